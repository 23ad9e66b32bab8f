"""A picture of which anchors made a decision, of models whose scores are sums over anchor pairs."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch

from vlmfast.data import ImageTextDataset
from vlmfast.tasks.encode import encode_dataset
from vlmfast.tasks.page import ACCENT, INK, MUTED, RIGHT, WRONG, Cell, gallery
from vlmfast.tasks.search import caption_groups

SHOWN = 7  # anchors beside an image; with it two rows of four


def write_attribution(
    path: str | PathLike[str],
    model: Any,
    dataset: Any,
    collator: Any,
    *,
    num_queries: int = 5,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int = 0,
    progress: bool = True,
) -> None:
    """Write a PNG: images drawn at random, the caption that each was given, and the anchors that gave it.

    Beside an anchor stands its share of the score. Images of anchors are shown where their source is still there.

    Args:
        path: the file to write.
        model: with `similarities`, `attribution` and `anchors`, see `vlmfast.models.training_free.asif.ASIFModel`.
        dataset, collator, batch_size, num_workers, progress: as of `vlmfast.tasks.encode.encode_dataset`.
        num_queries: images, at most as many as there are.
        seed: of the draw.
    """
    features = encode_dataset(
        model, dataset, collator, batch_size=batch_size, num_workers=num_workers, progress=progress
    )
    drawn = torch.randperm(len(features.captions), generator=torch.Generator().manual_seed(seed))[:num_queries]
    image, groups = features.image[drawn], caption_groups(features.captions)
    chosen = model.similarities(image, features.text).argmax(dim=1)
    scores = model.similarities(image, features.text[chosen]).diagonal()
    shares, numbers = model.attribution(image, features.text[chosen], SHOWN)
    sources = _Sources(model.anchors, dataset.transform)
    sections = []
    for row, (index, said) in enumerate(zip(drawn.tolist(), chosen.tolist(), strict=True)):
        right = bool(groups[index] == groups[said])
        lines = [(features.captions[said], RIGHT if right else WRONG)]
        lines += [] if right else [(features.captions[index], INK)]
        cells = [Cell(dataset[features.indices[index]].image, [*lines, (f"score {scores[row]:.3f}", MUTED)])]
        for share, number in zip(shares[row].tolist(), numbers[row].tolist(), strict=True):
            if share > 0:
                part = f"{100 * share / float(scores[row]):.1f} % of the score"
                cells.append(Cell(sources.image(number), [(model.anchors.sample(number)[1], INK), (part, ACCENT)]))
        sections.append((f"Image {features.keys[index]}, and the anchors that chose its caption", cells))
    subtitle = (
        f"{len(features.captions):,} images and captions, {len(model.anchors):,} anchors; images drawn at random (seed "
        f"{seed}).   Green: the right caption.  Red: another, above the right one.  Blue: what an anchor contributes."
    )
    gallery(path, "What decides", subtitle, sections)


class _Sources:
    """Images of anchors, from where their samples came; None where that is no longer there."""

    def __init__(self, anchors: Any, transform: Any) -> None:
        self.anchors, self.transform = anchors, transform
        self._open: dict[str, ImageTextDataset | None] = {}

    def image(self, number: int) -> torch.Tensor | None:
        found = self.anchors.source(number)
        if found is None:
            return None
        source, index = found
        if source not in self._open:
            try:
                self._open[source] = ImageTextDataset(source, transform=self.transform)
            except (FileNotFoundError, ValueError):
                self._open[source] = None
        dataset = self._open[source]
        # The key tells whether the source still holds the samples that the anchors were made of.
        if dataset is None or index >= len(dataset) or dataset.metadata(index)[0] != self.anchors.sample(number)[0]:
            return None
        sample = dataset[index]
        return None if sample is None else sample.image
