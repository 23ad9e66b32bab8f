"""The Triton kernel of sigmoid_loss and its launcher; the contract is in vlmfast/ops/sigmoid_loss.py.

One pass over square chunks: a kernel writes each chunk's gradient of the logits and its tiles' sums, the library
multiplies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from vlmfast.kernels import pairs
from vlmfast.kernels.pairs import CHUNK, GRADIENT_SCALE, dot_tile, match_tile

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
MAX_BLOCK_N = 64
"""The epilogue needs more registers than those of info_nce."""


@triton.jit
def log1p_of_fraction(e):
    """ln(1 + e) for e in [0, 1] to float32's relative accuracy: 2 artanh(e / (2 + e)) by its series."""
    t = e / (2.0 + e)
    square = t * t
    series = square * (2.0 / 17.0) + 2.0 / 15.0
    series = series * square + 2.0 / 13.0
    series = series * square + 2.0 / 11.0
    series = series * square + 2.0 / 9.0
    series = series * square + 2.0 / 7.0
    series = series * square + 2.0 / 5.0
    series = series * square + 2.0 / 3.0
    series = series * square + 2.0
    return t * series


@triton.jit
def sigmoid_kernel(
    x_hi, x_lo, y_hi, y_lo, scale, bias, row_codes, col_codes, out, sums,
    n, m, dim, label_offset, first_row, first_col, chunk_cols,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, GROUPS: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """One tile: sums of loss, G * dot and G into sums (3, tiles), G into out, times GRADIENT_SCALE in float16."""
    row_tile, col_tile = tl.program_id(0), tl.program_id(1)
    local_rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    local_cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, cols = first_row + local_rows, first_col + local_cols
    inside = (rows < n)[:, None] & (cols < m)[None, :]
    dots = dot_tile(x_hi, x_lo, y_hi, y_lo, rows, cols, n, m, dim, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT)
    match = match_tile(rows, cols, n, m, row_codes, col_codes, label_offset, GROUPS)
    sign = tl.where(match, -1.0, 1.0)
    t = sign * (dots * tl.load(scale).to(tl.float32) + tl.load(bias).to(tl.float32))
    e = tl.exp2(-tl.abs(t) * LOG2E)
    loss = tl.maximum(t, 0.0) + log1p_of_fraction(e)
    g = tl.where(inside, sign * tl.where(t < 0.0, e, 1.0) / (1.0 + e), 0.0)
    tiles = tl.num_programs(0) * tl.num_programs(1)
    at = sums + row_tile * tl.num_programs(1) + col_tile
    tl.store(at, tl.sum(tl.sum(tl.where(inside, loss, 0.0), 1), 0))
    tl.store(at + tiles, tl.sum(tl.sum(g * dots, 1), 0))
    tl.store(at + 2 * tiles, tl.sum(tl.sum(g, 1), 0))
    if GRADIENT:
        if out.dtype.element_ty == tl.float16:
            g *= GRADIENT_SCALE
        out_at = local_rows[:, None].to(tl.int64) * chunk_cols + local_cols[None, :]
        tl.store(out + out_at, g.to(out.dtype.element_ty))


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
    split = pairs.wants_float32(image)
    config = pairs.config(image, split, MAX_BLOCK_N)
    x, y = pairs.operands(image, split), pairs.operands(text, split)
    n, m, dim = image.shape[0], text.shape[0], image.shape[1]
    d_image = image.new_zeros((n if image_grad else 0, dim), dtype=torch.float32)
    d_text = image.new_zeros((m if text_grad else 0, dim), dtype=torch.float32)
    x_right, y_right = (image.float(), text.float()) if split else (x.hi, y.hi)
    dtype = torch.float32 if split else torch.float16
    gradient = image_grad or text_grad
    totals = image.new_zeros(3, dtype=torch.float64)
    with torch.cuda.device_of(image):
        for first_row in range(0, n, CHUNK):
            height = min(CHUNK, n - first_row)
            row_tiles = triton.cdiv(height, config.block_m)
            for first_col in range(0, m, CHUNK):
                width = min(CHUNK, m - first_col)
                col_tiles = triton.cdiv(width, config.block_n)
                shape = (row_tiles * config.block_m, col_tiles * config.block_n) if gradient else (0, 0)
                chunk = image.new_empty(shape, dtype=dtype)
                sums = image.new_empty((3, row_tiles * col_tiles), dtype=torch.float32)
                sigmoid_kernel[(row_tiles, col_tiles)](
                    *x, *y, scale, bias, scale if row_codes is None else row_codes,
                    scale if col_codes is None else col_codes, chunk, sums,
                    n, m, dim, label_offset, first_row, first_col, shape[1],
                    BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, SPLIT=split,
                    GROUPS=row_codes is not None, GRADIENT=gradient, num_warps=config.num_warps,
                    num_stages=config.num_stages,
                )  # fmt: skip
                totals += sums.sum(1, dtype=torch.float64)
                if gradient:
                    pairs.accumulate(
                        chunk[:height, :width], x_right, y_right, first_row, first_col,
                        d_image if image_grad else None, d_text if text_grad else None,
                    )  # fmt: skip
    factor = scale.float() / (1.0 if split else GRADIENT_SCALE.value)
    return totals[0].float(), d_image * factor, d_text * factor, totals[1].float(), totals[2].float()
