"""Hidden states, vocabularies and labels, and the rule by which losses over them are judged."""

from __future__ import annotations

import torch
from contrastive import EPSILON, FLOAT32
from numerics import assert_as_exact_as_eager
from torch import Tensor

from vlmfast.ops import linear_cross_entropy
from vlmfast.ops.linear_cross_entropy import reference

NAMES = ("loss", "hidden gradient", "weight gradient", "bias gradient")


def words(rows: int, dim: int, vocabulary: int, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (rows, dim), weight (vocabulary, dim) and labels (rows,); the logits' spread is `size`."""
    hidden = torch.randn(rows, dim, dtype=torch.float64)
    weight = size * dim**-0.5 * torch.randn(vocabulary, dim, dtype=torch.float64)
    return hidden, weight, torch.randint(vocabulary, (rows,))


def check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    recompute: bool | None = None,
    dots: float = FLOAT32,
    **options: object,
) -> None:
    """Loss and gradients of linear_cross_entropy by the twice-eager rule; `dots`: the rounding of dot products."""
    inputs = [hidden.to(dtype), weight.to(dtype)] + ([] if bias is None else [bias.float()])
    lengths = hidden.norm(dim=1).max().item(), weight.norm(dim=1).max().item()
    # Of a probability near 1 float32 loses 2^-24, and a dot product's rounding is a relative error of the exponential.
    rounding = 2.0**-22 * len(labels) ** (options.get("reduction") == "sum")
    assert_as_exact_as_eager(
        lambda x, w, *b: linear_cross_entropy(x, w, labels, bias=b[0] if b else None, recompute=recompute, **options),
        lambda x, w, *b: reference(x, w, labels, bias=b[0].to(x.dtype) if b else None, **options),
        inputs,
        epsilon=max(EPSILON, dots, lengths[0] * lengths[1] * dots),
        floors=(rounding, rounding * lengths[1] / len(labels), rounding * lengths[0] / len(labels), rounding)[
            : 1 + len(inputs)
        ],
        names=NAMES[: 1 + len(inputs)],
    )
