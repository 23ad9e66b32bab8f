"""What image-to-text models share of collators and configs: rows of tokens, lines of a text file, checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfast.data.dataset import Sample


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
