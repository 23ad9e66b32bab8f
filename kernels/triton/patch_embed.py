"""Triton kernels of patch_embed and their launchers; the contract is in vlmfast/ops/patch_embed.py.

Both products read patches straight from the pixels: a tile is gathered by strides, normalised and rounded on its
way into the product. Entries of a patch come in the order of the pixels' memory, and so do the columns of the weight.
The weight's gradient is summed over ranges of tokens that are added in a fixed order: no atomics.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vlmfast.kernels.pairs import Config, descriptor
from vlmfast.kernels.products import DTYPES, capability, ceil_div, loaded, precision, rounded

import triton
import triton.language as tl

MIN_SPLIT = 1024
"""Tokens, at least, that a program of the weight's gradient sums over."""
PROGRAMS = 512
"""Programs that the weight's gradient is split into at most; not the device's number, so that results are the same."""


@functools.cache
def config_for(capability: int, wide: bool, backward: bool) -> Config:
    """A fixed choice by compute capability (major * 10 + minor); `wide`: operands are float32.

    Such that no kernel spills registers (tests/kernels/resources.json), except for tokens on 90. That was measured: the
    best tiles that spill none, 64 x 256, took 0.38 ms where these take 0.25 (256 images, /16, bfloat16, H100).
    """
    if capability == 90 and not wide:
        return Config(128, 128, 64, 8, 3) if backward else Config(128, 256, 64, 8, 3, descriptors=True)
    return Config(
        block_m=64 if wide and capability not in (90, 100) else 128,
        block_n=64 if wide else 128,
        block_k=32,
        num_warps=8,
        num_stages=2 if wide else 3,
    )


