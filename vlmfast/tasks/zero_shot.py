"""Zero-shot classification: an image takes the class whose averaged prompt embedding is nearest.

A model without such features takes the class with the highest mean of `match_scores` over its prompts. Blind, a model
gives each class the same share whatever the image, so that its expected accuracy is between chance and the majority's;
both stand beside the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from vlmfast.tasks.batches import EachCaption, evaluating
from vlmfast.tasks.encode import encode_texts, unit
from vlmfast.tasks.scores import Scores, align, listed, percent, versions
from vlmfast.tasks.search import CHUNK, match_ranks, top_k
from vlmfast.tasks.task import Run, Task

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

    @property
    def metrics(self) -> dict[str, float]:
        return {f"zero_shot_top-{k}": value for k, value in self.accuracy.items()}

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            **{f"top-{k}": value for k, value in self.accuracy.items()},
            "mean_per_class": self.mean_per_class,
            "chance": {f"top-{k}": value for k, value in self.chance.items()},
            "majority_class": self.majority,
            "num_classes": len(self.classes),
            "num_images": self.num_images,
            "per_class": self.per_class,
            "classes": list(self.classes),
            "confusion": self.confusion.tolist(),
        }


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


def zero_shot_scores(
    model: Any,
    image_features: torch.Tensor,
    categories: Sequence[str | None],
    collator: Any,
    templates: Sequence[str],
    batch_size: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> ZeroShot:
    """Scores of a model over the categories that occur; samples without one take no part.

    Args:
        image_features (N, D), categories: of the samples.
        Others as of `encode_texts`.
    Raises:
        ValueError: fewer than two categories occur, or as `prompts` and `encode_texts`.
    """
    labelled = [row for row, category in enumerate(categories) if category is not None]
    classes = sorted({category for category in categories if category is not None})
    if len(classes) < 2:
        raise ValueError(f"categories: expected two or more, got {classes}")
    texts = encode_texts(
        model, prompts(classes, templates), collator, batch_size=batch_size, device=device, autocast=autocast
    )
    number = {name: index for index, name in enumerate(classes)}
    labels = torch.tensor([number[category] for category in categories if category is not None])
    found, class_features = _ranked(model, image_features[labelled], texts, len(templates))
    return classify(found, labels, class_features, classes)


def _ranked(
    model: Any, image: torch.Tensor, texts: torch.Tensor, num_templates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands for the images and for the classes: their products are the scores.

    Of a model with `similarities` a class has the highest score of its prompts.
    """
    if not hasattr(model, "similarities"):
        return image, class_embeddings(texts, num_templates)
    scores = model.similarities(image, texts).view(len(image), -1, num_templates).amax(dim=2)
    return scores, torch.eye(scores.shape[1])


def zero_shot_rows(scores: ZeroShot) -> list[list[str]]:
    """Rows of a table."""
    blank = [""] * (len(scores.accuracy) - 1)
    return [
        ["zero-shot", *(f"top-{k}" for k in scores.accuracy), "mean per class"],
        ["image -> class", *map(percent, scores.accuracy.values()), percent(scores.mean_per_class)],
        ["chance", *map(percent, scores.chance.values()), percent(scores.chance[1])],
        ["majority class", percent(scores.majority), *blank, percent(scores.chance[1])],
    ]


@dataclass(frozen=True)
class ZeroShotScores(Scores):
    """Zero-shot scores of a dataset.

    Attributes:
        skipped: reason -> number of samples left out.
        arguments: of the run; a caller may add its own, such as the checkpoint and the data.
    """

    scores: ZeroShot
    skipped: dict[str, int]
    arguments: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        return self.scores.metrics

    def table(self) -> str:
        counts = f"{self.scores.num_images} images in {len(self.scores.classes)} classes"
        return f"{align(zero_shot_rows(self.scores))}\n\n{counts}; skipped: {listed(self.skipped)}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "zero_shot": self.scores.to_dict(),
            "skipped": dict(self.skipped),
            "arguments": dict(self.arguments),
            "versions": versions(),
        }

    def report(self, path: str | PathLike[str]) -> None:
        """Accuracy by class, and what is taken for what."""
        from vlmfast.tasks.report import write_zero_shot

        write_zero_shot(path, self.scores)


class ZeroShotClassification(Task):
    """Which category an image has, of those that occur."""

    methods: ClassVar = (("get_image_features", "get_text_features"), ("match_scores",))
    requires: ClassVar = ("category",)

    def score(self, run: Run) -> ZeroShotScores:
        categories = [run.dataset.metadata(index)[2] for index in range(len(run.dataset))]
        classes = sorted({category for category in categories if category is not None})
        if len(classes) < 2:
            raise ValueError(f"source: expected samples of two categories or more, got {classes}")
        texts = prompts(classes, TEMPLATES)
        collator = run.model.collator(run.model_options, run.tokenizer, train=False)
        if all(hasattr(run.model, name) for name in self.methods[0]):
            features = encode_texts(run.model, texts, collator, batch_size=run.batch_size, device=run.device)
            found, indices = self._features(run, collator)
            found, class_features = _ranked(run.model, found, features, len(TEMPLATES))
        else:
            class_features = torch.eye(len(classes))  # by which the scores themselves are ranked
            found, indices = self._match_scores(run, EachCaption(collator, texts), len(texts))
            found = found.view(len(indices), len(classes), -1).mean(dim=2)
        number = {name: index for index, name in enumerate(classes)}
        labels = torch.tensor([number[categories[index]] for index in indices])
        arguments = {"batch_size": run.batch_size, "device": str(run.device), "templates": list(TEMPLATES)}
        return ZeroShotScores(classify(found, labels, class_features, classes), dict(run.dataset.skipped()), arguments)

    @staticmethod
    def _features(run: Run, collator: Any) -> tuple[torch.Tensor, list[int]]:
        rows, seen = [], []
        with evaluating(run.model):
            for batch, indices, _ in run.batches(run.dataset, collator, "encode"):
                rows.append(unit(run.model.get_image_features(batch["pixel_values"])))
                seen += indices
        return torch.cat(run.some(rows)), seen

    @staticmethod
    def _match_scores(run: Run, collator: Any, num_texts: int) -> tuple[torch.Tensor, list[int]]:
        rows, seen = [], []
        run = replace(run, batch_size=max(1, run.batch_size // num_texts))
        with evaluating(run.model):
            for batch, indices, _ in run.batches(run.dataset, collator, "match"):
                rows.append(run.model.match_scores(**batch).float().cpu())
                seen += indices
        return torch.cat(run.some(rows)), seen
