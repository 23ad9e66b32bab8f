"""Texts of models that predict masked words: one or two segments, masked; and a question with a place to read from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmfast.data import Collator, TokenMask

Text = str | tuple[str, str]


class Texts:
    """Texts to token ids, for models of the BERT family.

    Args:
        tokenizer: of transformers, with a padding token.
        max_length: tokens of a text at most, special tokens included; of two segments the longer one is cut first.
    Raises:
        ValueError: the tokenizer has no padding token, or max_length leaves no room for text.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        Collator(tokenizer, max_length=max_length)  # checks both
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __call__(self, texts: Sequence[Text]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `token_type_ids` int64 (B, L), padded on the right; 1 in the last is the
        second segment."""
        return self._padded([self._row(text, self.max_length) for text in texts])

    def masked(
        self, texts: Sequence[Text], mask: TokenMask, generators: Sequence[np.random.Generator]
    ) -> dict[str, Tensor]:
        """As a call, with words masked, and `labels` int64 (B, L): the ids where they are predicted, else -100."""
        batch = self(texts)
        pairs = [mask(ids, generator) for ids, generator in zip(batch["input_ids"].numpy(), generators, strict=True)]
        ids, labels = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
        return {**batch, "input_ids": ids, "labels": labels}

    def questions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """As a call, with the mask token behind each text, before the token that ends it, and `read_at` int64 (B,), the
        mask's place."""
        rows, places = [], []
        ends = self.tokenizer.num_special_tokens_to_add() > 0
        for text in texts:
            ids, _ = self._row(text, self.max_length - 1)
            place = len(ids) - (1 if ends and ids[-1] in self.tokenizer.all_special_ids else 0)
            ids = [*ids[:place], self.tokenizer.mask_token_id, *ids[place:]]
            rows.append((ids, [0] * len(ids)))
            places.append(place)
        return {**self._padded(rows), "read_at": torch.tensor(places)}

    def _row(self, text: Text, max_length: int) -> tuple[list[int], list[int]]:
        """The ids of a text and their segments; the second one goes from its first word to the end."""
        first, second = text if isinstance(text, tuple) else (text, None)
        row = self.tokenizer(first, second, truncation=True, max_length=max_length)
        ids = row["input_ids"]
        # Not the tokenizer's own token_type_ids, which are 0 throughout where it is not a BERT's.
        segments = [] if second is None else row.sequence_ids(0)
        start = segments.index(1) if 1 in segments else len(ids)
        return ids, [int(place >= start) for place in range(len(ids))]

    def _padded(self, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        def pad(values: Sequence[list[int]], fill: int) -> Tensor:
            tensors = [torch.tensor(value) for value in values]
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)

        ids = [row for row, _ in rows]
        return {
            "input_ids": pad(ids, self.tokenizer.pad_token_id),
            "attention_mask": pad([[1] * len(row) for row in ids], 0),
            "token_type_ids": pad([types for _, types in rows], 0),
        }
