"""Measures providers of one loss side by side: time, share of the machine's matrix product, memory, error.

Every round times each provider once, one after the other, so that a busy or throttled machine is busy for all alike;
ratios are taken within one run. Memory is measured in a fresh process per row. Errors are against float64. A provider
that is not installed, cannot run on the device or does not fit in memory is named with its reason and has no row.

`run_under_pytest` is the same row under pytest-benchmark, a provider at a time and so not interleaved.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[..., Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_ERROR_ROWS = 8192
"""The float64 reference holds several N x N matrices; beyond this many rows errors are not measured."""


class NotHere(Exception):  # noqa: N818
    """Why a provider cannot run."""


@dataclass(frozen=True)
class Provider:
    """`make(device)` returns the loss or raises NotHere.

    `units` * N * N * D are the operations of its forward and backward. `frozen`: the image features have no gradient.
    `forward_only`: under no_grad. `matrices`: about how many (N, N) matrices of the features' dtype it holds at once.
    `backend`: the one of ours that is forced.
    """

    make: Callable[[str], Loss]
    units: int
    frozen: bool = False
    forward_only: bool = False
    matrices: int = 0
    backend: str | None = None
    dtypes: Sequence[str] = tuple(DTYPES)


@dataclass(frozen=True)
class Op:
    name: str
    scalars: tuple[float, ...]
    reference: Loss
    providers: dict[str, Provider]
    baseline: str


def require(module: str) -> Any:
    """An optional package, or NotHere with the reason."""
    from importlib import import_module

    try:
        return import_module(module)
    except Exception as error:  # some peers fail at import where there is no GPU, each in its own way
        raise NotHere(
            f"{module}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def on_gpu(device: str) -> None:
    if device != "cuda":
        raise NotHere("needs a GPU")


def backend_rows(impls: Mapping[str, Any], modes: Mapping[str, Provider]) -> dict[str, Provider]:
    """`modes` once more for each backend of an op, without that which runs by itself on the device."""

    def maker(backend: str, make: Callable[[str], Loss]) -> Callable[[str], Loss]:
        def checked(device: str) -> Loss:
            reasons = {name: impl.unsupported(torch.zeros(1, 1, device=device)) for name, impl in impls.items()}
            if reasons[backend]:
                raise NotHere(reasons[backend])
            if backend == next(name for name, reason in reasons.items() if not reason):
                raise NotHere("is what the rows without a backend's name run")
            return make(device)

        return checked

    return {
        f"vlmfast {backend}{mode}": replace(provider, make=maker(backend, provider.make), backend=backend)
        for backend in impls
        for mode, provider in modes.items()
    }


def compiled(function: Loss) -> Loss:
    """torch.compile for each size by itself: told of a second size, it would make one slower kernel for all sizes."""
    return torch.compile(function, dynamic=False)


def make(provider: Provider, rows: int, dtype_name: str, device: str) -> Loss:
    """The provider's loss.

    Raises:
        NotHere: it is not for this dtype or device, is not installed, or will not fit in memory.
    """
    if dtype_name not in provider.dtypes:
        raise NotHere(f"not for {dtype_name}")
    # A GPU says that it is full; a CPU's system may end the whole run instead.
    if device == "cpu" and provider.matrices:
        needed = provider.matrices * rows * rows * DTYPES[dtype_name].itemsize
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        if needed > 0.9 * available:
            raise NotHere(f"needs about {needed / 1e9:.0f} GB, {available / 1e9:.0f} GB are free")
    return provider.make(device)


def make_inputs(op: Op, rows: int, dim: int, dtype: torch.dtype, device: str, provider: Provider | None = None) -> list:
    generator = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(rows, dim, generator=generator), dim=1) for _ in range(2)]
    inputs = [t.to(device, dtype) for t in features] + [torch.tensor(v, device=device) for v in op.scalars]
    gradient = [True] * len(inputs)
    if provider is not None:
        gradient = [not provider.forward_only and not (provider.frozen and k == 0) for k in range(len(inputs))]
    return [t.requires_grad_(flag) for t, flag in zip(inputs, gradient, strict=True)]


def step(loss: Loss, inputs: list[Tensor], backend: str | None = None) -> list[Tensor]:
    """The loss and the gradients of those inputs that want one, by the backend named if one is."""
    if backend:
        with patch.dict(os.environ, VLMFAST_BACKEND=backend):
            return step(loss, inputs)
    leaves = [t for t in inputs if t.requires_grad]
    with torch.set_grad_enabled(bool(leaves)):
        value = loss(*inputs)
    # A peer may give no gradient for the scale; zero stands for it, and only the features' are judged.
    return [
        value.detach(),
        *(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True) if leaves else ()),
    ]


def seconds(function: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    start_time = time.perf_counter()
    function()
    return time.perf_counter() - start_time


def gemm_rates(rows: int, dim: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], float]]:
    """Functions that measure a matrix product's GFLOP/s: the library's at this size, and tiles that stay in cache.

    On a CPU float16 is judged by float32's product: that of float16 is emulated, a hundred times slower.
    """
    if device == "cpu" and dtype == torch.float16:
        dtype = torch.float32
    a, b = (torch.randn(rows, dim).to(device, dtype) for _ in range(2))
    rates = {"library": lambda: 2 * rows * rows * dim / seconds(lambda: a @ b.T, device) / 1e9}
    if device == "cpu":
        from vlmfast.ops._dispatch import core

        if core is not None:
            rates["tiles"] = lambda: core.tile_product_gflops(dtype == torch.bfloat16)
    return rates


def exact_results(op: Op, rows: int, dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Loss and every gradient of the reference in float64, at features rounded to dtype."""
    inputs = make_inputs(op, rows, dim, dtype, device)
    return step(op.reference, [t.detach().double().requires_grad_() for t in inputs])


