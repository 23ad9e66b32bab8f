"""A picture of what the model retrieves: random queries with their nearest neighbours, and accuracy by class."""

from __future__ import annotations

import textwrap
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from vlmfast.evaluation.retrieval import Recall, match_ranks, top_k
from vlmfast.evaluation.zero_shot import ZeroShot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmfast.evaluation.scores import Evaluation

RIGHT, WRONG, INK, MUTED, RULE, ACCENT = "#1f9d55", "#d64550", "#1f2933", "#7b8794", "#d9dee3", "#3b6fb6"
DPI = 110
WIDTH = 17.0  # inches, as all lengths below
MARGIN = 0.45
HEADER = 1.5
ROW = 1.42
HEADING = 0.95
SHOWN = 5
BAR = 0.27
MAX_CLASSES = 30


def write_report(
    path: str | PathLike[str],
    evaluation: Evaluation,
    dataset: Any,
    *,
    num_queries: int = 6,
    seed: int = 0,
    title: str = "Image-text retrieval",
) -> None:
    """Write a PNG: text queries with the images found, image queries with the captions found, accuracy by class.

    The queries are drawn at random, so the picture is as good as the model. A right answer has a green frame or tick, a
    wrong one a red frame or cross; where none of the five is right, the true match and its rank follow.

    Args:
        path: the file to write.
        evaluation: from `evaluate`.
        dataset: the one that was evaluated; it gives the images.
        num_queries: rows in each direction, at most the number of pairs.
        seed: of the draw.
        title: first line of the picture.
    Raises:
        ValueError: num_queries is not positive.
    """
    if num_queries < 1:
        raise ValueError(f"num_queries: expected at least 1, got {num_queries}")
    from matplotlib.figure import Figure  # half a second, wanted only here

    num_pairs = len(evaluation.features.captions)
    drawn = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(seed))
    num_queries = min(num_queries, num_pairs)
    text_rows, image_rows = drawn[:num_queries], drawn[-num_queries:]

    zero_shot = evaluation.zero_shot
    panel = 0.0 if zero_shot is None else 1.45 + BAR * min(len(zero_shot.classes), MAX_CLASSES) + 1.5
    figure = Figure(figsize=(WIDTH, HEADER + HEADING + num_queries * ROW + 0.3 + panel), dpi=DPI, facecolor="white")
    page = _Page(figure)
    _header(page, evaluation, title, seed)
    _text_to_image(page, evaluation, dataset, text_rows, top=HEADER)
    _image_to_text(page, evaluation, dataset, image_rows, top=HEADER)
    if zero_shot is not None:
        _zero_shot(page, zero_shot, top=HEADER + HEADING + num_queries * ROW + 0.3)
    figure.savefig(path, format="png")


class _Page:
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


def _header(page: _Page, evaluation: Evaluation, title: str, seed: int) -> None:
    num_pairs = len(evaluation.features.captions)
    page.text(MARGIN, 0.32, title, fontsize=21, fontweight="bold")
    page.text(
        MARGIN,
        0.8,
        f"{num_pairs:,} pairs; queries drawn at random (seed {seed}).   "
        "Green: the right match.  Red: another.  Dashed: where the right match stands instead.",
        color=MUTED,
    )
    page.rule(MARGIN, 1.3, page.width - 2 * MARGIN)


def _text_to_image(page: _Page, evaluation: Evaluation, dataset: Any, rows: torch.Tensor, top: float) -> None:
    features, groups = evaluation.features, evaluation.groups
    left, size, gap = MARGIN, 1.08, 0.12
    first = left + 2.0
    _heading(page, left, top, "Text to image", evaluation.text_to_image)
    _, found = top_k(features.text[rows], features.image, min(SHOWN, len(features.captions)))
    ranks = match_ranks(features.text[rows], features.image, positives=(groups[rows], groups))
    for line, row in enumerate(rows.tolist()):
        y = top + HEADING + line * ROW
        page.text(
            first - 0.18,
            y + size / 2,
            _wrap(features.captions[row], 20, 4),
            ha="right",
            va="center",
            multialignment="right",
        )
        for column, hit in enumerate(found[line].tolist()):
            frame = RIGHT if groups[hit] == groups[row] else WRONG
            page.image(first + column * (size + gap), y, size, _image(evaluation, dataset, hit), frame)
        if ranks[line] > found.shape[1]:
            x = first + found.shape[1] * (size + gap) + 0.2
            page.image(x, y, size * 0.72, _image(evaluation, dataset, row), RIGHT, "--")
            page.text(x + size * 0.36, y + size * 0.78, f"rank {int(ranks[line]):,}", ha="center", color=MUTED)


