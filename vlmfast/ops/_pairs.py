"""What the losses over pairs of features share: checks of their inputs, and which pairs are positives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmfast.ops._arguments import DTYPES, check_integers, check_number, check_tensor

Groups = tuple[Tensor, Tensor]
LARGEST = torch.finfo(torch.float32).max


def check_features(op: str, image: Tensor, text: Tensor) -> tuple[int, int]:
    """(n, D) and (N, D) of one supported dtype and device, neither empty; returns n and N."""
    check_tensor(op, "image", image)
    check_tensor(op, "text", text)
    shape, others = image.shape, text.shape  # once, as it costs as much as the rest of the checks
    for name, found, features in (("image", shape, image), ("text", others, text)):
        if len(found) != 2 or 0 in found:
            raise ValueError(f"{op}: {name} must be (batch, dim) and not empty; got {tuple(found)}")
        if features.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} must be float32, float16 or bfloat16; got {features.dtype}")
    if image.dtype != text.dtype:
        raise TypeError(f"{op}: text must have image's dtype {image.dtype}; got {text.dtype}")
    if shape[1] != others[1]:
        raise ValueError(f"{op}: text must have image's dim {shape[1]}; got {tuple(others)}")
    _check_device(op, "text", text, image)
    return shape[0], others[0]


def scalar(op: str, name: str, value: Tensor | float, image: Tensor) -> Tensor:
    """A number or a one-element tensor as a 0-dim tensor on image's device, gradient kept."""
    if not isinstance(value, Tensor):
        check_number(op, name, value)
        value = math.inf if value > LARGEST else -math.inf if value < -LARGEST else value
        return torch.full((), value, dtype=torch.float32, device=image.device)
    check_tensor(op, name, value)
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point; got {value.dtype}")
    if value.numel() != 1:
        raise ValueError(f"{op}: {name} must have one element; got {tuple(value.shape)}")
    _check_device(op, name, value, image)
    return value.reshape(())


def check_label_offset(op: str, label_offset: int, images: int, texts: int) -> None:
    if label_offset < 0 or label_offset + images > texts:
        raise ValueError(
            f"{op}: label_offset must be at least 0 and leave text a row for each of the {images} images; "
            f"got label_offset {label_offset} with {texts} rows of text"
        )


def check_row_mask(op: str, row_mask: Tensor, image: Tensor) -> None:
    check_tensor(op, "row_mask", row_mask)
    if row_mask.dtype != torch.bool:
        raise TypeError(f"{op}: row_mask must be bool; got {row_mask.dtype}")
    if row_mask.shape != image.shape[:1]:
        raise ValueError(f"{op}: row_mask must be ({image.shape[0]},), one per image; got {tuple(row_mask.shape)}")
    _check_device(op, "row_mask", row_mask, image)


def group_codes(op: str, groups: Groups, image: Tensor, text: Tensor) -> Groups:
    """(row_ids, col_ids) as int32 codes: equal where the ids are, -1 for a row's id that no column has.

    No synchronisation with the device.
    """
    if not isinstance(groups, tuple | list) or len(groups) != 2:
        raise TypeError(f"{op}: groups must be (row_ids, col_ids); got {type(groups).__name__}")
    for name, ids, features in (("row_ids", groups[0], image), ("col_ids", groups[1], text)):
        check_integers(op, f"groups {name}", ids)
        if ids.shape != features.shape[:1]:
            raise ValueError(f"{op}: groups {name} must be ({features.shape[0]},); got {tuple(ids.shape)}")
        _check_device(op, f"groups {name}", ids, image)
    rows, cols = groups[0].long(), groups[1].long()
    ids = cols.sort().values
    codes = torch.searchsorted(ids, rows).clamp(max=len(ids) - 1)
    codes = torch.where(ids[codes] == rows, codes, -1)
    return codes.int(), torch.searchsorted(ids, cols).int()


def count_matches(codes: Tensor, among: Tensor) -> Tensor:
    """(len(codes),) int64: how many entries of `among` equal each code."""
    ordered = among.sort().values
    return torch.searchsorted(ordered, codes, right=True) - torch.searchsorted(ordered, codes)


def positives(image: Tensor, text: Tensor, label_offset: int, codes: Groups | None) -> Tensor:
    """(n, N) bool, for references."""
    if codes is not None:
        return codes[0][:, None] == codes[1][None, :]
    rows = torch.arange(image.shape[0], device=image.device)
    return rows[:, None] + label_offset == torch.arange(text.shape[0], device=image.device)


def _check_device(op: str, name: str, tensor: Tensor, image: Tensor) -> None:
    if tensor.device != image.device:
        raise ValueError(f"{op}: {name} must be on image's device {image.device}; got {tensor.device}")
