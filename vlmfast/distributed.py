"""Collectives with gradients, and a ring of processes, for losses over a global batch.

One convention: after the mean over ranks that DistributedDataParallel takes, the gradient of every parameter is that
of one process on the global batch. A rank's gradient with respect to its own features is therefore the sum over ranks
of their losses' gradients, which is what the backward of `gather` and the sums of `Homeward` return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A shard's sum is under way together with the shards of `ring`, which count their tags from 0.
_HOMEWARD_TAG = 100


def rank_and_world_size() -> tuple[int, int]:
    """Rank and number of processes of the default group; (0, 1) when torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def check_rank(loss: str, rank: int, world_size: int) -> None:
    """Raises ValueError when rank and world_size are not those of torch.distributed."""
    actual = rank_and_world_size()
    if (rank, world_size) != actual:
        raise ValueError(
            f"{loss}: rank and world_size must be those of torch.distributed, {actual}; got {(rank, world_size)}"
        )


def shard_sizes(loss: str, *features: Tensor, gradients: Sequence[bool] = ()) -> list[int]:
    """The number of rows of every rank's shard, which may differ.

    Args:
        loss: a name for messages.
        features (n, D): this rank's shards, all of n rows.
        gradients: which gradients this rank wants; backward's collectives depend on it.
    Raises:
        ValueError: on every rank alike, when a shard is empty or not (n, D), a rank's shards differ in rows, or ranks
            differ in D, dtype or gradients.
    """
    mine = torch.tensor([*map(_describe, features), (0, 0, sum(g << i for i, g in enumerate(gradients)))])
    mine = mine.to(features[0].device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    *shards, wanted = torch.stack(everyone, 1).tolist()
    rows = [[shape[0] for shape in shard] for shard in shards]
    kinds = {(dim, dtype) for shard in shards for _, dim, dtype in shard}
    if min(map(min, rows)) < 1 or len(kinds) > 1 or any(r != rows[0] for r in rows) or -1 in kinds.pop():
        found = "; ".join(
            f"rank {rank}: {', '.join(map(_name, shard))}" for rank, shard in enumerate(zip(*shards, strict=True))
        )
        raise ValueError(
            f"{loss}: features must be floating point with rows, as many in all of a rank's, and the same dim and "
            f"dtype on every rank; got {found}"
        )
    if any(codes != wanted[0] for codes in wanted):
        found = "; ".join(
            f"rank {rank}: {[bool(codes[2] >> i & 1) for i in range(len(gradients))]}"
            for rank, codes in enumerate(wanted)
        )
        raise ValueError(f"{loss}: the inputs that need a gradient must be the same on every rank; got {found}")
    return rows[0]


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


def gather_scalars(value: Tensor) -> Tensor:
    """(world size,): every rank's one-element value, without gradient."""
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.contiguous())
    return torch.stack(values)


def mean(value: Tensor) -> Tensor:
    """The mean over ranks, without gradient."""
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def ring(shards: Sequence[Tensor], sizes: list[int]) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Every rank's shards in turn, in O(n) memory: own first, then the left neighbour's, and on round the ring.

    The transfer of the next shards is started before the present ones are yielded and waited for after, so that it
    goes on while the caller computes.

    Args:
        shards (n, ...): tensors of this rank, a row for each of its n samples.
        sizes: rows per rank, from `shard_sizes`.
    Yields:
        owner, shards: a rank and its tensors, once for each rank.
    Raises:
        RuntimeError: a neighbour has died or did not answer within the process group's timeout.
    """
    rank, world_size = rank_and_world_size()
    shards = [shard.contiguous() for shard in shards]
    for step in range(world_size - 1):
        owner = (rank - step) % world_size
        transfer = _Transfer(shards, sizes[owner - 1], tag=0)
        yield owner, shards
        shards = transfer.wait()
    yield (rank + 1) % world_size, shards


class Homeward:
    """Sums over ranks of what each computes for every shard of a `ring`, each brought to the shard's owner.

    A shard's sum follows the shard one step behind, so that it is under way while the next rank computes its part.

    Args:
        sizes: rows per rank, from `shard_sizes`.
        combine: of two partial sums; called in the same order on every run.
    """

    def __init__(self, sizes: list[int], combine: Callable[[Tensor, Tensor], Tensor] = torch.add) -> None:
        self._sizes, self._combine = sizes, combine
        self._own: Tensor | None = None
        self._transfer: _Transfer | None = None

    def add(self, owner: int, part: Tensor) -> None:
        """This rank's part (rows of owner, ...), to be called in the ring's order."""
        if self._own is None:
            self._own = part
            return
        if self._transfer is not None:
            part = self._combine(self._transfer.wait()[0], part)
        self._transfer = _Transfer([part.contiguous()], self._sizes[owner - 1], tag=_HOMEWARD_TAG)

    def total(self) -> Tensor:
        """The sum of all ranks' parts for this rank's shard, once `add` was called for every shard."""
        if self._own is None or self._transfer is None:
            raise RuntimeError("Homeward: total was called before every shard's part was added")
        return self._combine(self._transfer.wait()[0], self._own)


class _Transfer:
    """Tensors on their way to the right neighbour while others, with `rows` rows, come from the left one."""

    def __init__(self, tensors: Sequence[Tensor], rows: int, tag: int) -> None:
        rank, world_size = rank_and_world_size()
        self._right, self._left = (rank + 1) % world_size, (rank - 1) % world_size
        self._received = [tensor.new_empty(rows, *tensor.shape[1:]) for tensor in tensors]
        sends = [dist.P2POp(dist.isend, t, self._right, tag=tag + i) for i, t in enumerate(tensors)]
        receives = [dist.P2POp(dist.irecv, t, self._left, tag=tag + i) for i, t in enumerate(self._received)]
        try:
            self._requests = dist.batch_isend_irecv(sends + receives)
        except RuntimeError as error:
            raise self._failure() from error

    def wait(self) -> list[Tensor]:
        try:
            for request in self._requests:
                request.wait()
        except RuntimeError as error:
            raise self._failure() from error
        return self._received

    def _failure(self) -> RuntimeError:
        return RuntimeError(
            f"rank {dist.get_rank()}: the ring to rank {self._right} and from rank {self._left} is broken; "
            "a rank has died or does not call the same loss"
        )


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


def _describe(features: Tensor) -> tuple[int, int, int]:
    """Rows, dim and dtype as numbers; what is not (n, D) has -1 rows."""
    rows, dim = features.shape if features.dim() == 2 else (-1, features.dim())
    return rows, dim, _DTYPES.index(features.dtype) if features.dtype in _DTYPES else -1


def _name(description: tuple[int, int, int]) -> str:
    rows, dim, dtype = description
    shape = f"{dim} dimensions" if rows == -1 else f"({rows}, {dim})"
    return f"{shape} {str(_DTYPES[dtype]).removeprefix('torch.') if dtype >= 0 else 'of another dtype'}"
