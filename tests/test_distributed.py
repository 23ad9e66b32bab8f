"""The ring and the collectives by themselves, what they cost beside open_clip, and what happens when a rank dies."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from processes import run_processes
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vlmfast import distributed
from vlmfast.nn import ClipLoss, SigLipLoss, clip_loss, siglip_loss


def _gather(rank: int, world_size: int, sizes: list[int]) -> None:
    torch.manual_seed(3)
    everything = torch.randn(sum(sizes), 4, dtype=torch.float64)
    mine = everything.split(sizes)[rank].clone().requires_grad_()
    assert distributed.shard_sizes("test", mine) == sizes
    gathered = distributed.gather(mine, sizes)
    assert torch.equal(gathered, everything)
    weights = torch.randn(world_size, sum(sizes), 4, dtype=torch.float64)
    (weights[rank] * gathered).sum().backward()
    torch.testing.assert_close(mine.grad, weights.sum(0).split(sizes)[rank])
    value = torch.tensor(rank + 1.0)
    assert distributed.gather_scalars(value).tolist() == [r + 1 for r in range(world_size)]
    assert distributed.mean(value) == (world_size + 1) / 2


@pytest.mark.parametrize("sizes", [[2, 2], [1, 3, 2]], ids=str)
def test_gather_and_its_gradient(sizes: list[int]) -> None:
    run_processes(_gather, len(sizes), sizes)


def _ring(rank: int, world_size: int, sizes: list[int]) -> None:
    torch.manual_seed(3)
    table, vectors = torch.randn(sum(sizes), 2, 3).split(sizes), torch.randn(sum(sizes)).split(sizes)
    parts = torch.randn(world_size, sum(sizes), 5, dtype=torch.float64).split(sizes, 1)
    owners, sums, products = [], distributed.Homeward(sizes), distributed.Homeward(sizes, torch.mul)
    # A shard that is not contiguous arrives all the same.
    own = table[rank].transpose(1, 2).contiguous().transpose(1, 2)
    for owner, (rows, vector) in distributed.ring([own, vectors[rank]], sizes):
        assert torch.equal(rows, table[owner])
        assert torch.equal(vector, vectors[owner])
        sums.add(owner, parts[owner][rank])
        products.add(owner, parts[owner][rank])
        owners.append(owner)
    assert owners == [(rank - step) % world_size for step in range(world_size)]
    torch.testing.assert_close(sums.total(), parts[rank].sum(0))
    torch.testing.assert_close(products.total(), parts[rank].prod(0))


@pytest.mark.parametrize("sizes", [[2, 5], [1, 3, 2], [4, 1, 1, 2]], ids=str)
def test_ring_brings_every_shard_and_sums_home(sizes: list[int]) -> None:
    run_processes(_ring, len(sizes), sizes)


def _overlap(rank: int, world_size: int) -> None:
    events: list[str] = []

    def logged(event: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(event)
            return function(*args, **kwargs)

        return call

    class Transfer(distributed._Transfer):
        def __init__(self, tensors: Any, rows: int, tag: int) -> None:
            self.name = "sum" if tag else "shard"
            events.append(f"start {self.name}")
            super().__init__(tensors, rows, tag)

        def wait(self) -> list[Tensor]:
            events.append(f"wait {self.name}")
            return super().wait()

    distributed._Transfer = Transfer
    for module in (clip_loss, siglip_loss):
        module.tile_forward = logged("tile", module.tile_forward)
    clip_loss.tile_backward = logged("tile", clip_loss.tile_backward)
    first = ["start shard", "tile", "wait shard"]
    second = ["start shard", "tile", "start sum", "wait shard"]
    last = ["tile", "wait sum", "start sum", "wait sum"]
    image, text = (F.normalize(torch.randn(4, 6), dim=1).requires_grad_() for _ in range(2))
    loss = ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)(image, text, 5.0)
    assert events == first + second + last
    loss.backward()
    assert events == 2 * (first + second + last)
    events.clear()
    SigLipLoss(rank=rank, world_size=world_size)(image, text, 5.0, -1.0).backward()
    assert events == first + second + last


def test_transfers_go_on_while_a_block_is_computed() -> None:
    run_processes(_overlap, 3)


class Cost(TorchDispatchMode):
    """Floating-point operations of matrix products, and bytes that this rank receives from others."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, rank, world_size = function._overloadpacket.__name__, dist.get_rank(), dist.get_world_size()
        if name in ("mm", "addmm", "addmm_"):
            self.flops += 2 * args[-2].shape[0] * args[-2].shape[1] * args[-1].shape[1]
        elif name == "recv_":
            self.bytes += sum(t.nbytes for t in args[0])
        elif name == "allgather_":
            self.bytes += sum(t.nbytes for t in args[0][0]) - args[1][0].nbytes
        elif name == "scatter_":  # open_clip's reduce-scatter, on gloo
            self.bytes += 0 if args[3] == rank else args[0][0].nbytes
        elif name == "allreduce_":
            self.bytes += 2 * (world_size - 1) * args[0][0].nbytes // world_size
        else:  # a send is counted where it is received
            assert name == "send" or not str(function).startswith("c10d"), function
        return function(*args, **(kwargs or {}))


