"""Retrieval in both directions, and zero-shot classification beside it where the samples have categories.

Blind, a model is at chance by construction: a ranking that ignores the query is a random order of the gallery. So
chance stands beside the scores, and no second pass is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, ClassVar, Literal

import torch

from vlmfast.tasks.batches import place
from vlmfast.tasks.encode import Features, encode_dataset
from vlmfast.tasks.matching import match_matrix
from vlmfast.tasks.scores import Scores, align, listed, percent, versions
from vlmfast.tasks.search import Recall, caption_groups, recall_at_k, top_k
from vlmfast.tasks.task import Options, Run, Task
from vlmfast.tasks.zero_shot import TEMPLATES, ZeroShot, prompts, zero_shot_rows, zero_shot_scores


@dataclass(frozen=True)
class Evaluation(Scores):
    """Scores as fractions in [0, 1], with what is needed to get them again.

    Attributes:
        zero_shot: None where the samples have fewer than two categories.
        arguments: of `evaluate`; a caller may add its own, such as the checkpoint and the data.
        groups (N,): int64; pairs with equal ids counted as matches of one another.
        features: what the scores were computed from; not part of the record.
        dataset: what was evaluated; it gives the report its images.
    """

    image_to_text: Recall
    text_to_image: Recall
    zero_shot: ZeroShot | None
    arguments: dict[str, Any]
    groups: torch.Tensor = field(repr=False)
    features: Features = field(repr=False)
    dataset: Any = field(repr=False, default=None)

    @property
    def metrics(self) -> dict[str, float]:
        """`image_to_text_R@1` and so on, and `zero_shot_top-1` where there are classes."""
        directions = {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}
        found = {f"{name}_R@{k}": value for name, side in directions.items() for k, value in side.recall.items()}
        if self.zero_shot is not None:
            found |= self.zero_shot.metrics
        return found

    def report(self, path: str | PathLike[str]) -> None:
        """See `vlmfast.tasks.report.write_report`."""
        from vlmfast.tasks.report import write_report

        write_report(path, self, self.dataset)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON types."""
        return {
            "num_pairs": len(self.features.captions),
            "num_distinct_captions": len(set(self.features.captions)),
            "skipped": dict(self.features.skipped),
            "image_to_text": _recall_dict(self.image_to_text),
            "text_to_image": _recall_dict(self.text_to_image),
            "zero_shot": None if self.zero_shot is None else self.zero_shot.to_dict(),
            "arguments": dict(self.arguments),
            "versions": versions(),
        }

    def table(self) -> str:
        """The scores as aligned columns of plain text, in percent, above what chance would reach."""
        ks = list(self.image_to_text.recall)
        rows = [["retrieval", *(f"R@{k}" for k in ks), "median rank"]]
        for name, scores in (("image -> text", self.image_to_text), ("text -> image", self.text_to_image)):
            rows.append([name, *(percent(scores.recall[k]) for k in ks), f"{scores.median_rank:g}"])
        # Both directions share one chance level: queries and gallery are the same pairs, with the same groups.
        rows.append(["chance", *(percent(self.image_to_text.chance[k]) for k in ks), ""])
        text = align(rows)
        if self.zero_shot is not None:
            text += "\n\n" + align(zero_shot_rows(self.zero_shot))
        return f"{text}\n\n{self._counts()}"

    def _counts(self) -> str:
        captions = self.features.captions
        text = f"{len(captions)} pairs, {len(set(captions))} distinct captions"
        if self.zero_shot is not None:
            text += f"; {self.zero_shot.num_images} images in {len(self.zero_shot.classes)} classes"
        return f"{text}; skipped: {listed(self.features.skipped)}"


def evaluate(
    model: Any,
    dataset: Any,
    collator: Any,
    *,
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
        model, dataset, collator, batch_size, num_workers, device, autocast, progress: as in `encode_dataset`; the
            collator has `tokens`, as in `encode_texts`.
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
        collator,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        autocast=autocast,
        progress=progress,
    )
    groups = caption_groups(features.captions) if positives == "caption" else torch.arange(len(features.captions))
    encoded = features.image
    if hasattr(model, "similarities"):
        features = _of_scores(features, model.similarities(features.image, features.text))
    image_to_text, text_to_image = _recalls(features, groups, device)
    zero_shot = None
    if len({category for category in features.categories if category is not None}) > 1:
        zero_shot = zero_shot_scores(
            model, encoded, features.categories, collator, templates, batch_size, device, autocast
        )
    arguments = {
        "max_length": getattr(collator, "max_length", None),
        "batch_size": batch_size,
        "device": str(device),
        "autocast": str(autocast) if autocast is not None else None,
        "templates": list(templates),
        "positives": positives,
    }
    return Evaluation(image_to_text, text_to_image, zero_shot, arguments, groups, features, dataset)


