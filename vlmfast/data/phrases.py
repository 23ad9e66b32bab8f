"""Which tokens of a text a phrase of it spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def phrase_mask(
    tokenizer: Any, captions: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]], ids: Tensor
) -> Tensor:
    """Which tokens of its caption each phrase spans.

    Args:
        tokenizer: a fast one of transformers.
        captions: B texts.
        spans: of each text, of the characters of its phrases.
        ids (B, L): the tokens of the texts, each from column 0.
    Returns:
        bool (B, P, L), P the most phrases of a text. A phrase that was cut off spans nothing.
    Raises:
        ValueError: a row does not begin with the caption's tokens.
    """
    mask = torch.zeros(len(captions), max(map(len, spans), default=0), ids.shape[1], dtype=torch.bool)
    for row, (caption, own) in enumerate(zip(captions, spans, strict=True)):
        tokens = tokenizer(caption, truncation=True, max_length=ids.shape[1], return_offsets_mapping=True)
        length = len(tokens["input_ids"])
        if ids[row, :length].tolist() != tokens["input_ids"]:
            raise ValueError(f"input_ids: expected the tokens of {caption!r} from column 0, got {ids[row].tolist()}")
        for place, (start, end) in enumerate(own):
            for column, (first, last) in enumerate(tokens["offset_mapping"]):
                mask[row, place, column] = first < end and last > start and last > first
    return mask
