"""Collectives with gradients for losses over a global batch.

One convention: after the mean over ranks that DistributedDataParallel takes, the gradient of every parameter is that
of one process on the global batch. A rank's gradient with respect to its own features is therefore the sum over ranks
of their losses' gradients, which is what the backward of `gather` returns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def rank_and_world_size() -> tuple[int, int]:
    """Rank and number of processes of the default group; (0, 1) when torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shard_sizes(features: Tensor) -> list[int]:
    """The number of rows of every rank's shard, which may differ.

    Args:
        features (n, D): this rank's shard.
    Raises:
        ValueError: on every rank alike, when the shards' D or dtype differ or one is empty.
    """
    mine = torch.tensor([*features.shape, _dtype_code(features.dtype)], device=features.device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    shapes = [tuple(shape) for shape in torch.stack(everyone).tolist()]
    if len({shape[1:] for shape in shapes}) > 1 or any(shape[0] == 0 for shape in shapes):
        found = ", ".join(f"rank {rank}: {shape[:2]}" for rank, shape in enumerate(shapes))
        expected = "rows, and the same dim and dtype on every rank"
        raise ValueError(f"gather: features must have {expected}; got {found}")
    return [shape[0] for shape in shapes]


def gather(features: Tensor, sizes: list[int]) -> Tensor:
    """Every rank's rows in order of rank; the gradient of all ranks' losses flows back to the rank that owns a row.

    Args:
        features (n, D): this rank's shard.
        sizes: rows per rank, from `shard_sizes`.
    Returns:
        (sum(sizes), D), the same on every rank.
    """
    gathered: Tensor = _Gather.apply(features, sizes)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = features.new_zeros(max(sizes), features.shape[1])
        padded[: features.shape[0]] = features
        shards = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(shards, padded)
        return torch.cat([shard[:size] for shard, size in zip(shards, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rank, sizes = dist.get_rank(), ctx.sizes
        if dist.get_backend() == "nccl":
            shards = grad.new_zeros(len(sizes), max(sizes), grad.shape[1])
            for shard, rows in zip(shards, grad.split(sizes), strict=True):
                shard[: len(rows)] = rows
            mine = torch.empty_like(shards[0])
            dist.reduce_scatter_tensor(mine, shards)
            return mine[: sizes[rank]], None
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total.split(sizes)[rank], None


def _dtype_code(dtype: torch.dtype) -> int:
    return (torch.float32, torch.bfloat16, torch.float16, torch.float64).index(dtype)
