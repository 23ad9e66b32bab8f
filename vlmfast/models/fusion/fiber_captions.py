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


def greedy(step: Callable[[Tensor, Tensor], Tensor], rows: Tensor, count: int, *, end: int, pad: int) -> Tensor:
    """Up to `count` tokens (B, N), each the likeliest one; `pad` after `end`.

    Args:
        step: (tokens (B, t), rows (B,)) to the logits (B, V) of what follows.
        rows (B,): of the batch, in order.
    """
    tokens = torch.zeros(len(rows), 0, dtype=torch.long, device=rows.device)
    going = torch.ones_like(rows, dtype=torch.bool)
    while tokens.shape[1] < count and bool(going.any()):
        token = torch.where(going, step(tokens, rows).argmax(-1), pad)
        tokens = torch.cat([tokens, token[:, None]], 1)
        going = going & (token != end)
    return tokens


def continued(input_ids: Tensor, lengths: Tensor, tokens: Tensor, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with what follows them, their mask, and the place (n,) of each row's last token.

    Args:
        input_ids (n, L): prompts, padded on the right; of `lengths` (n,).
        tokens (n, t): that follow.
    """
    count = tokens.shape[1]
    ids = F.pad(input_ids, (0, count), value=pad)
    ids = ids.scatter(1, lengths[:, None] + torch.arange(count, device=ids.device), tokens)
    longest = int(lengths.max()) + count
    mask = torch.arange(longest, device=ids.device) < (lengths + count)[:, None]
    return ids[:, :longest], mask.long(), lengths + count - 1
