"""Zero-shot classification: an image takes the class whose averaged prompt embedding is nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from vlmfast.evaluation.retrieval import CHUNK, match_ranks, top_k

TEMPLATES = (
    "{}",
    "a picture of {}",
    "a photo of {}",
    "a drawing of {}",
    "clip art of {}",
    "an icon of {}",
)


@dataclass(frozen=True)
class ZeroShot:
    """Zero-shot scores, as fractions in [0, 1].

    Attributes:
        classes: the C class names; their order is that of `confusion`.
        accuracy: k -> fraction of images whose class is among the k nearest; k = 1, and 5 where C > 5.
        chance: k -> k / C, what guessing reaches.
        majority: what always answering the most frequent class reaches at top-1.
        mean_per_class: mean over classes of per_class, so that a rare class counts as much as a frequent one.
        per_class: class -> fraction of its images classified right (recall); only classes that have images.
        confusion: (C, C) int64; row the true class, column the predicted one.
    """

    classes: tuple[str, ...]
    num_images: int
    accuracy: dict[int, float]
    chance: dict[int, float]
    majority: float
    mean_per_class: float
    per_class: dict[str, float]
    confusion: torch.Tensor


def prompts(classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Every class in every template, class by class: C * T strings.

    Raises:
        ValueError: there is no class or template, a class repeats, or a template does not hold `{}` exactly once.
    """
    if not classes:
        raise ValueError("classes: expected at least one class name, got none")
    if len(set(classes)) != len(classes):
        repeated = sorted({name for name in classes if classes.count(name) > 1})
        raise ValueError(f"classes: expected distinct names, got {repeated} more than once")
    if not templates:
        raise ValueError("templates: expected at least one template, got none")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"templates: expected '{{}}' exactly once in each, got {template!r}")
    # Not str.format: a class name or a template may hold braces of its own.
    return [template.replace("{}", name) for name in classes for template in templates]


def class_embeddings(prompt_features: torch.Tensor, num_templates: int) -> torch.Tensor:
    """One unit-norm embedding per class: the mean of its unit-norm prompt embeddings, normalised again.

    Without the second normalisation a class whose prompts disagree would score lower for that alone.

    Args:
        prompt_features (C * T, D): text features of `prompts(classes, templates)`, of any norm.
        num_templates: T.
    Returns:
        (C, D) float32.
    Raises:
        ValueError: the number of rows is not a multiple of T.
    Source: Radford et al. 2021, section 3.1.4.
    """
    rows, dim = prompt_features.shape
    if num_templates < 1 or rows % num_templates:
        raise ValueError(f"prompt_features: expected a multiple of {num_templates} rows, got {rows}")
    unit = F.normalize(prompt_features.float(), dim=-1)
    return F.normalize(unit.view(-1, num_templates, dim).mean(dim=1), dim=-1)


def classify(
    image_features: torch.Tensor,
    labels: torch.Tensor,
    class_features: torch.Tensor,
    classes: Sequence[str],
    *,
    chunk: int = CHUNK,
) -> ZeroShot:
    """Scores of nearest-class prediction; the class listed first wins among equally near ones.

    Args:
        image_features (N, D): unit-norm, N >= 1.
        labels (N,): int64 in [0, C).
        class_features (C, D): from `class_embeddings`.
        classes: the C names.
        chunk: as in `retrieval.top_k`.
    Raises:
        ValueError, TypeError: shapes, dtypes or labels are not as above; the message names the argument.
    """
    num_images, num_classes = image_features.shape[0], class_features.shape[0]
    if num_images == 0:
        raise ValueError("image_features: expected at least one row, got none")
    if len(classes) != num_classes:
        raise ValueError(f"classes: expected {num_classes} names as class_features has rows, got {len(classes)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {labels.dtype}")
    if labels.shape != (num_images,):
        raise ValueError(f"labels: expected shape ({num_images},), got {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels: expected values in [0, {num_classes}), got values in [{low}, {high}]")
    labels = labels.to(image_features.device)
    everything = torch.arange(num_classes, device=labels.device)
    ranks = match_ranks(image_features, class_features, positives=(labels, everything), chunk=chunk)
    predicted = top_k(image_features, class_features, 1, chunk=chunk)[1][:, 0]
    confusion = (labels * num_classes + predicted).bincount(minlength=num_classes**2).view(num_classes, num_classes)
    confusion = confusion.cpu()
    per_class = {
        name: int(row[index]) / int(row.sum())
        for index, (name, row) in enumerate(zip(classes, confusion, strict=True))
        if row.sum() > 0
    }
    ks = (1, 5) if num_classes > 5 else (1,)  # among five classes or fewer, top-5 is always right
    return ZeroShot(
        classes=tuple(classes),
        num_images=num_images,
        accuracy={k: (ranks <= k).double().mean().item() for k in ks},
        chance={k: k / num_classes for k in ks},
        majority=confusion.sum(dim=1).max().item() / num_images,
        mean_per_class=sum(per_class.values()) / len(per_class),
        per_class=per_class,
        confusion=confusion,
    )
