"""What the losses over pairs of features share: checks of their inputs, and which pairs are positives."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Groups = tuple[Tensor, Tensor]


def check_features(op: str, image: Tensor, text: Tensor) -> None:
    """(n, D) and (N, D) of one supported dtype and device, neither empty."""
    for name, features in (("image", image), ("text", text)):
        if features.dim() != 2 or 0 in features.shape:
            raise ValueError(f"{op}: {name} must be (batch, dim) and not empty; got {tuple(features.shape)}")
        if features.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} must be float32, float16 or bfloat16; got {features.dtype}")
    if image.dtype != text.dtype:
        raise TypeError(f"{op}: text must have image's dtype {image.dtype}; got {text.dtype}")
    if image.shape[1] != text.shape[1]:
        raise ValueError(f"{op}: text must have image's dim {image.shape[1]}; got {tuple(text.shape)}")
    _check_device(op, "text", text, image)


def scalar(op: str, name: str, value: Tensor | float, image: Tensor) -> Tensor:
    """A float or a one-element tensor as a 0-dim tensor on image's device, gradient kept."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.float32, device=image.device)
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point; got {value.dtype}")
    if value.numel() != 1:
        raise ValueError(f"{op}: {name} must have one element; got {tuple(value.shape)}")
    _check_device(op, name, value, image)
    return value.reshape(())


def check_label_offset(op: str, label_offset: int, image: Tensor, text: Tensor) -> None:
    if label_offset < 0 or label_offset + image.shape[0] > text.shape[0]:
        raise ValueError(
            f"{op}: label_offset must be at least 0 and leave text a row for each of the {image.shape[0]} images; "
            f"got label_offset {label_offset} with {text.shape[0]} rows of text"
        )


def check_row_mask(op: str, row_mask: Tensor, image: Tensor) -> None:
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
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"{op}: groups {name} must be an integer tensor; got {getattr(ids, 'dtype', type(ids))}")
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
