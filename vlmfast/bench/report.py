"""What a benchmark leaves behind: a table in the terminal, the machine it ran on, a picture."""

from __future__ import annotations

import functools
import itertools
import json
import math
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vlmfast.ops._dispatch import core

PACKAGES = (
    "triton",
    "open_clip_torch",
    "transformers",
    "timm",
    "flamingo-pytorch",
    "memeff",
    "inf-cl",
    "siglip-kernel",
)


def to_json(found: Any) -> str:
    """JSON text of what was found; numbers that JSON has no word for, NaN and the infinities, are null."""
    return json.dumps(_finite(found), indent=1, allow_nan=False) + "\n"


def _finite(found: Any) -> Any:
    if isinstance(found, Mapping):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def size_name(numbers: Mapping[str, int]) -> str:
    """A size as one word of text, such as 'N 64 D 16'."""
    return " ".join(f"{key} {value}" for key, value in numbers.items())


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
        memory, value, gradient = (
            math.nan if number is None else number
            for number in (row["peak_extra_mb"], error.get("value"), error.get("gradient"))
        )
        print(
            f"{row['provider']:32}{row['median_s'] * 1e3:9.1f}{row['iqr_s'] * 1e3:8.1f}{ratio:>24}{row['gflops']:9.0f}"
            f"{row['share_of_gemm']:9.0%}{memory:9.0f}{value:10.1e}{gradient:10.1e}"
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
    for package in PACKAGES:
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


def _positive(value: Value, row: dict[str, Any]) -> float | None:
    """The row's value, if a logarithmic axis has a place for it."""
    found = value(row)
    return found if found is not None and 0 < found < math.inf else None


def lines_plot(rows: Sequence[dict[str, Any]], header: dict[str, Any], title: str, path: Path) -> None:
    """Time, memory and error against the size's first number; panels per dtype.

    A line per provider and size's other numbers, which are in the title if they are all the same.
    """
    axis_name = next(iter(rows[0]["size"]))

    def others(row: dict[str, Any]) -> str:
        return size_name({key: value for key, value in row["size"].items() if key != axis_name})

    kinds = list(dict.fromkeys(map(others, rows)))

    def draw(axis: Any, chosen: dict[str, list[dict[str, Any]]], value: Value, color: Color) -> None:
        for number, (name, group) in enumerate(chosen.items()):
            style = "-" if name.startswith("vlmfast") else "--"
            for kind, marker in zip(kinds, itertools.cycle("os^Dv")):
                points = sorted((r["size"][axis_name], value(r)) for r in group if others(r) == kind and value(r))
                label = name if len(kinds) == 1 else f"{name}, {kind}"
                if points:
                    axis.plot(*zip(*points, strict=True), style, marker=marker, label=label, color=color(number % 20))
        axis.set(xscale="log", yscale="log", xlabel=axis_name)

    _panels(rows, header, f"{title}: {kinds[0]}" if len(kinds) == 1 else title, path, draw)


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
            draw(axis, chosen, functools.partial(_positive, value), colors)
            axis.set(ylabel=label, title=dtype)
            axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    what = header.get("gpu") or f"{header['processor']}, {header['threads']} threads"
    figure.suptitle(f"{title}; {what}; torch {header['torch']}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
