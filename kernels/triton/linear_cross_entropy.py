"""Triton kernels of linear_cross_entropy and their launchers; the contract is in vlmfast/ops/linear_cross_entropy.py.

Hidden states are of any size, so that operands are multiplied in their own dtype, with float32 sums. Forward: each tile
of logits leaves a row's maximum and sum, which are put together in a fixed order. Backward: the gradient of the logits
for some words at a time, written by one kernel and multiplied by the library. Logits are always computed again.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vlmfast.kernels import products
from vlmfast.kernels.products import ceil_div, loaded, rounded, tensor_or

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
CHUNK_ELEMENTS = 1 << 26
"""Entries of the gradient of the logits that are in memory at a time: 134 MB in 16 bits."""

PEAK = 2.0**14
"""What the largest gradient of a logit is stored as, away from float16's subnormals."""


class Config(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


@functools.cache
def config_for(capability: int, wide: bool) -> Config:
    """A fixed choice, such that no kernel spills registers (tests/kernels/resources.json); not tuned. wide: float32."""
    return Config(64, 32, 32, 4, 2) if wide else Config(128, 128, 32, 8, 3)


@triton.jit
def logits_tile(
    x, weight, bias, rows, cols, n, words, dim,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) logits of these rows of x (n, dim) and weight (words, dim); only bias beyond them."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    row_at, col_at = rows[:, None].to(tl.int64) * dim, cols[:, None].to(tl.int64) * dim
    for k in range(0, dim, BLOCK_K):
        entries = k + tl.arange(0, BLOCK_K)[None, :]
        a = tl.load(x + row_at + entries, mask=(rows < n)[:, None] & (entries < dim), other=0.0)
        b = tl.load(weight + col_at + entries, mask=(cols < words)[:, None] & (entries < dim), other=0.0)
        total = tl.dot(loaded(a), loaded(b).T, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + cols, mask=cols < words, other=0.0)[None, :]
    return total


@triton.jit
def sums_kernel(
    x, weight, bias, labels, tops, sums, own, n, words, dim,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile's maxima, rounded, and sums, of all words but the labels, into (tiles, n); labels' logits into own."""
    col = tl.program_id(1) * BLOCK_N
    rows, cols = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    z = logits_tile(x, weight, bias, rows, cols, n, words, dim, BLOCK_M, BLOCK_N, BLOCK_K, BIAS, PRECISION)
    label = tl.load(labels + rows, mask=rows < n, other=-1)
    match = label[:, None] == cols[None, :]
    here = (label >= col) & (label < col + BLOCK_N)
    tl.store(own + rows, tl.sum(tl.where(match, z, 0.0), 1), mask=here)
    logits = tl.where(match | (cols >= words)[None, :], float("-inf"), z * LOG2E)
    top = tl.floor(tl.max(logits, 1) + 0.5)
    base = tl.where(top == float("-inf"), 0.0, top)
    at = tl.program_id(1).to(tl.int64) * n + rows
    tl.store(tops + at, top, mask=rows < n)
    tl.store(sums + at, tl.sum(tl.exp2(logits - base[:, None]), 1), mask=rows < n)


@triton.jit
def gradient_kernel(
    x, weight, bias, labels, side, out, n, words, dim, first_word, chunk_words,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of G into out (n, chunk_words), by side (4, n): shift, factor, target, offset."""
    local = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, cols = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), first_word + local
    z = logits_tile(x, weight, bias, rows, cols, n, words, dim, BLOCK_M, BLOCK_N, BLOCK_K, BIAS, PRECISION)
    shift = tl.load(side + rows, mask=rows < n, other=0.0)
    factor = tl.load(side + n + rows, mask=rows < n, other=0.0)
    target = tl.load(side + 2 * n + rows, mask=rows < n, other=0.0)
    offset = tl.load(side + 3 * n + rows, mask=rows < n, other=0.0)
    label = tl.load(labels + rows, mask=rows < n, other=-1)
    g = tl.exp2(z * LOG2E - shift[:, None]) * factor[:, None] - offset[:, None]
    g = tl.where(label[:, None] == cols[None, :], target[:, None], g)
    inside = (rows < n)[:, None] & (local < chunk_words)[None, :]
    stored: tl.constexpr = out.dtype.element_ty
    tl.store(
        out + rows[:, None].to(tl.int64) * chunk_words + local[None, :], rounded(g, stored).to(stored), mask=inside
    )


def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """stats (3, n)."""
    x, w, options = _prepared(hidden, weight, bias)
    n, words, dim = x.shape[0], w.shape[0], x.shape[1]
    tiles = ceil_div(words, options["BLOCK_N"])
    tops, sums = (x.new_empty((tiles, n), dtype=torch.float32) for _ in range(2))
    own = x.new_empty(n, dtype=torch.float32)
    with torch.cuda.device_of(x):
        sums_kernel[(ceil_div(n, options["BLOCK_M"]), tiles)](
            x, w, tensor_or(bias, own), labels.contiguous(), tops, sums, own, n, words, dim, **options
        )
    top = tops.amax(0)
    shift = torch.where(top == -math.inf, 0, top)
    total = (sums * torch.where(tops == -math.inf, 0, torch.exp2(tops - shift))).sum(0, dtype=torch.float64)
    return torch.stack([shift, total.float(), own])


def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    kept: Tensor,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; (0,) where not wanted."""
    x, w, options = _prepared(hidden, weight, bias)
    n, words, dim = x.shape[0], w.shape[0], x.shape[1]
    # Entries of G are at most |target| + V * offset; they are stored relative to that, as a power of two.
    peak = torch.exp2(torch.floor(torch.log2((rows[2].abs() + words * rows[3].abs()).max().clamp(min=2.0**-100))))
    unit = peak / PEAK
    side = torch.cat([rows[:1], rows[1:] / unit]).contiguous()
    d_hidden = x.new_zeros((n, dim) if hidden_grad else 0, dtype=torch.float32)
    d_weight = torch.empty_like(w) if weight_grad else w.new_empty(0)
    d_bias = x.new_empty(words if bias_grad else 0, dtype=torch.float32)
    step = max(options["BLOCK_N"], CHUNK_ELEMENTS // n // options["BLOCK_N"] * options["BLOCK_N"])
    with torch.cuda.device_of(x):
        for first in range(0, words, step):
            part = slice(first, min(first + step, words))
            width = part.stop - first
            g = x.new_empty((n, width))
            gradient_kernel[(ceil_div(n, options["BLOCK_M"]), ceil_div(width, options["BLOCK_N"]))](
                x, w, tensor_or(bias, side), labels.contiguous(), side, g, n, words, dim, first, width, **options
            )
            if hidden_grad:
                _add_product(d_hidden, g, w[part])
            if weight_grad:
                d_weight[part] = _add_product(x.new_zeros((width, dim), dtype=torch.float32), g.T, x).mul_(unit)
            if bias_grad:
                d_bias[part] = g.sum(0, dtype=torch.float32) * unit
    return d_hidden.mul_(unit).to(hidden.dtype), d_weight, d_bias


def _prepared(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Any]]:
    wide = hidden.dtype == torch.float32
    options = config_for(products.capability(hidden), wide).options
    precision = products.precision(hidden) if wide else "ieee"
    return hidden.contiguous(), weight.contiguous(), {**options, "BIAS": bias is not None, "PRECISION": precision}


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b with float32 sums: of 16-bit operands the library's, where a GPU has it."""
    if a.dtype != torch.float32 and a.device.type == "cuda" and not torch.version.hip:
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.addmm_(a.float(), b.float())
