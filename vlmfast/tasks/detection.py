"""Boxes and names of the objects in an image: COCO's mean average precision.

With --train-data the names that training has and those held out are scored apart too. What stands beside the scores:
`blind`, the boxes that the model finds in other images, at the same place of these; `chance`, the model's boxes with
names that have changed places at random, in each image by themselves, the mean of some draws; `majority`, the same
boxes for every image, of each name the mean of its true ones, weighed by how frequent it is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.data import ImageTextDataset
from vlmfast.tasks.batches import cycle, evaluating
from vlmfast.tasks.boxes import detected, image_sizes, stretched, to_model
from vlmfast.tasks.page import ACCENT, INK, RIGHT, Cell, gallery
from vlmfast.tasks.scores import Compared
from vlmfast.tasks.task import Options, Run, Task

SHOWN = 12
DRAWS = 5
DRAWN = 0.5  # the least score of a box in the picture


@dataclass
class DetectionOptions(Options):
    """Flags of `vlmfast eval --task detection`."""

    train_data: str | None = field(
        default=None, metadata={"help": "Training samples; names that none of them has are scored apart, as held out."}
    )


class Detection(Task):
    """mAP over IoU 0.5 to 0.95, and at 0.5."""

    Options = DetectionOptions
    methods: ClassVar = (("detect",),)
    requires: ClassVar = ("objects",)

    def score(self, run: Run) -> Compared:
        sizes = image_sizes(run)
        records = {index: objects_of(run.dataset.record(index)) for index in sizes}
        names = sorted({name for _, found, _ in records.values() for name in found})
        if not names:
            raise ValueError(f"source: no object of {len(sizes)} samples has a box and a name")
        found = self._detect(run, names, sizes)
        indices = run.some(list(found))
        number = {name: place for place, name in enumerate(names)}
        truth = [
            {
                "boxes": boxes.float(),
                "labels": torch.tensor([number[name] for name in found], dtype=torch.int64),
                "iscrowd": crowd,
            }
            for boxes, found, crowd in map(records.__getitem__, indices)
        ]
        said = {"model": [found[index] for index in indices]}
        said["blind"] = [
            {**said["model"][other], "boxes": _elsewhere(said["model"][other]["boxes"], indices, place, other, sizes)}
            for place, other in enumerate(cycle(len(indices)))
        ]
        said["majority"] = _constant(truth, [sizes[index] for index in indices])
        held_out = None
        if self.options.train_data:
            training = ImageTextDataset(self.options.train_data, transform=None, requires=self.requires)
            known = {name for index in range(len(training)) for name in objects_of(training.record(index))[1]}
            held_out = [place for place, name in enumerate(names) if name not in known]
        rows: dict[str, dict[str, float]] = {}
        by_name: dict[str, float] = {}
        for row, predictions in said.items():
            rows[row], each = average_precision(predictions, truth, held_out)
            by_name = by_name or {names[place]: value for place, value in each.items()}
        rows["chance"] = _mean(
            average_precision(_renamed(said["model"], len(names), draw), truth, held_out)[0] for draw in range(DRAWS)
        )
        return Compared(
            task=self.name,
            rows=rows,
            num_samples=len(indices),
            skipped=dict(run.dataset.skipped()),
            arguments={**vars(self.options), "batch_size": run.batch_size, "device": str(run.device)},
            draw=partial(_draw, run.dataset, indices, said["model"], truth, names, sizes, rows),
            notes=f"times 100, of {len(names)} names" + (f", {len(held_out)} held out" if held_out is not None else ""),
            details={"by_name": by_name, "held_out": [names[place] for place in held_out or ()]},
        )

    @staticmethod
    def _detect(run: Run, names: list[str], sizes: dict[int, tuple[int, int]]) -> dict[int, dict[str, Tensor]]:
        """By index: boxes in pixels of the file, scores, and labels as places in `names`; others are left out."""
        by_name = {name: place for place, name in enumerate(names)}
        collator = run.model.collator(run.model_options, run.tokenizer, train=False)
        asked = getattr(run.model, "open_vocabulary", False)
        own = {} if asked else {int(label): str(name) for label, name in run.model.config.id2label.items()}
        found = {}
        with evaluating(run.model):
            for batch, indices, _ in run.batches(run.dataset, collator, "detect"):
                phrases = [names] * len(indices) if asked else None
                several = detected(run.model, batch, phrases, run.tokenizer, [sizes[index] for index in indices])
                for index, one in zip(indices, several, strict=True):
                    labels = one["labels"].tolist()
                    places = labels if asked else [by_name.get(own.get(label, ""), -1) for label in labels]
                    kept = torch.tensor([label >= 0 for label in places], dtype=torch.bool)
                    found[index] = {
                        "boxes": one["boxes"][kept].float(),
                        "scores": one["scores"][kept],
                        "labels": torch.tensor(places, dtype=torch.int64)[kept],
                    }
        return found


def objects_of(record: dict[str, Any]) -> tuple[Tensor, list[str], Tensor]:
    """Boxes (N, 4) float64 and names of the objects of a record that have both, and 1 (N,) for a crowd in one box."""
    kept = [
        (o["box"], o["name"], bool(o.get("crowd")))
        for o in record.get("objects", ())
        if isinstance(o, dict) and isinstance(o.get("name"), str) and len(o.get("box") or ()) == 4
    ]
    boxes = torch.tensor([box for box, _, _ in kept], dtype=torch.float64).view(-1, 4)
    return boxes, [name for _, name, _ in kept], torch.tensor([crowd for _, _, crowd in kept], dtype=torch.int64)


def average_precision(
    predictions: Sequence[dict[str, Tensor]], truth: Sequence[dict[str, Tensor]], held_out: Sequence[int] | None = None
) -> tuple[dict[str, float], dict[int, float]]:
    """COCO's mAP of predictions, and the average precision of each label.

    Args:
        predictions: of each image "boxes" (N, 4), "scores" (N,) and "labels" (N,) int64.
        truth: of each image "boxes" (M, 4) and "labels" (M,), and "iscrowd" (M,) where some are crowds, which need not
            be found.
        held_out: labels that are scored apart.
    Raises:
        ModuleNotFoundError: torchmetrics or pycocotools is not installed.
    """
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(class_metrics=True)
    metric.warn_on_many_detections = False
    metric.update(list(predictions), list(truth))
    found = metric.compute()
    each = dict(zip(found["classes"].view(-1).tolist(), found["map_per_class"].view(-1).tolist(), strict=True))
    each = {label: value for label, value in each.items() if value >= 0}  # -1 where no image has the label
    scores = {"mAP": float(found["map"]), "mAP50": float(found["map_50"])}
    if held_out is not None:
        for name, which in (("mAP train names", False), ("mAP held out", True)):
            values = [value for label, value in each.items() if (label in held_out) == which]
            if values:
                scores[name] = sum(values) / len(values)
    return scores, each


def _elsewhere(
    boxes: Tensor, indices: Sequence[int], place: int, other: int, sizes: dict[int, tuple[int, int]]
) -> Tensor:
    return stretched(boxes, sizes[indices[other]], sizes[indices[place]]).float()


def _renamed(found: Sequence[dict[str, Tensor]], names: int, draw: int) -> list[dict[str, Tensor]]:
    """The same boxes, with the names in another order in each image."""
    generator = torch.Generator().manual_seed(draw)
    return [{**one, "labels": torch.randperm(names, generator=generator)[one["labels"]]} for one in found]


def _mean(several: Iterable[dict[str, float]]) -> dict[str, float]:
    rows = list(several)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _constant(truth: Sequence[dict[str, Tensor]], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
    boxes = defaultdict(list)
    for one, size in zip(truth, sizes, strict=True):
        for box, label in zip(stretched(one["boxes"], size, (1, 1)), one["labels"].tolist(), strict=True):
            boxes[label].append(box)
    counts = Counter({label: len(found) for label, found in boxes.items()})
    labels = [label for label, _ in counts.most_common(100)]
    mean = torch.stack([torch.stack(boxes[label]).mean(dim=0) for label in labels])
    scores = torch.tensor([counts[label] / len(truth) for label in labels])
    return [
        {"boxes": stretched(mean, (1, 1), size).float(), "scores": scores, "labels": torch.tensor(labels)}
        for size in sizes
    ]


def _draw(
    dataset: Any,
    indices: Sequence[int],
    predictions: Sequence[dict[str, Tensor]],
    truth: Sequence[dict[str, Tensor]],
    names: Sequence[str],
    sizes: dict[int, tuple[int, int]],
    rows: dict[str, dict[str, float]],
    path: str | PathLike[str],
) -> None:
    drawn = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0)).tolist()[:SHOWN]

    def cell(place: int) -> Cell:
        image, one, true = dataset[indices[place]].image, predictions[place], truth[place]
        seen, size = (image.shape[1], image.shape[0]), sizes[indices[place]]
        boxes = [(box, RIGHT, "") for box in to_model(true["boxes"], seen, size).tolist()]
        lines = [(", ".join(names[label] for label in true["labels"].tolist()), INK)]
        for box, score, label in zip(
            to_model(one["boxes"], seen, size).tolist(), one["scores"].tolist(), one["labels"].tolist(), strict=True
        ):
            if score >= DRAWN:
                boxes.append((box, ACCENT, names[label]))
                lines.append((f"{names[label]} {100 * score:.0f}%", ACCENT))
        return Cell(image, lines, boxes)

    scores = ", ".join(f"{row} {100 * values['mAP50']:.1f}" for row, values in rows.items())
    subtitle = (
        f"{len(indices):,} images; mAP50: {scores}.   Green: true.  Blue: found, with a score of {DRAWN} or more."
    )
    gallery(path, "Objects", subtitle, [("Drawn at random", [cell(place) for place in drawn])])
