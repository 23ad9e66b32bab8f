"""`ClipLoss` over several gloo processes of this machine, forward and backward, beside open_clip's.

    python bench/bench_distributed.py --processes 2 4 8 --pairs 64 128 256 512 --rounds 7 --output figures.json

Each process has one thread. A step of each provider follows the other within a round; the time of a step is from the
last process's start to the last one's end. A ratio is taken within a round, and the median of the rounds is shown.
Beside it is that of processor seconds, of all processes together, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist
from torch.nn import functional as F

from vlmfast.bench.report import machine, to_json
from vlmfast.nn import ClipLoss, exchange

SECONDS = 0.2  # of steps of one provider in one round, three steps at least
KINDS = ("wall", "processor")
BASELINE = "open_clip"
RING = "vlmfast ring"  # of single shards, which a budget of nothing leaves
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def providers(rank: int, world_size: int) -> dict[str, Callable[..., Tensor]]:
    """Losses with open_clip's arguments. "vlmfast" is the default; "uniform" promises, as open_clip assumes."""
    from open_clip.loss import ClipLoss as OpenClipLoss

    options: dict[str, Any] = {
        "local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": world_size,
    }  # fmt: skip
    return {
        "vlmfast": ClipLoss(**options),
        "vlmfast uniform": ClipLoss(**options, uniform=True),
        RING: ClipLoss(**options),
        BASELINE: OpenClipLoss(**options),
    }


def time_of(step: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Seconds of one step, the longest of all ranks'; and processor seconds of all together. The same on each rank."""
    dist.barrier()
    start, used = time.perf_counter(), time.process_time()
    for _ in range(calls):
        step()
    wall, processor = (
        torch.tensor(seconds / calls) for seconds in (time.perf_counter() - start, time.process_time() - used)
    )
    dist.all_reduce(wall, dist.ReduceOp.MAX)
    dist.all_reduce(processor)
    return wall.item(), processor.item()


def measure(rank: int, world_size: int, store: str, args: argparse.Namespace, results: Any) -> None:
    """One process; the first puts a row for each provider, size and dtype into results."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    default = exchange.COSTS["cpu"]
    for pairs in args.pairs:
        for dtype in args.dtypes:
            torch.manual_seed(rank)
            image, text = (
                F.normalize(torch.randn(pairs, args.dim), dim=1).to(DTYPES[dtype]).requires_grad_() for _ in range(2)
            )
            scale = torch.tensor(50.0, requires_grad=True)

            def step(name: str, loss: Callable[..., Tensor]) -> Tensor:
                # Which way the texts go is chosen at every call.
                exchange.COSTS["cpu"] = replace(default, budget=0) if name == RING else default
                value = loss(image, text, scale)  # noqa: B023
                value.backward()
                return value.detach().float()

            losses = providers(rank, world_size)
            values = {name: step(name, loss) for name, loss in losses.items()}
            tolerance = 1e-4 if dtype == "float32" else 0.05  # open_clip's logits are bfloat16
            if any(abs(value - values[BASELINE]) > tolerance * values[BASELINE] for value in values.values()):
                raise SystemExit(f"the losses differ: {values}")
            calls = {
                name: max(3, int(SECONDS / time_of(lambda n=name, f=loss: step(n, f), 1)[0]))
                for name, loss in losses.items()
            }
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
            for turn in range(args.rounds):
                names = list(losses)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    times[name].append(time_of(lambda n=name: step(n, losses[n]), calls[name]))  # noqa: B023
            if rank == 0:
                size = {"processes": world_size, "pairs": pairs, "dim": args.dim, "dtype": dtype}
                for name, found in times.items():
                    results.put({**size, "provider": name, **summary(found, times[BASELINE])})
    dist.destroy_process_group()


def summary(found: Sequence[tuple[float, float]], baseline: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Medians, and how many times as long the baseline took in the same round."""
    row: dict[str, Any] = {}
    for kind, ours, theirs in zip(KINDS, zip(*found, strict=True), zip(*baseline, strict=True), strict=True):
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        row |= {
            f"{kind}_s": statistics.median(ours), f"{kind}_ratio": statistics.median(ratios), f"{kind}_rounds_s": ours,
        }  # fmt: skip
    return row


def rows_of(world_size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What the processes of one world measured."""
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.start_processes(
            measure, (world_size, str(Path(folder) / "store"), args, results), world_size, join=False
        )
        expected = len(args.pairs) * len(args.dtypes) * len(providers(0, 1))
        found: list[dict[str, Any]] = []
        while not context.join(timeout=0.1) or len(found) < expected:
            while not results.empty():
                found.append(results.get())
    return found


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each provider and size: milliseconds, and how many times as long the baseline takes."""
    for row in rows:
        if row["provider"] == BASELINE:
            same = [r for r in rows if all(r[k] == row[k] for k in ("processes", "pairs", "dtype"))]
            print(f"\n{row['processes']} processes of {row['pairs']} pairs, {row['dtype']}")
            for r in same:
                cells = (f"{k} {1e3 * r[f'{k}_s']:8.2f} ms {r[f'{k}_ratio']:6.2f}x" for k in KINDS)
                print(f"{r['provider']:18}", *cells, sep="  ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 128, 256, 512], help="per process")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=DTYPES)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    rows = []
    for world_size in args.processes:
        found = rows_of(world_size, args)
        show(found)
        rows += found
        if args.output:
            args.output.write_text(to_json({"op": "distributed", "machine": {**machine(), "threads": 1}, "rows": rows}))


if __name__ == "__main__":
    main()
