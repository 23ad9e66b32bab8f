"""`evaluate`: retrieval and zero-shot scores of a model on a dataset of pairs, and the record of a run."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from vlmfast.evaluation.encode import Features, encode_dataset, encode_texts, place
from vlmfast.evaluation.retrieval import Recall, caption_groups, recall_at_k
from vlmfast.evaluation.zero_shot import TEMPLATES, ZeroShot, class_embeddings, classify, prompts


@dataclass(frozen=True)
class Evaluation:
    """Scores as fractions in [0, 1], with what is needed to get them again.

    Attributes:
        zero_shot: None where the samples have fewer than two categories.
        arguments: of `evaluate`; a caller may add its own, such as the checkpoint and the data.
        groups (N,): int64; pairs with equal ids counted as matches of one another.
        features: what the scores were computed from; not part of the record.
    """

    image_to_text: Recall
    text_to_image: Recall
    zero_shot: ZeroShot | None
    arguments: dict[str, Any]
    groups: torch.Tensor = field(repr=False)
    features: Features = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON types."""
        return {
            "num_pairs": len(self.features.captions),
            "num_distinct_captions": len(set(self.features.captions)),
            "skipped": dict(self.features.skipped),
            "image_to_text": _recall_dict(self.image_to_text),
            "text_to_image": _recall_dict(self.text_to_image),
            "zero_shot": None if self.zero_shot is None else _zero_shot_dict(self.zero_shot),
            "arguments": dict(self.arguments),
            "versions": _versions(),
        }

    def table(self) -> str:
        """The scores as aligned columns of plain text, in percent, above what chance would reach."""
        ks = list(self.image_to_text.recall)
        rows = [["retrieval", *(f"R@{k}" for k in ks), "median rank"]]
        for name, scores in (("image -> text", self.image_to_text), ("text -> image", self.text_to_image)):
            rows.append([name, *(_percent(scores.recall[k]) for k in ks), f"{scores.median_rank:g}"])
        # Both directions share one chance level: queries and gallery are the same pairs, with the same groups.
        rows.append(["chance", *(_percent(self.image_to_text.chance[k]) for k in ks), ""])
        text = _align(rows)
        if self.zero_shot is not None:
            zero_shot = self.zero_shot
            blank = [""] * (len(zero_shot.accuracy) - 1)
            text += "\n\n" + _align(
                [
                    ["zero-shot", *(f"top-{k}" for k in zero_shot.accuracy), "mean per class"],
                    ["image -> class", *map(_percent, zero_shot.accuracy.values()), _percent(zero_shot.mean_per_class)],
                    ["chance", *map(_percent, zero_shot.chance.values()), _percent(zero_shot.chance[1])],
                    ["majority class", _percent(zero_shot.majority), *blank, _percent(zero_shot.chance[1])],
                ]
            )
        return f"{text}\n\n{self._counts()}"

    def _counts(self) -> str:
        captions = self.features.captions
        text = f"{len(captions)} pairs, {len(set(captions))} distinct captions"
        if self.zero_shot is not None:
            text += f"; {self.zero_shot.num_images} images in {len(self.zero_shot.classes)} classes"
        reasons = [f"{count} {reason}" for reason, count in self.features.skipped.items() if count]
        return f"{text}; skipped: {', '.join(reasons) if reasons else 'none'}"


def evaluate(
    model: Any,
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    templates: Sequence[str] = TEMPLATES,
    positives: Literal["caption", "pair"] = "caption",
    progress: bool = True,
) -> Evaluation:
    """R@1, 5, 10 and median rank in both directions, and zero-shot classification over the samples' categories.

    A k larger than the number of pairs is left out. Samples without a category take no part in the classification.

    Args:
        model, dataset, tokenizer, max_length, batch_size, num_workers, device, autocast, progress: as in
            `encode_dataset`.
        templates: prompts, each with one `{}` for the name of the category.
        positives: "caption" counts every pair with the identical caption string as a match, "pair" the query's own pair
            alone, which is the standard protocol. They differ only where captions repeat.
    Raises:
        ValueError: an argument is not as above, no pair could be read, or features are not finite.
    """
    if positives not in ("caption", "pair"):
        raise ValueError(f"positives: expected 'caption' or 'pair', got {positives!r}")
    device = place(model, device)
    prompts(["class"], templates)  # a bad template is reported before the work, not after it
    features = encode_dataset(
        model,
        dataset,
        tokenizer,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        max_length=max_length,
        autocast=autocast,
        progress=progress,
    )
    groups = caption_groups(features.captions) if positives == "caption" else torch.arange(len(features.captions))
    ks = [k for k in (1, 5, 10) if k <= len(features.captions)]
    # Scores are summed in float64, which some accelerators lack.
    home = device if device.type == "cuda" else torch.device("cpu")
    image, text = features.image.to(home), features.text.to(home)
    image_to_text = recall_at_k(image, text, ks=ks, positives=(groups, groups))
    text_to_image = recall_at_k(text, image, ks=ks, positives=(groups, groups))

    zero_shot = None
    labelled = [row for row, category in enumerate(features.categories) if category is not None]
    classes = sorted({category for category in features.categories if category is not None})
    if len(classes) > 1:
        class_features = class_embeddings(
            encode_texts(
                model,
                prompts(classes, templates),
                tokenizer,
                batch_size=batch_size,
                device=device,
                max_length=max_length,
                autocast=autocast,
            ),
            len(templates),
        )
        number = {name: index for index, name in enumerate(classes)}
        labels = torch.tensor([number[category] for category in features.categories if category is not None])
        zero_shot = classify(features.image[labelled], labels, class_features, classes)

    arguments = {
        "max_length": max_length,
        "batch_size": batch_size,
        "device": str(device),
        "autocast": str(autocast) if autocast is not None else None,
        "templates": list(templates),
        "positives": positives,
    }
    return Evaluation(image_to_text, text_to_image, zero_shot, arguments, groups, features)


def _recall_dict(scores: Recall) -> dict[str, Any]:
    return {
        **{f"R@{k}": value for k, value in scores.recall.items()},
        "median_rank": scores.median_rank,
        "chance": {f"R@{k}": value for k, value in scores.chance.items()},
    }


def _zero_shot_dict(scores: ZeroShot) -> dict[str, Any]:
    return {
        **{f"top-{k}": value for k, value in scores.accuracy.items()},
        "mean_per_class": scores.mean_per_class,
        "chance": {f"top-{k}": value for k, value in scores.chance.items()},
        "majority_class": scores.majority,
        "num_classes": len(scores.classes),
        "num_images": scores.num_images,
        "per_class": scores.per_class,
        "classes": list(scores.classes),
        "confusion": scores.confusion.tolist(),
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("vlmfast", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # vlmfast run from a source tree
            found[package] = None
    return found


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"


def _align(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)
