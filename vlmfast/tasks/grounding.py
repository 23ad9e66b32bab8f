"""Which box each phrase of a caption is about: accuracy at an overlap (IoU) of 0.5 with any of the phrase's boxes.

A model scores regions for phrases (`phrase_scores`), or detects what phrases name (`detect`). Regions are those that
the model finds itself; or those of the features, "boxes" (R, 4) in pixels of the image file; or, without features, the
objects of the record. What stands beside the accuracy: `blind`, with images (and features) shuffled among samples;
`majority`, always the largest box that there is to choose; `chance`, any of them; `upper bound`, the best of them,
which no choice can exceed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.data.phrases import phrase_mask
from vlmfast.tasks.batches import Blind, Collate, evaluating
from vlmfast.tasks.boxes import area, detected, image_sizes, in_file, overlap, stretched, to_model
from vlmfast.tasks.page import ACCENT, INK, MUTED, RIGHT, WRONG, Cell, gallery
from vlmfast.tasks.scores import Compared
from vlmfast.tasks.task import Run, Task, Trainable

SHOWN = 8
ENOUGH = 0.5


@dataclass(frozen=True)
class Phrase:
    """A phrase of a caption.

    Attributes:
        span: its first character and the one behind its last.
        boxes (N, 4): float64, in pixels of the image file; one or more.
    """

    span: tuple[int, int]
    boxes: Tensor


class Grounding(Task):
    """Accuracy of the best box of each phrase."""

    methods: ClassVar = (("phrase_scores",), ("detect",))
    requires: ClassVar = ("caption", "phrases", "objects")

    def evaluate(self, model: Any, *arguments: Any, features: Any = None, **settings: Any) -> Any:
        """As `Task.evaluate`; a model that reads regions has those of the records where no features are named."""
        return super().evaluate(model, *arguments, features=features or _default_features(model), **settings)

    def trainable(
        self, model: Any, source: Any, tokenizer: Any, model_options: Any, *, features: Any = None, seed: int = 0
    ) -> Trainable:
        """The model itself: its forward takes `phrase_mask` and `phrase_overlap` too, and gives the loss of its scores.

        `phrase_overlap` is float32 (B, P, R), the overlap (IoU) of each region with the nearest box of each phrase, 0
        of padding. Regions are the features', or without features the objects of the records.

        Raises:
            TypeError: the model has no `phrase_scores`, or finds the regions itself.
        """
        if not callable(getattr(model, "phrase_scores", None)):
            raise TypeError(f"task {self.name}: expected a model with phrase_scores; {type(model).__name__} lacks it")
        if getattr(model, "open_vocabulary", False):
            raise TypeError(f"task {self.name}: {type(model).__name__} finds regions itself; train it without --task")
        chosen = features or _default_features(model)
        dataset = self.training_data(
            model, source, model_options, chosen, seed=seed, requires=self.requires, min_batch=1
        )
        collator = model.collator(model_options, tokenizer, train=False)
        return Trainable(model, dataset, _Overlaps(_Spans(collator, tokenizer)))

    def score(self, run: Run) -> Compared:
        sizes = image_sizes(run)
        phrases = {index: phrases_of(run.dataset.record(index)) for index in sizes}
        found = self._ground(run, run.dataset, phrases, sizes)
        indices = run.some([index for index in found if phrases[index]])
        rows = {"model": {"accuracy": _accuracy(found, phrases, indices)}}
        if run.blind:
            blind = Blind(run.dataset, list(found))
            wrong = self._ground(run, blind, phrases, sizes, blind.other)
            rows["blind"] = {"accuracy": _accuracy(wrong, phrases, indices)}
        hits = [
            (overlap(boxes, phrase.boxes).amax(dim=1) >= ENOUGH, boxes)
            for index in indices
            for phrase, (_, boxes) in zip(phrases[index], found[index], strict=True)
        ]
        share = [float(hit.double().mean()) if len(hit) else 0.0 for hit, _ in hits]
        largest = [bool(len(hit)) and bool(hit[area(boxes).argmax()]) for hit, boxes in hits]
        rows["majority"] = {"accuracy": sum(largest) / len(hits)}
        rows["chance"] = {"accuracy": sum(share) / len(hits)}
        rows["upper bound"] = {"accuracy": sum(value > 0 for value in share) / len(hits)}
        return Compared(
            task=self.name,
            rows=rows,
            num_samples=len(indices),
            skipped=dict(run.dataset.skipped() + Counter({"no phrase with a box": len(found) - len(indices)})),
            arguments={"batch_size": run.batch_size, "device": str(run.device)},
            draw=partial(_draw, run.dataset, indices, found, phrases, sizes, rows),
            notes=f"times 100, of {len(hits)} phrases",
            details={"num_phrases": len(hits)},
        )

    @staticmethod
    def _ground(
        run: Run,
        dataset: Any,
        phrases: dict[int, list[Phrase]],
        sizes: dict[int, tuple[int, int]],
        others: dict[int, int] | None = None,
    ) -> dict[int, list[tuple[int, Tensor]]]:
        """By index, for each phrase: the place of the box that is chosen, and the boxes (R, 4) in pixels of the file.

        Args:
            others: whose image each sample shows, where that is not its own.
        """
        by_regions = callable(getattr(run.model, "phrase_scores", None))
        collator = run.model.collator(run.model_options, run.tokenizer, train=False)
        found: dict[int, list[tuple[int, Tensor]]] = {}
        if by_regions:
            collator = _Spans(collator, run.tokenizer)
        with evaluating(run.model):
            for batch, indices, samples in run.batches(dataset, collator, "ground"):
                if by_regions:
                    scores = run.model.phrase_scores(**batch)
                    if isinstance(scores, tuple):
                        scores, own_boxes = scores
                        found |= _of_model(scores.float().cpu(), own_boxes.cpu(), batch, indices, phrases, sizes)
                        continue
                    for row, index, sample in zip(scores.float().cpu(), indices, samples, strict=True):
                        boxes = _regions(sample, sizes, index, (others or {}).get(index, index))
                        own = row[: len(phrases[index]), : len(boxes)]
                        best = own.argmax(dim=1).tolist() if len(boxes) else [-1] * len(own)
                        found[index] = [(place, boxes) for place in best]
                    continue
                asked = [[s.caption[slice(*p.span)] for p in phrases[i]] for i, s in zip(indices, samples, strict=True)]
                several = detected(run.model, batch, asked, run.tokenizer, [sizes[index] for index in indices])
                for index, one in zip(indices, several, strict=True):
                    found[index] = []
                    for number in range(len(phrases[index])):
                        mine = one["labels"] == number
                        place = int(one["scores"][mine].argmax()) if mine.any() else -1
                        found[index].append((place, one["boxes"][mine]))
        return found


def phrases_of(record: dict[str, Any]) -> list[Phrase]:
    """The phrases of a record that name objects with boxes."""
    boxes = [o.get("box") if isinstance(o, dict) else None for o in record.get("objects", ())]
    found = []
    for phrase in record.get("phrases", ()):
        start, end = phrase["span"]
        mine = [boxes[place] for place in phrase["objects"] if 0 <= place < len(boxes) and len(boxes[place] or ()) == 4]
        if mine and 0 <= start < end:
            found.append(Phrase((start, end), torch.tensor(mine, dtype=torch.float64)))
    return found


class _Spans:
    """A collator that adds `phrase_mask`."""

    def __init__(self, collator: Collate, tokenizer: Any) -> None:
        self.collator = collator
        self.tokenizer = tokenizer

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        batch = self.collator(samples)
        spans = [[phrase.span for phrase in phrases_of(sample.record)] for sample in samples]
        captions = [sample.caption for sample in samples]
        return {**batch, "phrase_mask": phrase_mask(self.tokenizer, captions, spans, batch["input_ids"])}


class _Overlaps:
    """A collator that adds `phrase_overlap`."""

    def __init__(self, collator: Collate) -> None:
        self.collator = collator

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        kept = [sample for sample in samples if sample is not None]
        batch = self.collator(kept)
        found = torch.zeros(*batch["phrase_mask"].shape[:2], batch["region_mask"].shape[1])
        for row, sample in zip(found, kept, strict=True):
            boxes = _regions(sample, {}, 0, 0)[: row.shape[1]]
            for place, phrase in enumerate(phrases_of(sample.record)):
                row[place, : len(boxes)] = overlap(boxes, phrase.boxes).amax(dim=1)
        return {**batch, "phrase_overlap": found}


def _of_model(
    scores: Tensor,
    boxes: Tensor,
    batch: dict[str, Any],
    indices: Sequence[int],
    phrases: dict[int, list[Phrase]],
    sizes: dict[int, tuple[int, int]],
) -> dict[int, list[tuple[int, Tensor]]]:
    """As `Grounding._ground`, of the regions that a model has found itself; scores of -inf are of none."""
    found = {}
    for place, (row, own, index) in enumerate(zip(scores, boxes, indices, strict=True)):
        there = row.isfinite().all(dim=0)
        where = in_file(own[there], batch, place, sizes[index])
        asked = row[: len(phrases[index]), there]
        best = asked.argmax(dim=1).tolist() if len(where) else [-1] * len(asked)
        found[index] = [(choice, where) for choice in best]
    return found


def _default_features(model: Any) -> str | None:
    return "objects" if getattr(model, "reads_features", False) else None


def _regions(sample: Any, sizes: dict[int, tuple[int, int]], index: int, shown: int) -> Tensor:
    """Boxes (R, 4) that there are to choose, at their place in the sample's own image, where another one is shown."""
    if sample.features is None:
        boxes = [o["box"] for o in sample.record["objects"]]
        return torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
    if "boxes" not in sample.features:
        raise ValueError(f"features: expected 'boxes' of sample {sample.key!r}, got {list(sample.features)}")
    own: Tensor = sample.features["boxes"].double()
    return own if shown == index else stretched(own, sizes[shown], sizes[index])


