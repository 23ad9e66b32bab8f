"""Multiple choice with a reason, as in VCR: an answer, the rationale of the right answer, and both.

`answer` is Q -> A, `rationale` QA -> R with the right answer given, `both` Q -> AR. A choice is scored by a head over
`joint_features` (a checkpoint of `TaskModel`) or, without training, by `match_scores`. What stands beside the scores:
`blind`, with images shuffled among samples; `majority`, always the place that is right most often; `chance`.
Source: Zellers et al. 2019 (1811.10830). Its texts name regions by tags; here they are plain words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlmfast.tasks.batches import Blind, EachCaption, evaluating
from vlmfast.tasks.heads import Labelled, TaskModel, first_of
from vlmfast.tasks.page import INK, MUTED, RIGHT, WRONG, Cell, gallery
from vlmfast.tasks.scores import Compared
from vlmfast.tasks.task import Run, Task, Trainable

SHOWN = 8
KINDS = ("answer", "rationale")


class Reasoning(Task):
    """An answer of several, a rationale of several, and both right."""

    methods: ClassVar = (("logits",), ("match_scores",))
    requires: ClassVar = ("question", "choices", "answer_index", "rationale_choices", "rationale_index")

    def score(self, run: Run) -> Compared:
        chosen, indices = self._choose(run, run.dataset)
        records = [run.dataset.record(index) for index in indices]
        truth = {kind: [right_of(kind, record) for record in records] for kind in KINDS}
        rows = {"model": _scores(chosen, truth)}
        if run.blind:
            rows["blind"] = _scores(self._choose(run, Blind(run.dataset, indices))[0], truth)
        common = {kind: Counter(truth[kind]).most_common(1)[0][0] for kind in KINDS}
        rows["majority"] = _scores({kind: [common[kind]] * len(records) for kind in KINDS}, truth)
        rows["chance"] = _chance(records)
        return Compared(
            task=self.name,
            rows=rows,
            num_samples=len(records),
            skipped=dict(run.dataset.skipped()),
            arguments={"batch_size": run.batch_size, "device": str(run.device)},
            draw=partial(_draw, run.dataset, indices, chosen, rows),
            notes="all times 100",
            details={"form": "head" if callable(getattr(run.model, "logits", None)) else "match_scores"},
        )

    def trainable(
        self, model: Any, source: Any, tokenizer: Any, model_options: Any, *, features: Any = None, seed: int = 0
    ) -> Trainable:
        """A head with one output, trained by cross-entropy between the choices, of answers and rationales alike.

        Raises:
            ValueError: a batch has questions with different numbers of choices.
        """
        dataset = self.training_data(
            model, source, model_options, features, seed=seed, requires=self.requires, min_batch=1
        )
        plain = model.collator(model_options, tokenizer, train=False)
        made = TaskModel.around(model, self.name, ("choice",), plain([first_of(dataset)]))
        return Trainable(made, _Choices(dataset), Labelled(EachCaption(plain, _texts), _labels))

    @staticmethod
    def _choose(run: Run, dataset: Any) -> tuple[dict[str, list[int]], list[int]]:
        """The places of the choices that score highest, and the indices of the samples."""
        collator = run.model.collator(run.model_options, run.tokenizer, train=False)
        by_head = callable(getattr(run.model, "logits", None))
        chosen: dict[str, list[int]] = {}
        seen: list[int] = []
        run = replace(run, batch_size=max(1, run.batch_size // 4))
        with evaluating(run.model):
            for kind in KINDS:
                chosen[kind], seen = [], []
                for batch, indices, samples in run.batches(
                    dataset, EachCaption(collator, partial(_texts_of, kind)), kind
                ):
                    scores = run.model.logits(**batch)[:, 0] if by_head else run.model.match_scores(**batch)
                    counts = [len(_texts_of(kind, sample)) for sample in samples]
                    chosen[kind] += [int(part.argmax()) for part in scores.float().cpu().split(counts)]
                    seen += indices
        return chosen, run.some(seen)


def texts_of(kind: str, record: dict[str, Any]) -> list[str]:
    """The question with each answer; or the question, the right answer and each rationale."""
    if kind == "answer":
        return [f"{record['question']} {choice}" for choice in record["choices"]]
    asked = f"{record['question']} {record['choices'][right_of('answer', record)]}"
    return [f"{asked} {reason}" for reason in record["rationale_choices"]]


def right_of(kind: str, record: dict[str, Any]) -> int:
    """The place of the right choice.

    Raises:
        ValueError: there is no such choice.
    """
    name, choices = ("answer_index", "choices") if kind == "answer" else ("rationale_index", "rationale_choices")
    place: int = record[name]
    if not 0 <= place < len(record[choices]):
        raise ValueError(f"{name}: expected 0 to {len(record[choices]) - 1}, got {place}")
    return place


def _texts_of(kind: str, sample: Any) -> list[str]:
    return texts_of(kind, sample.record)


class _Choices(Dataset[Any]):
    """Two samples of each: its answers, and its rationales; `record["kind"]` says which."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return 2 * len(self.dataset)

    def __getitem__(self, position: Any) -> Any:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[Any]) -> list[Any]:
        numbers = [position[-1] if isinstance(position, tuple) else position for position in positions]
        wanted = [
            (position[0], number // 2) if isinstance(position, tuple) else number // 2
            for position, number in zip(positions, numbers, strict=True)
        ]
        samples = self.dataset.__getitems__(wanted)
        kinds = [KINDS[number % 2] for number in numbers] + [KINDS[0]] * (len(samples) - len(numbers))  # stand-ins
        return [
            sample and replace(sample, record={**sample.record, "kind": kind})
            for sample, kind in zip(samples, kinds, strict=True)
        ]

    def skipped(self) -> Counter[str]:
        found: Counter[str] = self.dataset.skipped()
        return found

    def fingerprint(self) -> str:
        found: str = self.dataset.fingerprint()
        return found


def _texts(sample: Any) -> list[str]:
    return texts_of(sample.record["kind"], sample.record)


def _labels(samples: Sequence[Any]) -> Tensor:
    if len(counts := {len(_texts(sample)) for sample in samples}) > 1:
        raise ValueError(f"choices: expected the same number for every question, got {sorted(counts)}")
    return torch.tensor([right_of(sample.record["kind"], sample.record) for sample in samples])


def _scores(chosen: dict[str, list[int]], truth: dict[str, list[int]]) -> dict[str, float]:
    right = {kind: [a == b for a, b in zip(chosen[kind], truth[kind], strict=True)] for kind in KINDS}
    both = [a and b for a, b in zip(right["answer"], right["rationale"], strict=True)]
    return {name: sum(values) / len(values) for name, values in (*right.items(), ("both", both))}


def _chance(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    each = [(1 / len(record["choices"]), 1 / len(record["rationale_choices"])) for record in records]
    return {
        "answer": sum(a for a, _ in each) / len(each),
        "rationale": sum(r for _, r in each) / len(each),
        "both": sum(a * r for a, r in each) / len(each),
    }


def _draw(
    dataset: Any,
    indices: Sequence[int],
    chosen: dict[str, list[int]],
    rows: dict[str, dict[str, float]],
    path: str | PathLike[str],
) -> None:
    drawn = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0)).tolist()

    def cell(place: int) -> Cell:
        sample = dataset[indices[place]]
        record, lines = sample.record, [(sample.record["question"], INK)]
        for kind, choices in zip(KINDS, ("choices", "rationale_choices"), strict=True):
            said, right = chosen[kind][place], right_of(kind, record)
            lines.append((record[choices][said], RIGHT if said == right else WRONG))
            if said != right:
                lines.append((record[choices][right], MUTED))
        return Cell(sample.image, lines)

    truth = [{kind: right_of(kind, dataset.record(index)) for kind in KINDS} for index in indices]
    right = [all(chosen[kind][place] == truth[place][kind] for kind in KINDS) for place in range(len(indices))]
    sections = [
        (name, [cell(place) for place in places])
        for name, which in (("Both right", True), ("Answer or rationale wrong", False))
        if (places := [place for place in drawn if right[place] == which][:SHOWN])
    ]
    scores = ", ".join(f"{row} {100 * values['both']:.1f}" for row, values in rows.items())
    subtitle = f"{len(indices):,} questions; both: {scores}.   Grey: what is right instead."
    gallery(path, "Answers and rationales", subtitle, sections)
