"""Patch embedding, pixels to tokens: reference, backends, registration and public function.

Backends see pixels as (B, C, H, W) of any strides, whatever the layout, and a `Spec` spread over the last arguments.
With P = C*p*q entries of a patch, n patches of an image in row-major order, K of them taken, k prefix tokens:

- forward returns tokens (B, k + K, O): normalised patches, rounded to the dtype of products, times weight.flatten(1).T
  with float32 sums, plus bias, after the prefix; plus position (k + n, O) or (B, k + n, O) at the taken patches.
- backward(grad, ...) returns weight_grad (O, C, p, q), of weight's dtype or float32, or (0,) where not asked for, and
  token_grad (k + n, O), float32, or (0,): grad summed over the batch, at the patches that it came from. The gradients
  of bias, prefix and position follow from token_grad.
- scatter(rows, ...), for the rarely wanted gradients of pixels and of positions per image: rows (B, K, C*p*q) summed at
  the pixels (B, C, H, W) that they came from, over std. "cuda" has a kernel for it; elsewhere PyTorch ops do it.

Nothing but the inputs is saved for backward: patches are read from the pixels again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.ops import _patches
from vlmfast.ops._arguments import check_tensor, refuse
from vlmfast.ops._define import define, without_autocast
from vlmfast.ops._dispatch import Impl, choose, cuda_function
from vlmfast.ops._patches import LAYOUTS


class Spec(NamedTuple):
    """What decides the tokens besides tensors; mean and std as in `patch_embed`."""

    mean: Sequence[float] | None
    std: Sequence[float] | None
    pad: bool
    product_dtype: torch.dtype
    token_dtype: torch.dtype


def reference(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    layout: str = "NCHW",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
    keep: Tensor | None = None,
    pad: bool = False,
) -> Tensor:
    """The definition of patch_embed, the stem of a vision transformer; any floating dtype, float64 is the oracle."""
    x = _patches.normalise(pixels.permute(LAYOUTS[layout]), mean, std, weight.dtype)
    if pad:
        x = _patches.padded(x, weight)
    tokens = F.conv2d(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    count = 0 if prefix is None else len(prefix)
    if prefix is not None:
        tokens = torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)
    if position is not None:
        tokens = tokens + position
    if keep is not None:
        kept = keep[:, :, None].expand(-1, -1, tokens.shape[2])
        tokens = torch.cat([tokens[:, :count], tokens[:, count:].gather(1, kept)], dim=1)
    return tokens


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    layout: str = "NCHW",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
    keep: Tensor | None = None,
    pad: bool = False,
) -> Tensor:
    """Tokens of a vision transformer from its pixels, in one pass: normalise, embed patches, add prefix and positions.

    Equals, for NCHW and without `keep`::

        x = (pixels / 255 - mean) / std  # uint8; of floating-point pixels (pixels - mean) / std
        tokens = F.conv2d(x, weight, bias, stride=patch_size).flatten(2).transpose(1, 2)
        torch.cat([prefix.expand(B, -1, -1), tokens], dim=1) + position

    Args:
        pixels (B, C, H, W), or (B, H, W, C) with layout "NHWC": uint8, float32, float16 or bfloat16; any strides.
        weight (O, C, p, q): of a convolution whose stride is its kernel; float32, float16 or bfloat16.
        bias (O,): of weight's dtype.
        layout: "NCHW" or "NHWC".
        mean, std: C floats each, of pixels in [0, 1] where they are uint8; given together. None does not normalise, but
            uint8 pixels are divided by 255.
        prefix (k, O): tokens that come first, such as a class token or registers.
        position (k + n, O) or, per image, (B, k + n, O): added, n being the number of patches. Prefix and position may
            have another floating dtype than weight.
        keep (B, K): int64 indices in [0, n) of the patches to embed, in the order of the result; the others cost
            nothing. Indices outside raise IndexError on CPU tensors and are undefined on accelerators.
        pad: fill images up to whole patches, right and below, with zeros after normalisation. Without it, sides that
            the patch does not divide raise.
    Returns:
        tokens (B, k + n, O), or (B, k + K, O) with keep; of the dtype that the expression above has: weight's, or
        autocast's, promoted with those of prefix and position.
    Raises:
        TypeError: an argument is not of the type above, a tensor is sparse, nested or quantised, a dtype is not
            supported, or bias has not weight's.
        ValueError: shapes, devices or layout disagree, or mean comes without std; the message names the argument.
        RuntimeError: a second derivative is asked for, or the backend named by VLMFAST_BACKEND cannot run.
    Memory: the tokens; for backward nothing but the pixels as they came. On a CPU the memory of the last two calls'
    tokens, up to 1 GB each, is held for later calls. FLOPs: 2*B*K*O*C*p*q, and as many for weight's gradient.
    Repeatable bit for bit for a given number of threads.
    Source: Dosovitskiy et al. 2021, equation 1; patch dropout: Li et al. 2023 (FLIP).
    """
    _patches.check_pixels("patch_embed", "pixels", pixels, layout)
    if pixels.dim() != 4:
        raise ValueError(f"patch_embed: pixels must have 4 dimensions, {layout}; got {tuple(pixels.shape)}")
    pixels = pixels.permute(LAYOUTS[layout])
    _patches.check("patch_embed", pixels, weight, bias, mean, std, prefix, position, keep, pad)
    device = pixels.device.type
    product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    token_dtype = product_dtype
    for added in (prefix, position):
        if added is not None:
            token_dtype = torch.promote_types(token_dtype, added.dtype)
    spec = Spec(_floats(mean), _floats(std), pad, product_dtype, token_dtype)
    tokens: Tensor = _forward_op(pixels, weight, bias, prefix, position, keep, *spec)
    return tokens


def patch_embed_packed(
    images: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    layout: str = "NCHW",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    position: Tensor | None = None,
    pad: bool = False,
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Tokens of images of different sizes, one after the other without padding, as NaFlex and NaViT take them.

    Args:
        images: one or more of (C, H_i, W_i), or (H_i, W_i, C) with layout "NHWC"; one dtype and device.
        position (sum of n_i, O): added.
        weight, bias, mean, std, pad: as in `patch_embed`.
    Returns:
        tokens (sum of n_i, O), and each image's (rows, columns) of patches, n_i their product.
    Raises:
        TypeError, ValueError: as `patch_embed`; images differ in dtype, device or channels, or there are none.
    Memory: one copy of the images' pixels, in their dtype, and the tokens. Source: Dehghani et al. 2023 (NaViT);
    Tschannen et al. 2025 (SigLIP 2), section 2.4.2.
    """
    if not isinstance(images, Sequence):
        refuse("patch_embed_packed", "images", "a list of tensors", images)
    if not images:
        raise ValueError("patch_embed_packed: images must hold at least one image; got none")
    for index, image in enumerate(images):
        _patches.check_pixels("patch_embed_packed", f"images[{index}]", image, layout)
    check_tensor("patch_embed_packed", "weight", weight)
    if weight.dim() != 4:
        raise ValueError(f"patch_embed_packed: weight must be (O, C, p, q); got {tuple(weight.shape)}")
    for index, image in enumerate(images):
        if image.dim() != 3:
            raise ValueError(f"patch_embed_packed: images[{index}] must be {layout[1:]}; got {tuple(image.shape)}")
        if image.dtype != images[0].dtype or image.device != images[0].device:
            raise ValueError(
                f"patch_embed_packed: images[{index}] must be {images[0].dtype} on {images[0].device} as the first; "
                f"got {image.dtype} on {image.device}"
            )
    views = [image[None].permute(LAYOUTS[layout]) for image in images]
    for view in views:
        _patches.check("patch_embed_packed", view, weight, bias, mean, std, None, None, None, pad)
    grids = [_patches.grid(view, weight, pad) for view in views]
    sides = weight.shape[2:]
    if any(
        view.shape[2:] != (rows * sides[0], cols * sides[1]) for view, (rows, cols) in zip(views, grids, strict=True)
    ):
        # What is zero after normalisation may be no value of a pixel.
        views = [_patches.padded(_patches.normalise(view, mean, std, torch.float32), weight) for view in views]
        mean = std = None
    packed = torch.cat([_patches.patches(view, weight).flatten(0, 2) for view in views])
    tokens = patch_embed(packed, weight, bias, mean=mean, std=std).squeeze(1)
    if position is not None:
        check_tensor("patch_embed_packed", "position", position)
        if not position.is_floating_point():
            raise TypeError(f"patch_embed_packed: position must be floating point; got {position.dtype}")
        if position.shape != tokens.shape:
            raise ValueError(f"patch_embed_packed: position must be {tuple(tokens.shape)}; got {tuple(position.shape)}")
        tokens = tokens + position
    return tokens, grids


