"""Triton kernels of info_nce and their launchers; the contract is in vlmfast/ops/info_nce.py.

Forward: tiles of exponentials with one shift, their row and column sums as partial sums that are added in a fixed
order. Rows and columns whose sums left float32's range are done again with a running maximum by kernels that are always
launched and whose programs return at once elsewhere: the host never waits for the device. Backward: square chunks of
the gradient of the logits, each written by one kernel and multiplied by the library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from vlmfast.kernels import pairs
from vlmfast.kernels.pairs import (
    CHUNK,
    Config,
    dot_tile,
    is_edge,
    match_tile,
    on_the_diagonal,
    store_gradient,
)
from vlmfast.kernels.products import ceil_div, tensor_or

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
SUMMED = 64
"""Rows or columns that a program sums the tiles' sums of."""
NORMALISED = 256
"""Rows or columns of a program of normalise_kernel."""
SHIFT_BELOW_TOP = tl.constexpr(70 * math.log2(math.e))


@triton.jit
def one_shift(scale):
    """Base-2 scale, and the integer shift 70 (in natural units) below the largest logit of unit-norm features."""
    scale2 = tl.load(scale).to(tl.float32) * LOG2E
    return scale2, tl.floor(tl.abs(scale2) - SHIFT_BELOW_TOP + 0.5)


