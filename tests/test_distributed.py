"""The ring and the collectives by themselves, what they cost beside open_clip, which is chosen, and what happens when a
rank dies."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import divisors, exchange, run_processes
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vlmfast import distributed
from vlmfast.nn import ClipLoss, SigLipLoss, clip_loss, siglip_loss
from vlmfast.nn.exchange import COSTS, Costs, needed_bytes, shards_per_block, step_seconds


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
    leaf = value.clone().requires_grad_()
    for function in (distributed.gather_scalars, distributed.total, distributed.largest):
        assert torch.equal(function(leaf), function(value))
        assert not function(leaf).requires_grad
    few = torch.arange(6).view(3, 2).T + rank
    assert torch.equal(distributed.gather_scalars(few), torch.stack([few - rank + r for r in range(world_size)]))
    assert distributed.mean(value) == (world_size + 1) / 2
    assert distributed.total(value) == world_size * (world_size + 1) / 2
    many = torch.arange(1 << 18) + rank  # more than a sum that is gathered
    assert torch.equal(distributed.total(many), world_size * (many - rank) + world_size * (world_size - 1) // 2)
    assert distributed.largest(value) == world_size
    assert torch.equal(distributed.gather_rows(everything.split(sizes)[rank].int(), sizes), everything.int())
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        parts = torch.randn(world_size, sum(sizes), 4).to(dtype)
        expected = parts.to(torch.promote_types(dtype, torch.float32)).sum(0).split(sizes)[rank]
        alone, nothing = distributed.reduce_scatter(parts[rank], sizes)
        numbers = torch.arange(9.0) + rank  # more than a row of four holds
        rows, found = distributed.reduce_scatter(parts[rank], sizes, numbers)
        assert nothing.numel() == 0
        assert found.tolist() == [world_size * i + world_size * (world_size - 1) / 2 for i in range(9)]
        for found in (alone, rows):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sizes", [[2, 2], [1, 3, 2]], ids=str)
def test_gather_and_its_gradient(sizes: list[int]) -> None:
    run_processes(_gather, len(sizes), sizes)


def _ring(rank: int, world_size: int, sizes: list[int]) -> None:
    torch.manual_seed(3)
    table, vectors = torch.randn(sum(sizes), 2, 3).split(sizes), torch.randn(sum(sizes)).split(sizes)
    parts = torch.randn(world_size, sum(sizes), 5, dtype=torch.float64).split(sizes, 1)
    # A shard that is not contiguous arrives all the same.
    own = table[rank].transpose(1, 2).contiguous().transpose(1, 2)
    for per_block in divisors(world_size):
        ring = (sizes, per_block)
        owners, sums = [], distributed.Homeward(sizes, shards_per_block=per_block)
        products = distributed.Homeward(sizes, torch.mul, per_block)
        for owner, (rows, vector) in distributed.ring([own, vectors[rank]], *ring):
            with pytest.raises(RuntimeError, match="total was called before every shard's part was added"):
                sums.total()
            block = slice(owner * per_block, (owner + 1) * per_block)
            assert torch.equal(rows, torch.cat(table[block]))
            assert torch.equal(vector, torch.cat(vectors[block]))
            part = torch.cat(parts[block], 1)[rank]
            sums.add(owner, part)
            products.add(owner, part)
            owners.append(owner)
        blocks = world_size // per_block
        assert owners == [(rank // per_block - step) % blocks for step in range(blocks)]
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
        def __init__(self, tensors: Any, rows: int, tag: int, distance: int) -> None:
            self.name = "sum" if tag else "shard"
            events.append(f"start {self.name}")
            super().__init__(tensors, rows, tag, distance)

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
    exchange(1)
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
    """Floating-point operations of matrix products; bytes, messages and collectives that this rank receives."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.messages = self.collectives = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, rank, world_size = function._overloadpacket.__name__, dist.get_rank(), dist.get_world_size()
        if name in ("mm", "addmm", "addmm_"):
            self.flops += 2 * args[-2].shape[0] * args[-2].shape[1] * args[-1].shape[1]
        elif name == "recv_":
            self.bytes += sum(t.nbytes for t in args[0])
            self.messages += 1
        elif name in ("_allgather_base_", "alltoall_base_"):
            self.bytes += args[0].nbytes * (world_size - 1) // world_size
        elif name == "allgather_":
            self.bytes += sum(t.nbytes for t in args[0][0]) - args[1][0].nbytes
        elif name == "scatter_":  # open_clip's reduce-scatter, on gloo
            self.bytes += 0 if args[3] == rank else args[0][0].nbytes
        elif name == "allreduce_":
            self.bytes += 2 * (world_size - 1) * args[0][0].nbytes // world_size
        else:  # a send is counted where it is received
            assert name == "send" or not str(function).startswith("c10d"), function
        self.collectives += str(function).startswith("c10d") and name not in ("send", "recv_")
        return function(*args, **(kwargs or {}))


