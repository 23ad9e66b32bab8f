"""What a task found: the contract of scores, and scores as a table of rows beside one another."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from typing import Any

import torch


class Scores(ABC):
    """What a task found. Fractions are in [0, 1].

    Attributes:
        arguments: what gives the scores again; a caller may add its own, such as the checkpoint and the data.
    """

    arguments: dict[str, Any]

    @property
    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Every score by name, for the log of a training run."""

    @abstractmethod
    def table(self) -> str:
        """The scores as aligned plain text, beside what chance, the majority and a blind model reach."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The record of the run as JSON types."""

    @abstractmethod
    def report(self, path: str | PathLike[str]) -> None:
        """Write a PNG that shows what the model does; needs matplotlib."""


@dataclass(frozen=True)
class Compared(Scores):
    """Scores of a model above those of others that do not look, on the same samples.

    Attributes:
        task: name.
        rows: "model", then what it is compared with, such as "blind", "majority" and "chance", to score by name; a
            score may be missing where it is not known.
        num_samples: that were scored.
        skipped: reason -> number of samples left out.
        notes: a line below the table.
        details: what the record holds besides, as JSON types.
        draw: writes the picture to a path.
    """

    task: str
    rows: dict[str, dict[str, float]]
    num_samples: int
    skipped: dict[str, int]
    arguments: dict[str, Any]
    draw: Callable[[str | PathLike[str]], None] = field(repr=False)
    notes: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """The model's scores under their names, others as `<score>_<row>`."""
        return {
            score if row == "model" else f"{score}_{row}": value
            for row, scores in self.rows.items()
            for score, value in scores.items()
        }

    def table(self) -> str:
        names = list(self.rows["model"])
        cells = [
            [row, *(f"{100 * scores[name]:.1f}" if name in scores else "" for name in names)]
            for row, scores in self.rows.items()
        ]
        counts = f"{self.num_samples} samples; skipped: {listed(self.skipped)}"
        lines = [align([[self.task, *names], *cells]), "", f"{self.notes}; {counts}" if self.notes else counts]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "scores": {row: dict(scores) for row, scores in self.rows.items()},
            "num_samples": self.num_samples,
            "skipped": dict(self.skipped),
            **self.details,
            "arguments": dict(self.arguments),
            "versions": versions(),
        }

    def report(self, path: str | PathLike[str]) -> None:
        self.draw(path)


def versions() -> dict[str, str | None]:
    """Of what a score depends on."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("vlmfast", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # vlmfast run from a source tree
            found[package] = None
    return found


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"


def listed(skipped: Mapping[str, int]) -> str:
    """'1 corrupt image, 2 empty caption', or 'none'."""
    return ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count) or "none"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines; the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)
