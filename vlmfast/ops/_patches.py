"""The geometry of patches and the checks of what patch_embed is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.ops._arguments import DTYPES, check_flag, check_floating, check_string, check_tensor, refuse

LAYOUTS = {"NCHW": (0, 1, 2, 3), "NHWC": (0, 3, 1, 2)}


def normalise(pixels: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, dtype: torch.dtype) -> Tensor:
    """Pixels (B, C, H, W) as patch_embed multiplies them: uint8 from [0, 255] to [0, 1]; then less mean, over std."""
    x = pixels.to(torch.promote_types(dtype, torch.float32))
    if pixels.dtype == torch.uint8:
        x = x / 255
    if mean is not None and std is not None:
        x = (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]
    return x.to(dtype)


def grid(pixels: Tensor, weight: Tensor, pad: bool) -> tuple[int, int]:
    """Rows and columns of patches of pixels (B, C, H, W)."""
    extra = (weight.shape[2] - 1, weight.shape[3] - 1) if pad else (0, 0)
    return (pixels.shape[2] + extra[0]) // weight.shape[2], (pixels.shape[3] + extra[1]) // weight.shape[3]


def padded(x: Tensor, weight: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[3] % weight.shape[3], 0, -x.shape[2] % weight.shape[2]))


def patches(x: Tensor, weight: Tensor) -> Tensor:
    """A view (B, rows, columns, C, p, q) of x (B, C, rows * p, columns * q)."""
    p, q = weight.shape[2:]
    return x.unfold(2, p, p).unfold(3, q, q).permute(0, 2, 3, 1, 4, 5)


def check(
    op: str,
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    prefix: Tensor | None,
    position: Tensor | None,
    keep: Tensor | None,
    pad: bool,
) -> None:
    """Of pixels (B, C, H, W), whose type `check_pixels` has seen."""
    if pixels.dtype not in (torch.uint8, *DTYPES):
        raise TypeError(f"{op}: pixels must be uint8, float32, float16 or bfloat16; got {pixels.dtype}")
    check_floating(op, "weight", weight)
    check_flag(op, "pad", pad)
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"{op}: weight must be (O, C, p, q) and not empty; got {tuple(weight.shape)}")
    batch, channels, *sides = pixels.shape
    width, patch = weight.shape[0], tuple(weight.shape[2:])
    if channels != weight.shape[1]:
        raise ValueError(f"{op}: pixels must have weight's {weight.shape[1]} channels; got {channels}; see layout")
    if 0 in pixels.shape:
        raise ValueError(f"{op}: pixels must not be empty; got {batch} images of {tuple(sides)}")
    if not pad and (sides[0] % patch[0] or sides[1] % patch[1]):
        raise ValueError(f"{op}: pixels must have sides that the patch {patch} divides, or pad; got {tuple(sides)}")
    if bias is not None:
        check_tensor(op, "bias", bias)
        if bias.dtype != weight.dtype:
            raise TypeError(f"{op}: bias must have weight's dtype {weight.dtype}; got {bias.dtype}")
        if bias.shape != (width,):
            raise ValueError(f"{op}: bias must be ({width},); got {tuple(bias.shape)}")
    if (mean is None) != (std is None):
        raise ValueError(f"{op}: mean and std must be given together; got mean {mean} and std {std}")
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        check_numbers(op, name, values)
        if len(values) != channels:
            raise ValueError(f"{op}: {name} must have {channels} values, one per channel; got {len(values)}")
    if std is not None and 0 in std:
        raise ValueError(f"{op}: std must not be 0; got {list(std)}")
    count = 0
    if prefix is not None:
        check_floating(op, "prefix", prefix)
        if prefix.dim() != 2 or prefix.shape[1] != width:
            raise ValueError(f"{op}: prefix must be (tokens, {width}); got {tuple(prefix.shape)}")
        count = prefix.shape[0]
    rows, columns = grid(pixels, weight, pad)
    if position is not None:
        check_floating(op, "position", position)
        shape = (count + rows * columns, width)
        each = position.dim() == 3 and position.shape[0] == batch
        if not (each or position.dim() == 2) or position.shape[-2] != shape[0] or position.shape[-1] != shape[1]:
            raise ValueError(f"{op}: position must be {shape} or {(batch, *shape)}; got {tuple(position.shape)}")
    if keep is not None:
        check_tensor(op, "keep", keep)
        if keep.dtype != torch.int64:
            raise TypeError(f"{op}: keep must be int64; got {keep.dtype}")
        if keep.dim() != 2 or keep.shape[0] != batch or keep.shape[1] == 0:
            raise ValueError(f"{op}: keep must be ({batch}, patches to keep) and not empty; got {tuple(keep.shape)}")
    tensors = {"weight": weight, "bias": bias, "prefix": prefix, "position": position, "keep": keep}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != pixels.device:
            raise ValueError(f"{op}: {name} must be on pixels' device {pixels.device}; got {tensor.device}")


def check_pixels(op: str, name: str, pixels: Tensor, layout: str) -> None:
    """That they are a tensor, and layout one of the two."""
    check_string(op, "layout", layout)
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout must be NCHW or NHWC; got {layout!r}")
    check_tensor(op, name, pixels)


def check_numbers(op: str, name: str, values: Sequence[float]) -> None:
    """A sequence of numbers, or a tensor or array of one dimension."""
    if not hasattr(values, "__len__") or not hasattr(values, "__iter__") or isinstance(values, str | bytes | dict):
        refuse(op, name, "a sequence of numbers", values)
    for number, value in enumerate(values):
        if not hasattr(value, "__float__"):
            refuse(op, f"{name}[{number}]", "a number", value)


def tokens_shape(
    pixels: Tensor, weight: Tensor, prefix: Tensor | None, keep: Tensor | None, pad: bool
) -> tuple[int, int, int]:
    rows, columns = grid(pixels, weight, pad)
    taken = rows * columns if keep is None else keep.shape[1]
    return pixels.shape[0], (0 if prefix is None else prefix.shape[0]) + taken, weight.shape[0]
