"""Triton kernels of media_attention and their launchers; contract and `media` are in vlmfast/ops/media_attention.py.

What a row sees is an interval of keys, of which those beyond media_len are left out; rows_kernel makes it once, and
for each tile of rows the hull of its rows' intervals. Forward and the queries' gradient visit the keys of their tile's
hull alone, the gradient of keys and values the tiles of rows whose hull reaches them: in a fixed order, no atomics.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vlmfast.kernels.products import capability, ceil_div, loaded, precision, rounded, tensor_or
from vlmfast.kernels.products import unsupported as device_unsupported

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MAX_DIM = {"half": 128, "tf32": 128, "ieee": 64}
"""Of a head, by the kind of products: tiles of wider ones do not fit into the registers."""


class Config(NamedTuple):
    """Tile sizes and launch options."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@functools.cache
def config_for(capability: int, products: str, dim: int, backward: bool = False) -> Config:
    """A fixed choice by compute capability (major * 10 + minor), kind of products, and the larger head dim.

    Such that no kernel spills registers (tests/kernels/resources.json); measured on 90 alone, in 16 bits.
    """
    asynchronous = capability in (90, 100)  # products that read shared memory: more registers are left
    if products == "half":
        if capability == 90 and dim <= 64:
            return Config(64, 64, 4, 3)
        if asynchronous or (dim > 32 and not backward):
            return Config(128, 64, 8, 2)
        return Config(64, 32, 4, 2) if backward else Config(128, 64, 4, 2)
    if products == "tf32":
        if backward:
            return Config(32 if dim > 64 else 64, 32, 4, 1)
        return Config(128, 64, 8, 1) if asynchronous else Config(64, 32, 4, 1)
    return Config(32, 32, 8 if backward and dim > 32 else 4, 1)


def products(q: Tensor) -> str:
    """The kind of products: of 16 bits, or of float32 by TF32 where torch may, else in float32."""
    if q.dtype != torch.float32:
        return "half"
    return "tf32" if precision(q) == "tf32" else "ieee"


