"""Samples to batches of a language model that reads texts alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfast.data.text import usable

IGNORED = -100


class TextCollator:
    """A list of samples to one batch; skipped samples (None) are left out.

    With an end token: `input_ids` (B, L) of begin, caption and end, padded with 0 on the right, `attention_mask`, and
    `labels`, -100 for begin and padding. A caption of more than max_length - 2 tokens is cut, and has no end.

    Without: prompts behind the begin token, padded on the left and not cut, `attention_mask`, and `pixel_values`
    (B, H, W, 3) where the samples have images.
    """

    def __init__(self, tokenizer: Any, start: int, end: int | None = None, max_length: int = 0) -> None:
        if end is not None and max_length < 3:
            raise ValueError(f"max_length: expected at least 3, got {max_length}")
        self.tokenizer, self.start, self.end, self.max_length = tokenizer, start, end, max_length

    def __call__(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        kept = usable(samples)
        rows = [self._row(sample.caption) for sample in kept]
        length = max(map(len, rows))
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for k, row in enumerate(rows):
            place = slice(length - len(row), length) if self.end is None else slice(0, len(row))
            ids[k, place], mask[k, place] = torch.tensor(row), 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.end is not None:
            labels = ids.masked_fill(mask == 0, IGNORED)
            labels[:, 0] = IGNORED
            return {**batch, "labels": labels}
        images = [sample.image for sample in kept if sample.image is not None]
        return {**batch, "pixel_values": torch.stack(images)} if images else batch

    def _row(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        if self.end is None:
            return [self.start, *ids]
        row = [self.start, *ids]
        return [*row, self.end] if len(row) < self.max_length else row[: self.max_length]