def errors(ours: list[Tensor], exact: list[Tensor], provider: Provider) -> dict[str, float]:
    """|loss - exact|, and the largest error of a feature gradient's entry relative to the largest entry."""
    found = {"loss": (ours[0].double() - exact[0]).abs().item()}
    if not provider.forward_only:
        features = exact[2:3] if provider.frozen else exact[1:3]
        pairs = zip(ours[1:], features, strict=False)
        found["gradient"] = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    return found


def peak_memory(op: Op, name: str, rows: int, dim: int, dtype_name: str, device: str) -> float:
    """MB beyond the inputs in one forward and backward, in this process.

    A smaller one before it warms libraries up, and one of this size compiles what is to be compiled.
    """
    provider = op.providers[name]
    loss = provider.make(device)
    step(loss, make_inputs(op, 256, dim, DTYPES[dtype_name], device, provider), provider.backend)
    inputs = make_inputs(op, rows, dim, DTYPES[dtype_name], device, provider)
    before = torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")
    step(loss, inputs, provider.backend)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(loss, inputs, provider.backend)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # Linux: forget the peak so far, which the compiler may have set.
    Path("/proc/self/clear_refs").write_text("5")
    step(loss, inputs, provider.backend)
    return max(0, _status("VmHWM") - before) * 1024 / 1e6


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(
    op: Op, names: Sequence[str], sizes: Sequence[int], dtypes: Sequence[str], dim: int, rounds: int, script: str
) -> list[dict]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows_out = []
    for dtype_name in dtypes:
        for rows in sizes:
            rows_out += _measure_size(op, names, rows, dim, dtype_name, device, rounds, script)
    return rows_out