def _costs(rank: int, world_size: int) -> None:
    from open_clip import loss as open_clip_loss

    os.environ["VLMFAST_BACKEND"] = "torch"  # whose products the mode above sees
    n, dim, others = 32, 64, world_size - 1
    product, features, statistics = n * n * world_size * dim, n * dim * 4, n * 3 * 4
    scalars = others * 100  # sizes, dtypes, gradients of the losses and of the scale

    def cost(loss: nn.Module, *scalars: float, frozen: bool = False, backward: bool = True) -> tuple[float, int]:
        image, text = (F.normalize(torch.randn(n, dim), dim=1) for _ in range(2))
        leaves = [
            image.requires_grad_(not frozen),
            text.requires_grad_(),
            *(torch.tensor(scalar, requires_grad=True) for scalar in scalars),
        ]
        with Cost() as mode, warnings.catch_warnings(), torch.set_grad_enabled(backward):
            warnings.simplefilter("ignore", FutureWarning)
            value = loss(*leaves)
            if backward:
                value.backward()
        return mode.flops / product, mode.bytes

    def saved(loss: nn.Module, *scalars: float) -> int:
        image, text = (F.normalize(torch.randn(n, dim), dim=1).requires_grad_() for _ in range(2))
        tensors = loss(image, text, *map(torch.tensor, scalars)).grad_fn.saved_tensors
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    ranks = {"rank": rank, "world_size": world_size}
    for local_loss in (False, True):
        clip = ClipLoss(local_loss, gather_with_grad=True, **ranks)
        flops, moved = cost(clip, 5.0)
        assert flops == 6
        assert 0 <= moved - others * (2 * features + 2 * statistics) <= scalars
        strip = world_size * (n * n * 4 + features)
        assert 0 <= saved(clip, 5.0) - features - strip <= 2 * statistics + 100
        assert cost(clip, 5.0, backward=False)[0] == 2
        assert cost(clip, 5.0, frozen=True)[0] == 4
        clip_loss.STORE_BUDGET_BYTES = 4 * n * n * world_size - 1
        flops, moved = cost(clip, 5.0)
        assert flops == 8
        assert 0 <= moved - others * (3 * features + 2 * statistics) <= scalars
        assert cost(clip, 5.0, frozen=True)[0] == 6
        assert 0 <= saved(clip, 5.0) - 2 * features <= 2 * statistics + 100
        clip_loss.STORE_BUDGET_BYTES += 1
    assert cost(open_clip_loss.ClipLoss(True, gather_with_grad=True, **ranks), 5.0) == (12, others * 4 * features)

    siglip = SigLipLoss(**ranks)
    flops, moved = cost(siglip, 5.0, -2.0)
    assert flops == 6
    assert 0 <= moved - others * 2 * features <= scalars
    assert 0 <= saved(siglip, 5.0, -2.0) - 2 * features <= 100
    assert cost(siglip, 5.0, -2.0, backward=False)[0] == 2
    assert cost(siglip, 5.0, -2.0, frozen=True)[0] == 4
    assert cost(open_clip_loss.SigLipLoss(**ranks), 5.0, -2.0) == (6, others * 2 * features)


@pytest.mark.parametrize("world_size", [2, 4])
def test_operations_bytes_and_memory_per_rank(world_size: int) -> None:
    pytest.importorskip("open_clip.loss")
    run_processes(_costs, world_size)


TIMEOUT = 4.0


def _lose_a_rank(rank: int, world_size: int, module: str, loss: Callable[..., Tensor], when: str, hangs: bool) -> None:
    def lost(*_: Any) -> None:
        time.sleep(TIMEOUT + 3 if hangs else 0)
        os._exit(0)

    image, text = (F.normalize(torch.randn(4, 6), dim=1).requires_grad_() for _ in range(2))
    loss(rank, world_size, image, text).backward()
    if rank == 1:
        setattr(import_module(module), when, lost)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"rank {rank}: the ring to rank .* a rank has died"):
        loss(rank, world_size, image, text).backward()
    assert time.monotonic() - start < TIMEOUT + 2
    os._exit(0)  # the group cannot be taken down in order any more


def _clip(rank: int, world_size: int, image: Tensor, text: Tensor) -> Tensor:
    return ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)(image, text, 5.0)


def _siglip(rank: int, world_size: int, image: Tensor, text: Tensor) -> Tensor:
    return SigLipLoss(rank=rank, world_size=world_size)(image, text, 5.0, -1.0)


@pytest.mark.parametrize(
    ("module", "loss", "when", "hangs"),
    [
        ("vlmfast.nn.clip_loss", _clip, "tile_forward", False),
        ("vlmfast.nn.clip_loss", _clip, "tile_forward", True),
        ("vlmfast.nn.clip_loss", _clip, "tile_backward", False),
        ("vlmfast.nn.siglip_loss", _siglip, "tile_forward", False),
    ],
    ids=["clip dies in forward", "clip hangs", "clip dies in backward", "siglip dies"],
)
def test_a_lost_rank_makes_the_others_fail(module: str, loss: Callable[..., Tensor], when: str, hangs: bool) -> None:
    run_processes(_lose_a_rank, 3, module, loss, when, hangs, timeout=TIMEOUT)