def _image_to_text(page: _Page, evaluation: Evaluation, dataset: Any, rows: torch.Tensor, top: float) -> None:
    features, groups = evaluation.features, evaluation.groups
    left, size, pitch = 9.9, 1.08, 0.216
    _heading(page, left, top, "Image to text", evaluation.image_to_text)
    _, found = top_k(features.image[rows], features.text, min(SHOWN, len(features.captions)))
    ranks = match_ranks(features.image[rows], features.text, positives=(groups[rows], groups))
    for line, row in enumerate(rows.tolist()):
        y = top + HEADING + line * ROW
        page.image(left, y, size, _image(evaluation, dataset, row), RULE)
        for place, hit in enumerate(found[line].tolist()):
            right = bool(groups[hit] == groups[row])
            at, color = y - 0.02 + place * pitch, RIGHT if right else INK
            page.text(left + size + 0.2, at, "✓" if right else "✗", color=RIGHT if right else WRONG)
            caption = _shorten(features.captions[hit], 54)
            page.text(left + size + 0.45, at, caption, color=color, fontweight="bold" if right else "normal")
        if ranks[line] > found.shape[1]:
            at = y - 0.02 + found.shape[1] * pitch
            page.text(left + size + 0.45, at, _shorten(features.captions[row], 44), color=RIGHT, fontstyle="italic")
            page.text(page.width - MARGIN, at, f"rank {int(ranks[line]):,}", color=MUTED, ha="right")


def _heading(page: _Page, left: float, top: float, name: str, scores: Recall) -> None:
    page.text(left, top, name, fontsize=15, fontweight="bold")
    recall = "   ".join(f"R@{k} {100 * value:.1f}%" for k, value in scores.recall.items())
    last = max(scores.recall)
    chance = f"median rank {scores.median_rank:g}   (chance R@{last} {100 * scores.chance[last]:.1f}%)"
    page.text(left, top + 0.36, f"{recall}   {chance}", color=ACCENT, fontsize=11.5)


def _zero_shot(page: _Page, scores: ZeroShot, top: float) -> None:
    page.rule(MARGIN, top, page.width - 2 * MARGIN)
    page.text(MARGIN, top + 0.25, "Zero-shot classification", fontsize=15, fontweight="bold")
    accuracy = "   ".join(f"top-{k} {100 * value:.1f}%" for k, value in scores.accuracy.items())
    others = f"(chance {100 * scores.chance[1]:.1f}%, always the largest class {100 * scores.majority:.1f}%)"
    per_class = f"mean per class {100 * scores.mean_per_class:.1f}%"
    page.text(MARGIN, top + 0.61, f"{accuracy}   {per_class}   {others}", color=ACCENT, fontsize=11.5)

    counts = scores.confusion.sum(dim=1)
    shown = counts.argsort(descending=True, stable=True)[: min(MAX_CLASSES, int((counts > 0).sum()))]
    names = [scores.classes[index] for index in shown]
    height = BAR * len(names)
    start = top + 1.45

    bars = page.axes(MARGIN + 3.0, start, 4.6, height)
    values = [100 * scores.per_class[name] for name in names]
    bars.barh(range(len(names)), values, color=ACCENT, height=0.68)
    bars.axvline(100 * scores.chance[1], color=MUTED, linestyle=":", linewidth=1.5)
    bars.set(xlim=(0, 109), ylim=(len(names) - 0.5, -0.5), yticks=range(len(names)), xticks=range(0, 101, 25))
    bars.set_yticklabels(
        [f"{_shorten(name, 26)}  ({int(count)})" for name, count in zip(names, counts[shown], strict=True)]
    )
    for place, value in enumerate(values):
        bars.text(value + 1.2, place, f"{value:.0f}", va="center", color=INK, fontsize=10)
    which = "" if len(names) == len(scores.classes) else f"the {len(names)} largest of {len(scores.classes)} classes; "
    bars.set_title(f"{which}accuracy by class, % (images); dotted: chance", fontsize=11, color=MUTED, loc="left")
    bars.tick_params(length=0, labelsize=10.5, labelcolor=INK)
    for side, spine in bars.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(RULE)

    matrix = page.axes(page.width - MARGIN - 6.0, start, 6.0, height)
    shares = scores.confusion[shown][:, shown].double() / counts[shown, None]
    matrix.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for true in range(len(names)):
        for predicted in range(len(names)):
            share = float(shares[true, predicted])
            if share >= 0.005:
                color = "white" if share > 0.55 else INK
                matrix.text(predicted, true, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=8)
    matrix.set(xticks=range(len(names)), yticks=range(len(names)))
    matrix.set_xticklabels([_shorten(name, 22) for name in names], rotation=40, ha="right", rotation_mode="anchor")
    matrix.set_yticklabels([_shorten(name, 22) for name in names])
    matrix.set_title("true class (row) taken for (column), %", fontsize=11, color=MUTED, loc="left")
    matrix.tick_params(length=0, labelsize=10, labelcolor=INK)
    for spine in matrix.spines.values():
        spine.set_color(RULE)


def _image(evaluation: Evaluation, dataset: Any, row: int) -> torch.Tensor:
    image: torch.Tensor = dataset[evaluation.features.indices[row]].image
    return image


def _wrap(text: str, width: int, lines: int) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def _shorten(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"