def _measure_size(
    op: Op, names: Sequence[str], rows: int, dim: int, dtype_name: str, device: str, rounds: int, script: str
) -> list[dict]:
    # What torch.compile made for other sizes counts against its limit of kernels per function.
    torch.compiler.reset()
    dtype = DTYPES[dtype_name]
    exact = exact_results(op, rows, dim, dtype, device) if rows <= MAX_ERROR_ROWS else None
    losses: dict[str, Loss] = {}
    found: dict[str, dict[str, float]] = {}
    for name in names:
        provider = op.providers[name]
        try:
            loss = make(provider, rows, dtype_name, device)
            results = step(loss, make_inputs(op, rows, dim, dtype, device, provider), provider.backend)
        except NotHere as reason:
            print(f"  {name}: no row ({reason})", flush=True)
            continue
        except Exception as error:  # a peer that this size, dtype or GPU is too much for; ours must run
            if name.startswith("vlmfast"):
                raise
            print(f"  {name}: no row ({type(error).__name__}: {str(error).splitlines()[:1]})", flush=True)
            continue
        losses[name] = loss
        if exact is not None:
            found[name] = errors(results, exact, provider)
    rates = gemm_rates(rows, dim, dtype, device)
    measured: dict[str, list[float]] = {name: [] for name in losses}
    products: dict[str, list[float]] = {name: [] for name in rates}
    inputs = {name: make_inputs(op, rows, dim, dtype, device, op.providers[name]) for name in losses}
    for number in range(rounds + 1):  # the first warms up
        for name, loss in losses.items():
            elapsed = seconds(functools.partial(step, loss, inputs[name], op.providers[name].backend), device)
            if number:
                measured[name].append(elapsed)
        for name, rate in rates.items():
            value = rate()
            if number:
                products[name].append(value)
    gemm = {name: statistics.median(values) for name, values in products.items()}
    inputs.clear()
    group = []
    for name, times in measured.items():
        row = _row(op.providers[name], name, rows, dim, dtype_name, device, times, gemm)
        if name in found:
            row["error"] = found[name]
        row["peak_extra_mb"] = _memory_of(script, name, rows, dim, dtype_name, device)
        group.append(row)
    print_table(op, group, gemm)
    return group


def _row(
    provider: Provider,
    name: str,
    rows: int,
    dim: int,
    dtype_name: str,
    device: str,
    times: Sequence[float],
    gemm: dict[str, float],
) -> dict:
    median = statistics.median(times)
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [median] * 3
    gflops = provider.units * rows * rows * dim / median / 1e9
    return {
        "provider": name, "rows": rows, "dim": dim, "dtype": dtype_name, "device": device, "median_s": median,
        "iqr_s": quartiles[2] - quartiles[0], "rounds": len(times), "units": provider.units, "gflops": gflops,
        "gemm_gflops": gemm, "share_of_gemm": gflops / max(gemm.values()),
    }  # fmt: skip


def _memory_of(script: str, name: str, rows: int, dim: int, dtype_name: str, device: str) -> float | None:
    """`peak_memory` in a fresh process; None, and why on the terminal, where it failed."""
    done = subprocess.run(
        [sys.executable, script, "--memory", name, str(rows), str(dim), dtype_name, device],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return float(done.stdout.split()[-1])
    print(f"  {name}: no memory figure ({done.stderr.strip().splitlines()[-1:]})", flush=True)
    return None


def run_under_pytest(op: Op, name: str, rows: int, dtype_name: str, benchmark: Any, dim: int = 512) -> None:
    """One provider at one size as a pytest-benchmark; skips where the provider cannot run."""
    import pytest

    device = "cuda" if torch.cuda.is_available() else "cpu"
    provider, dtype = op.providers[name], DTYPES[dtype_name]
    torch.compiler.reset()
    try:
        loss = make(provider, rows, dtype_name, device)
    except NotHere as reason:
        pytest.skip(str(reason))
    inputs = make_inputs(op, rows, dim, dtype, device, provider)

    def once() -> list[Tensor]:
        results = step(loss, inputs, provider.backend)
        if device == "cuda":
            torch.cuda.synchronize()
        return results

    results = benchmark.pedantic(once, rounds=5, warmup_rounds=2)
    found = errors(results, exact_results(op, rows, dim, dtype, device), provider)
    gflop = provider.units * rows * rows * dim / 1e9
    benchmark.extra_info.update(provider=name, rows=rows, dim=dim, dtype=dtype_name, gflop=gflop, error=found)


def print_table(op: Op, group: list[dict], gemm: dict[str, float]) -> None:
    if not group:
        return
    first = group[0]
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in gemm.items())
    print(f"\n{op.name}  N = {first['rows']}, D = {first['dim']}, {first['dtype']}; matrix product, GFLOP/s: {rates}")
    titles = f"{'ms':>9}{'IQR':>8}{'x ' + op.baseline:>16}{'GFLOP/s':>9}{'of GEMM':>9}{'MB':>9}"
    print(f"{'':32}{titles}{'loss err':>10}{'grad err':>10}")
    base = next((row["median_s"] for row in group if row["provider"] == op.baseline), None)
    for row in group:
        ratio = f"{base / row['median_s']:.2f}" if base else ""
        error = row.get("error", {})
        memory = float("nan") if row["peak_extra_mb"] is None else row["peak_extra_mb"]
        print(
            f"{row['provider']:32}{row['median_s'] * 1e3:9.1f}{row['iqr_s'] * 1e3:8.1f}{ratio:>16}{row['gflops']:9.0f}"
            f"{row['share_of_gemm']:9.0%}{memory:9.0f}"
            f"{error.get('loss', float('nan')):10.1e}{error.get('gradient', float('nan')):10.1e}"
        )
    sys.stdout.flush()


