"""vlmfast bench."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmfast import bench
from vlmfast.bench import compare
from vlmfast.bench.harness import DTYPES, Bench
from vlmfast.bench.report import machine


def run(arguments: Sequence[str]) -> int:
    """Tables on the terminal, OUTPUT/<op>.json and .png with --output. 1 when --compare finds a row that is slower."""
    parser = argparse.ArgumentParser(prog="vlmfast bench", description="Measures ops beside what people use instead.")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"by default all: {', '.join(bench.NAMES)}")
    parser.add_argument("--providers", nargs="+", help="by default all; --list names them")
    parser.add_argument("--sizes", nargs="+", help="by default those that --list names")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, metavar="DIR", help="write <op>.json and <op>.png to this folder")
    parser.add_argument("--compare", type=Path, nargs="+", default=[], metavar="JSON", help="results of an older run")
    parser.add_argument("--list", action="store_true", help="name ops, sizes and providers, and measure nothing")
    parser.add_argument("--memory", nargs=3, metavar=("PROVIDER", "SIZE", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    benches = [bench.load(name) for name in dict.fromkeys(options.ops or bench.NAMES)]
    if options.list:
        for one in benches:
            print(f"{one.name}\n  sizes: {', '.join(one.sizes)}\n  providers: {', '.join(one.providers)}")
        return 0
    if options.memory:
        print(benches[0].memory(*options.memory))
        return 0
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1; got {options.rounds}")
    chosen = [(one, _providers(one, options.providers), _sizes(one, options.sizes)) for one in benches]
    header = machine()
    names = [one.name for one in benches]
    old = [compare.load(path, header, names, options.dtypes) for path in options.compare]
    print(json.dumps(header))
    found: dict[str, list[dict[str, Any]]] = {}
    for one, providers, sizes in chosen:
        found[one.name] = [
            row
            for dtype in options.dtypes
            for size in sizes
            for row in one.measure(providers, size, dtype, options.rounds)
        ]
        if options.output and found[one.name]:
            _write(one, found[one.name], header, options.output)
    slower = False
    for results in old:
        text, worse = compare.compare(results["rows"], found[results["op"]])
        print("", results["op"], *text, sep="\n")
        slower = slower or worse
    return 1 if slower else 0


def _providers(one: Bench, names: Sequence[str] | None) -> Sequence[str]:
    if unknown := [name for name in names or () if name not in one.providers]:
        raise ValueError(f"--providers of {one.name} must be of {', '.join(one.providers)}; got {', '.join(unknown)}")
    return names or one.providers


def _sizes(one: Bench, sizes: Sequence[str] | None) -> Sequence[str]:
    for size in sizes or ():
        try:
            one.check(size)
        except ValueError as error:
            raise ValueError(
                f"--sizes of {one.name} must be like {', '.join(one.sizes)}; got {size!r} ({error})"
            ) from error
    return sizes or one.sizes


def _write(one: Bench, rows: list[dict[str, Any]], header: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{one.name}.json"
    target.write_text(json.dumps({"op": one.name, "machine": header, "rows": rows}, indent=1) + "\n")
    one.plot(rows, header, one.name, target.with_suffix(".png"))
    print(f"\nwritten: {target} and {target.with_suffix('.png')}")
