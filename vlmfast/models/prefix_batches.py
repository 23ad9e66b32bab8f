"""Samples to batches of a language model that reads images among its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfast.data.dataset import IMAGE_PLACE, Sample
from vlmfast.data.text import usable
from vlmfast.nn.prefix import IGNORED, token_ids


class PrefixCollator:
    """A list of samples to one batch; skipped samples (None) are left out.

    A sample's images come where `<image>` stands in its caption, or else before it. The batch is:

    - pixel_values (N, H, W, 3): all images, in the order in which they are read; or `image_features` (B, ...), where
      samples have these features instead;
    - input_ids (B, L): tokens without those that a tokenizer adds of itself, IMAGE in the places of images, 0 for pads;
    - attention_mask (B, L): 0 for pads;
    - labels (B, L): the tokens of the caption, and the one that ends it. Not for prompts.

    Args:
        tokenizer: a transformers tokenizer.
        image_length: embeddings k of an image.
        positions: of the language model; None where there is no limit.
        max_length: tokens of a caption at most, with the one that ends it; what is longer is cut, and has no end.
        stop: the token that ends a caption; None makes prompts, which are not cut, with pads on the left.
    Raises:
        ValueError: in a call, a caption has another number of `<image>` than its sample has images, a prompt is longer
            than positions, or every sample of the batch was skipped.
    """

    def __init__(
        self, tokenizer: Any, *, image_length: int, positions: int | None, max_length: int = 0, stop: int | None = None
    ) -> None:
        if stop is not None and max_length < 1:
            raise ValueError(f"max_length: expected at least 1, got {max_length}")
        self.tokenizer = tokenizer
        self.image_length = image_length
        self.positions = positions
        self.max_length = max_length
        self.stop = stop

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        kept = usable(samples)
        batch: dict[str, Tensor] = {}
        if kept[0].features is not None:
            batch["image_features"] = torch.stack([(sample.features or {})["image_features"] for sample in kept])
        else:
            images = [image for sample in kept for image in _images(sample)]
            if images:
                batch["pixel_values"] = torch.stack(images)
        rows = [self._row(sample) for sample in kept]
        length = max(len(row) for row in rows)
        batch["input_ids"] = torch.zeros(len(rows), length, dtype=torch.long)
        batch["attention_mask"] = torch.zeros(len(rows), length, dtype=torch.long)
        for k, row in enumerate(rows):
            place = slice(length - len(row), length) if self.stop is None else slice(0, len(row))
            batch["input_ids"][k, place] = torch.tensor(row, dtype=torch.long)
            batch["attention_mask"][k, place] = 1
        if self.stop is not None:
            predicted = (batch["attention_mask"] == 1) & (batch["input_ids"] >= 0)
            predicted[:, 0] = False  # nothing stands before it
            batch["labels"] = batch["input_ids"].masked_fill(~predicted, IGNORED)
        return batch

    def _row(self, sample: Sample) -> list[int]:
        count = 1 if sample.features is not None else len(_images(sample))
        texts = sample.caption.split(IMAGE_PLACE)
        if len(texts) == 1:
            texts = [""] * count + texts
        if len(texts) - 1 != count:
            raise ValueError(
                f"caption of sample {sample.key!r}: expected {IMAGE_PLACE} {count} times, once for each image, or not "
                f"at all, got it {len(texts) - 1} times"
            )
        parts: list[list[int] | None] = [self._ids(texts[0])]
        for text in texts[1:]:
            parts += [None, self._ids(text)]
        if self.stop is not None:
            parts = self._ended(parts, self.stop)
        row = token_ids(parts, self.image_length)
        if self.positions is not None and len(row) > self.positions:
            raise ValueError(
                f"caption of sample {sample.key!r}: expected at most the {self.positions} positions of the language "
                f"model, got {len(row)} with {count} images"
            )
        return row

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        return ids

    def _ended(self, parts: list[list[int] | None], stop: int) -> list[list[int] | None]:
        """At most max_length tokens, with the token that ends them where nothing had to go."""
        last = parts[-1]
        assert last is not None
        if not last or last[-1] != stop:
            parts = [*parts[:-1], [*last, stop]]
        left, found = self.max_length, []
        for part in parts:
            found.append(None if part is None else part[:left])
            left -= 0 if part is None else len(part[:left])
        return found


def _images(sample: Sample) -> list[Tensor]:
    return sample.images or ([] if sample.image is None else [sample.image])
