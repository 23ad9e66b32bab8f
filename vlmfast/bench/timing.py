"""Seconds of a call, and the rates of matrix products that they are judged by."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def here() -> str:
    """The device that is measured: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc's


def seconds(function: Callable[[], Any], device: str) -> float:
    """Of one call among as many that follow each other as 50 ms hold, 20 at most, after one that is not counted.

    As in a training step, a GPU has work in its queue while more is launched: launches count where it waits for them.
    On a CPU the memory that other functions have freed is given back to the system first: by itself the C library does
    so at some later call, whosever that is, and takes 6 to 8 ms for 240 MB.
    """
    if device == "cpu" and _malloc_trim:
        _malloc_trim(0)
    once = _mean_seconds(function, 1, device)
    return _mean_seconds(function, max(1, min(20, int(0.05 / max(once, 1e-9)))), device)


def _mean_seconds(function: Callable[[], Any], calls: int, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    start_time = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start_time) / calls


def interleaved(
    runs: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each by a clock, such as time.process_time, one after the other in every round."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            before = clock()
            run()
            spent[name].append(clock() - before)
    return spent


def compared(spent: Mapping[str, Sequence[float]], ours: str, theirs: str) -> dict[str, Any]:
    """Medians by name, how many times as long theirs takes in each round, and both in a sentence."""
    middle = {name: statistics.median(values) for name, values in spent.items()}
    ratios = [b / a for a, b in zip(spent[ours], spent[theirs], strict=True)]
    said = (
        f"{middle[ours]:.3f} s against {middle[theirs]:.3f} s, "
        f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    return {"seconds": spent, "median": middle, "ratios": ratios, "said": said}


def gemm_rates(product: tuple[int, int, int], dtype: torch.dtype, device: str) -> dict[str, Callable[[], float]]:
    """Functions that measure a matrix product's GFLOP/s: the library's of (m, n, k), and tiles that stay in cache.

    On a CPU float16 is judged by float32's product: that of float16 is emulated, a hundred times slower.
    """
    if device == "cpu" and dtype == torch.float16:
        dtype = torch.float32
    m, n, k = product
    a, b = (torch.randn(rows, k).to(device, dtype) for rows in (m, n))
    rates = {"library": lambda: 2 * m * n * k / seconds(lambda: a @ b.T, device) / 1e9}
    if device == "cpu":
        from vlmfast.ops._dispatch import core

        if core is not None:
            rates["tiles"] = lambda: core.tile_product_gflops(dtype == torch.bfloat16)
    return rates


def row_of(times: Sequence[float], gflop: float, gemm: Mapping[str, float]) -> dict[str, Any]:
    """Median and spread of the rounds, and the rate that gflop in that time is."""
    median = statistics.median(times)
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [median] * 3
    return {
        "median_s": median, "iqr_s": quartiles[2] - quartiles[0], "rounds": len(times), "gflops": gflop / median,
        "gemm_gflops": dict(gemm), "share_of_gemm": gflop / median / max(gemm.values()),
    }  # fmt: skip
