"""Tiles of dot products on a GPU: what the kernels of info_nce and sigmoid_loss share.

Features are multiplied as float16 with float32 sums: unit-norm entries fit, and the rounding is an eighth of
bfloat16's. With `split`, float32 features are two float16 terms, hi + lo / 2048, and three products give float32's
accuracy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from vlmfast.kernels.products import allows_tf32, capability, ceil_div, rounded

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOW_SCALE = tl.constexpr(2048.0)
CHUNK = 8192
"""Rows and columns of the square of logits whose gradient is in memory at a time: 134 MB of float16."""

GRADIENT_SCALE = tl.constexpr(2.0**14)
"""Gradient tiles have entries of at most 1 and are stored times this, away from float16's subnormals."""


class Config(NamedTuple):
    """Tile sizes and launch options of the kernels that multiply tiles; `descriptors`: operands come by TMA."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What a kernel of the losses is launched with."""
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k,
            "DESCRIPTORS": self.descriptors, "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


@functools.cache
def config_for(capability: int, split: bool, groups: bool, max_block_n: int = 128) -> Config:
    """A fixed choice by compute capability (major * 10 + minor); nothing is tuned at run time, so results repeat.

    Such that no kernel spills registers (tests/kernels/resources.json); measured on 90 alone.
    """
    if capability == 90:  # two programs of four warps share a multiprocessor
        small, large = (
            ((128, 64, 32, 8, 3), (128, 128, 64, 8, 3)) if split else ((64, 64, 64, 4, 4), (128, 128, 64, 4, 3))
        )
        return Config(*(small if groups or max_block_n < 128 else large), descriptors=True)
    narrow = split or capability == 100  # two accumulators; or an epilogue that reads its tile from tensor memory
    return Config(
        block_m=128,
        block_n=min(64 if narrow else 128, max_block_n),
        block_k=64 if capability == 100 and not split else 32,
        num_warps=8,
        num_stages=2 if split and capability == 120 else 3,
    )


def wants_float32(features: Tensor) -> bool:
    """Whether products must keep float32's accuracy: float32 features, unless torch may use TF32 for them."""
    return features.dtype == torch.float32 and not allows_tf32()


class Operands(NamedTuple):
    """Features (rows, D) as float16: hi, and for split products the rounded rest times LOW_SCALE (else hi again)."""

    hi: Tensor
    lo: Tensor


def descriptor(matrix: Tensor, rows: int, config: Config) -> TensorDescriptor:
    """Of tiles of so many rows of a matrix of 16-bit numbers.

    The hardware wants rows and the first one to begin at multiples of 16 bytes; zeros fill them up.
    """
    if matrix.shape[1] % 8 or matrix.data_ptr() % 16:
        matrix = F.pad(matrix, (0, -matrix.shape[1] % 8))
    return TensorDescriptor.from_tensor(matrix, [rows, config.block_k])


def operands(features: Tensor, split: bool) -> Operands:
    features = features.contiguous()
    hi = features.to(torch.float16)
    lo = ((features.float() - hi.float()) * LOW_SCALE.value).to(torch.float16) if split else hi
    return Operands(hi, lo)


def tiles_of(features: Operands, rows: int, config: Config, split: bool) -> tuple[Any, Any]:
    """hi and lo as the kernels take them: descriptors of tiles of so many rows, or what these replace."""
    if not config.descriptors:
        return features
    hi, lo = features
    return descriptor(hi, rows, config), descriptor(lo, rows, config) if split else lo


class Prepared(NamedTuple):
    """What kernels are launched with: whether products are split, tiles, features, and these as `tiles_of` has them."""

    split: bool
    config: Config
    features: tuple[Operands, Operands]
    x: tuple[Any, Any]
    y: tuple[Any, Any]


def prepare(image: Tensor, text: Tensor, groups: bool, max_block_n: int = 128) -> Prepared:
    split = wants_float32(image)
    config = config_for(capability(image), split, groups, max_block_n)
    features = operands(image, split), operands(text, split)
    x, y = (
        tiles_of(side, rows, config, split)
        for side, rows in zip(features, (config.block_m, config.block_n), strict=True)
    )
    return Prepared(split, config, features, x, y)


