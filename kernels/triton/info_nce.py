"""Triton kernels of info_nce and their launchers; the contract is in vlmfast/ops/info_nce.py.

Forward: tiles of exponentials with one shift, their row and column sums as partial sums that are added in a fixed
order. Rows and columns whose sums left float32's range are done again with a running maximum by kernels that are always
launched and whose programs return at once elsewhere: the host never waits for the device. Backward: square chunks of
the gradient of the logits, each written by one kernel and multiplied by the library.
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
SHIFT_BELOW_TOP = tl.constexpr(70 * math.log2(math.e))


@triton.jit
def one_shift(scale):
    """Base-2 scale, and the integer shift 70 (in natural units) below the largest logit of unit-norm features."""
    scale2 = tl.load(scale).to(tl.float32) * LOG2E
    return scale2, tl.floor(tl.abs(scale2) - SHIFT_BELOW_TOP + 0.5)


@triton.jit
def exp_sums_kernel(
    x_hi, x_lo, y_hi, y_lo, scale, row_codes, col_codes, kept, row_sums, col_sums, row_dots, col_dots,
    n, m, dim, label_offset, first_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Partial sums of one tile: row_sums, row_dots (column tiles, chunk rows), col_sums, col_dots (row tiles, m)."""
    scale2, shift = one_shift(scale)
    row_tile, col_tile = tl.program_id(0), tl.program_id(1)
    local = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = first_row + local
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dots = dot_tile(x_hi, x_lo, y_hi, y_lo, rows, cols, n, m, dim, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT)
    inside = (rows < n)[:, None] & (cols < m)[None, :]
    if KEEP:
        tl.store(kept + rows[:, None].to(tl.int64) * m + cols[None, :], dots, mask=inside)
    match = match_tile(rows, cols, n, m, row_codes, col_codes, label_offset, GROUPS) & inside
    counted = inside if GROUPS else inside & (match == 0)
    e = tl.where(counted, tl.exp2(dots * scale2 - shift), 0.0)
    chunk_rows = tl.num_programs(0) * BLOCK_M
    row_at = col_tile.to(tl.int64) * chunk_rows + local
    matched = tl.where(match, dots, 0.0)
    tl.store(row_sums + row_at, tl.sum(e, 1))
    tl.store(row_dots + row_at, tl.sum(matched, 1))
    if COLUMNS:
        col_at = row_tile.to(tl.int64) * m + cols
        tl.store(col_sums + col_at, tl.sum(e, 0), mask=cols < m)
        tl.store(col_dots + col_at, tl.sum(matched, 0), mask=cols < m)


