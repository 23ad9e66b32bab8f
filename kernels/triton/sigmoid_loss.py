"""The Triton kernel of sigmoid_loss and its launcher; the contract is in vlmfast/ops/sigmoid_loss.py.

One pass over square chunks: a kernel writes each chunk's gradient of the logits and its tiles' sums, the library
multiplies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from vlmfast.kernels import pairs
from vlmfast.kernels.pairs import (
    CHUNK,
    GRADIENT_SCALE,
    dot_tile,
    is_edge,
    match_tile,
    on_the_diagonal,
    store_gradient,
)
from vlmfast.kernels.products import ceil_div

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
MAX_BLOCK_N = 64
"""The epilogue needs more registers than those of info_nce."""


@triton.jit
def log1p_of_fraction(e):
    """ln(1 + e) for e in [0, 1], off by at most 1.3e-7 of it: e times a polynomial fitted at Chebyshev nodes."""
    p = e * -0.0031760570182286655 + 0.0195425272573124
    p = p * e - 0.05637361281721428
    p = p * e + 0.10543623793422761
    p = p * e - 0.15269667072707793
    p = p * e + 0.19663274256431137
    p = p * e - 0.24951616262671453
    p = p * e + 0.33329710498891135
    p = p * e - 0.49999892648061806
    p = p * e + 0.9999999946562917
    return p * e


@triton.jit
def sigmoid_kernel(
    x_hi, x_lo, y_hi, y_lo, scale, bias, row_codes, col_codes, out, sums,
    n, m, dim, label_offset, first_row, first_col, chunk_cols,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, GROUPS: tl.constexpr, GRADIENT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One tile: sums of loss, G * dot and G into sums (3, tiles), G into out as `store_gradient` does."""
    row_tile, col_tile = tl.program_id(0), tl.program_id(1)
    local_rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    local_cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, cols = first_row + local_rows, first_col + local_cols
    row, col = first_row + row_tile * BLOCK_M, first_col + col_tile * BLOCK_N
    dots = dot_tile(x_hi, x_lo, y_hi, y_lo, row, col, n, m, dim, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, DESCRIPTORS)
    t = dots * tl.load(scale).to(tl.float32) + tl.load(bias).to(tl.float32)
    matches = GROUPS | on_the_diagonal(row, col, label_offset, BLOCK_M, BLOCK_N)
    if matches:
        t = tl.where(match_tile(rows, cols, n, m, row_codes, col_codes, label_offset, GROUPS), -t, t)
    e = tl.exp2(-tl.abs(t) * LOG2E)
    loss = tl.maximum(t, 0.0) + log1p_of_fraction(e)
    g = tl.where(t < 0.0, e, 1.0) / (1.0 + e)
    if matches:
        g = tl.where(match_tile(rows, cols, n, m, row_codes, col_codes, label_offset, GROUPS), -g, g)
    if is_edge(row, col, n, m, BLOCK_M, BLOCK_N):
        inside = (rows < n)[:, None] & (cols < m)[None, :]
        loss, g = tl.where(inside, loss, 0.0), tl.where(inside, g, 0.0)
    tiles = tl.num_programs(0) * tl.num_programs(1)
    at = sums + row_tile * tl.num_programs(1) + col_tile
    tl.store(at, tl.sum(tl.sum(loss, 1), 0))
    tl.store(at + tiles, tl.sum(tl.sum(g * dots, 1), 0))
    tl.store(at + 2 * tiles, tl.sum(tl.sum(g, 1), 0))
    if GRADIENT:
        plane = tl.num_programs(0).to(tl.int64) * BLOCK_M * chunk_cols
        store_gradient(out, local_rows[:, None].to(tl.int64) * chunk_cols + local_cols[None, :], plane, g, SPLIT)


def forward(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_codes: Tensor | None,
    col_codes: Tensor | None,
    label_offset: int,
    image_grad: bool,
    text_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums over all pairs: loss, gradients of image and text (0 rows where not wanted), of scale and bias; float32."""
    split, config, features, x, y = pairs.prepare(image, text, row_codes is not None, MAX_BLOCK_N)
    n, m, dim = image.shape[0], text.shape[0], image.shape[1]
    d_image = image.new_empty((n if image_grad else 0, dim), dtype=torch.float32)
    d_text = image.new_empty((m if text_grad else 0, dim), dtype=torch.float32)
    gradient = image_grad or text_grad
    totals = image.new_zeros(3, dtype=torch.float64)
    with torch.cuda.device_of(image):
        for first_row in range(0, n, CHUNK):
            height = min(CHUNK, n - first_row)
            row_tiles = ceil_div(height, config.block_m)
            for first_col in range(0, m, CHUNK):
                width = min(CHUNK, m - first_col)
                col_tiles = ceil_div(width, config.block_n)
                shape = (row_tiles * config.block_m, col_tiles * config.block_n) if gradient else (0, 0)
                chunk = pairs.gradient_chunk(image, *shape, split)
                sums = image.new_empty((3, row_tiles * col_tiles), dtype=torch.float32)
                sigmoid_kernel[(row_tiles, col_tiles)](
                    *x, *y, scale, bias, scale if row_codes is None else row_codes,
                    scale if col_codes is None else col_codes, chunk, sums,
                    n, m, dim, label_offset, first_row, first_col, shape[1],
                    SPLIT=split, GROUPS=row_codes is not None, GRADIENT=gradient, **config.options,
                )  # fmt: skip
                totals += sums.sum(1, dtype=torch.float64)
                if gradient:
                    pairs.accumulate(
                        chunk[:, :height, :width], *features, first_row, first_col,
                        d_image if image_grad else None, d_text if text_grad else None,
                    )  # fmt: skip
    factor = scale.float() / GRADIENT_SCALE.value
    return totals[0].float(), d_image.mul_(factor), d_text.mul_(factor), totals[1].float(), totals[2].float()
