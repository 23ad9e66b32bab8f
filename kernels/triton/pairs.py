"""Tiles of dot products on a GPU: what the kernels of info_nce and sigmoid_loss share.

Features are multiplied as float16 with float32 sums: unit-norm entries fit, and the rounding is an eighth of
bfloat16's. With `split`, float32 features are two float16 terms, hi + lo / 2048, and three products give float32's
accuracy.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from vlmfast.kernels.products import allows_tf32, capability

import triton
import triton.language as tl

LOW_SCALE = 2048.0
CHUNK = 4096
"""Rows and columns of the square of logits whose gradient is in memory at a time: 33 MB of float16, as an L2 cache."""

GRADIENT_SCALE = tl.constexpr(2.0**14)
"""Gradient tiles have entries of at most 1 and are stored times this, away from float16's subnormals."""


class Config(NamedTuple):
    """Tile sizes and launch options of the kernels that multiply tiles."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@functools.cache
def config_for(capability: int, split: bool, max_block_n: int = 128) -> Config:
    """A fixed choice by compute capability (major * 10 + minor); nothing is tuned at run time, so results repeat.

    Chosen such that no kernel spills registers (tests/kernels/resources.json); their speed was not measured yet.
    """
    narrow = split or capability == 100  # two accumulators; or an epilogue that reads its tile from tensor memory
    return Config(
        block_m=128,
        block_n=min(64 if narrow else 128, max_block_n),
        block_k=64 if capability in (90, 100) and not split else 32,
        num_warps=8,
        num_stages=2 if split and capability == 120 else 3,
    )


def config(tensor: Tensor, split: bool, max_block_n: int = 128) -> Config:
    return config_for(capability(tensor), split, max_block_n)


def wants_float32(features: Tensor) -> bool:
    """Whether products must keep float32's accuracy: float32 features, unless torch may use TF32 for them."""
    return features.dtype == torch.float32 and not allows_tf32()


class Operands(NamedTuple):
    """Features (rows, D) as float16: hi, and for split products the rounded rest times LOW_SCALE (else hi again)."""

    hi: Tensor
    lo: Tensor


def operands(features: Tensor, split: bool) -> Operands:
    features = features.contiguous()
    hi = features.to(torch.float16)
    lo = ((features.float() - hi.float()) * LOW_SCALE).to(torch.float16) if split else hi
    return Operands(hi, lo)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32: by the library's float16 product with float32 sums, or its float32 product."""
    if a.dtype == torch.float16:
        if a.device.type == "cuda":
            return torch.mm(a, b, out_dtype=torch.float32)
        a, b = a.float(), b.float()
    return a @ b


@triton.jit
def dot_tile(
    x_hi, x_lo, y_hi, y_lo, rows, cols, n, m, dim, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) float32 dot products of the given rows of x (n, dim) and of y (m, dim), 0 beyond them."""
    k = tl.arange(0, BLOCK_K)
    x_at = rows[:, None].to(tl.int64) * dim + k[None, :]
    y_at = cols[None, :].to(tl.int64) * dim + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    cross = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, dim, BLOCK_K):
        x_mask = (rows < n)[:, None] & (k < dim - start)[None, :]
        y_mask = (cols < m)[None, :] & (k < dim - start)[:, None]
        x = tl.load(x_hi + x_at + start, mask=x_mask, other=0.0)
        y = tl.load(y_hi + y_at + start, mask=y_mask, other=0.0)
        total = tl.dot(x, y, total)
        if SPLIT:
            cross = tl.dot(x, tl.load(y_lo + y_at + start, mask=y_mask, other=0.0), cross)
            cross = tl.dot(tl.load(x_lo + x_at + start, mask=x_mask, other=0.0), y, cross)
    if SPLIT:
        total += cross * (1.0 / 2048.0)
    return total


@triton.jit
def match_tile(rows, cols, n, m, row_codes, col_codes, label_offset, GROUPS: tl.constexpr):
    """Which entries are positives: column row + label_offset, or equal codes."""
    if GROUPS:
        row_code = tl.load(row_codes + rows, mask=rows < n, other=-2)
        col_code = tl.load(col_codes + cols, mask=cols < m, other=-3)
        return row_code[:, None] == col_code[None, :]
    return rows[:, None] + label_offset == cols[None, :]


def accumulate(
    chunk: Tensor,
    x: Tensor,
    y: Tensor,
    first_row: int,
    first_col: int,
    d_image: Tensor | None,
    d_text: Tensor | None,
) -> None:
    """d_image rows += chunk @ y columns, d_text columns += chunk.T @ x rows; None where not wanted."""
    rows = slice(first_row, first_row + chunk.shape[0])
    cols = slice(first_col, first_col + chunk.shape[1])
    if d_image is not None:
        d_image[rows] += product(chunk, y[cols])
    if d_text is not None:
        d_text[cols] += product(chunk.T, x[rows])
