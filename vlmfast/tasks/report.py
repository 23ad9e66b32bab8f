"""A picture of what the model retrieves: random queries with their nearest neighbours, and accuracy by class."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from vlmfast.tasks.page import ACCENT, DPI, INK, MARGIN, MUTED, RIGHT, RULE, WIDTH, WRONG, Page, shorten, wrap
from vlmfast.tasks.search import Recall, match_ranks, top_k
from vlmfast.tasks.zero_shot import ZeroShot

if TYPE_CHECKING:
    from vlmfast.tasks.retrieval import Evaluation

HEADER = 1.5  # inches, as all lengths
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
    page = Page(figure)
    _header(page, evaluation, title, seed)
    _text_to_image(page, evaluation, dataset, text_rows, top=HEADER)
    _image_to_text(page, evaluation, dataset, image_rows, top=HEADER)
    if zero_shot is not None:
        _zero_shot(page, zero_shot, top=HEADER + HEADING + num_queries * ROW + 0.3)
    figure.savefig(path, format="png")


def write_zero_shot(path: str | PathLike[str], scores: ZeroShot) -> None:
    """Write a PNG of accuracy by class and of what is taken for what."""
    from matplotlib.figure import Figure

    height = 0.3 + 1.45 + BAR * min(len(scores.classes), MAX_CLASSES) + 1.5
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    _zero_shot(Page(figure), scores, top=0.3)
    figure.savefig(path, format="png")


def _header(page: Page, evaluation: Evaluation, title: str, seed: int) -> None:
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


def _text_to_image(page: Page, evaluation: Evaluation, dataset: Any, rows: torch.Tensor, top: float) -> None:
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
            wrap(features.captions[row], 20, 4),
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


def _image_to_text(page: Page, evaluation: Evaluation, dataset: Any, rows: torch.Tensor, top: float) -> None:
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
            caption = shorten(features.captions[hit], 54)
            page.text(left + size + 0.45, at, caption, color=color, fontweight="bold" if right else "normal")
        if ranks[line] > found.shape[1]:
            at = y - 0.02 + found.shape[1] * pitch
            page.text(left + size + 0.45, at, shorten(features.captions[row], 44), color=RIGHT, fontstyle="italic")
            page.text(page.width - MARGIN, at, f"rank {int(ranks[line]):,}", color=MUTED, ha="right")


def _heading(page: Page, left: float, top: float, name: str, scores: Recall) -> None:
    page.text(left, top, name, fontsize=15, fontweight="bold")
    recall = "   ".join(f"R@{k} {100 * value:.1f}%" for k, value in scores.recall.items())
    last = max(scores.recall)
    chance = f"median rank {scores.median_rank:g}   (chance R@{last} {100 * scores.chance[last]:.1f}%)"
    page.text(left, top + 0.36, f"{recall}   {chance}", color=ACCENT, fontsize=11.5)


def _zero_shot(page: Page, scores: ZeroShot, top: float) -> None:
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
        [f"{shorten(name, 26)}  ({int(count)})" for name, count in zip(names, counts[shown], strict=True)]
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
    matrix.set_xticklabels([shorten(name, 22) for name in names], rotation=40, ha="right", rotation_mode="anchor")
    matrix.set_yticklabels([shorten(name, 22) for name in names])
    matrix.set_title("true class (row) taken for (column), %", fontsize=11, color=MUTED, loc="left")
    matrix.tick_params(length=0, labelsize=10, labelcolor=INK)
    for spine in matrix.spines.values():
        spine.set_color(RULE)


def _image(evaluation: Evaluation, dataset: Any, row: int) -> torch.Tensor:
    image: torch.Tensor = dataset[evaluation.features.indices[row]].image
    return image
