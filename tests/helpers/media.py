"""Inputs of media_attention, and the rule by which it is judged."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from numerics import assert_as_exact_as_eager
from torch import Tensor

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""One rounding of a 16-bit result; a float32 probability e^(s - lse) is off by a rounding of lse, some units large."""


def heads(batch: int, number: int, length: int, dim: int) -> Tensor:
    """(batch, number, length, dim) as a projection leaves it: the heads side by side in memory."""
    return torch.randn(batch, length, number, dim, dtype=torch.float64).transpose(1, 2)


def qkv(
    batch: int, number: int, kv_number: int, queries: int, keys: int, dim: int, v_dim: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        heads(batch, number, queries, dim),
        heads(batch, kv_number, keys, dim),
        heads(batch, kv_number, keys, v_dim or dim),
    )


def last_media(batch: int, queries: int, media: int) -> dict[str, Tensor]:
    """Each row sees the last of the media that come at random places, the rows before the first nothing."""
    places = torch.rand(batch, queries).argsort(1)[:, :media].sort(1).values
    last = (places[:, None] <= torch.arange(queries)[:, None]).sum(2)
    return {"media_lo": last, "media_hi": last}


def any_media(batch: int, queries: int, media: int) -> dict[str, Tensor]:
    """Any intervals: empty ones, of several media, in no order."""
    lo, hi = (torch.randint(-1, media + 1, (batch, queries)) for _ in range(2))
    return {"media_lo": lo, "media_hi": hi}


def with_weights(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    """A scalar of (q, k, v, w) whose gradient at w is function(q, k, v), and that at q, k, v is its backward of w."""
    return lambda q, k, v, w: (function(q, k, v, **options) * w).sum(dtype=torch.promote_types(w.dtype, torch.float32))


def check(
    fused: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> None:
    """Output and gradients of q, k and v by the twice-eager rule."""
    q, k, v = (t.to(dtype) for t in inputs)
    weights = torch.randn(*q.shape[:3], v.shape[3]).to(dtype)
    # P_ij (g_i v_j - delta_i) cancels where a row sees one key: its rounding is that of the terms.
    scale = abs(options.get("scale") or q.shape[3] ** -0.5)
    cancelled = 2.0**-21 * v.norm(dim=-1).max().item() * weights.norm(dim=-1).max().item() * scale
    shared = q.shape[1] // k.shape[1] * math.sqrt(q.shape[2])
    assert_as_exact_as_eager(
        with_weights(fused, **options),
        with_weights(reference, **options),
        (q, k, v, weights),
        epsilon=ROUNDING[dtype],
        # The scalar is judged by its gradients.
        floors=(
            math.inf,
            cancelled * k.norm(dim=-1).max().item(),
            cancelled * q.norm(dim=-1).max().item() * shared,
            0.0,
            0.0,
        ),
        names=("sum", "q gradient", "k gradient", "v gradient", "out"),
    )