def _of_scores(features: Features, scores: torch.Tensor) -> Features:
    """Features whose products are scores (N, N): these stand for those of images, unit vectors for those of texts."""
    return replace(features, image=scores, text=torch.eye(len(scores)))


def _recall_dict(scores: Recall) -> dict[str, Any]:
    return {
        **{f"R@{k}": value for k, value in scores.recall.items()},
        "median_rank": scores.median_rank,
        "chance": {f"R@{k}": value for k, value in scores.chance.items()},
    }


def _recalls(features: Features, groups: torch.Tensor, device: torch.device) -> tuple[Recall, Recall]:
    """Of both directions."""
    ks = [k for k in (1, 5, 10) if k <= len(features.captions)]
    # Scores are summed in float64, which some accelerators lack.
    home = device if device.type == "cuda" else torch.device("cpu")
    image, text = features.image.to(home), features.text.to(home)
    return (
        recall_at_k(image, text, ks=ks, positives=(groups, groups)),
        recall_at_k(text, image, ks=ks, positives=(groups, groups)),
    )


@dataclass
class RetrievalOptions(Options):
    """Flags of `vlmfast eval --task retrieval`."""

    rerank: int = field(
        default=0,
        metadata={"help": "How many of the nearest are ranked again by match_scores, in each direction."},
    )
    gallery: int = field(
        default=100,
        metadata={"help": "Pairs that a model is scored on that has match_scores alone: every image with every text."},
    )

    def __post_init__(self) -> None:
        for name, value, least in (("rerank", self.rerank, 0), ("gallery", self.gallery, 1)):
            if value < least:
                raise ValueError(f"--{name}: expected at least {least}, got {value}")


class Retrieval(Task):
    """R@1, 5, 10 in both directions; zero-shot classification besides where the samples have two categories or more.

    A model with `match_scores` alone is scored on a gallery of pairs, drawn with a fixed seed.
    """

    Options = RetrievalOptions
    methods: ClassVar = (("get_image_features", "get_text_features"), ("match_scores",))
    requires: ClassVar = ("caption",)

    def score(self, run: Run) -> Evaluation:
        if not all(hasattr(run.model, name) for name in self.methods[0]):
            return self._by_matching(run)
        found = evaluate(
            run.model,
            run.dataset,
            run.model.collator(run.model_options, run.tokenizer, train=False),
            batch_size=run.batch_size,
            num_workers=run.num_workers,
            device=run.device,
            progress=run.progress,
        )
        return self._ranked_again(run, found) if self.options.rerank else found

    def _ranked_again(self, run: Run, found: Evaluation) -> Evaluation:
        """With the nearest of each query in the order of their match_scores, before all others."""
        if not callable(getattr(run.model, "match_scores", None)):
            raise TypeError(f"--rerank: expected a model with match_scores; {type(run.model).__name__} lacks it")
        features = found.features
        k = min(self.options.rerank, len(features.captions))
        wanted = torch.zeros(len(features.captions), len(features.captions), dtype=torch.bool)
        wanted.scatter_(1, top_k(features.image, features.text, k)[1], True)
        wanted.T.scatter_(1, top_k(features.text, features.image, k)[1], True)
        matched = match_matrix(run, features.indices, features.captions, wanted)
        # Cosines are at most 1; a match is at most its best, so that all of them stand between 2 and 3, in order.
        above = 2 + 1 / (1 + matched[wanted].max() - matched)
        scores = torch.where(wanted, above, features.image @ features.text.T)
        return self._by_scores(found, scores, features, run, rerank=k)

    def _by_matching(self, run: Run) -> Evaluation:
        order = torch.randperm(len(run.dataset), generator=torch.Generator().manual_seed(0)).tolist()
        drawn = sorted(order[: self.options.gallery])
        indices = run.some([index for index in drawn if run.dataset[index] is not None])
        keys, captions, categories = zip(*(run.dataset.metadata(index) for index in indices), strict=True)
        wanted = torch.ones(len(indices), len(indices), dtype=torch.bool)
        scores = match_matrix(run, indices, captions, wanted)
        features = Features(
            scores, scores, list(captions), list(keys), list(categories), indices, dict(run.dataset.skipped())
        )
        arguments = {"batch_size": run.batch_size, "device": str(run.device), "positives": "caption"}
        groups = caption_groups(captions)
        empty = Recall({}, {}, 0.0, 0, 0)
        made = Evaluation(empty, empty, None, arguments, groups, features, run.dataset)
        return self._by_scores(made, scores, features, run, gallery=len(indices))

    @staticmethod
    def _by_scores(found: Evaluation, scores: torch.Tensor, features: Features, run: Run, **how: int) -> Evaluation:
        """An evaluation whose ranking is that of scores (N, N), images by texts."""
        features = _of_scores(features, scores)
        image_to_text, text_to_image = _recalls(features, found.groups, run.device)
        return replace(
            found,
            image_to_text=image_to_text,
            text_to_image=text_to_image,
            features=features,
            arguments={**found.arguments, **how},
        )
