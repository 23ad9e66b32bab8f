"""A picture laid out in inches from its top left corner, which the reports of tasks are drawn on."""

from __future__ import annotations

import textwrap
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

    def image(self, left: float, top: float, size: float, image: torch.Tensor, frame: str, style: str = "-") -> None:
        axes = self.axes(left, top, size, size)
        axes.imshow(image.numpy(), interpolation="bicubic")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            width = 2.0 if style == "--" else {RIGHT: 3.5, WRONG: 1.8, RULE: 1.0}[frame]
            spine.set(color=frame, linewidth=width, linestyle=style)


def wrap(text: str, width: int, lines: int) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def shorten(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"