@triton.jit
def corners(
    rows, keep, total, taken, columns, height, width, sb, sh, sw,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Of tokens: image, patch, offset of the patch's first pixel, and the image's rows and columns from there on."""
    image = (rows // taken).to(tl.int64)
    if KEEP:  # noqa: SIM108  a branch of the compiler's
        patch = tl.load(keep + rows, mask=rows < total, other=0).to(tl.int32)
    else:
        patch = rows % taken
    top, left = patch // columns * PATCH_H, patch % columns * PATCH_W
    first = image * sb + top.to(tl.int64) * sh + left.to(tl.int64) * sw
    return image, patch, first, height - top, width - left


@triton.jit
def patch_tile(
    pixels, affine, first, below, right, rows, k, total, sc, sh, sw,
    CHANNELS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, PACKED: tl.constexpr,
    NORMALISE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Entries k of the patches of the given tokens, normalised, float32; 0 outside of images, patches and tokens."""
    if PACKED:  # a row of a patch is one run of memory: k is (i, j, c)
        i, run = k // (PATCH_W * CHANNELS), k % (PATCH_W * CHANNELS)
        j, c = run // CHANNELS, run % CHANNELS
        at = i.to(tl.int64) * sh + run
    else:  # k is (c, i, j)
        c, i, j = k // (PATCH_H * PATCH_W), k // PATCH_W % PATCH_H, k % PATCH_W
        at = c.to(tl.int64) * sc + i.to(tl.int64) * sh + j.to(tl.int64) * sw
    entries = k < CHANNELS * PATCH_H * PATCH_W
    inside = (rows < total)[:, None] & entries[None, :]
    if PAD:
        inside &= (i[None, :] < below[:, None]) & (j[None, :] < right[:, None])
    x = tl.load(pixels + (first[:, None] + at[None, :]), mask=inside, other=0).to(tl.float32)
    if NORMALISE:
        factor = tl.load(affine + c, mask=entries, other=0.0)
        shift = tl.load(affine + CHANNELS + c, mask=entries, other=0.0)
        x = tl.where(inside, x * factor[None, :] + shift[None, :], 0.0)
    return x


@triton.jit
def tokens_kernel(
    pixels, affine, weight, bias, position, keep, tokens,
    total, taken, columns, height, width, embed, prefix, sb, sc, sh, sw, position_image, position_token, position_embed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHANNELS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, PACKED: tl.constexpr,
    NORMALISE: tl.constexpr, PAD: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr, POSITION: tl.constexpr,
    PRODUCTS: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One tile of the tokens of patches; weight (embed, entries), in their order, has the dtype of products."""
    DIM: tl.constexpr = CHANNELS * PATCH_H * PATCH_W
    tiles_across = tl.cdiv(embed, BLOCK_N)
    rows = tl.program_id(0) // tiles_across * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % tiles_across * BLOCK_N
    cols = col + tl.arange(0, BLOCK_N)
    image, patch, first, below, right = corners(
        rows, keep, total, taken, columns, height, width, sb, sh, sw, PATCH_H, PATCH_W, KEEP
    )
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, DIM, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = patch_tile(
            pixels, affine, first, below, right, rows, k, total, sc, sh, sw,
            CHANNELS, PATCH_H, PATCH_W, PACKED, NORMALISE, PAD,
        )  # fmt: skip
        if DESCRIPTORS:
            w = weight.load([col, start]).T
        else:
            w_inside = (k < DIM)[:, None] & (cols < embed)[None, :]
            w = tl.load(weight + cols[None, :].to(tl.int64) * DIM + k[:, None], mask=w_inside, other=0.0)
        sums = tl.dot(rounded(x, PRODUCTS), loaded(w), sums, input_precision=PRECISION)
    inside = (rows < total)[:, None] & (cols < embed)[None, :]
    if BIAS:
        sums += tl.load(bias + cols, mask=cols < embed, other=0.0).to(tl.float32)[None, :]
    if POSITION:
        at = image * position_image + (prefix + patch).to(tl.int64) * position_token
        places = (position + at)[:, None] + cols[None, :].to(tl.int64) * position_embed
        sums += tl.load(places, mask=inside, other=0.0).to(tl.float32)
    out = (rows + (image + 1) * prefix) * embed
    stored: tl.constexpr = tokens.dtype.element_ty
    tl.store((tokens + out)[:, None] + cols[None, :], rounded(sums, stored).to(stored), mask=inside)


@triton.jit
def weight_grad_kernel(
    grad, pixels, affine, keep, partial,
    total, per_split, taken, columns, height, width, embed, prefix, sb, sc, sh, sw, grad_image, grad_token, grad_embed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHANNELS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, PACKED: tl.constexpr,
    NORMALISE: tl.constexpr, PAD: tl.constexpr, KEEP: tl.constexpr, PRODUCTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of partial (splits, embed, entries): the weight's gradient over `per_split` tokens."""
    DIM: tl.constexpr = CHANNELS * PATCH_H * PATCH_W
    tiles_across: tl.constexpr = (DIM + BLOCK_N - 1) // BLOCK_N
    split = tl.program_id(1)
    embeds = tl.program_id(0) // tiles_across * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tiles_across * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, total), BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        image, _, first, below, right = corners(
            rows, keep, total, taken, columns, height, width, sb, sh, sw, PATCH_H, PATCH_W, KEEP
        )
        x = patch_tile(
            pixels, affine, first, below, right, rows, k, total, sc, sh, sw,
            CHANNELS, PATCH_H, PATCH_W, PACKED, NORMALISE, PAD,
        )  # fmt: skip
        at = image * grad_image + (prefix + rows % taken).to(tl.int64) * grad_token
        at = embeds[:, None].to(tl.int64) * grad_embed + at[None, :]
        g = tl.load(grad + at, mask=(embeds < embed)[:, None] & (rows < total)[None, :], other=0.0).to(tl.float32)
        sums = tl.dot(rounded(g, PRODUCTS), rounded(x, PRODUCTS), sums, input_precision=PRECISION)
    out = (split.to(tl.int64) * embed + embeds) * DIM
    inside = (embeds < embed)[:, None] & (k < DIM)[None, :]
    tl.store(partial + out[:, None] + k[None, :], sums, mask=inside)


def forward(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor | None,
    position: Tensor | None,
    keep: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    pad: bool,
    product_dtype: torch.dtype,
    token_dtype: torch.dtype,
) -> Tensor:
    """tokens (B, k + K, O)."""
    batch, embed = pixels.shape[0], weight.shape[0]
    count = 0 if prefix is None else prefix.shape[0]
    rows, columns = _grid(pixels, weight)
    taken = rows * columns if keep is None else keep.shape[1]
    tokens = pixels.new_empty((batch, count + taken, embed), dtype=token_dtype)
    packed = _is_packed(pixels)
    operand = weight.permute(0, 2, 3, 1) if packed else weight
    operand = operand.to(product_dtype).flatten(1).contiguous()
    place = (0, 0, 0) if position is None else position.expand(batch, -1, -1).stride()
    config = config_for(capability(pixels), product_dtype == torch.float32, backward=False)
    unread = operand  # stands for what is not there
    if config.descriptors:
        operand = descriptor(operand, config.block_n, config)
    programs = ceil_div(batch * taken, config.block_m) * ceil_div(embed, config.block_n)
    with torch.cuda.device_of(pixels):
        tokens_kernel[(programs,)](
            pixels, _affine(pixels, mean, std), operand, unread if bias is None else bias,
            unread if position is None else position, unread if keep is None else keep.contiguous(), tokens,
            batch * taken, taken, columns, *pixels.shape[2:], embed, count, *pixels.stride(), *place,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            **_meaning(pixels, weight, mean, keep, packed), BIAS=bias is not None, POSITION=position is not None,
            PRODUCTS=DTYPES[product_dtype], PRECISION=precision(pixels), DESCRIPTORS=config.descriptors,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if prefix is not None:
            first = prefix.float()
            tokens[:, :count] = first if position is None else first + position[..., :count, :].float()
    return tokens


def backward(
    grad: Tensor,
    pixels: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    prefix_tokens: int,
    wants_weight_grad: bool,
    wants_token_grad: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    pad: bool,
    product_dtype: torch.dtype,
    token_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """weight_grad (O, C, p, q), token_grad (k + n, O), float32; (0,) where not wanted."""
    weight_grad, token_grad = pixels.new_empty(0, dtype=torch.float32), pixels.new_empty(0, dtype=torch.float32)
    with torch.cuda.device_of(pixels):
        if wants_weight_grad:
            weight_grad = _weight_grad(grad, pixels, weight, keep, prefix_tokens, mean, std, product_dtype)
        if wants_token_grad:
            rows, columns = _grid(pixels, weight)
            token_grad = _token_grad(grad, keep, prefix_tokens, rows * columns)
    return weight_grad, token_grad


def _weight_grad(
    grad: Tensor,
    pixels: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    prefix_tokens: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    product_dtype: torch.dtype,
) -> Tensor:
    embed, channels, patch_h, patch_w = weight.shape
    taken = grad.shape[1] - prefix_tokens
    total = grad.shape[0] * taken
    packed = _is_packed(pixels)
    config = config_for(capability(pixels), product_dtype == torch.float32, backward=True)
    tiles = ceil_div(embed, config.block_m) * ceil_div(weight[0].numel(), config.block_n)
    splits = max(1, min(PROGRAMS // tiles, total // MIN_SPLIT))
    per_split = ceil_div(ceil_div(total, splits), config.block_k) * config.block_k
    splits = ceil_div(total, per_split)
    partial = pixels.new_empty((splits, embed, weight[0].numel()), dtype=torch.float32)
    weight_grad_kernel[(tiles, splits)](
        grad, pixels, _affine(pixels, mean, std), grad if keep is None else keep.contiguous(), partial,
        total, per_split, taken, _grid(pixels, weight)[1], *pixels.shape[2:], embed, prefix_tokens, *pixels.stride(),
        *grad.stride(), BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        **_meaning(pixels, weight, mean, keep, packed), PRODUCTS=DTYPES[product_dtype], PRECISION=precision(pixels),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    total_grad = partial.sum(0)
    if packed:
        return total_grad.view(embed, patch_h, patch_w, channels).permute(0, 3, 1, 2).contiguous()
    return total_grad.view(weight.shape)


def _token_grad(grad: Tensor, keep: Tensor | None, prefix_tokens: int, patches: int) -> Tensor:
    if keep is None:
        return grad.sum(0, dtype=torch.float32)
    total = grad.new_zeros((prefix_tokens + patches, grad.shape[2]), dtype=torch.float32)
    total[:prefix_tokens] = grad[:, :prefix_tokens].sum(0, dtype=torch.float32)
    # Unlike index_add_, repeatable on accelerators.
    rows = grad[:, prefix_tokens:].float().flatten(0, 1)
    return total.index_put_((keep.flatten() + prefix_tokens,), rows, accumulate=True)


def _grid(pixels: Tensor, weight: Tensor) -> tuple[int, int]:
    """Rows and columns of patches; sides that the patch does not divide are here only to be padded."""
    return ceil_div(pixels.shape[2], weight.shape[2]), ceil_div(pixels.shape[3], weight.shape[3])


def _is_packed(pixels: Tensor) -> bool:
    return pixels.stride(1) == 1 and pixels.stride(3) == pixels.shape[1]


def _meaning(
    pixels: Tensor, weight: Tensor, mean: Sequence[float] | None, keep: Tensor | None, packed: bool
) -> dict[str, Any]:
    """The compile-time constants of patch_tile."""
    channels, patch_h, patch_w = weight.shape[1:]
    return {
        "CHANNELS": channels, "PATCH_H": patch_h, "PATCH_W": patch_w, "PACKED": packed,
        "NORMALISE": mean is not None or pixels.dtype == torch.uint8,
        "PAD": bool(pixels.shape[2] % patch_h or pixels.shape[3] % patch_w), "KEEP": keep is not None,
    }  # fmt: skip


def _affine(pixels: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """(2, C) factor and shift that normalise a pixel."""
    channels = pixels.shape[1]
    return _affine_on(
        tuple(mean or [0.0] * channels), tuple(std or [1.0] * channels), pixels.dtype == torch.uint8, pixels.device
    )


@functools.cache
def _affine_on(mean: tuple[float, ...], std: tuple[float, ...], bytes_: bool, device: torch.device) -> Tensor:
    """Kept on the device: later calls neither copy nor wait."""
    factor = [1 / (255 * s) if bytes_ else 1 / s for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor([factor, shift], dtype=torch.float32, device=device)
