"""Host time, launches and time of kernels of a step of `info_nce`, of each candidate for batches of few pairs.

    python bench/launches.py --sizes 1024 4096 8192 --output runs/launches

A step is forward and backward, once the candidate has been compiled or captured. Of a step: `step_ms`, the wall time of
one among many that follow each other; `host_ms`, that until its call returns, without waiting for the device; and by
torch.profiler `launches` (calls of CUDA that start a kernel, a copy or a graph), `kernels` and `kernel_ms`, their sum
on the device, and the most costly of them. Where host_ms is the larger, a step waits for its launches. On a CPU there
are no launches, and `operators` alone is counted: calls of PyTorch's that are inside no other.

`fastest` names for each size the candidate of the least step_ms among those that are exact enough: their gradients are
at most twice as far from float64 as the dense expression's. It is what a choice by size is to be made of; vlmfast makes
none so far, as these figures have been measured on no GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vlmfast.bench import harness
from vlmfast.bench.info_nce import OP
from vlmfast.bench.report import machine, to_json
from vlmfast.bench.timing import here

CANDIDATES = (
    "vlmfast streamed",
    "vlmfast kept",
    "vlmfast in a CUDA graph",
    "vlmfast cuda streamed",
    "vlmfast cuda kept",
    "open_clip",
    "transformers",
    "transformers compiled",
    "transformers compiled, CUDA graph",
)
DENSE = "transformers"
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset", "cudaGraphLaunch")


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def times(once: Callable[[], object], calls: int, device: str) -> dict[str, float]:
    """Milliseconds of a step: on the host alone, and until the device has done all."""
    wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        once()
    host = time.perf_counter() - start
    wait(device)
    return {"step_ms": (time.perf_counter() - start) / calls * 1e3, "host_ms": host / calls * 1e3}


def profiled(once: Callable[[], object], calls: int, device: str) -> dict[str, Any]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities, acc_events=True) as found:
        for _ in range(calls):
            once()
        wait(device)
    events = list(found.events())
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    host = [event for event in events if event.device_type == DeviceType.CPU]
    spent: dict[str, float] = {}
    for event in kernels:
        spent[event.name] = spent.get(event.name, 0.0) + event.device_time_total / calls / 1e3
    most = sorted(spent.items(), key=lambda entry: -entry[1])[:6]
    return {
        "operators": sum(event.cpu_parent is None and "::" in event.name for event in host) / calls,
        "launches": sum(event.name.startswith(LAUNCHES) for event in host) / calls,
        "kernels": len(kernels) / calls,
        "kernel_ms": sum(spent.values()),
        "most": {name[:100]: round(value, 4) for name, value in most},
    }


def measure(size_text: str, dtype_name: str, calls: int, rounds: int) -> list[dict[str, Any]]:
    """A row of each candidate that runs here, their rounds interleaved."""
    torch.compiler.reset()
    device, size, dtype = here(), OP.size(size_text), harness.DTYPES[dtype_name]
    exact = harness.exact_results(OP, size, dtype, device)
    steps: dict[str, Callable[[], harness.Results]] = {}
    errors: dict[str, dict[str, float]] = {}

    def ready(name: str) -> Callable[[], harness.Results]:
        provider = OP.providers[name]
        function = harness.make(provider, size, dtype_name, device)
        inputs = harness.make_inputs(OP, size, dtype, device, provider)
        once = functools.partial(harness.step, function, inputs, provider.backend)
        errors[name] = harness.errors(OP, once(), exact)
        for _ in range(4):  # what is captured is captured in one of the first
            once()
        return once

    for name in CANDIDATES:
        if (made := harness.attempt(name, functools.partial(ready, name))) is not None:
            steps[name] = made
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, once in steps.items():
            measured[name].append(times(once, calls, device))
    rows = []
    for name, once in steps.items():
        best = min(measured[name], key=lambda row: row["step_ms"])
        row = {"provider": name, "size": dict(size.numbers), "dtype": dtype_name, "device": device, **best,
               "error": errors[name], **profiled(once, calls, device)}  # fmt: skip
        rows.append(row)
        shown = "".join(f"{row[f'{key}_ms']:9.3f} {key}" for key in ("step", "host", "kernel"))
        counts = f"{row['launches']:7.0f} launches{row['operators']:7.0f} operators"
        print(f"{size_text:>8}  {name:36}{shown}{counts}", flush=True)
    return rows


def fastest(rows: list[dict[str, Any]]) -> dict[str, str]:
    """By N, of rows of one dtype."""
    chosen = {}
    for pairs in dict.fromkeys(row["size"]["N"] for row in rows):
        group = [row for row in rows if row["size"]["N"] == pairs]
        bound = next((2 * row["error"]["gradient"] for row in group if row["provider"] == DENSE), float("inf"))
        right = [row for row in group if row["error"]["gradient"] <= bound]
        chosen[str(pairs)] = min(right, key=lambda row: row["step_ms"])["provider"]
    return chosen


def plot(rows: list[dict[str, Any]], header: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(dict.fromkeys(row["size"]["N"] for row in rows))
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(6 * len(sizes), 5), squeeze=False, layout="constrained")
    for axis, pairs in zip(axes[0], sizes, strict=True):
        group = [row for row in rows if row["size"]["N"] == pairs]
        for number, key in enumerate(("step_ms", "host_ms", "kernel_ms")):
            axis.barh([k + 0.27 * number for k in range(len(group))], [row[key] for row in group], 0.27, label=key)
        axis.set_yticks([k + 0.27 for k in range(len(group))], [row["provider"] for row in group], fontsize=8)
        axis.set(title=f"N = {pairs}", xlabel="ms a step")
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.suptitle(
        f"info_nce, {rows[0]['dtype']}; {header.get('gpu') or header['processor']}; torch {header['torch']}"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1024", "4096", "8192"], help="N or NxD")
    parser.add_argument("--dtype", default="bfloat16", choices=list(harness.DTYPES))
    parser.add_argument("--calls", type=int, default=20, help="of a round; few enough that launches do not wait")
    parser.add_argument("--rounds", type=int, default=5, help="of which the fastest counts")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write launches.json and launches.png there")
    args = parser.parse_args()
    header = machine()
    print(json.dumps(header, allow_nan=False))
    rows = [row for size in args.sizes for row in measure(size, args.dtype, args.calls, args.rounds)]
    found = {"op": OP.name, "machine": header, "fastest": fastest(rows), "rows": rows}
    print(json.dumps(found["fastest"]))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "launches.json").write_text(to_json(found))
        plot(rows, header, args.output / "launches.png")


if __name__ == "__main__":
    main()
