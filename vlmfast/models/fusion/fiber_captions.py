"""FIBER as a writer of captions: prompts in batches, and greedy decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.data import Collator


class PromptCollator:
    """A collator of prompts: texts without the token that ends them, of which at least the first stays."""

    def __init__(self, collator: Collator, tokenizer: Any) -> None:
        self.collator = collator
        self.end = tokenizer.eos_token_id

    def __call__(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        batch = self.collator(samples)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        rows, last = torch.arange(len(ids)), mask.sum(1) - 1
        ends = (ids[rows, last] == self.end) & (last > 0)
        mask[rows[ends], last[ends]] = 0
        longest = int(mask.sum(1).max())
        return {**batch, "input_ids": ids[:, :longest], "attention_mask": mask[:, :longest]}


def greedy(
    next_token: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    count: int,
    *,
    end: int,
    pad: int,
) -> Tensor:
    """Up to `count` tokens (B, N) after prompts of any lengths, each the most likely one; pads after the end.

    Args:
        next_token: of texts (B, L) and their mask, the token (B,) after the place (B,) of each row.
        input_ids, attention_mask (B, L): prompts, padded on the right, of at least one token.
        end: the token after which a text is over.
        pad: what stands behind it.
    """
    lengths, rows = attention_mask.sum(1), torch.arange(len(input_ids), device=input_ids.device)
    ids = F.pad(input_ids, (0, count), value=pad)
    going = torch.ones_like(lengths, dtype=torch.bool)
    new: list[Tensor] = []
    while len(new) < count and bool(going.any()):
        longest = int(lengths.max())
        seen = (torch.arange(longest, device=ids.device) < lengths[:, None]).long()
        token = torch.where(going, next_token(ids[:, :longest], seen, rows, lengths - 1), pad)
        new.append(token)
        going = going & (token != end)
        ids[rows[going], lengths[going]] = token[going]
        lengths = lengths + going.long()
    return torch.stack(new, 1)
