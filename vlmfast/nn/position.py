"""Position embeddings of one grid of patches resampled for others, as F.interpolate does it."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MODES = ("bilinear", "bicubic")


def interpolate_position(
    position: Tensor,
    size: tuple[int, int],
    *,
    old_size: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    mode: str = "bicubic",
    antialias: bool = False,
) -> Tensor:
    """Position embeddings for a grid of another size; equals F.interpolate with align_corners=False.

    Interpolation is linear and separable: one small matrix for rows and one for columns, made once for each pair of
    sizes and kept, so that nothing is read back from the device.

    Args:
        position (k + h * w, D): k tokens that have no place in the grid, then the grid row by row; floating point.
        size: (H, W) of the new grid.
        old_size: (h, w); None is a square.
        prefix_tokens: k; they are passed through.
        mode: "bilinear" or "bicubic".
        antialias: as in F.interpolate, for smaller grids.
    Returns:
        position (k + H * W, D): of position's dtype, computed in float32 or wider, under autocast too; position itself
        if the sizes are the same.
    Raises:
        ValueError: position has not k + h * w rows, prefix_tokens is negative, or mode or a size is none.
    FLOPs: 2*H*w*D*(h + W), and as many for the gradient.
    """
    if position.dim() != 2:
        raise ValueError(f"interpolate_position: position must be (tokens, width); got {tuple(position.shape)}")
    if prefix_tokens < 0:
        raise ValueError(f"interpolate_position: prefix_tokens must be at least 0; got {prefix_tokens}")
    height, width = _old_size("interpolate_position", position.shape[0] - prefix_tokens, old_size)
    _check_mode("interpolate_position", mode)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"interpolate_position: size must be two positive numbers; got {tuple(size)}")
    if tuple(size) == (height, width):
        return position
    dtype = torch.promote_types(position.dtype, torch.float32)
    # A graph, or a fake tensor, must not meet what another or the eager program made.
    kept = not torch.compiler.is_compiling() and type(position) in (Tensor, nn.Parameter)
    matrix = _kept_matrix if kept else _matrix
    rows = matrix(size[0], height, mode, antialias, position.device, dtype)
    columns = matrix(size[1], width, mode, antialias, position.device, dtype)
    with torch.autocast(position.device.type, enabled=False):
        grid = position[prefix_tokens:].to(dtype).unflatten(0, (height, width))
        grid = columns @ (rows @ grid.flatten(1)).unflatten(1, (width, -1))
    resampled = grid.flatten(0, 1).to(position.dtype)
    return torch.cat([position[:prefix_tokens], resampled]) if prefix_tokens else resampled


def interpolate_position_per_image(
    position: Tensor,
    sizes: Tensor,
    length: int,
    *,
    old_size: tuple[int, int] | None = None,
    mode: str = "bilinear",
) -> Tensor:
    """Position embeddings for a batch of images with grids of their own, padded, with sizes that stay on the device.

    Row i equals F.interpolate of position to sizes[i] with antialias=True, and after its last token repeats its first,
    as transformers' Siglip2 has it.

    Args:
        position (h * w, D): a grid row by row; floating point.
        sizes (B, 2): integers, (H_i, W_i) of each grid, with H_i * W_i <= length.
        length: L, tokens of an image.
        old_size: (h, w); None is a square.
        mode: "bilinear" or "bicubic".
    Returns:
        position (B, L, D): of position's dtype, computed in float32 or wider, under autocast too.
    Raises:
        ValueError: position has not h * w rows, mode is none, sizes has another shape; on CPU tensors outside
            torch.compile also where a size is below 1 or its grid above length. On accelerators that is undefined.
    Memory: 4*B*L*h*w bytes in passing, nothing is kept for backward but sizes. FLOPs: 2*B*L*h*w*D, and as many for the
    gradient.
    Source: Tschannen et al. 2025 (SigLIP 2), section 2.4.2.
    """
    name = "interpolate_position_per_image"
    if position.dim() != 2:
        raise ValueError(f"{name}: position must be (tokens, width); got {tuple(position.shape)}")
    grid = _old_size(name, position.shape[0], old_size)
    _check_mode(name, mode)
    if sizes.dim() != 2 or sizes.shape[1] != 2 or sizes.is_floating_point():
        raise ValueError(f"{name}: sizes must be integers (images, 2); got {sizes.dtype} {tuple(sizes.shape)}")
    if sizes.device != position.device:
        raise ValueError(f"{name}: sizes must be on position's device {position.device}; got {sizes.device}")
    if sizes.device.type == "cpu" and not torch.compiler.is_compiling():
        for size in sizes.tolist():
            if min(size) < 1 or size[0] * size[1] > length:
                raise ValueError(f"{name}: sizes must be positive with at most {length} patches; got {size}")
    resampled: Tensor = checkpoint(
        _resample, position, sizes, length, grid, mode, use_reentrant=False, preserve_rng_state=False
    )
    return resampled


def _resample(position: Tensor, sizes: Tensor, length: int, grid: tuple[int, int], mode: str) -> Tensor:
    dtype = torch.promote_types(position.dtype, torch.float32)
    token = torch.arange(length, device=sizes.device)
    height, width = sizes[:, :1], sizes[:, 1:]
    token = torch.where(token < height * width, token, 0)
    rows = _antialiased(token // width, height, grid[0], mode, dtype)
    columns = _antialiased(token % width, width, grid[1], mode, dtype)
    weights = (rows[..., :, None] * columns[..., None, :]).flatten(2)
    with torch.autocast(position.device.type, enabled=False):
        return (weights @ position.to(dtype)).to(position.dtype)


def _antialiased(index: Tensor, new: Tensor, old: int, mode: str, dtype: torch.dtype) -> Tensor:
    """Weights (..., old) of old entries in entries `index` (...) of `new`: PIL's filters, which F.interpolate takes."""
    # In float32 the distance of two places would be off by roundings of their coordinates.
    scale = old / new.double()
    centre = (index + 0.5) * scale
    entries = torch.arange(old, device=index.device) + 0.5
    x = ((entries - centre[..., None]) / scale.clamp(min=1)[..., None]).abs()
    if mode == "bilinear":
        weights = (1 - x).clamp(min=0)
    else:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    return (weights / weights.sum(-1, keepdim=True)).to(dtype)


def _matrix(new: int, old: int, mode: str, antialias: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(new, old): what F.interpolate along one dimension multiplies by."""
    # Rows stay as many: of images one pixel wide, PyTorch's antialiased columns are wrong.
    identity = torch.eye(old, dtype=torch.float64, device="cpu")[None, None]
    matrix = F.interpolate(identity, (old, new), mode=mode, align_corners=False, antialias=antialias)
    return matrix[0, 0].T.to(device, dtype).contiguous()


@lru_cache(maxsize=512)
def _kept_matrix(new: int, old: int, mode: str, antialias: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    # What is made in inference mode could not serve training later.
    with torch.inference_mode(False):
        return _matrix(new, old, mode, antialias, device, dtype)


def _old_size(name: str, tokens: int, old_size: tuple[int, int] | None) -> tuple[int, int]:
    side = math.isqrt(max(tokens, 0))
    height, width = old_size or (side, side)
    if height * width != tokens or min(height, width) < 1:
        given = "a square, as old_size is not given" if old_size is None else f"{height} * {width}"
        raise ValueError(f"{name}: position must have a row for each of {given}, after prefix_tokens; got {tokens}")
    return height, width


def _check_mode(name: str, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"{name}: mode must be bilinear or bicubic; got {mode!r}")
