"""Collectives with gradients, and a ring of processes, for losses over a global batch.

One convention: after the mean over ranks that DistributedDataParallel takes, the gradient of every parameter is that
of one process on the global batch. A rank's gradient with respect to its own features is therefore the sum over ranks
of their losses' gradients, which is what the backward of `gather`, `reduce_scatter` and the sums of `Homeward` return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A shard's sum is under way together with the shards of `ring`, which count their tags from 0.
_HOMEWARD_TAG = 100
# On a CPU what all ranks together add up is gathered up to this many bytes: gloo gathers with half the messages, one
# after the other, of its all-reduce.
_GATHERED_SUM_BYTES = 1 << 20


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
    everyone = mine.new_empty(dist.get_world_size(), *mine.shape)
    dist.all_gather_into_tensor(everyone.flatten(0, 1), mine)
    *shards, wanted = everyone.transpose(0, 1).tolist()
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


@torch.no_grad()
def gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """As `gather`, without gradient.

    Raises:
        RuntimeError: another rank has died or did not answer within the process group's timeout.
    """
    most = max(sizes)
    gathered = rows.new_empty(len(sizes), most, *rows.shape[1:])
    if len(rows) < most:
        padded = rows.new_zeros(gathered.shape[1:])
        padded[: len(rows)] = rows
        rows = padded
    with _a_collective("gather"):
        dist.all_gather_into_tensor(gathered.flatten(0, 1), rows.contiguous())
    if min(sizes) == most:
        return gathered.flatten(0, 1)
    return torch.cat([shard[:size] for shard, size in zip(gathered, sizes, strict=True)])


@torch.no_grad()
def reduce_scatter(rows: Tensor, sizes: list[int], numbers: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum over ranks of all their rows (sum(sizes), D), of which each rank gets its own, without gradient.

    Args:
        rows (sum(sizes), D): this rank's; what is narrower than float32 is sent and added in float32.
        sizes: rows per rank, from `shard_sizes`.
        numbers (k,): are added over ranks as well, in the same message, and given to all of them.
    Returns:
        rows (n, D), numbers (k,) or (0,): in float32 or rows' wider dtype.
    Raises:
        RuntimeError: another rank has died or did not answer within the process group's timeout.
    """
    rank, world_size = rank_and_world_size()
    most, dim, count = max(sizes), rows.shape[1], 0 if numbers is None else len(numbers)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if not count and min(sizes) == most:
        parts = rows.to(dtype).contiguous().view(world_size, most, dim)
    else:
        parts = rows.new_empty(world_size, most + -(-count // dim), dim, dtype=dtype)
        if min(sizes) == most:
            parts[:, :most] = rows.view(world_size, most, dim)
        else:
            for part, shard in zip(parts, rows.split(sizes), strict=True):
                part[: len(shard)] = shard
                part[len(shard) : most] = 0
        if numbers is not None:
            rest = parts[:, most:].flatten(1)
            rest[:, :count] = numbers
            rest[:, count:] = 0
    with _a_collective("reduce-scatter"):
        if dist.get_backend() == "nccl":
            mine = torch.empty_like(parts[0])
            dist.reduce_scatter_tensor(mine, parts)
        else:  # gloo's adds everything on every rank
            received = torch.empty_like(parts)
            dist.all_to_all_single(received, parts)
            mine = received.sum(0)
    return mine[: sizes[rank]], mine[most:].flatten()[:count]


@torch.no_grad()
def gather_scalars(value: Tensor) -> Tensor:
    """(world size, ...): every rank's value, a number or a few, without gradient."""
    values = value.new_empty(dist.get_world_size(), *value.shape)
    with _a_collective("gather"):
        dist.all_gather_into_tensor(values.flatten(), value.flatten())
    return values


@torch.no_grad()
def total(value: Tensor) -> Tensor:
    """The sum over ranks, without gradient."""
    world_size = dist.get_world_size()
    if value.device.type != "cpu" or world_size * value.nbytes > _GATHERED_SUM_BYTES:
        return _reduced(value, dist.ReduceOp.SUM)
    everyone = value.new_empty(world_size, *value.shape)
    with _a_collective("sum"):
        dist.all_gather_into_tensor(everyone.flatten(), value.flatten())
    return everyone.sum(0)


@torch.no_grad()
def largest(value: Tensor) -> Tensor:
    """The largest of all ranks, entry by entry, without gradient."""
    return _reduced(value, dist.ReduceOp.MAX)


def mean(value: Tensor) -> Tensor:
    """The mean over ranks, without gradient."""
    return total(value) / dist.get_world_size()


def block_sizes(sizes: list[int], shards_per_block: int) -> list[int]:
    """Rows per block of as many ranks, in order of rank."""
    return [sum(sizes[first : first + shards_per_block]) for first in range(0, len(sizes), shards_per_block)]


def ring(
    shards: Sequence[Tensor], sizes: list[int], shards_per_block: int = 1
) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Every rank's shards in turn, a block of ranks at a time: own first, then the left neighbour's, and on round.

    Ranks of one block first give each other their shards. Then blocks travel round rings: rank r's is one of the ranks
    r + i * shards_per_block. The transfer of the next block is started before the present one is yielded and waited for
    after, so that it goes on while the caller computes. Memory: three blocks.

    Args:
        shards (n, ...): tensors of this rank, a row for each of its n samples.
        sizes: rows per rank, from `shard_sizes`.
        shards_per_block: a divisor of the number of ranks.
    Yields:
        block, tensors: a block's number and its ranks' rows, in order of rank; once for each block. Of one shard each,
        the number is the rank.
    Raises:
        RuntimeError: a rank has died or did not answer within the process group's timeout.
    """
    rank, world_size = rank_and_world_size()
    rows, own, blocks = block_sizes(sizes, shards_per_block), rank // shards_per_block, world_size // shards_per_block
    tensors = _shared_in_block([shard.contiguous() for shard in shards], sizes, shards_per_block)
    for step in range(blocks - 1):
        block = (own - step) % blocks
        transfer = _Transfer(tensors, rows[block - 1], tag=0, distance=shards_per_block)
        yield block, tensors
        tensors = transfer.wait()
    yield (own + 1) % blocks, tensors


class Homeward:
    """Sums over ranks of what each computes for every shard of a `ring`, each brought to the shard's owner.

    A block's sum follows the block one step behind, so that it is under way while the next rank computes its part. At
    the end the ranks of a block give each other what they have for each other's shards.

    Args:
        sizes: rows per rank, from `shard_sizes`.
        combine: of two partial sums; called in the same order on every run.
        shards_per_block: the ring's.
    """

    def __init__(
        self,
        sizes: list[int],
        combine: Callable[[Tensor, Tensor], Tensor] = torch.add,
        shards_per_block: int = 1,
    ) -> None:
        self._sizes, self._combine, self._per_block = sizes, combine, shards_per_block
        self._rows = block_sizes(sizes, shards_per_block)
        self._missing = len(self._rows)
        self._own: Tensor | None = None
        self._transfer: _Transfer | None = None

    def add(self, block: int, part: Tensor) -> None:
        """This rank's part (rows of block, ...), to be called in the ring's order."""
        self._missing -= 1
        if self._own is None:
            self._own = part
            return
        if self._transfer is not None:
            part = self._combine(self._transfer.wait()[0], part)
        self._transfer = _Transfer(
            [part.contiguous()], self._rows[block - 1], tag=_HOMEWARD_TAG, distance=self._per_block
        )

    def total(self) -> Tensor:
        """The sum of all ranks' parts for this rank's shard, once `add` was called for every shard."""
        if self._own is None or self._missing:
            raise RuntimeError("Homeward: total was called before every shard's part was added")
        block = self._combine(self._transfer.wait()[0], self._own) if self._transfer else self._own
        if self._per_block == 1:
            return block
        first, *others = _each_to_its_owner(block, self._sizes, self._per_block)
        for other in others:
            first = self._combine(first, other)
        return first


class _Messages:
    """Tensors on their way to other ranks, and from them: lists of (rank, tensor, tag)."""

    def __init__(
        self, sent: Sequence[tuple[int, Tensor, int]], received: Sequence[tuple[int, Tensor, int]], ring: str
    ) -> None:
        self._ring = ring
        operations = [dist.P2POp(dist.isend, tensor, to, tag=tag) for to, tensor, tag in sent]
        operations += [dist.P2POp(dist.irecv, tensor, of, tag=tag) for of, tensor, tag in received]
        try:
            self._requests = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise self._failure() from error

    def wait(self) -> Any:
        try:
            for request in self._requests:
                request.wait()
        except RuntimeError as error:
            raise self._failure() from error

    def _failure(self) -> RuntimeError:
        return RuntimeError(
            f"rank {dist.get_rank()}: the ring to {self._ring} is broken; "
            "a rank has died or does not call the same loss"
        )


class _Transfer(_Messages):
    """Tensors on their way to the right neighbour while others, with `rows` rows, come from the left one."""

    def __init__(self, tensors: Sequence[Tensor], rows: int, tag: int, distance: int = 1) -> None:
        rank, world_size = rank_and_world_size()
        right, left = (rank + distance) % world_size, (rank - distance) % world_size
        self._received = [tensor.new_empty(rows, *tensor.shape[1:]) for tensor in tensors]
        super().__init__(
            [(right, tensor, tag + i) for i, tensor in enumerate(tensors)],
            [(left, tensor, tag + i) for i, tensor in enumerate(self._received)],
            f"rank {right} and from rank {left}",
        )

    def wait(self) -> list[Tensor]:
        super().wait()
        return self._received


def _members(shards_per_block: int) -> range:
    """The ranks of this rank's block."""
    first = dist.get_rank() // shards_per_block * shards_per_block
    return range(first, first + shards_per_block)


def _shared_in_block(shards: list[Tensor], sizes: list[int], shards_per_block: int) -> list[Tensor]:
    """The tensors of all ranks of this rank's block, in order of rank."""
    if shards_per_block == 1:
        return shards
    rank, members = dist.get_rank(), _members(shards_per_block)
    rows = [sizes[member] for member in members]
    blocks = [shard.new_empty(sum(rows), *shard.shape[1:]) for shard in shards]
    sent, received = [], []
    for tag, (shard, block) in enumerate(zip(shards, blocks, strict=True)):
        for member, place in zip(members, block.split(rows), strict=True):
            if member == rank:
                place.copy_(shard)
            else:
                sent.append((member, shard, tag))
                received.append((member, place, tag))
    _Messages(sent, received, f"and from ranks {members[0]} to {members[-1]}").wait()
    return blocks


def _each_to_its_owner(block: Tensor, sizes: list[int], shards_per_block: int) -> list[Tensor]:
    """What each rank of this rank's block has for this rank, in order of rank."""
    rank, members = dist.get_rank(), _members(shards_per_block)
    block = block.contiguous()
    parts = list(block.split([sizes[member] for member in members]))
    mine = [
        part if m == rank else block.new_empty(sizes[rank], *block.shape[1:])
        for m, part in zip(members, parts, strict=True)
    ]
    sent = [(m, part, _HOMEWARD_TAG) for m, part in zip(members, parts, strict=True) if m != rank]
    received = [(m, part, _HOMEWARD_TAG) for m, part in zip(members, mine, strict=True) if m != rank]
    _Messages(sent, received, f"and from ranks {members[0]} to {members[-1]}").wait()
    return mine


@contextmanager
def _a_collective(name: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank()}: the {name} over all ranks is broken; "
            "a rank has died or does not call the same loss"
        ) from error


def _reduced(value: Tensor, op: Any) -> Tensor:
    found = value.clone()
    with _a_collective("sum" if op == dist.ReduceOp.SUM else "maximum"):
        dist.all_reduce(found, op)
    return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return gather_rows(features, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.sizes)[0].to(grad.dtype), None


def _describe(features: Tensor) -> tuple[int, int, int]:
    """Rows, dim and dtype as numbers; what is not (n, D) has -1 rows."""
    rows, dim = features.shape if features.dim() == 2 else (-1, features.dim())
    return rows, dim, _DTYPES.index(features.dtype) if features.dtype in _DTYPES else -1


def _name(description: tuple[int, int, int]) -> str:
    rows, dim, dtype = description
    shape = f"{dim} dimensions" if rows == -1 else f"({rows}, {dim})"
    return f"{shape} {str(_DTYPES[dtype]).removeprefix('torch.') if dtype >= 0 else 'of another dtype'}"
