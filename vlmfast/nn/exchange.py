"""How the losses over many processes exchange their texts: gathered at once, or in blocks round a ring.

`step_seconds` predicts the time of a step from a few constants of the machine, and `shards_per_block` takes the fastest
way that fits in memory. Set another machine's constants, or another budget, before the first step, on all ranks alike::

    from dataclasses import replace
    from vlmfast.nn import exchange

    exchange.COSTS["cuda"] = replace(exchange.COSTS["cuda"], bandwidth=12e9, budget=2 << 30)

A budget of 0 leaves the ring of single shards, in the least memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor


@dataclass(frozen=True)
class Costs:
    """Constants of one kind of device and of what connects it.

    Args:
        bandwidth: bytes per second that a rank receives, while all ranks do.
        latency: seconds from the start of a message until it is there. A collective takes as many as the number of
            ranks has binary digits, or twice that.
        launch: seconds that a forward or a backward op takes at least, however small.
        rate: floating-point operations per second of the op, on large tiles.
        overlaps: whether transfers go on while products are computed, and do not take their cores.
        budget: bytes that a rank may spend on the texts of others and their gradients.
    """

    bandwidth: float
    latency: float
    launch: float
    rate: float
    overlaps: bool
    budget: int


COSTS = {
    # rate and launch measured, on one H100 (docs/large_batches.md); bandwidth and latency assumed, of a network of
    # 400 Gbit/s per GPU.
    "cuda": Costs(bandwidth=50e9, latency=20e-6, launch=1e-3, rate=500e12, overlaps=True, budget=8 << 30),
    # Assumed; the order of magnitude that gloo's processes on one machine have, whose transfers take their own cores.
    "cpu": Costs(bandwidth=1e9, latency=2e-4, launch=5e-4, rate=1e11, overlaps=False, budget=1 << 30),
}
"""By type of device; "cuda" stands for every accelerator."""


def shards_per_block(sizes: Sequence[int], text: Tensor) -> int:
    """Into blocks of how many ranks' shards the texts go; all of them are gathered where it is the number of ranks.

    Args:
        sizes: rows per rank.
        text (n, D): one rank's shard. Dim and dtype decide, which all ranks share.
    Returns:
        A divisor of the number of ranks: the fastest of those that fit in the budget, 1 where none does.
    """
    costs = COSTS["cpu" if text.device.type == "cpu" else "cuda"]
    return _best(len(sizes), max(sizes), text.shape[1], text.element_size(), costs)


def step_seconds(block: int, world_size: int, rows: int, dim: int, itemsize: int, costs: Costs) -> float:
    """Predicted time of `ClipLoss`, forward and backward, on each rank; nothing is measured here.

    Args:
        block: shards per block; world_size for all texts gathered at once.
        world_size: number of ranks.
        rows, dim, itemsize: of a rank's features; the size of an element in bytes.
    """
    flops = 8 * rows * rows * world_size * dim
    if block == world_size:
        # Gather, largest and sum of columns in two phases each, reduce-scatter. Nothing goes on at the same time.
        moved = (world_size - 1) * rows * (dim * (itemsize + 4) + 40)
        phases = 6 * (world_size - 1).bit_length()
        return 2 * costs.launch + flops / costs.rate + phases * costs.latency + moved / costs.bandwidth
    turns = world_size // block
    seconds = 0.0
    for share, sent in ((0.25, dim * itemsize + 12), (0.75, dim * (itemsize + 4) + 12)):
        # A block travels, and its sums after it, while products go on; the sharing within a block stands alone.
        products = turns * costs.launch + share * flops / costs.rate
        travel = (turns - 1) * (2 * costs.latency + block * rows * sent / costs.bandwidth)
        within = (block - 1) * (2 * costs.latency + rows * sent / costs.bandwidth)
        seconds += (max(products, travel) if costs.overlaps else products + travel) + within
    return seconds


def needed_bytes(block: int, world_size: int, rows: int, dim: int, itemsize: int) -> int:
    """Memory of a rank for other ranks' texts and their gradients in float32, at its highest."""
    if block == world_size:  # texts; gradients, as the op returns them, as they are sent, and as gloo receives them
        return world_size * rows * dim * (itemsize + 12)
    return block * rows * dim * (2 * itemsize + 12)  # two blocks of texts; gradients computed, sent and received


@lru_cache
def _best(world_size: int, rows: int, dim: int, itemsize: int, costs: Costs) -> int:
    size = (rows, dim, itemsize)
    divisors = [block for block in range(1, world_size + 1) if world_size % block == 0]
    fitting = [block for block in divisors if needed_bytes(block, world_size, *size) <= costs.budget] or [1]
    return min(fitting, key=lambda block: (step_seconds(block, world_size, *size, costs), -block))