@triton.jit
def exp_sums_kernel(
    x_hi, x_lo, y_hi, y_lo, scale, row_codes, col_codes, kept, common, row_sums, col_sums, row_dots, col_dots,
    n, m, dim, label_offset, first_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, KEEP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Partial sums of one tile: row_sums (column tiles, chunk rows), col_sums (row tiles, m); row_dots and col_dots of
    the same shapes with GROUPS, else (n,) and (m,), written where a row or column has its one positive.
    """
    scale2, shift = one_shift(scale)
    row_tile, col_tile = tl.program_id(0), tl.program_id(1)
    if (row_tile == 0) & (col_tile == 0):
        tl.store(common, float("inf") if KEEP else shift)
    row, col = first_row + row_tile * BLOCK_M, col_tile * BLOCK_N
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    dots = dot_tile(x_hi, x_lo, y_hi, y_lo, row, col, n, m, dim, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, DESCRIPTORS)
    inside = (rows < n)[:, None] & (cols < m)[None, :]
    if KEEP:
        tl.store(kept + rows[:, None].to(tl.int64) * m + cols[None, :], dots, mask=inside)
    row_at = col_tile.to(tl.int64) * tl.num_programs(0) * BLOCK_M + rows - first_row
    col_at = row_tile.to(tl.int64) * m + cols
    if GROUPS:
        matched = tl.where(inside & match_tile(rows, cols, n, m, row_codes, col_codes, label_offset, GROUPS), dots, 0.0)
        tl.store(row_dots + row_at, tl.sum(matched, 1))
        if COLUMNS:
            tl.store(col_dots + col_at, tl.sum(matched, 0), mask=cols < m)
        logits = tl.where(inside, dots * scale2 - shift, float("-inf"))
    elif on_the_diagonal(row, col, label_offset, BLOCK_M, BLOCK_N) | is_edge(row, col, n, m, BLOCK_M, BLOCK_N):
        positive = rows + label_offset
        match = positive[:, None] == cols[None, :]
        here = (rows < n) & (positive >= col) & (positive < tl.minimum(col + BLOCK_N, m))
        dot = tl.sum(tl.where(match, dots, 0.0), 1)
        tl.store(row_dots + rows, dot, mask=here)
        if COLUMNS:
            tl.store(col_dots + positive, dot, mask=here)
        logits = tl.where(inside & (match == 0), dots * scale2 - shift, float("-inf"))
    else:
        logits = dots * scale2 - shift
    e = tl.exp2(logits)
    tl.store(row_sums + row_at, tl.sum(e, 1))
    if COLUMNS:
        tl.store(col_sums + col_at, tl.sum(e, 0), mask=cols < m)


@triton.jit
def sum_of_tiles(partial, at, count, tiles, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Entries `at` of partial (tiles, count), summed over the tiles in a fixed order."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tiles, TILES):
        tile = (first + tl.arange(0, TILES))[:, None]
        inside = (tile < tiles) & (at < count)[None, :]
        total += tl.sum(tl.load(partial + tile.to(tl.int64) * count + at[None, :], mask=inside, other=0.0), 0)
    return total


@triton.jit
def sums_kernel(
    row_partials, col_partials, stats, stride, height, width, m, n, first_row, row_tiles, col_tiles,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Into stats (3, n + m), from its second row on: the sums of row_partials (planes, column tiles, width) for
    `height` rows from `first_row` on; those of col_partials (planes, row tiles, m) added to earlier rows'.
    """
    plane, of_rows = tl.program_id(1).to(tl.int64), tl.cdiv(height, BLOCK)
    out = stats + (1 + plane) * stride
    if tl.program_id(0) < of_rows:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        total = sum_of_tiles(row_partials + plane * col_tiles * width, at, width, col_tiles, BLOCK, TILES)
        tl.store(out + first_row + at, total, mask=at < height)
    else:
        at = (tl.program_id(0) - of_rows) * BLOCK + tl.arange(0, BLOCK)
        total = sum_of_tiles(col_partials + plane * row_tiles * m, at, m, row_tiles, BLOCK, TILES)
        if first_row > 0:
            total += tl.load(out + n + at, mask=at < m, other=0.0)
        tl.store(out + n + at, total, mask=at < m)


@triton.jit
def online_side(
    x_hi, x_lo, y_hi, y_lo, scale, row_codes, col_codes, common, stats, stride, first, n, m, dim, label_offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """`online_kernel` for the rows (or columns) from `first` on."""
    count, others = (m, n) if COLUMNS else (n, m)
    BLOCK: tl.constexpr = BLOCK_N if COLUMNS else BLOCK_M
    BLOCK_ACROSS: tl.constexpr = BLOCK_M if COLUMNS else BLOCK_N
    AXIS: tl.constexpr = 0 if COLUMNS else 1
    own = first + tl.arange(0, BLOCK)
    scale2, shift = one_shift(scale)
    total = tl.load(stats + stride + own, mask=own < count, other=1.0)
    flagged = ((total >= 1.2924697071141057e-26) & (total <= 8.507059173023462e37)) == 0  # [2^-86, 2^126]
    tl.store(stats + own, tl.zeros((BLOCK,), tl.float32) + shift, mask=(flagged == 0) & (own < count))
    if tl.max(flagged.to(tl.int32), 0) > 0:
        tl.store(common, float("inf"))
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        running = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, others, BLOCK_ACROSS):
            row, col = (start, first) if COLUMNS else (first, start)
            rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
            dots = dot_tile(x_hi, x_lo, y_hi, y_lo, row, col, n, m, dim, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, DESCRIPTORS)
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
        tl.store(stats + stride + own, running, mask=keep)


@triton.jit
def online_kernel(
    x_hi, x_lo, y_hi, y_lo, scale, row_codes, col_codes, common, stats, stride, n, m, dim, label_offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, GROUPS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The shift of each row, and of each column if there are programs for them, into stats (3, n + m); where a sum is
    out of range, shift and sum by a running maximum, and infinity into `common`.

    The tiles are those of the other kernels: another order of the products would round dots differently, and
    probabilities of large logits would not agree with their sums.
    """
    of_rows = tl.cdiv(n, BLOCK_M)
    if tl.program_id(0) < of_rows:
        online_side(
            x_hi, x_lo, y_hi, y_lo, scale, row_codes, col_codes, common, stats, stride, tl.program_id(0) * BLOCK_M,
            n, m, dim, label_offset, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, GROUPS, False, DESCRIPTORS,
        )  # fmt: skip
    else:
        first = (tl.program_id(0) - of_rows) * BLOCK_N
        online_side(
            x_hi, x_lo, y_hi, y_lo, scale, row_codes, col_codes, common, stats + n, stride, first,
            n, m, dim, label_offset, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, GROUPS, True, DESCRIPTORS,
        )  # fmt: skip


@triton.jit
def normalise_side(
    stats, stride, scale, weight, counts, side, n, first,
    COUNTS: tl.constexpr, EXCLUDE_POSITIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the rows from `first` on the sum of the losses; their shifts, factors and targets into side (3, n)."""
    at = first + tl.arange(0, BLOCK)
    inside = at < n
    shift = tl.load(stats + at, mask=inside, other=0.0)
    total = tl.load(stats + stride + at, mask=inside, other=1.0).to(tl.float64)
    dot = tl.load(stats + 2 * stride + at, mask=inside, other=0.0).to(tl.float64)
    share = tl.load(weight + at, mask=inside, other=0.0)
    positive = dot * (tl.load(scale).to(tl.float64) * 1.4426950408889634)
    log_total = tl.log2(total) + shift
    if COUNTS:
        each = tl.maximum(tl.load(counts + at, mask=inside, other=1), 1).to(tl.float64)
        loss = (log_total - positive / each) * 0.6931471805599453
        factor, target = share / total, share / each
    else:
        ratio = (log_total - positive) * 0.6931471805599453
        if EXCLUDE_POSITIVE:
            loss, target = ratio, share
        else:  # softplus and sigmoid; log(1 + e) * e / ((1 + e) - 1) is exact where 1 + e is rounded
            e = tl.exp(-tl.abs(ratio))
            above = 1.0 + e
            loss = tl.maximum(ratio, 0.0) + tl.where(above == 1.0, e, tl.log(above) * (e / (above - 1.0)))
            target = share * tl.where(ratio >= 0.0, 1.0, e) / above
        factor = tl.where(total == 0.0, 0.0, target / total)
    tl.store(side + at, shift, mask=inside)
    tl.store(side + n + at, factor.to(tl.float32), mask=inside)
    tl.store(side + 2 * n + at, target.to(tl.float32), mask=inside)
    return tl.sum(tl.where(share == 0.0, 0.0, share * loss), 0)


@triton.jit
def normalise_kernel(
    row_stats, row_stride, row_weight, row_counts, row_side, n,
    col_stats, col_stride, col_weight, col_counts, col_side, m, scale, losses,
    COUNTS: tl.constexpr, EXCLUDE_POSITIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`normalise` of vlmfast/ops/info_nce.py in float64, the losses as a sum of each program's."""
    of_rows = tl.cdiv(n, BLOCK)
    if tl.program_id(0) < of_rows:
        loss = normalise_side(
            row_stats, row_stride, scale, row_weight, row_counts, row_side, n, tl.program_id(0) * BLOCK,
            COUNTS, EXCLUDE_POSITIVE, BLOCK,
        )  # fmt: skip
    else:
        loss = normalise_side(
            col_stats, col_stride, scale, col_weight, col_counts, col_side, m, (tl.program_id(0) - of_rows) * BLOCK,
            COUNTS, EXCLUDE_POSITIVE, BLOCK,
        )  # fmt: skip
    tl.store(losses + tl.program_id(0), loss)


@triton.jit
def one_way(logits, own, side, count):
    """The softmax of rows, (rows, 1), or of columns, (1, cols), by the shifts and factors in side (3, count)."""
    shift = tl.load(side + own, mask=own < count, other=0.0)
    factor = tl.load(side + count + own, mask=own < count, other=0.0)
    return tl.exp2(logits - tl.where(factor == 0.0, float("inf"), shift)) * factor


@triton.jit
def gradient_kernel(
    x_hi, x_lo, y_hi, y_lo, scale, rows_side, cols_side, shift, kept, row_codes, col_codes, out,
    n, m, dim, label_offset, first_row, first_col, chunk_cols,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One tile of G, 0 outside of n and m, into out (planes, chunk rows, chunk_cols) as `store_gradient` does."""
    scale2, _ = one_shift(scale)
    local_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    local_cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, col = first_row + tl.program_id(0) * BLOCK_M, first_col + tl.program_id(1) * BLOCK_N
    rows, cols = first_row + local_rows, first_col + local_cols
    inside = (rows < n)[:, None] & (cols < m)[None, :]
    if KEPT:
        dots = tl.load(kept + rows[:, None].to(tl.int64) * m + cols[None, :], mask=inside, other=0.0)
    else:
        dots = dot_tile(x_hi, x_lo, y_hi, y_lo, row, col, n, m, dim, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, DESCRIPTORS)
    common = tl.load(shift)
    if common < float("inf"):
        row_factor = tl.load(rows_side + n + rows, mask=rows < n, other=0.0)
        col_factor = tl.load(cols_side + m + cols, mask=cols < m, other=0.0)
        e = dots if KEPT else tl.exp2(dots * scale2 - common)  # what is kept then is the exponential
        g = e * (row_factor[:, None] + col_factor[None, :])
    else:
        logits = dots * scale2
        g = one_way(logits, tl.expand_dims(rows, 1), rows_side, n) + one_way(
            logits, tl.expand_dims(cols, 0), cols_side, m
        )
    if GROUPS | on_the_diagonal(row, col, label_offset, BLOCK_M, BLOCK_N):
        match = match_tile(rows, cols, n, m, row_codes, col_codes, label_offset, GROUPS)
        row_target = tl.load(rows_side + 2 * n + rows, mask=rows < n, other=0.0)
        col_target = tl.load(cols_side + 2 * m + cols, mask=cols < m, other=0.0)
        if not GROUPS:
            g = tl.where(match, 0.0, g)
        g -= tl.where(match, row_target[:, None], 0.0)
        g -= tl.where(match, col_target[None, :], 0.0)
    if is_edge(row, col, n, m, BLOCK_M, BLOCK_N):
        g = tl.where(inside, g, 0.0)
    plane = tl.num_programs(0).to(tl.int64) * BLOCK_M * chunk_cols
    store_gradient(out, local_rows[:, None].to(tl.int64) * chunk_cols + local_cols[None, :], plane, g, SPLIT)


def online_config(config: Config) -> Config:
    """Of online_kernel, whose code is twice that of the others: fewer stages, fewer registers."""
    return config._replace(num_stages=2)


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
    split, config, _, x, y = pairs.prepare(image, text, row_codes is not None)
    n, m, dim = image.shape[0], text.shape[0], image.shape[1]
    groups, codes = row_codes is not None, (tensor_or(row_codes, scale), tensor_or(col_codes, scale))
    kept = image.new_empty((n, m) if keep else (0, 0), dtype=torch.float32)
    shift = image.new_empty((), dtype=torch.float32)
    of_cols = m if columns else 0
    stats = image.new_zeros((3, n + of_cols), dtype=torch.float32)
    col_tiles = ceil_div(m, config.block_n)
    planes = 2 if groups else 1  # the sums, and those of the positives' dots where there may be several
    with _device_of(image):
        for first in range(0, n, CHUNK):
            height = min(CHUNK, n - first)
            row_tiles = ceil_div(height, config.block_m)
            partial_rows = image.new_empty((planes, col_tiles, row_tiles * config.block_m), dtype=torch.float32)
            partial_cols = image.new_empty((planes, row_tiles, of_cols), dtype=torch.float32)
            row_dots, col_dots = (partial_rows[1], partial_cols[1]) if groups else (stats[2], stats[2, n:])
            exp_sums_kernel[(row_tiles, col_tiles)](
                *x, *y, scale, *codes, kept, shift, partial_rows, partial_cols, row_dots, col_dots,
                n, m, dim, label_offset, first,
                SPLIT=split, GROUPS=groups, COLUMNS=columns, KEEP=keep, **config.options,
            )  # fmt: skip
            sums_kernel[(ceil_div(height, SUMMED) + ceil_div(of_cols, SUMMED), planes)](
                partial_rows, partial_cols, stats, stats.shape[1], height, partial_rows.shape[2], of_cols, n, first,
                row_tiles, col_tiles, BLOCK=SUMMED, TILES=32,
            )  # fmt: skip
        online_kernel[(ceil_div(n, config.block_m) + ceil_div(of_cols, config.block_n),)](
            *x, *y, scale, *codes, shift, stats, stats.shape[1], n, m, dim, label_offset,
            SPLIT=split, GROUPS=groups, **online_config(config).options,
        )  # fmt: skip
    return stats[:, :n], stats[:, n:], shift, kept


def normalise(
    sides: Sequence[tuple[Tensor, Tensor, Tensor | None]], scale: Tensor, exclude_positive: bool
) -> tuple[Tensor, list[Tensor]]:
    """`normalise` of vlmfast/ops/info_nce.py for one or two sides, the losses summed up to a few."""
    found, arguments, programs = [], [], 0
    for stats, weight, count in sides:
        stats = stats if stats.stride(1) == 1 else stats.contiguous()
        n = stats.shape[1]
        found.append(stats.new_empty((3, n)))
        arguments += [stats, stats.stride(0), weight, tensor_or(count, weight), found[-1], n]
        programs += ceil_div(n, NORMALISED)
    if len(sides) == 1:
        arguments += arguments
    losses = weight.new_empty(programs)
    with _device_of(scale):
        normalise_kernel[(programs,)](
            *arguments, scale, losses, COUNTS=count is not None, EXCLUDE_POSITIVE=exclude_positive, BLOCK=NORMALISED
        )
    return losses, found


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
    split, config, features, x, y = pairs.prepare(image, text, row_codes is not None)
    n, m, dim = image.shape[0], text.shape[0], image.shape[1]
    # The scale's gradient is read off a feature gradient, so one of the two is always accumulated.
    image_sum = image_grad or not text_grad
    d_image = image.new_empty((n if image_sum else 0, dim), dtype=torch.float32)
    d_text = image.new_empty((m if text_grad else 0, dim), dtype=torch.float32)
    rows, cols = rows.contiguous(), cols.contiguous()
    with _device_of(image):
        for first_row in range(0, n, CHUNK):
            height = min(CHUNK, n - first_row)
            row_tiles = ceil_div(height, config.block_m)
            for first_col in range(0, m, CHUNK):
                width = min(CHUNK, m - first_col)
                col_tiles = ceil_div(width, config.block_n)
                chunk = pairs.gradient_chunk(image, row_tiles * config.block_m, col_tiles * config.block_n, split)
                gradient_kernel[(row_tiles, col_tiles)](
                    *x, *y, scale, rows, cols, shift, kept, tensor_or(row_codes, scale), tensor_or(col_codes, scale),
                    chunk, n, m, dim, label_offset, first_row, first_col, chunk.shape[2],
                    SPLIT=split, GROUPS=row_codes is not None, KEPT=kept.numel() > 0, **config.options,
                )  # fmt: skip
                pairs.accumulate(
                    chunk[:, :height, :width], *features, first_row, first_col,
                    d_image if image_sum else None, d_text if text_grad else None,
                )  # fmt: skip
        parts = [(d_image, image)] * image_sum + [(d_text, text)] * text_grad
        gradients, d_scale = pairs.finish(parts, unit, scale, store=image_grad or not image_sum)
    none = image.new_empty(0)
    dx, dy = gradients[0] if image_grad else none, gradients[-1] if text_grad else none
    return dx, dy, d_scale.to(scale.dtype)


def _device_of(tensor: Tensor) -> torch.cuda.device_of:
    return torch.cuda.device_of(tensor)
