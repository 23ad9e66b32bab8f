"""A picture laid out in inches from its top left corner, which the reports of tasks are drawn on."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG, INK, MUTED, RULE, ACCENT = "#1f9d55", "#d64550", "#1f2933", "#7b8794", "#d9dee3", "#3b6fb6"
DPI = 110
WIDTH = 17.0  # inches, as all lengths
MARGIN = 0.45


class Page:
    """A figure addressed in inches from its top left corner."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.width, self.height = figure.get_size_inches()

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        return self.figure.add_axes(
            (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        )

    def text(self, left: float, top: float, text: str, **style: Any) -> None:
        # parse_math=False: a caption may hold dollar signs.
        style = {"fontsize": 11, "color": INK, "va": "top", "parse_math": False, **style}
        self.figure.text(left / self.width, 1 - top / self.height, text, **style)

    def rule(self, left: float, top: float, width: float) -> None:
        self.axes(left, top, width, 0.01).set(xticks=[], yticks=[], facecolor=RULE)
        for spine in self.figure.axes[-1].spines.values():
            spine.set_visible(False)

    def image(self, left: float, top: float, size: float, image: torch.Tensor, frame: str, style: str = "-") -> Axes:
        axes = self.axes(left, top, size, size)
        axes.imshow(image.numpy(), interpolation="bicubic")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            width = 2.0 if style == "--" else {RIGHT: 3.5, WRONG: 1.8, RULE: 1.0}[frame]
            spine.set(color=frame, linewidth=width, linestyle=style)
        return axes


@dataclass(frozen=True)
class Cell:
    """One sample of a gallery.

    Attributes:
        image (H, W, 3): uint8; None leaves the place empty.
        lines: texts and their colours, below one another.
        boxes: [x1, y1, x2, y2] in pixels of the image, colour and label of each.
    """

    image: torch.Tensor | None
    lines: Sequence[tuple[str, str]]
    boxes: Sequence[tuple[Sequence[float], str, str]] = ()


def gallery(
    path: str | PathLike[str], title: str, subtitle: str, sections: Sequence[tuple[str, Sequence[Cell]]]
) -> None:
    """Write a PNG of samples under headings, four a row."""
    from matplotlib.figure import Figure  # half a second, wanted only here

    columns, size, row, heading, header = 4, 2.0, 2.25, 0.6, 1.5
    heights = [heading + row * -(-len(cells) // columns) for _, cells in sections]
    figure = Figure(figsize=(WIDTH, header + sum(heights) + 0.3), dpi=DPI, facecolor="white")
    page = Page(figure)
    page.text(MARGIN, 0.32, title, fontsize=21, fontweight="bold")
    page.text(MARGIN, 0.8, subtitle, color=MUTED)
    page.rule(MARGIN, 1.3, WIDTH - 2 * MARGIN)
    pitch = (WIDTH - 2 * MARGIN) / columns
    top = header
    for (name, cells), height in zip(sections, heights, strict=True):
        page.text(MARGIN, top + 0.1, name, fontsize=15, fontweight="bold")
        for number, cell in enumerate(cells):
            x, y = MARGIN + number % columns * pitch, top + heading + number // columns * row
            if cell.image is not None:
                _boxes(page.image(x, y, size, cell.image, RULE), cell.boxes)
            lines = [(line, colour) for text, colour in cell.lines for line in wrap(text, 23, 4).split("\n")]
            for place, (line, colour) in enumerate(lines[:10]):
                page.text(x + size + 0.12, y + 0.2 * place, line, color=colour, fontsize=10)
        top += height
    figure.savefig(path, format="png")


def _boxes(axes: Axes, boxes: Sequence[tuple[Sequence[float], str, str]]) -> None:
    from matplotlib.patches import Rectangle

    for (left, top, right, bottom), colour, label in boxes:
        # An image's pixel 0 is drawn from -0.5 to 0.5.
        corner, width, height = (left - 0.5, top - 0.5), right - left, bottom - top
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=1.8))
        axes.text(
            left,
            top,
            label,
            fontsize=7,
            color="white",
            backgroundcolor=colour,
            va="top",
            parse_math=False,
            clip_on=True,
        )


def wrap(text: str, width: int, lines: int) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def shorten(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"
