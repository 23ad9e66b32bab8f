"""Features of a whole dataset, from any model with `get_image_features` and `get_text_features`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vlmfast.data import Collator


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and inference mode; on leaving, with or without an error, every submodule gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def place(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Move the model to the device; None leaves it where it is. Returns the device it is on."""
    if device is not None:
        model.to(device)
        return torch.device(device)
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def encode_dataset(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    max_length: int,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> Features:
    """Encode both sides of every pair, in dataset order.

    Args:
        model: a Module whose `get_image_features(pixel_values)` and `get_text_features(input_ids, attention_mask)` give
            (B, D).
        dataset: as `vlmfast.data.ImageTextDataset`: `dataset[index]` is a sample or None, `skipped()` counts the None.
        tokenizer: a transformers tokenizer; captions are truncated to max_length tokens.
        batch_size: pairs per forward pass.
        num_workers: processes that read and decode; 0 reads in this one.
        device: where to compute; the model is moved there. None is where the model is.
        autocast: torch.bfloat16 or torch.float16 for mixed precision; None computes in the model's dtype.
        progress: a progress bar on stderr, if that is a terminal.
    Raises:
        ValueError: no sample of the dataset could be read, or a feature is not finite.
    """
    device = place(model, device)
    loader: DataLoader[Any] = DataLoader(
        _Indexed(dataset),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_Collate(Collator(tokenizer, max_length=max_length)),
        pin_memory=device.type == "cuda",
    )
    images, texts, kept = [], [], []
    with evaluating(model), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for batch, samples in tqdm(loader, desc="encode", unit="batch", disable=None if progress else True):
            if batch is None:
                continue
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            images.append(_unit(model.get_image_features(batch["pixel_values"])))
            texts.append(_unit(model.get_text_features(batch["input_ids"], batch["attention_mask"])))
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
        indices=[sample.index for sample in kept],
        skipped=skipped,
    )


def encode_texts(
    model: Any,
    texts: Sequence[str],
    tokenizer: Any,
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    max_length: int,
    autocast: torch.dtype | None = None,
) -> torch.Tensor:
    """Unit-norm float32 features (len(texts), D) of the texts, on the CPU. Arguments as in `encode_dataset`.

    Raises:
        ValueError: there are no texts, or a feature is not finite.
    """
    if not texts:
        raise ValueError("texts: expected at least one, got none")
    device = place(model, device)
    features = []
    with evaluating(model), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for start in range(0, len(texts), batch_size):
            tokens = tokenizer(
                list(texts[start : start + batch_size]),
                padding="longest",
                truncation=True,
                max_length=max_length,
                return_attention_mask=True,
                return_tensors="pt",
            )
            input_ids, attention_mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
            features.append(_unit(model.get_text_features(input_ids, attention_mask)))
    return _finite("text", torch.cat(features))


@dataclass(frozen=True)
class _Kept:
    index: int
    key: str
    caption: str
    category: str | None


class _Indexed(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]


class _Collate:
    """What the collator drops is dropped from the captions too, in the same place."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, indexed: list[tuple[int, Any]]) -> tuple[dict[str, torch.Tensor] | None, list[_Kept]]:
        read = [(index, sample) for index, sample in indexed if sample is not None]
        batch = self.collator([sample for _, sample in read]) if read else None
        return batch, [_Kept(index, sample.key, sample.caption, sample.category) for index, sample in read]


def _unit(features: torch.Tensor) -> torch.Tensor:
    # In float32, for a unit vector rounded to 16 bits is no longer one.
    return F.normalize(features.float(), dim=-1).cpu()


def _finite(side: str, features: torch.Tensor) -> torch.Tensor:
    broken = ~features.isfinite().all(dim=1)
    if broken.any():
        raise ValueError(f"model: expected finite {side} features, got NaN or infinity in {int(broken.sum())} rows")
    return features