def _accuracy(
    found: dict[int, list[tuple[int, Tensor]]], phrases: dict[int, list[Phrase]], indices: Sequence[int]
) -> float:
    right = [
        place >= 0 and bool((overlap(boxes[place : place + 1], phrase.boxes) >= ENOUGH).any())
        for index in indices
        for phrase, (place, boxes) in zip(phrases[index], found.get(index, ()), strict=True)
    ]
    return sum(right) / len(right)


def _draw(
    dataset: Any,
    indices: Sequence[int],
    found: dict[int, list[tuple[int, Tensor]]],
    phrases: dict[int, list[Phrase]],
    sizes: dict[int, tuple[int, int]],
    rows: dict[str, dict[str, float]],
    path: str | PathLike[str],
) -> None:
    drawn = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0)).tolist()[: 2 * SHOWN]

    def cell(index: int) -> Cell:
        sample = dataset[index]
        lines = [(sample.caption, INK)]
        boxes: list[tuple[Sequence[float], str, str]] = []
        if sample.image is None:
            return Cell(None, lines)
        seen = (sample.image.shape[1], sample.image.shape[0])
        for phrase, (place, own) in zip(phrases[index], found[index], strict=True):
            text = sample.caption[slice(*phrase.span)]
            boxes += [(box, MUTED, "") for box in to_model(phrase.boxes, seen, sizes[index]).tolist()]
            if place >= 0:
                right = bool((overlap(own[place : place + 1], phrase.boxes) >= ENOUGH).any())
                box = to_model(own[place : place + 1], seen, sizes[index])[0].tolist()
                boxes.append((box, ACCENT if right else WRONG, text))
                lines.append((text, RIGHT if right else WRONG))
        return Cell(sample.image, lines, boxes)

    scores = ", ".join(f"{row} {100 * values['accuracy']:.1f}" for row, values in rows.items())
    subtitle = f"{len(indices):,} images; accuracy: {scores}.   Grey: true.  Blue: right.  Red: wrong."
    gallery(path, "Phrases", subtitle, [("Drawn at random", [cell(indices[place]) for place in drawn])])
