"""vlmfast bench."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmfast import bench
from vlmfast.bench import compare
from vlmfast.bench.harness import DTYPES, Bench
from vlmfast.bench.report import machine, to_json


def run(arguments: Sequence[str]) -> int:
    """Tables on the terminal, OUTPUT/<op>.json and .png with --output. 1 when --compare finds a row that is slower."""
    if arguments[:1] == ["data"]:
        from vlmfast.cli import bench_data

        return bench_data.run(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="vlmfast bench",
        description="Measures ops beside what people use instead; 'vlmfast bench data' measures images a second.",
    )
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
            print(f"{one.name}\n  sizes: {shlex.join(one.sizes)}\n  providers: {shlex.join(one.providers)}")
        return 0
    if options.memory:
        print(benches[0].memory(*options.memory))
        return 0
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1; got {options.rounds}")
    chosen = _chosen(benches, options.providers, options.sizes)
    header = machine()
    old = [_older(path, header, chosen, options.providers, options.dtypes) for path in options.compare]
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    print(json.dumps(header, allow_nan=False))
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
    for op, rows in old:
        text, worse = compare.compare(rows, found[op])
        print("", op, *text, sep="\n")
        slower = slower or worse
    for path, (op, rows) in zip(options.compare, old, strict=True):
        if not compare.in_common(rows, found[op]):
            raise ValueError(f"--compare: {path} has no row in common with this run of {op}")
    return 1 if slower else 0


Chosen = list[tuple[Bench, Sequence[str], Sequence[str]]]


def _chosen(benches: Sequence[Bench], providers: Sequence[str] | None, sizes: Sequence[str] | None) -> Chosen:
    """Of each op what it knows of the providers and sizes named, all of its own where none are.

    Raises:
        ValueError: no op knows one of the names, or none knows a provider and a size.
    """
    for name in providers or ():
        if not any(name in one.providers for one in benches):
            known = "; of ".join(f"{one.name} must be of {shlex.join(one.providers)}" for one in benches)
            raise ValueError(f"--providers of {known}; got {name!r}")
    for size in sizes or ():
        if all(reasons := [_no_size(one, size) for one in benches]):
            known = "; of ".join(
                f"{one.name} must be like {shlex.join(one.sizes)} ({reason})"
                for one, reason in zip(benches, reasons, strict=True)
            )
            raise ValueError(f"--sizes of {known}; got {size!r}")
    chosen: Chosen = []
    for one in benches:
        named = one.providers if providers is None else [name for name in providers if name in one.providers]
        read = one.sizes if sizes is None else [size for size in sizes if not _no_size(one, size)]
        if named and read:
            chosen.append((one, list(dict.fromkeys(named)), list(dict.fromkeys(read))))
        else:
            print(f"{one.name}: not measured, it knows none of the {'sizes' if named else 'providers'} named")
    if not chosen:
        raise ValueError("--providers and --sizes must leave an op that knows one of both; none does")
    return chosen


def _no_size(one: Bench, size: str) -> str | None:
    """Why it is no size of the op, if it is none."""
    try:
        one.check(size)
    except ValueError as error:
        return str(error)
    return None


def _older(
    path: Path, header: dict[str, Any], chosen: Chosen, providers: Sequence[str] | None, dtypes: Sequence[str]
) -> tuple[str, list[dict[str, Any]]]:
    """The op of an older run, and those of its rows that this one will have too."""
    old = compare.load(path, header, [one.name for one, _, _ in chosen], dtypes)
    one, _, sizes = next(entry for entry in chosen if entry[0].name == old["op"])
    rows = compare.asked(old["rows"], providers, [one.check(size) for size in sizes], dtypes)
    if not rows:
        raise ValueError(f"--compare: {path} has no row of the providers, sizes and dtypes that are measured")
    return one.name, rows


def _write(one: Bench, rows: list[dict[str, Any]], header: dict[str, Any], folder: Path) -> None:
    target = folder / f"{one.name}.json"
    target.write_text(to_json({"op": one.name, "machine": header, "rows": rows}))
    one.plot(rows, header, one.name, target.with_suffix(".png"))
    print(f"\nwritten: {target} and {target.with_suffix('.png')}")