def _floats(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [float(value) for value in values]


def _taken_patches(pixels: Tensor, weight: Tensor, keep: Tensor | None, spec: Spec) -> Tensor:
    """Normalised patches (B, K, P) in the dtype of products."""
    x = _patches.normalise(pixels, spec.mean, spec.std, spec.product_dtype)
    grid = _patches.patches(_patches.padded(x, weight), weight)
    if keep is not None:
        images = torch.arange(len(keep), device=keep.device)[:, None]
        return grid[images, keep // grid.shape[2], keep % grid.shape[2]].flatten(2)
    return grid.flatten(3).flatten(1, 2)


def _taken_position(position: Tensor, keep: Tensor | None, count: int) -> Tensor:
    """position (k + n, O) or (B, k + n, O) at the prefix and the taken patches, (k + K, O) or (B, k + K, O)."""
    if keep is None:
        return position
    position = position.expand(len(keep), -1, -1)
    kept = keep[:, :, None].expand(-1, -1, position.shape[2])
    return torch.cat([position[:, :count], position[:, count:].gather(1, kept)], dim=1)


def reference_forward(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor | None,
    position: Tensor | None,
    keep: Tensor | None,
    *spec: Any,
) -> Tensor:
    asked = Spec(*spec)
    count = 0 if prefix is None else len(prefix)
    tokens = weight.new_empty(_patches.tokens_shape(pixels, weight, prefix, keep, asked.pad), dtype=asked.token_dtype)
    rows = weight.flatten(1).to(asked.product_dtype)
    tokens[:, count:] = _taken_patches(pixels, weight, keep, asked) @ rows.T
    if bias is not None:
        tokens[:, count:] += bias
    if prefix is not None:
        tokens[:, :count] = prefix
    if position is not None:
        tokens += _taken_position(position, keep, count)
    return tokens


def reference_backward(
    grad: Tensor,
    pixels: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    prefix_tokens: int,
    wants_weight_grad: bool,
    wants_token_grad: bool,
    *spec: Any,
) -> tuple[Tensor, Tensor]:
    asked = Spec(*spec)
    weight_grad, token_grad = weight.new_empty(0, dtype=torch.float32), weight.new_empty(0, dtype=torch.float32)
    if wants_weight_grad:
        taken = _taken_patches(pixels, weight, keep, asked).flatten(0, 1)
        rows = grad[:, prefix_tokens:].to(asked.product_dtype).reshape(len(taken), -1)
        weight_grad = (rows.T @ taken).view(weight.shape).float()
    if wants_token_grad:
        token_grad = _sum_over_batch(grad, pixels, weight, keep, prefix_tokens, asked.pad)
    return weight_grad, token_grad


def _sum_over_batch(
    grad: Tensor, pixels: Tensor, weight: Tensor, keep: Tensor | None, prefix_tokens: int, pad: bool
) -> Tensor:
    if keep is None:
        return grad.sum(0, dtype=torch.float32)
    height, width = _patches.grid(pixels, weight, pad)
    total = grad.new_zeros((prefix_tokens + height * width, grad.shape[2]), dtype=torch.float32)
    total[:prefix_tokens] = grad[:, :prefix_tokens].sum(0, dtype=torch.float32)
    # Unlike index_add_, repeatable on accelerators.
    rows = grad[:, prefix_tokens:].float().flatten(0, 1)
    total[prefix_tokens:].index_put_((keep.flatten(),), rows, accumulate=True)
    return total


def reference_scatter(
    rows: Tensor,
    keep: Tensor | None,
    patch: Sequence[int],
    size: Sequence[int],
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    batch, (_, height, width) = len(rows), patch
    grid = (-(-size[0] // height), -(-size[1] // width))
    if keep is not None:
        patches = keep + torch.arange(batch, device=keep.device)[:, None] * (grid[0] * grid[1])
        total = rows.new_zeros((batch * grid[0] * grid[1], rows.shape[2]), dtype=torch.float32)
        # Unlike scatter_add, repeatable on accelerators.
        rows = total.index_put_((patches.flatten(),), rows.float().flatten(0, 1), accumulate=True)
    images = rows.reshape(batch, *grid, *patch).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    images = images[:, :, : size[0], : size[1]].to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    for channel, spread in enumerate(std or ()):  # a tensor of std would be copied to a GPU, which waits
        images[:, channel] /= spread
    return images.to(dtype)


@dataclass(frozen=True)
class PatchEmbedImpl(Impl):
    scatter: Callable[..., Tensor] = reference_scatter


IMPLS = {
    "cpu": PatchEmbedImpl.cpu("patch_embed"),
    "triton": PatchEmbedImpl.triton("patch_embed"),
    "cuda": PatchEmbedImpl.cuda("patch_embed", scatter=cuda_function("patch_embed_scatter")),
    "torch": PatchEmbedImpl(reference_forward, reference_backward),
}


def _forward(pixels: Tensor, weight: Tensor, *args: Any) -> Tensor:
    keep, pad = args[3], args[6]
    if keep is not None and keep.device.type == "cpu":
        rows, columns = _patches.grid(pixels, weight, pad)
        low, high = keep.aminmax()
        if low < 0 or high >= rows * columns:
            raise IndexError(f"patch_embed: keep must be in [0, {rows * columns}); got {int(low)} to {int(high)}")
    with without_autocast():
        tokens: Tensor = choose("patch_embed", IMPLS, pixels).forward(pixels, weight, *args)
    return tokens


def _backward(grad: Tensor, pixels: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    with without_autocast():
        weight_grad, token_grad = choose("patch_embed", IMPLS, pixels).backward(grad, pixels, weight, *args)
    return weight_grad.to(weight.dtype), token_grad


def _scatter(rows: Tensor, *args: Any) -> Tensor:
    return choose("patch_embed", IMPLS, rows).scatter(rows, *args)


def _fake_forward(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor | None,
    position: Tensor | None,
    keep: Tensor | None,
    *spec: Any,
) -> Tensor:
    asked = Spec(*spec)
    return weight.new_empty(_patches.tokens_shape(pixels, weight, prefix, keep, asked.pad), dtype=asked.token_dtype)


def _fake_backward(
    grad: Tensor,
    pixels: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    prefix_tokens: int,
    wants_weight_grad: bool,
    wants_token_grad: bool,
    *spec: Any,
) -> tuple[Tensor, Tensor]:
    rows, columns = _patches.grid(pixels, weight, Spec(*spec).pad)
    tokens = (prefix_tokens + rows * columns, weight.shape[0])
    return (
        weight.new_empty(weight.shape if wants_weight_grad else (0,)),
        grad.new_empty(tokens if wants_token_grad else (0,), dtype=torch.float32),
    )


def _fake_scatter(rows: Tensor, *args: Any) -> Tensor:
    _, patch, size, _, dtype = args
    return rows.new_empty((rows.shape[0], patch[0], *size), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pixels, weight, bias, prefix, position, keep, *spec = inputs
    ctx.save_for_backward(pixels, weight, keep)
    ctx.spec = Spec(*spec)
    ctx.prefix_tokens = 0 if prefix is None else prefix.shape[0]
    ctx.shared_position = position is None or position.dim() == 2
    ctx.dtypes = [None if t is None else t.dtype for t in (bias, prefix, position)]


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    pixels, weight, keep = ctx.saved_tensors
    wants_pixels, wants_weight, wants_bias, wants_prefix, wants_position = ctx.needs_input_grad[:5]
    wants_tokens = wants_bias or wants_prefix or (wants_position and ctx.shared_position)
    count, spec = ctx.prefix_tokens, ctx.spec
    weight_grad, token_grad = _backward_op(grad, pixels, weight, keep, count, wants_weight, wants_tokens, *spec)
    position_grad = token_grad
    if wants_position and not ctx.shared_position:
        rows, columns = _patches.grid(pixels, weight, spec.pad)
        position_grad = grad if keep is None else _position_grad(grad, keep, count, rows * columns)
    bias_dtype, prefix_dtype, position_dtype = ctx.dtypes
    return (
        _pixel_grad(grad[:, count:], pixels, weight, keep, spec) if wants_pixels else None,
        weight_grad if wants_weight else None,
        token_grad[count:].sum(0).to(bias_dtype) if wants_bias else None,
        token_grad[:count].to(prefix_dtype) if wants_prefix else None,
        position_grad.to(position_dtype) if wants_position else None,
        *[None] * (1 + len(spec)),
    )


def _pixel_grad(grad: Tensor, pixels: Tensor, weight: Tensor, keep: Tensor | None, spec: Spec) -> Tensor:
    """(B, C, H, W), of pixels' dtype, from the gradient (B, K, O) of the patches' tokens."""
    rows = grad.to(spec.product_dtype) @ weight.flatten(1).to(spec.product_dtype)
    scattered: Tensor = _scatter_op(rows, keep, weight.shape[1:], pixels.shape[2:], spec.std, pixels.dtype)
    return scattered


def _position_grad(grad: Tensor, keep: Tensor, count: int, patches: int) -> Tensor:
    """(B, k + n, O) from the gradient (B, k + K, O) of tokens: positions are images of n lines, one patch each."""
    width = grad.shape[2]
    scattered = _scatter_op(grad[:, count:], keep, (1, 1, width), (patches, width), None, grad.dtype)
    return torch.cat([grad[:, :count], scattered[:, 0]], 1)


_SPEC = "float[]? mean, float[]? std, bool pad, ScalarType product_dtype, ScalarType token_dtype"
_forward_op = define(
    "patch_embed_forward",
    "(Tensor pixels, Tensor weight, Tensor? bias, Tensor? prefix, Tensor? position, Tensor? keep,"
    + _SPEC
    + ") -> Tensor",
    _forward,
    _fake_forward,
    _setup_context,
    _autograd,
)
_backward_op = define(
    "patch_embed_backward",
    "(Tensor grad, Tensor pixels, Tensor weight, Tensor? keep, SymInt prefix_tokens, bool wants_weight_grad,"
    " bool wants_token_grad," + _SPEC + ") -> (Tensor weight_grad, Tensor token_grad)",
    _backward,
    _fake_backward,
)
_scatter_op = define(
    "patch_embed_scatter",
    "(Tensor rows, Tensor? keep, SymInt[] patch, SymInt[] size, float[]? std, ScalarType dtype) -> Tensor",
    _scatter,
    _fake_scatter,
)
