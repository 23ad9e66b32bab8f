"""Pairs of features, and the rule by which the losses over them are judged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from numerics import assert_as_exact_as_eager
from torch import Tensor
from torch.nn import functional as F

from vlmfast.ops import info_nce
from vlmfast.ops._dispatch import core
from vlmfast.ops.info_nce import reference as info_nce_reference

# A few roundings; the rounding of a dot product, times the scale, is a relative error of the exponential.
EPSILON = 2e-6
FLOAT32 = 2.0**-24  # what float32 loses of a dot product of features, in units of their lengths
# What int16 loses at most of a dot product, in units of the features' lengths, and of a row of the gradient tile.
FIXED_POINT = 2.0**-15


def rounding_of_dots(backend: str, dtype: torch.dtype) -> float:
    """Of a dot product relative to the features' lengths: float32's, or that of the fixed point of some processors."""
    info = core.build_info() if core is not None and backend == "cpu" else {"int16_products": False}
    if info["int16_products"] and (dtype == torch.float16 or (dtype == torch.bfloat16 and not info["bf16_products"])):
        return FIXED_POINT
    return FLOAT32


def unit(rows: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64), dim=1)


def pairs(rows: int, dim: int, noise: float | None = None) -> tuple[Tensor, Tensor]:
    """Unrelated unit-norm features, or texts that are their images plus noise."""
    image, text = unit(rows, dim), unit(rows, dim)
    return image, text if noise is None else F.normalize(image + noise * text, dim=1)


def check(
    fused: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    image: Tensor,
    text: Tensor,
    *scalars: float,
    dtype: torch.dtype = torch.float32,
    terms: int = 1,
    dots: float = FLOAT32,
) -> None:
    """Loss and gradients of fused(image, text, *scalars), the scale first among them, by the twice-eager rule.

    `terms`: how many probabilities of order 1 go into one row's loss; `dots`: the relative rounding of dot products.
    """
    # Where all positives are nearly certain the exact values can be 1e-30; a float32 probability is off by up to 2^-24.
    rounding = terms * 2.0**-22
    longest = max(image.norm(dim=1).max().item(), text.norm(dim=1).max().item())
    gradient = rounding * scalars[0] / len(image) * longest
    assert_as_exact_as_eager(
        fused,
        lambda x, y, *s: reference(x, y, *(value.to(x.dtype) for value in s)),
        (image.to(dtype), text.to(dtype), *map(torch.tensor, scalars)),
        epsilon=max(EPSILON, dots, scalars[0] * dots),
        floors=(rounding, gradient, gradient, *[rounding] * len(scalars)),
        names=("loss", "image gradient", "text gradient", "scale gradient", "bias gradient")[: 3 + len(scalars)],
    )


def check_info_nce(
    image: Tensor,
    text: Tensor,
    scale: float,
    dtype: torch.dtype = torch.float32,
    *,
    recompute: bool | None = None,
    dots: float = FLOAT32,
    **options: object,
) -> None:
    check(
        lambda x, y, s: info_nce(x, y, s, recompute=recompute, **options),
        lambda x, y, s: info_nce_reference(x, y, s, **options),
        image, text, scale, dtype=dtype, dots=dots,
    )  # fmt: skip
