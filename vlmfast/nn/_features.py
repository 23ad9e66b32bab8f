"""What the contrastive losses share: sizes of ranks, features of two dtypes under autocast, and float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfast import distributed
from vlmfast.nn._sizes import check_integer
from vlmfast.ops import info_nce, sigmoid_loss
from vlmfast.ops.info_nce import reference as info_nce_reference
from vlmfast.ops.sigmoid_loss import reference as sigmoid_loss_reference


def check_ranks(name: str, rank: int, world_size: int) -> None:
    """open_clip's losses look at the rank only where there is more than one process.

    Raises:
        TypeError, ValueError: rank or world_size is no integer, or there are many and rank is none of them.
    """
    check_integer(name, "world_size", world_size, least=0)
    check_integer(name, "rank", rank, least=None)
    if world_size > 1 and not 0 <= rank < world_size:
        raise ValueError(f"{name}: rank must be in [0, world_size); got rank {rank}, world_size {world_size}")


def check_rows(name: str, image: Tensor, text: Tensor) -> None:
    """One text for each image, and for float64, which no op checks, (n, D) each."""
    if image.shape[:1] != text.shape[:1]:
        raise ValueError(
            f"{name}: image_features and text_features must have the same number of rows; "
            f"got {tuple(image.shape)} and {tuple(text.shape)}"
        )
    if image.dtype == torch.float64 and (image.dim() != 2 or image.shape != text.shape or 0 in image.shape):
        raise ValueError(
            f"{name}: image_features and text_features must be (batch, dim) and not empty; "
            f"got {tuple(image.shape)} and {tuple(text.shape)}"
        )


def sizes_of_shards(
    name: str, image: Tensor, text: Tensor, gradients: Sequence[bool], equal_ranks: int | None
) -> list[int]:
    """Rows per rank: as the ranks tell each other, or this rank's where equal_ranks of them are known to be equal."""
    if equal_ranks is None:
        return distributed.shard_sizes(name, image, text, gradients=gradients)
    check_rows(name, image, text)
    return [len(image)] * equal_ranks


def label_offset(block: int, sizes: list[int], shards_per_block: int) -> int:
    """Where this rank's positives begin among the rows of a block of the ring; past its end if they are not there."""
    rank, _ = distributed.rank_and_world_size()
    first = block * shards_per_block
    members = sizes[first : first + shards_per_block]
    return sum(sizes[first:rank]) if first <= rank < first + shards_per_block else sum(members)


def of_one_dtype(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype where autocast is on, whose products take two; else as they are."""
    device = image.device.type
    wide = torch.float64 in (image.dtype, text.dtype)  # autocast leaves it alone
    if image.dtype == text.dtype or wide or not torch.is_autocast_enabled(device):
        return image, text
    if not (image.is_floating_point() and text.is_floating_point()):
        return image, text
    dtype = torch.promote_types(image.dtype, text.dtype)
    return image.to(dtype), text.to(dtype)


def contrast(image: Tensor, text: Tensor, scale: Tensor | float, **options: Any) -> Tensor:
    """`vlmfast.ops.info_nce`, and its definition in PyTorch for float64, which no kernel has."""
    return _either(info_nce, info_nce_reference, image, text)(image, text, scale, **options)


def contrast_pairwise(
    image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float, **options: Any
) -> Tensor:
    """`vlmfast.ops.sigmoid_loss`, and its definition in PyTorch for float64, which no kernel has."""
    return _either(sigmoid_loss, sigmoid_loss_reference, image, text)(image, text, scale, bias, **options)


def _either(op: Any, reference: Any, image: Tensor, text: Tensor) -> Any:
    return reference if image.dtype == text.dtype == torch.float64 else op
