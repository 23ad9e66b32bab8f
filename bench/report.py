"""What a benchmark leaves behind: a table in the terminal, the machine it ran on, a picture."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PEERS = ("open_clip_torch", "transformers", "timm", "flamingo-pytorch", "memeff", "inf-cl", "siglip-kernel")


def print_table(name: str, baseline: str, group: Sequence[dict[str, Any]]) -> None:
    """Rows of one size and dtype; `baseline` is the provider that ratios are taken to."""
    if not group:
        return
    first = group[0]
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in first["gemm_gflops"].items())
    size = ", ".join(f"{key} {value}" for key, value in first["size"].items())
    print(f"\n{name}  {size}, {first['dtype']}; matrix product, GFLOP/s: {rates}")
    titles = f"{'ms':>9}{'IQR':>8}{'x ' + baseline:>24}{'GFLOP/s':>9}{'of GEMM':>9}{'MB':>9}"
    print(f"{'':32}{titles}{'error':>10}{'grad err':>10}")
    base = next((row["median_s"] for row in group if row["provider"] == baseline), None)
    for row in group:
        ratio = f"{base / row['median_s']:.2f}" if base else ""
        error = row.get("error", {})
        memory = float("nan") if row["peak_extra_mb"] is None else row["peak_extra_mb"]
        print(
            f"{row['provider']:32}{row['median_s'] * 1e3:9.1f}{row['iqr_s'] * 1e3:8.1f}{ratio:>24}{row['gflops']:9.0f}"
            f"{row['share_of_gemm']:9.0%}{memory:9.0f}"
            f"{error.get('value', float('nan')):10.1e}{error.get('gradient', float('nan')):10.1e}"
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
    for package in PEERS:
        try:
            header[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        header["gpu"] = torch.cuda.get_device_name()
    return header


def plot(rows: Sequence[dict[str, Any]], header: dict[str, Any], title: str, path: Path) -> None:
    """Time, memory and gradient error against the size's first number, a line per provider; panels per dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axis_name, *others = rows[0]["size"]
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
                chosen = [row for row in rows if (row["provider"], row["dtype"]) == (name, dtype)]
                points = sorted((row["size"][axis_name], value(row)) for row in chosen if value(row))
                if points:
                    style = "-" if name.startswith("vlmfast") else "--"
                    axis.plot(*zip(*points, strict=True), style, marker="o", label=name, color=colors(number % 20))
            axis.set(xscale="log", yscale="log", xlabel=axis_name, ylabel=label, title=dtype)
            axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    what = header.get("gpu") or f"{header['processor']}, {header['threads']} threads"
    fixed = ", ".join(f"{key} {rows[0]['size'][key]}" for key in others)
    figure.suptitle(f"{title}: {fixed}; {what}; torch {header['torch']}")
    figure.savefig(path, dpi=110)
