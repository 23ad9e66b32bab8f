"""A run against an older one of the same machine: what became slower by more than the rounds of both vary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmfast.bench.report import size_name

SAME = ("processor", "threads", "gpu")
LEAST = 0.03
"""Smaller changes are never called slower: the rounds of one run do not show how runs differ."""


def load(path: Path, machine: Mapping[str, Any], names: Sequence[str], dtypes: Sequence[str]) -> dict[str, Any]:
    """An older run's JSON, once it is sure that it can be compared with.

    Returns:
        the op's name, and `rows`.
    Raises:
        ValueError: it is no result of a benchmark, of an op that is not measured now, of another machine or number of
            threads, has a row without what is compared, or has none of a dtype that is measured now.
    """
    try:
        old = json.loads(path.read_text())
        rows, header = list(old["rows"]), dict(old["machine"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--compare must be a JSON that vlmfast bench wrote; {path} is not ({error!r})") from error
    # Results of the time before `vlmfast bench` do not say of which op they are.
    op = old.get("op") or (names[0] if len(names) == 1 else None)
    if op not in names:
        raise ValueError(f"--compare: {path} is of {op or 'an op that it does not name'}; measured: {', '.join(names)}")
    for key in SAME:
        if header.get(key) != machine.get(key):
            raise ValueError(f"--compare: {path} has {key} {header.get(key)!r}; here it is {machine.get(key)!r}")
    for number, row in enumerate(rows):
        if missing := _missing(row):
            needed = "provider, size or case, dtype, device, median_s and iqr_s"
            raise ValueError(
                f"--compare: every row must have {needed}; row {number} of {path} has no {', '.join(missing)}"
            )
    known = sorted({row["dtype"] for row in rows})
    if missing := [dtype for dtype in dtypes if dtype not in known]:
        raise ValueError(f"--compare: {path} has dtypes {', '.join(known)}; measured: {', '.join(missing)}")
    return {"op": op, "rows": rows}


def _missing(row: Any) -> list[str]:
    """What a row of a JSON lacks of what is compared; null is lacking too, and a time that is not above 0."""
    if not isinstance(row, Mapping):
        return ["keys"]
    missing = [key for key in ("provider", "dtype", "device") if not isinstance(row.get(key), str)]
    if not isinstance(row.get("case"), str) and not isinstance(row.get("size"), Mapping):
        missing.append("size or case")
    if not isinstance(row.get("median_s"), int | float) or not row["median_s"] > 0:
        missing.append("median_s")
    if not isinstance(row.get("iqr_s"), int | float):
        missing.append("iqr_s")
    return missing


def asked(
    rows: Sequence[dict[str, Any]], providers: Sequence[str] | None, sizes: Sequence[str], dtypes: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows that a run of these would have too; providers None: of all, also of those that are no more."""
    return [
        row
        for row in rows
        if (providers is None or row["provider"] in providers) and _size(row) in sizes and row["dtype"] in dtypes
    ]


def in_common(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> bool:
    return bool({_key(row) for row in old} & {_key(row) for row in new})


def compare(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> tuple[list[str], bool]:
    """A line per row of new with the ratio of the times, and whether one is slower beyond the noise.

    Slower: by more than the sum of both interquartile ranges, and by more than LEAST. Rows of old that new lacks have a
    line that says so.
    """
    known = {_key(row): row for row in old}
    text, slower = [f"{'new / old time':62}{'ratio':>8}{'noise':>8}"], False
    for row in new:
        name = _name(row)
        if _key(row) not in known:
            text.append(f"  {name:60}{'new':>8}")
            continue
        before = known[_key(row)]
        noise = max(row["iqr_s"] + before["iqr_s"], LEAST * before["median_s"])
        worse = row["median_s"] - before["median_s"] > noise
        slower = slower or worse
        ratio = row["median_s"] / before["median_s"]
        text.append(f"  {name:60}{ratio:8.2f}{noise / before['median_s']:8.0%}{'  SLOWER' if worse else ''}")
    now = {_key(row) for row in new}
    text += [f"  {_name(row):60}{'gone':>8}" for row in old if _key(row) not in now]
    return text, slower


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['provider']}, {_size(row)}, {row['dtype']}"


def _size(row: Mapping[str, Any]) -> str:
    return str(row.get("case") or size_name(row["size"]))


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (row["provider"], _size(row), row["dtype"], row["device"])