def machine() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        processor = (
            f"{named.get('model name', processor)} (family {named.get('cpu family')}, model {named.get('model')})"
        )
    from vlmfast.ops._dispatch import core

    header = {
        "processor": processor, "threads": torch.get_num_threads(), "system": platform.system(),
        "python": platform.python_version(), "torch": torch.__version__, "date": date.today().isoformat(),
        "vlmfast": {k: v for k, v in core.build_info().items() if k != "torch"} if core else "no C++ core",
    }  # fmt: skip
    for package in ("open_clip_torch", "transformers", "memeff", "inf-cl", "siglip-kernel"):
        from importlib.metadata import PackageNotFoundError, version

        try:
            header[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        header["gpu"] = torch.cuda.get_device_name()
    return header


def plot(rows: list[dict], header: dict[str, Any], title: str, path: Path) -> None:
    """Time, memory and gradient error against N, a line per provider; one row of panels per dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    figure, axes = pyplot.subplots(len(dtypes), 3, figsize=(15, 4.2 * len(dtypes)), squeeze=False, layout="constrained")
    colors = pyplot.get_cmap("tab20")
    panels = {
        "time, forward and backward (s)": lambda row: row["median_s"],
        "peak memory beyond the inputs (MB)": lambda row: row["peak_extra_mb"],
        "largest gradient error / largest gradient": lambda row: row.get("error", {}).get("gradient"),
    }
    for dtype, line in zip(dtypes, axes, strict=True):
        for (label, value), axis in zip(panels.items(), line, strict=True):
            for number, name in enumerate(names):
                points = [(row["rows"], value(row)) for row in rows if (row["provider"], row["dtype"]) == (name, dtype)]
                points = [(x, y) for x, y in points if y]
                if points:
                    style = "-" if name.startswith("vlmfast") else "--"
                    axis.plot(*zip(*points, strict=True), style, marker="o", label=name, color=colors(number % 20))
            axis.set(xscale="log", yscale="log", xlabel="N", ylabel=label, title=dtype)
            axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    what = header.get("gpu") or f"{header['processor']}, {header['threads']} threads"
    figure.suptitle(f"{title}: D = {rows[0]['dim']}; {what}; torch {header['torch']}")
    figure.savefig(path, dpi=110)


def main(op: Op, script: str, title: str) -> None:
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--providers", nargs="+", default=list(op.providers), choices=list(op.providers))
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.png")
    parser.add_argument("--memory", nargs=5, metavar=("PROVIDER", "N", "D", "DTYPE", "DEVICE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        name, rows, dim, dtype, device = options.memory
        print(peak_memory(op, name, int(rows), int(dim), dtype, device))
        return
    header = machine()
    print(json.dumps(header))
    rows = measure(op, options.providers, options.sizes, options.dtypes, options.dim, options.rounds, script)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        target = options.output.with_suffix(".json")
        target.write_text(json.dumps({"machine": header, "rows": rows}, indent=1) + "\n")
        plot(rows, header, op.name, options.output.with_suffix(".png"))
        print(f"\nwritten: {target} and {options.output.with_suffix('.png')}")
