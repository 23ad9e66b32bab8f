"""vlmfast doctor."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmfast import doctor
from vlmfast.bench.report import to_json


def run(arguments: Sequence[str]) -> int:
    """The report as text, and as JSON with --json. 1 when a check failed."""
    parser = argparse.ArgumentParser(
        prog="vlmfast doctor", description="What runs on this machine, why not the rest, and whether it is right."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it to this file, to paste in an issue")
    options = parser.parse_args(arguments)
    if options.json:
        try:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.open("a").close()
        except OSError as error:
            raise ValueError(f"--json must be a file that can be written; got {options.json} ({error})") from error
    found = doctor.report()
    print("\n".join(lines(found)))
    if options.json:
        options.json.write_text(to_json(found))
        print(f"\nwritten: {options.json}")
    return 0 if found["passed"] else 1


def lines(found: dict[str, Any]) -> list[str]:
    """The report of `vlmfast.doctor.report` as text."""
    text = ["machine"]
    for name, value in found["machine"].items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        if name == "gpus":
            shown = "; ".join(f"{g['name']} ({g['capability']}), {g['memory_gb']} GB" for g in value) or "none"
        text.append(f"  {name:18}{'not installed' if shown is None else shown}")
    for device, ops in found["backends"].items():
        text += ["", f"backends on {device} tensors, in order of preference"]
        for op, why in ops.items():
            text.append(f"  {op}")
            text += [
                f"    {name:8}{'runs' if reason is None else f'does not: {reason}'}" for name, reason in why.items()
            ]
    text += ["", "kernels"]
    text += [f"  {name:8}{', '.join(v) if isinstance(v, list) else v}" for name, v in found["kernels"].items()]
    text += ["", f"{'checks against float64':42}{'dtype':10}{'':8}largest error / bound"]
    for row in found["checks"]:
        share = max((_share(output) for output in row["outputs"].values()), default=0.0)
        verdict = "ok" if row["passed"] else "WRONG"
        where = f"{row['op']}, {row['backend']} on {row['device']}"
        text.append(f"  {where:40}{row['dtype']:10}{verdict:8}{share:.2f}")
        text += [f"    {failure}" for failure in row["failures"]]
    text += _speed(found)
    text += ["", *(f"not checked: {reason}" for reason in found["not_checked"])]
    wrong = sum(not row["passed"] for row in found["checks"])
    text += ["", f"{len(found['checks'])} checks, {wrong} wrong"]
    return text


def _share(output: dict[str, float | None]) -> float:
    """Error / bound, infinite where one is not a finite number."""
    error, bound = output["error"], output["bound"]
    if error is None or bound is None or not math.isfinite(error + bound):
        return math.inf
    return error / bound if bound else 0.0


def _speed(found: dict[str, Any]) -> list[str]:
    """Of a machine with a GPU, what it does at best and each op's share of it."""
    if "rates" not in found:
        return []
    rates = dict(found["rates"])
    text = ["", f"bandwidth {rates.pop('bandwidth') / 1e9:.0f} GB/s; matrix products, TFLOP/s: "]
    text[-1] += ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in rates.items())
    text += ["", f"{'forward and backward':42}{'dtype':10}{'ms':>9}{'roofline':>10}{'share':>8}"]
    for row in found["timings"]:
        head = f"  {row['op'] + ', ' + row['backend']:40}{row['dtype']:10}"
        if "failure" in row:
            text.append(f"{head}{row['failure']}")
        else:
            times = f"{row['seconds'] * 1e3:9.2f}{row['roofline_seconds'] * 1e3:10.2f}"
            text.append(f"{head}{times}{row['share']:8.0%}")
    return text
