"""Samples to batches of images with captions; rows of tokens, lines of a text file, checks of configs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmfast.data.dataset import Sample
from vlmfast.data.text import usable
from vlmfast.nn.prefix import IGNORED

SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids without those that a tokenizer adds of itself."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False) if text else []
    return ids


def pad_rows(rows: Sequence[Sequence[int]], filler: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of any lengths as int64 (B, L), pads on the right, and their mask int64 (B, L), 0 for pads."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), filler, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[k, : len(row)] = 1
    return ids, mask


def image_of(sample: Sample) -> Tensor | None:
    """The one image of a sample, or None.

    Raises:
        ValueError: it has several.
    """
    if len(sample.images) > 1:
        raise ValueError(f"sample {sample.key!r}: expected one image, got {len(sample.images)}")
    return sample.image


def read_lines(path: str) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no UTF-8, or has no line.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text file in UTF-8, got {error}") from error
    found = [line for line in lines if line]
    if not found:
        raise ValueError(f"{path}: expected a line of text at least, got none")
    return found


def check_positive(config: Any, *names: str) -> None:
    """ValueError where one of a config's fields is no positive integer."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


class CaptionCollator:
    """A list of samples to one batch, as VirTex reads it; skipped samples (None) are left out.

    Args:
        tokenizer: a transformers tokenizer.
        config: the model's, with the begin and end tokens.
        max_length: tokens of a caption at most, with those around it; what is longer is cut, and has no end. None makes
            prompts: the begin token and the caption, neither cut nor predicted.
        flip: probability that an image is flipped, and left and right swapped in its caption.
    """

    def __init__(self, tokenizer: Any, config: Any, max_length: int | None = None, flip: float = 0.0) -> None:
        self.tokenizer = tokenizer
        self.begin, self.end = config.bos_token_id, config.eos_token_id
        self.max_length = max_length
        self.flip = flip

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        kept = usable(samples)
        if self.flip:
            kept = [flipped(s) if np.random.default_rng(s.seed).random() < self.flip else s for s in kept]
        images = [image for image in map(image_of, kept) if image is not None]
        if len(images) < len(kept):
            raise ValueError(f"samples: expected an image of each, got {len(images)} of {len(kept)}")
        rows = [self._row(sample.caption) for sample in kept]
        ids, mask = pad_rows(rows)
        batch = {"pixel_values": torch.stack(images), "input_ids": ids, "attention_mask": mask}
        if self.max_length is not None:
            batch["labels"] = ids.masked_fill(mask == 0, IGNORED)
            batch["labels"][:, 0] = IGNORED  # nothing stands before it
        return batch

    def _row(self, caption: str) -> list[int]:
        ids = [self.begin, *encode(self.tokenizer, caption)]
        return ids if self.max_length is None else [*ids, self.end][: self.max_length]


def flipped(sample: Sample) -> Sample:
    """The sample with its image (H, W, 3) flipped, and the words left and right swapped in its caption."""
    image = image_of(sample)
    return replace(sample, image=None if image is None else image.flip(1), caption=swap_sides(sample.caption))


def swap_sides(caption: str) -> str:
    """left for right and right for left, where they are words of their own; capitals stay."""

    def other(found: re.Match[str]) -> str:
        word = found.group()
        side = "right" if word.lower() == "left" else "left"
        return side.upper() if word.isupper() else side.title() if word[0].isupper() else side

    return SIDES.sub(other, caption)