@triton.jit
def online_kernel(
    x_hi, x_lo, y_hi, y_lo, scale, row_codes, col_codes, stats, n, m, dim, label_offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Shift and sum, in stats (3, count), of the rows (or columns) whose sum is out of range, by a running maximum.

    The tiles are those of the other kernels: another order of the products would round dots differently, and
    probabilities of large logits would not agree with their sums.
    """
    count, others = (m, n) if COLUMNS else (n, m)
    BLOCK: tl.constexpr = BLOCK_N if COLUMNS else BLOCK_M
    BLOCK_ACROSS: tl.constexpr = BLOCK_M if COLUMNS else BLOCK_N
    AXIS: tl.constexpr = 0 if COLUMNS else 1
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(stats + count + own, mask=own < count, other=1.0)
    flagged = ((total >= 1.2924697071141057e-26) & (total <= 8.507059173023462e37)) == 0  # [2^-86, 2^126]
    if tl.max(flagged.to(tl.int32), 0) > 0:
        scale2, _ = one_shift(scale)
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        running = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, others, BLOCK_ACROSS):
            across = start + tl.arange(0, BLOCK_ACROSS)
            if COLUMNS:
                rows, cols = across, own
            else:
                rows, cols = own, across
            dots = dot_tile(x_hi, x_lo, y_hi, y_lo, rows, cols, n, m, dim, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT)
            counted = (rows < n)[:, None] & (cols < m)[None, :]
            if not GROUPS:
                counted &= match_tile(rows, cols, n, m, row_codes, col_codes, label_offset, GROUPS) == 0
            logits = tl.where(counted, dots * scale2, float("-inf"))
            higher = tl.maximum(top, tl.floor(tl.max(logits, AXIS) + 0.5))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            before = tl.where(top == float("-inf"), 0.0, running * tl.exp2(top - base))
            running = before + tl.sum(tl.exp2(logits - tl.expand_dims(base, AXIS)), AXIS)
            top = higher
        keep = flagged & (own < count)
        tl.store(stats + own, tl.where(top == float("-inf"), 0.0, top), mask=keep)
        tl.store(stats + count + own, running, mask=keep)


@triton.jit
def gradient_kernel(
    x_hi, x_lo, y_hi, y_lo, scale, rows_side, cols_side, shift, kept, row_codes, col_codes, out,
    n, m, dim, label_offset, first_row, first_col, chunk_cols,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """One tile of G, times GRADIENT_SCALE where `out` (chunk rows, chunk_cols) is float16; 0 outside of n and m."""
    scale2, _ = one_shift(scale)
    local_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    local_cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, cols = first_row + local_rows, first_col + local_cols
    inside = (rows < n)[:, None] & (cols < m)[None, :]
    if KEPT:
        dots = tl.load(kept + rows[:, None].to(tl.int64) * m + cols[None, :], mask=inside, other=0.0)
    else:
        dots = dot_tile(x_hi, x_lo, y_hi, y_lo, rows, cols, n, m, dim, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT)
    row_shift = tl.load(rows_side + rows, mask=rows < n, other=0.0)
    row_factor = tl.load(rows_side + n + rows, mask=rows < n, other=0.0)
    row_target = tl.load(rows_side + 2 * n + rows, mask=rows < n, other=0.0)
    col_shift = tl.load(cols_side + cols, mask=cols < m, other=0.0)
    col_factor = tl.load(cols_side + m + cols, mask=cols < m, other=0.0)
    col_target = tl.load(cols_side + 2 * m + cols, mask=cols < m, other=0.0)
    common = tl.load(shift)
    if common < float("inf"):
        e = dots if KEPT else tl.exp2(dots * scale2 - common)  # what is kept then is the exponential
        g = e * (row_factor[:, None] + col_factor[None, :])
    else:
        logits = dots * scale2
        g = tl.where(row_factor[:, None] == 0.0, 0.0, tl.exp2(logits - row_shift[:, None]) * row_factor[:, None])
        g += tl.where(col_factor[None, :] == 0.0, 0.0, tl.exp2(logits - col_shift[None, :]) * col_factor[None, :])
    match = match_tile(rows, cols, n, m, row_codes, col_codes, label_offset, GROUPS)
    target = row_target[:, None] + col_target[None, :]
    if GROUPS:
        g -= tl.where(match, target, 0.0)
    else:
        g = tl.where(match, -target, g)
    g = tl.where(inside, g, 0.0)
    if out.dtype.element_ty == tl.float16:
        g *= GRADIENT_SCALE
    at = local_rows[:, None].to(tl.int64) * chunk_cols + local_cols[None, :]
    tl.store(out + at, g.to(out.dtype.element_ty))


def forward(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    row_codes: Tensor | None,
    col_codes: Tensor | None,
    label_offset: int,
    columns: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row_stats (3, n), col_stats (3, m) or (3, 0), shift (), kept, which is dot (and shift infinite) if asked for."""
    split = pairs.wants_float32(image)
    config = pairs.config(image, split)
    x, y = pairs.operands(image, split), pairs.operands(text, split)
    n, m, dim = image.shape[0], text.shape[0], image.shape[1]
    groups = row_codes is not None
    kept = image.new_empty((n, m) if keep else (0, 0), dtype=torch.float32)
    row_stats = image.new_empty((3, n), dtype=torch.float32)
    col_stats = image.new_zeros((3, m if columns else 0), dtype=torch.float32)
    col_tiles = triton.cdiv(m, config.block_n)
    with _device_of(image):
        for first in range(0, n, CHUNK):
            row_tiles = triton.cdiv(min(CHUNK, n - first), config.block_m)
            partial_rows = image.new_empty((2, col_tiles, row_tiles * config.block_m), dtype=torch.float32)
            partial_cols = image.new_empty((2, row_tiles, m if columns else 0), dtype=torch.float32)
            exp_sums_kernel[(row_tiles, col_tiles)](
                *x, *y, scale, _or(row_codes, scale), _or(col_codes, scale), kept, partial_rows[0], partial_cols[0],
                partial_rows[1], partial_cols[1], n, m, dim, label_offset, first,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, SPLIT=split, GROUPS=groups,
                COLUMNS=columns, KEEP=keep, num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
            row_stats[1:, first : first + CHUNK] = partial_rows.sum(1)[:, : n - first]
            if columns:
                col_stats[1:] += partial_cols.sum(1)
        shift = torch.round((scale.float() * LOG2E.value).abs() - SHIFT_BELOW_TOP.value)
        in_range = torch.ones((), dtype=torch.bool, device=image.device)
        for stats, count, block in ((row_stats, n, config.block_m), (col_stats, col_stats.shape[1], config.block_n)):
            if count:
                stats[0] = shift
                in_range &= ((stats[1] >= 2.0**-86) & (stats[1] <= 2.0**126)).all()
                online_kernel[(triton.cdiv(count, block),)](
                    *x, *y, scale, _or(row_codes, scale), _or(col_codes, scale), stats, n, m, dim, label_offset,
                    BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, SPLIT=split,
                    GROUPS=groups, COLUMNS=stats is col_stats, num_warps=config.num_warps,
                    num_stages=config.num_stages,
                )  # fmt: skip
    shift = torch.where(in_range, shift, math.inf)
    return row_stats, col_stats, torch.full_like(shift, math.inf) if keep else shift, kept


def backward(
    unit: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    rows: Tensor,
    cols: Tensor,
    shift: Tensor,
    kept: Tensor,
    row_codes: Tensor | None,
    col_codes: Tensor | None,
    label_offset: int,
    image_grad: bool,
    text_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text (empty where not wanted) and scale."""
    split = pairs.wants_float32(image)
    config = pairs.config(image, split)
    x, y = pairs.operands(image, split), pairs.operands(text, split)
    n, m, dim = image.shape[0], text.shape[0], image.shape[1]
    # The scale's gradient is read off a feature gradient, so one of the two is always accumulated.
    image_sum = image_grad or not text_grad
    d_image = image.new_zeros((n if image_sum else 0, dim), dtype=torch.float32)
    d_text = image.new_zeros((m if text_grad else 0, dim), dtype=torch.float32)
    # Right-hand sides of the gradients' products, in the gradient chunk's dtype.
    x_right, y_right = (image.float(), text.float()) if split else (x.hi, y.hi)
    dtype = torch.float32 if split else torch.float16
    rows, cols = rows.contiguous(), cols.contiguous()
    with _device_of(image):
        for first_row in range(0, n, CHUNK):
            height = min(CHUNK, n - first_row)
            row_tiles = triton.cdiv(height, config.block_m)
            for first_col in range(0, m, CHUNK):
                width = min(CHUNK, m - first_col)
                col_tiles = triton.cdiv(width, config.block_n)
                chunk = image.new_empty((row_tiles * config.block_m, col_tiles * config.block_n), dtype=dtype)
                gradient_kernel[(row_tiles, col_tiles)](
                    *x, *y, scale, rows, cols, shift, kept, _or(row_codes, scale), _or(col_codes, scale), chunk,
                    n, m, dim, label_offset, first_row, first_col, chunk.shape[1],
                    BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, SPLIT=split,
                    GROUPS=row_codes is not None, KEPT=kept.numel() > 0, num_warps=config.num_warps,
                    num_stages=config.num_stages,
                )  # fmt: skip
                pairs.accumulate(
                    chunk[:height, :width], x_right, y_right, first_row, first_col,
                    d_image if image_sum else None, d_text if text_grad else None,
                )  # fmt: skip
    scaled = unit.float() / (1.0 if split else GRADIENT_SCALE.value)
    d, features = (d_image, image) if image_sum else (d_text, text)
    factor = scaled * scale.float()
    return (
        (d_image * factor).to(image.dtype) if image_grad else image.new_empty(0),
        (d_text * factor).to(text.dtype) if text_grad else text.new_empty(0),
        ((d * features.float()).sum() * scaled).to(scale.dtype),
    )


def _or(tensor: Tensor | None, otherwise: Tensor) -> Tensor:
    """A kernel's pointer argument that is not read where there is no tensor."""
    return otherwise if tensor is None else tensor


def _device_of(tensor: Tensor) -> torch.cuda.device_of:
    return torch.cuda.device_of(tensor)
