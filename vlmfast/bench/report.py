"""What a benchmark leaves behind: a table in the terminal, the machine it ran on, a picture."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vlmfast.ops._dispatch import core

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


def processor() -> str:
    """The processor's name, on Linux with family and model."""
    found = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        return f"{named.get('model name', found)} (family {named.get('cpu family')}, model {named.get('model')})"
    return found


def machine() -> dict[str, Any]:
    """What decides the times: processor, threads, versions."""
    header = {
        "processor": processor(), "threads": torch.get_num_threads(), "system": platform.system(),
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


PANELS = {
    "time (s)": lambda row: row["median_s"],
    "peak memory beyond the inputs (MB)": lambda row: row["peak_extra_mb"],
    "error against float64": lambda row: row.get("error", {}).get("gradient", row.get("error", {}).get("value")),
}
"""What is drawn of a row; a gradient's error is relative to the largest gradient."""


def lines_plot(rows: Sequence[dict[str, Any]], header: dict[str, Any], title: str, path: Path) -> None:
    """Time, memory and error against the size's first number, a line per provider; panels per dtype."""
    axis_name, *others = rows[0]["size"]

    def draw(axis: Any, chosen: dict[str, list[dict[str, Any]]], value: Value, color: Color) -> None:
        for number, (name, group) in enumerate(chosen.items()):
            points = sorted((row["size"][axis_name], value(row)) for row in group if value(row))
            if points:
                style = "-" if name.startswith("vlmfast") else "--"
                axis.plot(*zip(*points, strict=True), style, marker="o", label=name, color=color(number % 20))
        axis.set(xscale="log", yscale="log", xlabel=axis_name)

    fixed = ", ".join(f"{key} {rows[0]['size'][key]}" for key in others)
    _panels(rows, header, f"{title}: {fixed}", path, draw)


def bars_plot(rows: Sequence[dict[str, Any]], header: dict[str, Any], title: str, path: Path) -> None:
    """Time, memory and error, a group of bars per case, a bar per provider; panels per dtype."""
    cases = list(dict.fromkeys(row["case"] for row in rows))

    def draw(axis: Any, chosen: dict[str, list[dict[str, Any]]], value: Value, color: Color) -> None:
        for number, (name, group) in enumerate(chosen.items()):
            found = {row["case"]: value(row) for row in group}
            places = [k + 0.8 * number / len(chosen) for k, case in enumerate(cases) if found.get(case)]
            values = [found[case] for case in cases if found.get(case)]
            axis.bar(places, values, 0.8 / len(chosen), align="edge", label=name, color=color(number % 20))
        axis.set(yscale="log")
        axis.set_xticks([k + 0.4 for k in range(len(cases))], cases, fontsize=8)

    _panels(rows, header, title, path, draw)


Value = Callable[[dict[str, Any]], Any]
Color = Callable[[int], Any]
Draw = Callable[[Any, dict[str, list[dict[str, Any]]], Value, Color], None]


def _panels(rows: Sequence[dict[str, Any]], header: dict[str, Any], title: str, path: Path, draw: Draw) -> None:
    """A row of panels per dtype, one for each of PANELS, drawn by `draw(axis, rows by provider, value, color)`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    figure, axes = pyplot.subplots(len(dtypes), 3, figsize=(15, 4.2 * len(dtypes)), squeeze=False, layout="constrained")
    colors = pyplot.get_cmap("tab20")
    for dtype, line in zip(dtypes, axes, strict=True):
        chosen = {name: [row for row in rows if (row["provider"], row["dtype"]) == (name, dtype)] for name in names}
        for (label, value), axis in zip(PANELS.items(), line, strict=True):
            draw(axis, chosen, value, colors)
            axis.set(ylabel=label, title=dtype)
            axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    what = header.get("gpu") or f"{header['processor']}, {header['threads']} threads"
    figure.suptitle(f"{title}; {what}; torch {header['torch']}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
