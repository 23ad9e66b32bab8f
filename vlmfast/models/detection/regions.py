"""From scored proposals of an image to its regions, or to its detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OVERLAP = 0.5
"""Overlap (IoU) above which NMS drops the box of lower score, class by class."""
LEAST = 0.01
"""Probability of a class below which a proposal is no candidate for it."""
DETECTED = 0.05
"""The same, for detections."""
DETECTIONS = 100
"""Detections of an image at most."""


@dataclass(frozen=True)
class Selection:
    """How many regions an image has: those whose score is `threshold` or more, within the bounds.

    36 fixed regions are `Selection(36, 36)`. An image has fewer than `least` only where there are fewer proposals.

    Args:
        least, most: regions of an image.
        threshold: probability of the region's class.
    Raises:
        ValueError: a number is out of range.
    """

    least: int = 10
    most: int = 100
    threshold: float = 0.2

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"regions: expected 1 <= least <= most, got {self.least} and {self.most}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold: expected a probability, got {self.threshold}")


@dataclass(frozen=True)
class Scored:
    """The proposals of an image after the head.

    Attributes:
        boxes (P, K, 4): refined for each class, and clipped to the image.
        probabilities (P, K + 1): background last.
        features (P, D).
    """

    boxes: Tensor
    probabilities: Tensor
    features: Tensor


def select(scored: Scored, selection: Selection) -> tuple[Tensor, Tensor]:
    """Which proposals are regions, and as what: places (R,) in order of score, and classes (R,).

    NMS runs in each class. A proposal's class is the most probable of those in which it is left, and this is its score.
    Where fewer than `selection.least` proposals are left in any class, the others follow by their most probable class.
    """
    classes = scored.probabilities[:, :-1]
    rows, labels = _suppress(scored, LEAST, OVERLAP)
    left = torch.zeros_like(classes)
    left[rows, labels] = classes[rows, labels]
    score, label = left.max(dim=1)
    top, likeliest = classes.max(dim=1)
    label = torch.where(score > 0, label, likeliest)
    order = torch.argsort(torch.where(score > 0, 1 + score, top), descending=True, stable=True)
    enough = int((score >= selection.threshold).sum())
    places = order[: min(max(enough, selection.least), selection.most)]
    return places, label[places]


def detections(scored: Scored) -> dict[str, Tensor]:
    """Boxes (N, 4), scores (N,) and labels (N,): each proposal as each class that is probable enough, after NMS."""
    rows, labels = _suppress(scored, DETECTED, OVERLAP)
    rows, labels = rows[:DETECTIONS], labels[:DETECTIONS]
    return {"boxes": scored.boxes[rows, labels], "scores": scored.probabilities[rows, labels], "labels": labels}


def as_batch(images: Sequence[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Of several images by name what they have, as `vlmfast.data.cache_features` takes it."""
    return {name: [image[name] for image in images] for name in images[0]}


def describe(
    scored: Scored, places: Tensor, labels: Tensor, scale: Sequence[float], size: Sequence[int]
) -> dict[str, Tensor]:
    """The regions of an image as `Sample.features` has them, without attributes.

    Args:
        places, labels (R,): of `select`.
        scale: by what x and y of boxes are divided, to be pixels of the image file.
        size: its width and height.
    """
    probabilities = scored.probabilities[places]
    return {
        "boxes": scored.boxes[places, labels] / scored.boxes.new_tensor([*scale, *scale]),
        "features": scored.features[places],
        "probabilities": probabilities,
        "labels": labels,
        "scores": probabilities.gather(1, labels[:, None])[:, 0],
        "image_size": torch.tensor(list(size), dtype=torch.int64),
    }


def _suppress(scored: Scored, least: float, overlap: float) -> tuple[Tensor, Tensor]:
    """Proposals and classes, best first, that NMS leaves within each class."""
    from torchvision.ops import batched_nms  # of the extra `detection`

    rows, labels = (scored.probabilities[:, :-1] > least).nonzero(as_tuple=True)
    # float64: torchvision moves the boxes of each class apart, where float32 has too few digits for many classes.
    boxes, scores = scored.boxes[rows, labels].double(), scored.probabilities[rows, labels].double()
    kept = batched_nms(boxes, scores, labels, overlap)
    return rows[kept], labels[kept]