def _costs(rank: int, world_size: int) -> None:
    from open_clip import loss as open_clip_loss

    os.environ["VLMFAST_BACKEND"] = "torch"  # whose products the mode above sees
    n, dim, others = 32, 64, world_size - 1
    product, features, statistics = n * n * world_size * dim, n * dim * 4, n * 3 * 4
    scalars = others * 100  # sizes, dtypes, gradients of the losses and of the scale

    def cost(loss: nn.Module, *scalars: float, frozen: bool = False, backward: bool = True) -> tuple[float, int]:
        mode = costs(loss, *scalars, frozen=frozen, backward=backward)
        return mode.flops / product, mode.bytes

    def costs(loss: nn.Module, *scalars: float, frozen: bool = False, backward: bool = True) -> Cost:
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
        return mode

    def saved(loss: nn.Module, *scalars: float) -> int:
        image, text = (F.normalize(torch.randn(n, dim), dim=1).requires_grad_() for _ in range(2))
        tensors = loss(image, text, *map(torch.tensor, scalars)).grad_fn.saved_tensors
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    ranks = {"rank": rank, "world_size": world_size}
    ops: list[str] = []

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)
        setattr(module, name, lambda *args: ops.append(name) or function(*args))

    for module, name in ((clip_loss, "tile_forward"), (clip_loss, "tile_backward"), (siglip_loss, "tile_forward")):
        counted(module, name)

    exchange(1)
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

    # Texts gathered, their gradients with one more row, and two numbers in float64 for each column.
    exchange(world_size)
    columns = others * (2 * world_size * n + 2) * 8
    for local_loss in (False, True):
        clip = ClipLoss(local_loss, gather_with_grad=True, uniform=True, **ranks)
        for kept in (True, False):
            clip_loss.STORE_BUDGET_BYTES = 4 * n * n * world_size - (not kept)
            ops.clear()
            found = costs(clip, 5.0)
            assert ops == ["tile_forward", "tile_backward"]
            assert (found.collectives, found.messages) == (3, 0)
            assert found.flops == (6 if kept else 8) * product
            assert found.bytes == others * (2 * features + dim * 4) + columns
            strip = world_size * (n * n * 4 * kept + features)
            assert 0 <= saved(clip, 5.0) - features - strip <= (world_size + 1) * statistics + 100
            assert cost(clip, 5.0, frozen=True)[0] == (4 if kept else 6)
        found = costs(clip, 5.0, backward=False)
        assert (found.collectives, found.flops) == (2, 2 * product)
        found = costs(ClipLoss(local_loss, gather_with_grad=True, **ranks), 5.0)
        assert found.collectives == 4  # sizes besides
        assert ops[-2:] == ["tile_forward", "tile_backward"]
        assert 0 <= found.bytes - others * (2 * features + dim * 4) - columns <= scalars

    # Blocks of two shards: half the ops, the same bytes.
    exchange(2)
    if world_size > 2:
        clip_loss.STORE_BUDGET_BYTES = 4 * n * n * world_size
        ops.clear()
        found = costs(ClipLoss(local_loss, gather_with_grad=True, **ranks), 5.0)
        assert len(ops) == world_size
        assert 0 <= found.bytes - others * (2 * features + 2 * statistics) <= scalars
        assert found.messages == 4 * (world_size // 2 - 1) + 4
        assert found.flops == 6 * product

    exchange(world_size)
    siglip = SigLipLoss(uniform=True, **ranks)
    ops.clear()
    found = costs(siglip, 5.0, -2.0)
    assert ops == ["tile_forward"]
    assert (found.collectives, found.messages) == (2, 0)
    assert (found.flops, found.bytes) == (6 * product, others * 2 * features)
    assert costs(SigLipLoss(**ranks), 5.0, -2.0).collectives == 3

    exchange(1)
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


def test_the_model_of_costs() -> None:
    """One constant at a time: what of a step each of them is multiplied by."""
    free = Costs(bandwidth=float("inf"), latency=0.0, launch=0.0, rate=float("inf"), overlaps=True, budget=1 << 40)
    size = {"world_size": 8, "rows": 3, "dim": 5, "itemsize": 2}
    launches = [step_seconds(block, **size, costs=replace(free, launch=1.0)) for block in divisors(8)]
    assert launches == [16, 8, 4, 2]
    assert {step_seconds(block, **size, costs=replace(free, rate=1.0)) for block in divisors(8)} == {8 * 3 * 24 * 5}
    for world_size, phases in ((2, 6), (8, 18), (9, 24)):
        latencies = step_seconds(world_size, world_size, 3, 5, 2, replace(free, latency=1.0))
        assert latencies == phases
    latencies = [step_seconds(block, **size, costs=replace(free, latency=1.0)) for block in divisors(8)[:-1]]
    assert latencies == [4 * 7, 4 * 3 + 4 * 1, 4 * 1 + 4 * 3]
    moved = [step_seconds(block, **size, costs=replace(free, bandwidth=1.0)) for block in divisors(8)]
    assert moved == [7 * 3 * (5 * (2 * 2 + 4) + 24)] * 3 + [7 * 3 * (5 * (2 + 4) + 40)]
    for overlaps, seconds in ((True, 28), (False, 16 + 28)):
        both = replace(free, launch=1.0, latency=1.0, overlaps=overlaps)
        assert step_seconds(1, **size, costs=both) == seconds


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.empty(128, 512)
    assert shards_per_block([128] * 8, text) == 8
    size = (8, 128, 512, 4)
    for budget, block in ((0, 1), (needed_bytes(8, *size) - 1, 4), (needed_bytes(4, *size) - 1, 2)):
        monkeypatch.setitem(COSTS, "cpu", replace(COSTS["cpu"], budget=budget))
        assert shards_per_block([128] * 8, text) == block
        assert shards_per_block([1] * 7 + [128], text) == block  # the largest shard decides
        assert shards_per_block([128] * 7, text) == (7 if budget >= needed_bytes(7, 7, 128, 512, 4) else 1)
    # On a GPU a million texts of 512 bfloat16 numbers are gathered; where the network is as slow as the products, it
    # pays to do both at a time.
    texts = torch.empty(1024, 512, dtype=torch.bfloat16, device="meta")
    assert shards_per_block([1024] * 1024, texts) == 1024
    assert needed_bytes(1024, 1024, 1024, 512, 2) < COSTS["cuda"].budget < needed_bytes(2048, 2048, 1024, 512, 2)
    slow = replace(COSTS["cuda"], bandwidth=20e9, rate=50e12)
    monkeypatch.setitem(COSTS, "cuda", slow)
    chosen = shards_per_block([4096] * 64, torch.empty(4096, 512, dtype=torch.bfloat16, device="meta"))
    assert 1 < chosen < 64


def test_the_table_of_the_docs_is_what_the_model_predicts() -> None:
    page = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith(("| 128 |", "| 1,024 |"))]
    assert len(rows) == 10
    for pairs, ranks, *shown in rows:
        world_size, n = int(ranks.replace(",", "")), int(pairs.replace(",", ""))
        text = torch.empty(n, 512, dtype=torch.bfloat16, device="meta")
        blocks = (world_size, 1, shards_per_block([n] * world_size, text))
        times = [f"{1e3 * step_seconds(b, world_size, n, 512, 2, COSTS['cuda']):,.1f} ms" for b in blocks[:2]]
        assert shown == [*times, "gathered" if blocks[2] == world_size else f"blocks of {blocks[2]}"]


TIMEOUT = 4.0


def _lose_a_rank(
    rank: int, world_size: int, module: str, loss: Callable[..., Tensor], when: str, hangs: bool, gathered: bool
) -> None:
    def lost(*_: Any) -> None:
        time.sleep(TIMEOUT + 3 if hangs else 0)
        os._exit(0)

    exchange(world_size if gathered else 1)
    image, text = (F.normalize(torch.randn(4, 6), dim=1).requires_grad_() for _ in range(2))
    loss(rank, world_size, image, text).backward()
    if rank == 1:
        setattr(import_module(module), when, lost)
    start = time.monotonic()
    broken = r"(sum|reduce-scatter) over all ranks is broken;" if gathered else "ring to rank .*"
    with pytest.raises(RuntimeError, match=rf"rank {rank}: the {broken} a rank has died"):
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
@pytest.mark.parametrize("gathered", [False, True], ids=["ring", "gathered"])
def test_a_lost_rank_makes_the_others_fail(
    module: str, loss: Callable[..., Tensor], when: str, hangs: bool, gathered: bool
) -> None:
    run_processes(_lose_a_rank, 3, module, loss, when, hangs, gathered, timeout=TIMEOUT)
