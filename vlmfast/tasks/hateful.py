"""A label of an image and its text together, such as hateful or not: AUROC and accuracy.

What stands beside them: `blind`, with images shuffled among samples; `majority`, always the more frequent label of the
samples that are scored. Chance is an AUROC of 0.5. Where neither image nor text gives the label away alone, a blind
model is at chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.tasks.batches import Blind, Collate, evaluating
from vlmfast.tasks.generation import Prompted
from vlmfast.tasks.heads import Labelled, TaskModel, first_of
from vlmfast.tasks.page import INK, RIGHT, WRONG, Cell, gallery
from vlmfast.tasks.scores import Compared
from vlmfast.tasks.task import Run, Task, Trainable

SHOWN = 8


class Hateful(Task):
    """Two labels, 0 and 1, of `text` and image together."""

    methods: ClassVar = (("logits",),)
    requires: ClassVar = ("text", "label")

    def score(self, run: Run) -> Compared:
        found, labels, indices = self._probabilities(run, run.dataset)
        rows = {"model": scores_of(found, labels)}
        if run.blind:
            blind, of, _ = self._probabilities(run, Blind(run.dataset, indices))
            rows["blind"] = scores_of(blind, of)
        counts = Counter(labels.tolist())
        rows["majority"] = {"AUROC": 0.5, "accuracy": max(counts.values()) / len(labels)}
        rows["chance"] = {"AUROC": 0.5, "accuracy": 0.5}
        return Compared(
            task=self.name,
            rows=rows,
            num_samples=len(labels),
            skipped=dict(run.dataset.skipped()),
            arguments={"batch_size": run.batch_size, "device": str(run.device)},
            draw=partial(_draw, run.dataset, indices, found.tolist(), labels.tolist(), rows),
            notes="all times 100",
            details={"labels": {str(label): count for label, count in sorted(counts.items())}},
        )

    def trainable(
        self, model: Any, source: Any, tokenizer: Any, model_options: Any, *, features: Any = None, seed: int = 0
    ) -> Trainable:
        """A head with an output for each label, trained by cross-entropy."""
        dataset = self.training_data(
            model, source, model_options, features, seed=seed, requires=self.requires, min_batch=1
        )
        collator = _collator(model, model_options, tokenizer)
        made = TaskModel.around(model, self.name, ("0", "1"), collator([first_of(dataset)]))
        return Trainable(made, dataset, Labelled(collator, labels_of))

    @staticmethod
    def _probabilities(run: Run, dataset: Any) -> tuple[Tensor, Tensor, list[int]]:
        """The probability (N,) of label 1, the labels and the indices of the samples."""
        collator = Labelled(_collator(run.model, run.model_options, run.tokenizer), labels_of)
        found, labels, seen = [], [], []
        with evaluating(run.model):
            for batch, indices, _ in run.batches(dataset, collator, "label"):
                labels.append(batch.pop("labels").cpu())
                found.append(run.model.logits(**batch).float().softmax(dim=1)[:, 1].cpu())
                seen += indices
        return torch.cat(run.some(found)), torch.cat(labels), seen


def scores_of(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """AUROC and accuracy at one half.

    Args:
        probabilities (N,): float, of label 1.
        labels (N,): int64, 0 or 1.
    Raises:
        ValueError: only one of the labels occurs, so that there is no AUROC.
        ModuleNotFoundError: torchmetrics is not installed.
    """
    from torchmetrics.functional.classification import binary_accuracy, binary_auroc

    if len(labels.unique()) < 2:
        raise ValueError(f"label: expected samples with 0 and with 1, got {labels.unique().tolist()} alone")
    return {
        "AUROC": float(binary_auroc(probabilities, labels)),
        "accuracy": float(binary_accuracy(probabilities, labels)),
    }


def labels_of(samples: Sequence[Any]) -> Tensor:
    """(B,) int64, 0 or 1; ValueError for another."""
    for sample in samples:
        if sample.record["label"] not in (0, 1):
            raise ValueError(f"label: expected 0 or 1, got {sample.record['label']} of sample {sample.key!r}")
    return torch.tensor([sample.record["label"] for sample in samples])


def _collator(model: Any, model_options: Any, tokenizer: Any) -> Collate:
    return Prompted(model.collator(model_options, tokenizer, train=False), _text)


def _text(sample: Any) -> str:
    text: str = sample.record["text"]
    return text.strip()


def _draw(
    dataset: Any,
    indices: Sequence[int],
    found: Sequence[float],
    labels: Sequence[int],
    rows: dict[str, dict[str, float]],
    path: str | PathLike[str],
) -> None:
    order = sorted(range(len(found)), key=lambda place: -found[place])
    half = len(order) // 2

    def cell(place: int) -> Cell:
        sample, label = dataset[indices[place]], labels[place]
        colour = RIGHT if (found[place] > 0.5) == bool(label) else WRONG
        said = f"{100 * found[place]:.0f}% label 1; it is {label}"
        return Cell(sample.image, [(_text(sample), INK), (said, colour)])

    sections = [
        ("Most surely label 1", order[: min(SHOWN, len(order) - half)]),
        ("Least sure", sorted(order, key=lambda place: abs(found[place] - 0.5))[:SHOWN]),
        ("Most surely label 0", order[::-1][: min(SHOWN, half)]),
    ]
    scores = ", ".join(f"{row} {100 * values['AUROC']:.1f}" for row, values in rows.items())
    subtitle = f"{len(found):,} samples; AUROC: {scores}."
    gallery(path, "Image and text", subtitle, [(name, [cell(place) for place in places]) for name, places in sections])
