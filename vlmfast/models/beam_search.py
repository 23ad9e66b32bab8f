"""Beam search that keeps few continuations of each beam, as AllenNLP and VirTex have it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

REPEATED = -10_000.0
"""The log-probability of a token that was the last one already."""


def beam_search(
    step: Callable[[Tensor, Tensor], Tensor],
    batch: int,
    *,
    beams: int,
    per_node: int,
    max_steps: int,
    end: int,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row, and their log-probability.

    The first step takes the `beams` likeliest tokens. Each later one takes the `per_node` likeliest continuations of
    every beam, and of all these the `beams` likeliest. A token directly after itself gets REPEATED. A beam that has
    ended goes on with `end` at no cost. Sums of log-probabilities are compared as they are, whatever the length.

    Args:
        step: (tokens (n, t), rows (n,)) to the logits (n, V) of what follows; rows: to which of the batch each belongs.
        batch: B.
        max_steps: tokens at most.
        end: the token that ends a beam.
        device: of tokens and rows.
    Returns:
        tokens (B, T) int64, `end` once it has ended and behind that; log-probabilities (B,) float32.
    Raises:
        ValueError: a number is less than 1, or beams or per_node more than V.
    """
    for name, value in (("num_beams", beams), ("per_node", per_node), ("max_new_tokens", max_steps)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    rows = torch.arange(batch, device=device)
    first = step(torch.zeros(batch, 0, dtype=torch.long, device=device), rows).float().log_softmax(dim=1)
    vocabulary = first.shape[1]
    if max(beams, per_node) > vocabulary:
        raise ValueError(f"num_beams: expected at most the {vocabulary} tokens, got {max(beams, per_node)}")
    scores, tokens = first.topk(beams)
    tokens = tokens[..., None]
    ended = F.one_hot(torch.tensor(end, device=first.device), vocabulary).log()  # 0 at the end token, -inf elsewhere
    for _ in range(max_steps - 1):
        last = tokens[..., -1].flatten()
        if bool((last == end).all()):
            break
        logits = step(tokens.flatten(0, 1), rows.repeat_interleave(beams))
        following = logits.float().log_softmax(dim=1).scatter(1, last[:, None], REPEATED)
        following = torch.where((last == end)[:, None], ended, following)
        gained, chosen = following.topk(per_node)
        sums = (scores[..., None] + gained.view(batch, beams, per_node)).flatten(1)
        scores, best = sums.topk(beams)
        before = tokens.gather(1, (best // per_node)[..., None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([before, chosen.view(batch, -1).gather(1, best)[..., None]], dim=2)
    return tokens[:, 0], scores[:, 0]
