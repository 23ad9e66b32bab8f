"""vlmfast models."""

from __future__ import annotations

from collections.abc import Sequence

from vlmfast.models import MODELS, model_class


def run(arguments: Sequence[str]) -> int:
    """Every model by name, with strategy, tasks and paper."""
    if arguments:
        raise ValueError(f"expected no arguments; got {' '.join(arguments)}")
    rows = [("model", "strategy", "tasks", "paper")]
    for name in MODELS:
        cls = model_class(name)
        rows.append((name, cls.strategy, ", ".join(cls.tasks) or "-", cls.paper))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\n'vlmfast train MODEL --help' lists the options of one.")
    return 0