def unsupported(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> str | None:
    """Why the Triton kernels cannot run on these tensors."""
    limit = MAX_DIM[products(q)] if q.device.type == "cuda" else max(MAX_DIM.values())
    if max(q.shape[3], v.shape[3]) > limit:
        reason = f"heads are larger than {limit}: {q.shape[3]} and {v.shape[3]}"
        return reason + (", of float32 without TF32" if limit == MAX_DIM["ieee"] else "")
    return device_unsupported(q)


@triton.jit
def rows_kernel(
    media_lo, media_hi, media_len, first, last, tile_first, tile_last, length, num_media, tokens_per_media,
    ROWS: tl.constexpr, INTERVALS: tl.constexpr, LENGTHS: tl.constexpr, EMPTY_ALL: tl.constexpr,
):  # fmt: skip
    """The keys first to last - 1 that each row sees, first -1 for an empty row that sees all; and each tile's hull."""
    tile, sample = tl.program_id(0), tl.program_id(1)
    rows = tile * ROWS + tl.arange(0, ROWS)
    at, inside = sample.to(tl.int64) * length + rows, rows < length
    if INTERVALS:
        lo = tl.maximum(tl.load(media_lo + at, mask=inside, other=1), 1)
        hi = tl.minimum(tl.load(media_hi + at, mask=inside, other=0), num_media)
    else:
        lo = tl.full((ROWS,), 1, tl.int32)
        hi = tl.where(inside, num_media, 0)
    sees = hi >= lo
    if LENGTHS:
        found = tl.zeros((ROWS,), tl.int32)
        for medium in range(tl.min(tl.where(sees, lo, num_media + 1)), tl.max(tl.where(sees, hi, 0)) + 1):
            valid = tl.load(media_len + sample.to(tl.int64) * num_media + medium - 1)
            found += tl.where((lo <= medium) & (medium <= hi) & (valid > 0), 1, 0)
        sees &= found > 0
    keys = num_media * tokens_per_media
    start, stop = tl.where(sees, (lo - 1) * tokens_per_media, 0), tl.where(sees, hi * tokens_per_media, 0)
    if EMPTY_ALL:
        start, stop = tl.where(sees, start, -1), tl.where(sees | ~inside, stop, keys)
    tl.store(first + at, start, mask=inside)
    tl.store(last + at, stop, mask=inside)
    hull = sample * tl.num_programs(0) + tile
    tl.store(tile_first + hull, tl.min(tl.where(stop > start, tl.maximum(start, 0), keys)))
    tl.store(tile_last + hull, tl.max(stop))


@triton.jit
def rows_of(tile, sample, length, first, last, ROWS: tl.constexpr):
    """The rows of a tile: which are there, their place in (B, Lq), and the keys that they see."""
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < length
    place = sample.to(tl.int64) * length + rows
    row_first = tl.load(first + place, mask=inside, other=0)
    row_last = tl.load(last + place, mask=inside, other=0)
    return rows, inside, place, row_first, row_last


@triton.jit
def matrix(pointer, rows, row_stride, dim_stride, inside, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a matrix (rows, DIM) as an operand (rows, WIDTH); 0 outside."""
    d = tl.arange(0, WIDTH)
    mask = inside[:, None]
    if DIM != WIDTH:
        mask &= (d < DIM)[None, :]
    at = rows[:, None].to(tl.int64) * row_stride + d[None, :] * dim_stride
    return loaded(tl.load(pointer + at, mask=mask, other=0.0))


@triton.jit
def scores(
    q, k, keys, first, last, valid, bias, scale,
    BIAS: tl.constexpr, EMPTY_ALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(rows, keys), -inf where a row does not see a key."""
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if BIAS:
        x += bias[None, :]
    sees = (keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None])
    if EMPTY_ALL:
        sees &= valid[None, :] | (first < 0)[:, None]
    else:
        sees &= valid[None, :]
    return tl.where(sees, x, float("-inf"))


@triton.jit
def keys_at(
    start, stop, total, sample, media_len, key_bias, tokens_per_media,
    KEYS: tl.constexpr, LENGTHS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The keys from start on: which are before stop, which of them are within media_len, and their bias."""
    keys = start + tl.arange(0, KEYS)
    inside = keys < stop
    valid = inside
    if LENGTHS:
        at = sample.to(tl.int64) * (total // tokens_per_media) + keys // tokens_per_media
        valid &= keys % tokens_per_media < tl.load(media_len + at, mask=inside, other=0)
    bias = tl.zeros((KEYS,), tl.float32)
    if BIAS:
        bias = tl.load(key_bias + sample.to(tl.int64) * total + keys, mask=inside, other=0.0)
    return keys, inside, valid, bias


@triton.jit
def forward_kernel(
    q, k, v, out, lse, first, last, tile_first, tile_last, media_len, key_bias,
    heads, group, length, total, tokens_per_media, scale,
    q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, LENGTHS: tl.constexpr, BIAS: tl.constexpr,
    EMPTY_ALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, Lq, H, dv) and lse (B, H, Lq) of one tile of rows of one head."""
    tile, head, sample = tl.program_id(0), tl.program_id(1) % heads, tl.program_id(1) // heads
    rows, inside, place, row_first, row_last = rows_of(tile, sample, length, first, last, ROWS)
    queries = matrix(q + sample.to(tl.int64) * q_b + head.to(tl.int64) * q_h, rows, q_l, q_d, inside, DIM, WIDTH)
    k += sample.to(tl.int64) * k_b + (head // group).to(tl.int64) * k_h
    v += sample.to(tl.int64) * v_b + (head // group).to(tl.int64) * v_h
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, V_WIDTH), tl.float32)
    hull = sample * tl.num_programs(0) + tile
    stop = tl.load(tile_last + hull)
    for start in range(tl.load(tile_first + hull), stop, KEYS):
        keys, there, valid, bias = keys_at(
            start, stop, total, sample, media_len, key_bias, tokens_per_media, KEYS, LENGTHS, BIAS
        )
        taken = there if EMPTY_ALL else valid
        x = scores(
            queries, matrix(k, keys, k_l, k_d, taken, DIM, WIDTH), keys, row_first, row_last, valid, bias, scale,
            BIAS, EMPTY_ALL, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(x, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2((x - shift[:, None]) * LOG2E)
        fade = tl.exp2((top - shift) * LOG2E)
        values = matrix(v, keys, v_l, v_d, taken, V_DIM, V_WIDTH)
        sums = sums * fade + tl.sum(weights, 1)
        found = tl.dot(rounded(weights, v.dtype.element_ty), values, found * fade[:, None], input_precision=PRECISION)
        top = higher
    seen = sums != 0  # not a number is something
    found = tl.where(seen[:, None], found / tl.where(seen, sums, 1.0)[:, None], 0.0)
    d = tl.arange(0, V_WIDTH)
    stored: tl.constexpr = out.dtype.element_ty
    at = (place * heads + head)[:, None] * V_DIM + d[None, :]
    tl.store(out + at, rounded(found, stored).to(stored), mask=inside[:, None] & (d < V_DIM)[None, :])
    log = tl.where(seen, top + tl.log2(tl.where(seen, sums, 1.0)) * LN2, float("-inf"))
    tl.store(lse + (sample.to(tl.int64) * heads + head) * length + rows, log, mask=inside)


@triton.jit
def row_state(lse, delta, at, inside):
    """lse of rows, +inf where they see nothing, so that their weights are 0; and delta."""
    log = tl.load(lse + at, mask=inside, other=float("-inf"))
    return tl.where(log == float("-inf"), float("inf"), log), tl.load(delta + at, mask=inside, other=0.0)


@triton.jit
def slopes(weights, dot, grads, values, PRECISION: tl.constexpr):
    """dS / scale where P is not 0, else 0, whatever the values there are."""
    slope = tl.dot(grads, tl.trans(values), input_precision=PRECISION) - dot[:, None]
    return tl.where(weights == 0, 0.0, weights * slope)


@triton.jit
def delta_kernel(
    grad, out, delta, heads, length, g_b, g_h, g_l, g_d, o_b, o_h, o_l, o_d,
    ROWS: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr,
):  # fmt: skip
    """delta (B, H, Lq): <grad, out> of each row."""
    head, sample = tl.program_id(1) % heads, tl.program_id(1) // heads
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < length
    grad += sample.to(tl.int64) * g_b + head.to(tl.int64) * g_h
    out += sample.to(tl.int64) * o_b + head.to(tl.int64) * o_h
    g = matrix(grad, rows, g_l, g_d, inside, V_DIM, V_WIDTH).to(tl.float32)
    o = matrix(out, rows, o_l, o_d, inside, V_DIM, V_WIDTH).to(tl.float32)
    tl.store(delta + tl.program_id(1).to(tl.int64) * length + rows, tl.sum(g * o, 1), mask=inside)


@triton.jit
def query_grad_kernel(
    grad, q, k, v, lse, delta, query_grad, first, last, tile_first, tile_last, media_len, key_bias,
    heads, group, length, total, tokens_per_media, scale,
    g_b, g_h, g_l, g_d, q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, LENGTHS: tl.constexpr, BIAS: tl.constexpr,
    EMPTY_ALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """query_grad (B, Lq, H, dh) of one tile of rows of one head."""
    tile, head, sample = tl.program_id(0), tl.program_id(1) % heads, tl.program_id(1) // heads
    rows, inside, place, row_first, row_last = rows_of(tile, sample, length, first, last, ROWS)
    queries = matrix(q + sample.to(tl.int64) * q_b + head.to(tl.int64) * q_h, rows, q_l, q_d, inside, DIM, WIDTH)
    grads = matrix(grad + sample.to(tl.int64) * g_b + head.to(tl.int64) * g_h, rows, g_l, g_d, inside, V_DIM, V_WIDTH)
    k += sample.to(tl.int64) * k_b + (head // group).to(tl.int64) * k_h
    v += sample.to(tl.int64) * v_b + (head // group).to(tl.int64) * v_h
    log, dot = row_state(lse, delta, tl.program_id(1).to(tl.int64) * length + rows, inside)
    found = tl.zeros((ROWS, WIDTH), tl.float32)
    hull = sample * tl.num_programs(0) + tile
    stop = tl.load(tile_last + hull)
    for start in range(tl.load(tile_first + hull), stop, KEYS):
        keys, there, valid, bias = keys_at(
            start, stop, total, sample, media_len, key_bias, tokens_per_media, KEYS, LENGTHS, BIAS
        )
        taken = there if EMPTY_ALL else valid
        keys_matrix = matrix(k, keys, k_l, k_d, taken, DIM, WIDTH)
        x = scores(queries, keys_matrix, keys, row_first, row_last, valid, bias, scale, BIAS, EMPTY_ALL, PRECISION)
        values = matrix(v, keys, v_l, v_d, taken, V_DIM, V_WIDTH)
        weights = tl.exp2((x - log[:, None]) * LOG2E)
        slope = slopes(weights, dot, grads, values, PRECISION)
        found = tl.dot(rounded(slope, k.dtype.element_ty), keys_matrix, found, input_precision=PRECISION)
    d = tl.arange(0, WIDTH)
    stored: tl.constexpr = query_grad.dtype.element_ty
    at = (place * heads + head)[:, None] * DIM + d[None, :]
    tl.store(query_grad + at, rounded(found * scale, stored).to(stored), mask=inside[:, None] & (d < DIM)[None, :])


@triton.jit
def key_grad_kernel(
    grad, q, k, v, lse, delta, key_grad, value_grad, first, last, tile_first, tile_last, media_len, key_bias,
    heads, group, length, total, tokens_per_media, scale,
    g_b, g_h, g_l, g_d, q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, LENGTHS: tl.constexpr, BIAS: tl.constexpr,
    EMPTY_ALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """key_grad (B, Lk, Hkv, dh) and value_grad (B, Lk, Hkv, dv) of one tile of keys of one of their heads."""
    kv_heads = heads // group
    head, sample = tl.program_id(1) % kv_heads, tl.program_id(1) // kv_heads
    start = tl.program_id(0) * KEYS
    keys, there, valid, bias = keys_at(
        start, total, total, sample, media_len, key_bias, tokens_per_media, KEYS, LENGTHS, BIAS
    )
    taken = there if EMPTY_ALL else valid
    keys_matrix = matrix(k + sample.to(tl.int64) * k_b + head.to(tl.int64) * k_h, keys, k_l, k_d, taken, DIM, WIDTH)
    values = matrix(v + sample.to(tl.int64) * v_b + head.to(tl.int64) * v_h, keys, v_l, v_d, taken, V_DIM, V_WIDTH)
    found_k = tl.zeros((KEYS, WIDTH), tl.float32)
    found_v = tl.zeros((KEYS, V_WIDTH), tl.float32)
    tiles = tl.cdiv(length, ROWS)
    for step in range(0, tiles * group):
        tile, query_head = step % tiles, head * group + step // tiles
        hull = sample * tiles + tile
        if (tl.load(tile_first + hull) < start + KEYS) & (tl.load(tile_last + hull) > start):
            rows, inside, _, row_first, row_last = rows_of(tile, sample, length, first, last, ROWS)
            of_head = sample.to(tl.int64) * heads + query_head
            log, dot = row_state(lse, delta, of_head * length + rows, inside)
            of_q = q + sample.to(tl.int64) * q_b + query_head.to(tl.int64) * q_h
            of_grad = grad + sample.to(tl.int64) * g_b + query_head.to(tl.int64) * g_h
            queries = matrix(of_q, rows, q_l, q_d, inside, DIM, WIDTH)
            grads = matrix(of_grad, rows, g_l, g_d, inside, V_DIM, V_WIDTH)
            x = scores(queries, keys_matrix, keys, row_first, row_last, valid, bias, scale, BIAS, EMPTY_ALL, PRECISION)
            weights = tl.exp2((x - log[:, None]) * LOG2E)
            found_v = tl.dot(rounded(tl.trans(weights), v.dtype.element_ty), grads, found_v, input_precision=PRECISION)
            slope = slopes(weights, dot, grads, values, PRECISION)
            found_k = tl.dot(rounded(tl.trans(slope), k.dtype.element_ty), queries, found_k, input_precision=PRECISION)
    stored: tl.constexpr = key_grad.dtype.element_ty
    place = (sample.to(tl.int64) * total + keys) * kv_heads + head
    d, e = tl.arange(0, WIDTH), tl.arange(0, V_WIDTH)
    at_k, at_v = place[:, None] * DIM + d[None, :], place[:, None] * V_DIM + e[None, :]
    tl.store(key_grad + at_k, rounded(found_k * scale, stored).to(stored), mask=there[:, None] & (d < DIM)[None, :])
    tl.store(value_grad + at_v, rounded(found_v, stored).to(stored), mask=there[:, None] & (e < V_DIM)[None, :])


def forward(q: Tensor, k: Tensor, v: Tensor, media: Any) -> tuple[Tensor, Tensor]:
    """out (B, H, Lq, dv), lse (B, H, Lq)."""
    batch, heads, length, _ = q.shape
    out = q.new_empty(batch, length, heads, v.shape[3])
    lse = q.new_empty(batch, heads, length, dtype=torch.float32)
    config = _config(q, v, backward=False)
    with torch.cuda.device_of(q):
        rows = _rows(q, k, media, config.rows)
        forward_kernel[(ceil_div(length, config.rows), batch * heads)](
            q, k, v, out, lse, *rows, tensor_or(media.len, rows[0]), tensor_or(media.key_bias, lse),
            *_sizes(q, k), media.tokens_per_media, media.scale, *q.stride(), *k.stride(), *v.stride(),
            **_meaning(q, v, media), ROWS=config.rows, KEYS=config.keys,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out.transpose(1, 2), lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    media: Any,
    q_grad: bool,
    kv_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of q's, k's and v's shapes; (0,) where not wanted."""
    batch, heads, length, dim = q.shape
    _, kv_heads, total, v_dim = v.shape
    empty = q.new_empty(0)
    dq = q.new_empty(batch, length, heads, dim).transpose(1, 2) if q_grad else empty
    dk = q.new_empty(batch, total, kv_heads, dim).transpose(1, 2) if kv_grad else empty
    dv = q.new_empty(batch, total, kv_heads, v_dim).transpose(1, 2) if kv_grad else empty
    delta = torch.empty_like(lse)
    config, meaning = _config(q, v, backward=True), _meaning(q, v, media)
    tiles = ceil_div(length, config.rows)
    with torch.cuda.device_of(q):
        rows = _rows(q, k, media, config.rows)
        delta_kernel[(tiles, batch * heads)](
            grad_out, out, delta, heads, length, *grad_out.stride(), *out.stride(),
            ROWS=config.rows, V_DIM=meaning["V_DIM"], V_WIDTH=meaning["V_WIDTH"], num_warps=config.num_warps,
        )  # fmt: skip
        inputs = (*rows, tensor_or(media.len, rows[0]), tensor_or(media.key_bias, lse), *_sizes(q, k))
        inputs += (media.tokens_per_media, media.scale)
        strides = (*grad_out.stride(), *q.stride(), *k.stride(), *v.stride())
        options = {**meaning, "ROWS": config.rows, "KEYS": config.keys}
        options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
        if q_grad:
            query_grad_kernel[(tiles, batch * heads)](grad_out, q, k, v, lse, delta, dq, *inputs, *strides, **options)
        if kv_grad:
            key_grad_kernel[(ceil_div(total, config.keys), batch * kv_heads)](
                grad_out, q, k, v, lse, delta, dk, dv, *inputs, *strides, **options
            )
    return dq, dk, dv


def _rows(q: Tensor, k: Tensor, media: Any, tile: int) -> tuple[Tensor, ...]:
    """first and last key of each row (B, Lq), and of each tile of rows (B, tiles); int32."""
    batch, length = q.shape[0], q.shape[2]
    first, last = (q.new_empty(batch, length, dtype=torch.int32) for _ in range(2))
    tiles = ceil_div(length, tile)
    tile_first, tile_last = (q.new_empty(batch, tiles, dtype=torch.int32) for _ in range(2))
    rows_kernel[(tiles, batch)](
        tensor_or(media.lo, first), tensor_or(media.hi, first), tensor_or(media.len, first),
        first, last, tile_first, tile_last, length, k.shape[2] // media.tokens_per_media, media.tokens_per_media,
        ROWS=tile, INTERVALS=media.lo is not None, LENGTHS=media.len is not None, EMPTY_ALL=media.empty_all,
    )  # fmt: skip
    return first, last, tile_first, tile_last


def _sizes(q: Tensor, k: Tensor) -> tuple[int, ...]:
    return q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2]


def _meaning(q: Tensor, v: Tensor, media: Any) -> dict[str, Any]:
    """The compile-time constants but the tile."""
    dims = {"DIM": q.shape[3], "V_DIM": v.shape[3]}
    widths = {name.replace("DIM", "WIDTH"): max(16, 1 << (dim - 1).bit_length()) for name, dim in dims.items()}
    flags = {"LENGTHS": media.len is not None, "BIAS": media.key_bias is not None, "EMPTY_ALL": media.empty_all}
    return {**dims, **widths, **flags, "PRECISION": "tf32" if products(q) == "tf32" else "ieee"}


def _config(q: Tensor, v: Tensor, backward: bool) -> Config:
    if q.device.type != "cuda":  # interpreted: fewer programs are faster, and both passes then round scores alike
        return Config(64, 64, 4, 1)
    return config_for(capability(q), products(q), max(q.shape[3], v.shape[3]), backward)
