"""Peak memory of a row: a GPU's by torch's allocator, a CPU's in a process that has done nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from vlmfast.bench import load


def peak_of(once: Callable[[], object], device: str) -> float:
    """MB that a call holds at its highest beyond what is held before the first of two calls."""
    before = torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")
    once()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        once()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    # Linux: forget the peak so far, which the compiler may have set.
    Path("/proc/self/clear_refs").write_text("5")
    once()
    return max(0, _status("VmHWM") - before) * 1024 / 1e6


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def memory_of(bench: str, provider: str, size: str, dtype_name: str) -> float | None:
    """The provider's peak memory; None, and why on the terminal, where it failed."""
    if torch.cuda.is_available():
        try:
            return load(bench).memory(provider, size, dtype_name)
        except Exception as error:  # a peer, or too little memory: the row has its time
            print(f"  {provider}: no memory figure ({type(error).__name__})", flush=True)
            return None
    done = subprocess.run(
        [sys.executable, "-m", "vlmfast", "bench", bench, "--memory", provider, size, dtype_name],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return float(done.stdout.split()[-1])
    print(f"  {provider}: no memory figure ({done.stderr.strip().splitlines()[-1:]})", flush=True)
    return None