@triton.jit
def operand_tile(features, start, k, count, dim, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Rows from `start` on, entries from `k` on, of features (count, dim); 0 beyond them."""
    if DESCRIPTORS:
        tile = features.load([start, k])
    else:
        rows, entries = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_K)[None, :]
        inside = (rows < count - start) & (entries < dim - k)
        first = (start + tl.zeros((), tl.int64)) * dim + k
        tile = tl.load(features + first + (rows * dim + entries), mask=inside, other=0.0)
    return tile


@triton.jit
def dot_tile(
    x_hi, x_lo, y_hi, y_lo, row, col, n, m, dim, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) float32 dot products of x (n, dim) from `row` on and y (m, dim) from `col` on, else 0."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    cross = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, dim, BLOCK_K):
        x = operand_tile(x_hi, row, k, n, dim, BLOCK_M, BLOCK_K, DESCRIPTORS)
        y = operand_tile(y_hi, col, k, m, dim, BLOCK_N, BLOCK_K, DESCRIPTORS)
        total = tl.dot(x, y.T, total)
        if SPLIT:
            cross = tl.dot(x, operand_tile(y_lo, col, k, m, dim, BLOCK_N, BLOCK_K, DESCRIPTORS).T, cross)
            cross = tl.dot(operand_tile(x_lo, row, k, n, dim, BLOCK_M, BLOCK_K, DESCRIPTORS), y.T, cross)
    if SPLIT:
        total += cross * (1.0 / LOW_SCALE)
    return total


@triton.jit
def match_tile(rows, cols, n, m, row_codes, col_codes, label_offset, GROUPS: tl.constexpr):
    """Which entries are positives: column row + label_offset, or equal codes."""
    if GROUPS:
        row_code = tl.load(row_codes + rows, mask=rows < n, other=-2)
        col_code = tl.load(col_codes + cols, mask=cols < m, other=-3)
        return row_code[:, None] == col_code[None, :]
    return rows[:, None] + label_offset == cols[None, :]


@triton.jit
def on_the_diagonal(row, col, label_offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether the tile that begins at row and col has an entry in column row + label_offset of a row."""
    first = row + label_offset
    return (first < col + BLOCK_N) & (col < first + BLOCK_M)


@triton.jit
def is_edge(row, col, n, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether the tile that begins at row and col reaches beyond the last row or column."""
    return (row + BLOCK_M > n) | (col + BLOCK_N > m)


@triton.jit
def store_gradient(out, at, plane, g, SPLIT: tl.constexpr):
    """G times GRADIENT_SCALE as float16; with SPLIT the rounded rest, times LOW_SCALE, `plane` entries further on."""
    g *= GRADIENT_SCALE
    hi = g.to(tl.float16)
    tl.store(out + at, hi)
    if SPLIT:
        tl.store(out + plane + at, ((g - hi.to(tl.float32)) * LOW_SCALE).to(tl.float16))


@triton.jit
def finish_kernel(
    sums, features, out, count, other_sums, other_out, unit, scale, partial, other_count,
    BLOCK: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """out = sums * unit * scale / GRADIENT_SCALE and each program's <sums, features>; then other_out likewise."""
    of_first = tl.cdiv(count, BLOCK)
    factor = tl.load(unit).to(tl.float32) * tl.load(scale).to(tl.float32) * (1.0 / GRADIENT_SCALE)
    stored: tl.constexpr = out.dtype.element_ty
    if tl.program_id(0) < of_first:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        found = tl.load(sums + at, mask=at < count, other=0.0)
        x = tl.load(features + at, mask=at < count, other=0.0).to(tl.float32)
        tl.store(partial + tl.program_id(0), tl.sum(found * x, 0) * (1.0 / GRADIENT_SCALE))
        if STORE:
            tl.store(out + at, rounded(found * factor, stored).to(stored), mask=at < count)
    else:
        at = (tl.program_id(0) - of_first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        found = tl.load(other_sums + at, mask=at < other_count, other=0.0)
        tl.store(other_out + at, rounded(found * factor, stored).to(stored), mask=at < other_count)


FINISHED = 4096
"""Entries of a program of finish_kernel."""


def finish(
    parts: Sequence[tuple[Tensor, Tensor]], unit: Tensor, scale: Tensor, store: bool
) -> tuple[list[Tensor], Tensor]:
    """The gradients of features, in their dtype, and of the scale, in float32.

    parts: one or two of what `accumulate` summed and its features; the first's gradient is computed if `store`.
    """
    outs = [x.new_empty(x.shape if store or number else 0) for number, (_, x) in enumerate(parts)]
    (first, features), (last, _) = parts[0], parts[-1]
    programs = ceil_div(first.numel(), FINISHED)
    partial = first.new_empty(programs)
    more = ceil_div(last.numel(), FINISHED) if len(parts) > 1 else 0
    finish_kernel[(programs + more,)](
        first, features.contiguous(), outs[0], first.numel(), last, outs[-1], unit, scale, partial, last.numel(),
        BLOCK=FINISHED, STORE=store,
    )  # fmt: skip
    return outs, partial.sum() * unit


def gradient_chunk(like: Tensor, rows: int, cols: int, split: bool) -> Tensor:
    """Room for what `store_gradient` stores: (planes, rows, cols)."""
    return like.new_empty((2 if split else 1, rows, cols), dtype=torch.float16)


def accumulate(
    chunk: Tensor,
    x: Operands,
    y: Operands,
    first_row: int,
    first_col: int,
    d_image: Tensor | None,
    d_text: Tensor | None,
) -> None:
    """d_image rows += G @ y columns, d_text columns += G.T @ x rows, times GRADIENT_SCALE; None where not wanted.

    What is there before counts from the second chunk of a row, or of a column, on. chunk (planes, rows, cols) is what
    `store_gradient` stored: G as one float16 number, or as two.
    """
    rows = slice(first_row, first_row + chunk.shape[1])
    cols = slice(first_col, first_col + chunk.shape[2])
    for total, own, other, left, right in ((d_image, rows, cols, chunk, y), (d_text, cols, rows, chunk.mT, x)):
        if total is None:
            continue
        _add_product(total[own], left[0], right.hi[other], 1.0, fresh=other.start == 0)
        for rest in left[1:]:
            _add_product(total[own], rest, right.hi[other], 1.0 / LOW_SCALE.value)
            _add_product(total[own], left[0], right.lo[other], 1.0 / LOW_SCALE.value)


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float, fresh: bool = False) -> None:
    """total += factor * a @ b, or = if fresh: the library's float16 product with float32 sums, where a GPU has it."""
    beta = 0.0 if fresh else 1.0
    if a.device.type == "cuda" and not torch.version.hip:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, alpha=factor, out=total)
    else:
        total.addmm_(a.float(), b.float(), beta=beta, alpha=factor)
