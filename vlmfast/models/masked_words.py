"""The head that predicts masked words, without logits of words that are not predicted; and learning rates by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.models.gathered import mean_over_ranks
from vlmfast.ops import linear_cross_entropy


def masked_word_loss(head: Any, states: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy () float32 over the words that are predicted, of all processes.

    Its mean over processes is that of one process with the whole batch, and so are gradients after DDP's mean.

    Args:
        head: a BridgeTowerMLMHead of transformers: transform, decoder, bias.
        states (B, L, D): what it reads.
        labels (B, L): int64, -100 where nothing is predicted.
    """
    counted = labels != -100
    count = mean_over_ranks(counted.sum().float())
    hidden = head.transform(states[counted])
    total = linear_cross_entropy(hidden, head.decoder.weight, labels[counted], bias=head.bias, reduction="sum")
    return total / torch.where(count == 0, 1, count)


@torch.no_grad()
def grow_bias(head: Any, size: int) -> None:
    """Makes the bias of such a head as long as the vocabulary; transformers resizes the decoder's weight alone."""
    head.bias = nn.Parameter(F.pad(head.bias, (0, size - len(head.bias))))


def groups_of_two_rates(
    named: Iterable[tuple[str, nn.Parameter]],
    fast: Callable[[str], bool],
    *,
    lr: float,
    factor: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """`parameter_groups` in which some names learn at `factor` times the rate.

    Gains, biases and scalars, which have fewer than two dimensions, do not decay.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            groups.setdefault((fast(name), parameter.dim() >= 2), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * (factor if quick else 1), "weight_decay": weight_decay if decays else 0.0}
        for (quick, decays), parameters in groups.items()
    ]
