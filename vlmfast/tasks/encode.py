"""Features of a whole dataset, from any model with `get_image_features` and `get_text_features`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from vlmfast.tasks.batches import batches, evaluating, place


@dataclass(frozen=True)
class Features:
    """Features of the N samples of a dataset that could be read, row i of everything being one pair.

    Attributes:
        image (N, D), text (N, D): unit-norm float32 on the CPU.
        captions, keys, categories: of the pair, as the dataset gives them; category None where there is none.
        indices: the sample's index in the dataset.
        skipped: reason -> number of samples left out.
    """

    image: torch.Tensor
    text: torch.Tensor
    captions: list[str]
    keys: list[str]
    categories: list[str | None]
    indices: list[int]
    skipped: dict[str, int]


def encode_dataset(
    model: Any,
    dataset: Any,
    collator: Any,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> Features:
    """Encode both sides of every pair, in dataset order.

    Args:
        model: a Module whose `get_image_features(pixel_values)` and `get_text_features(input_ids, attention_mask)` give
            (B, D).
        dataset: as `vlmfast.data.ImageTextDataset`: `dataset[index]` is a sample or None, `skipped()` counts the None.
        collator: as `vlmfast.data.Collator`, samples to `pixel_values`, `input_ids` and `attention_mask`.
        batch_size: pairs per forward pass.
        num_workers: processes that read and decode; 0 reads in this one.
        device: where to compute; the model is moved there. None is where the model is.
        autocast: torch.bfloat16 or torch.float16 for mixed precision; None computes in the model's dtype.
        progress: a progress bar on stderr, if that is a terminal.
    Raises:
        ValueError: no sample of the dataset could be read, or a feature is not finite.
    """
    device = place(model, device)
    images, texts, indices, kept = [], [], [], []
    with evaluating(model), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for batch, which, samples in batches(
            dataset,
            collator,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            progress=progress,
            name="encode",
        ):
            images.append(unit(model.get_image_features(batch["pixel_values"])))
            texts.append(unit(model.get_text_features(batch["input_ids"], batch["attention_mask"])))
            indices += which
            kept += samples
    skipped = dict(dataset.skipped())
    if not kept:
        raise ValueError(f"dataset: expected at least one readable pair, got {len(dataset)} samples, skipped {skipped}")
    return Features(
        # Concatenated outside inference mode, so that a probe can be trained on them.
        image=_finite("image", torch.cat(images)),
        text=_finite("text", torch.cat(texts)),
        captions=[sample.caption for sample in kept],
        keys=[sample.key for sample in kept],
        categories=[sample.category for sample in kept],
        indices=indices,
        skipped=skipped,
    )


def encode_texts(
    model: Any,
    texts: Sequence[str],
    collator: Any,
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
) -> torch.Tensor:
    """Unit-norm float32 features (len(texts), D) of the texts, on the CPU. Arguments as in `encode_dataset`.

    Args:
        collator: as `vlmfast.data.Collator`, whose method `tokens` makes `input_ids` and `attention_mask` of texts.
    Raises:
        ValueError: there are no texts, or a feature is not finite.
    """
    if not texts:
        raise ValueError("texts: expected at least one, got none")
    device = place(model, device)
    features = []
    with evaluating(model), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for start in range(0, len(texts), batch_size):
            tokens = collator.tokens(texts[start : start + batch_size])
            input_ids, attention_mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
            features.append(unit(model.get_text_features(input_ids, attention_mask)))
    return _finite("text", torch.cat(features))


def unit(features: torch.Tensor) -> torch.Tensor:
    """Unit-norm rows on the CPU."""
    # In float32, for a unit vector rounded to 16 bits is no longer one.
    return F.normalize(features.float(), dim=-1).cpu()


def _finite(side: str, features: torch.Tensor) -> torch.Tensor:
    broken = ~features.isfinite().all(dim=1)
    if broken.any():
        raise ValueError(f"model: expected finite {side} features, got NaN or infinity in {int(broken.sum())} rows")
    return features
