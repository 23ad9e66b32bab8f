"""Samples to batches of a decoder that reads an image by cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfast.data.dataset import Sample
from vlmfast.data.records import captions_of
from vlmfast.data.text import usable
from vlmfast.models.region_batches import RegionCollator
from vlmfast.nn.prefix import IGNORED

KINDS = ("train", "prompt", "references")


class CaptionCollator:
    """A list of samples to one batch; skipped samples (None) are left out.

    - pixel_values (B, H, W, 3); or `image_features` (B, R, W): what a frozen tower made of images before, or features
      of regions, with zeros and `image_mask` (B, R) 0 behind an image's last one;
    - input_ids (B, L): begin, the caption's tokens and, of captions that were not cut, stop; 0 for pads;
    - attention_mask (B, L): 0 for pads;
    - labels (B, L): the tokens behind begin, -100 elsewhere; of kind "train".
    - references: for each image its true captions; of kind "references".

    Args:
        tokenizer: a transformers tokenizer.
        begin, stop: tokens before a caption and behind it.
        kind: "train"; "prompt" has begin and the sample's caption, not cut, with pads on the left; "references" has
            begin alone.
        max_length: tokens of a row at most.
        max_regions: of an image, the first, which have the highest scores; None where an image tower is read.
    Raises:
        ValueError: in a call, every sample was skipped, or one has not what is read of images.
    """

    def __init__(
        self, tokenizer: Any, *, begin: int, stop: int, kind: str, max_length: int = 0, max_regions: int | None = None
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "train" and max_length < 2:
            raise ValueError(f"max_length: expected at least 2, begin and a token, got {max_length}")
        self.tokenizer = tokenizer
        self.begin = begin
        self.stop = stop
        self.kind = kind
        self.max_length = max_length
        self.regions = None if max_regions is None else RegionCollator(None, 1, max_regions)

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Any]:
        kept = usable(samples)
        batch: dict[str, Any] = self._images(kept)
        rows = [[self.begin]] * len(kept) if self.kind == "references" else [self._row(s.caption) for s in kept]
        length = max(len(row) for row in rows)
        batch["input_ids"] = torch.zeros(len(rows), length, dtype=torch.long)
        batch["attention_mask"] = torch.zeros(len(rows), length, dtype=torch.long)
        for k, row in enumerate(rows):
            place = slice(length - len(row), length) if self.kind == "prompt" else slice(0, len(row))
            batch["input_ids"][k, place] = torch.tensor(row, dtype=torch.long)
            batch["attention_mask"][k, place] = 1
        if self.kind == "train":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
            batch["labels"][:, 0] = IGNORED
        if self.kind == "references":
            batch["references"] = [captions_of(sample) for sample in kept]
        return batch

    def _row(self, caption: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(caption, add_special_tokens=False) if caption else []
        row = [self.begin, *ids]
        return row if self.kind == "prompt" else [*row, self.stop][: self.max_length]

    def _images(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        if self.regions is not None:
            found = self.regions(samples)
            return {"image_features": found["region_features"], "image_mask": found["region_mask"]}
        first = samples[0]
        if first.features is not None:
            if "image_features" not in first.features:
                raise ValueError(
                    f"features: expected none of sample {first.key!r}, or those of the image tower, got "
                    f"{list(first.features)}; --region-dim makes a model that reads regions"
                )
            return {"image_features": torch.stack([(sample.features or {})["image_features"] for sample in samples])}
        if first.image is None:
            raise ValueError(f"sample {first.key!r}: expected an image, or the image tower's features, got none")
        return {"pixel_values": torch.stack([sample.image for sample in samples if sample.image is not None])}
