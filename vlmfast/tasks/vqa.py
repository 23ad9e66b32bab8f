"""Questions about images, answered by generating, or by a head that chooses one of the answers of the training data.

A checkpoint of `TaskModel` chooses, any other model generates. What stands beside the accuracy: `blind`, with images
shuffled among samples; `majority`, always the most frequent answer; with --train-data `question`, the answer that was
most frequent for the very same question; `chance`, any of the answers that occur.
"""

from __future__ import annotations

import copy
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset

from vlmfast.data import ImageTextDataset
from vlmfast.tasks.answers import accuracy, most_frequent, normalise
from vlmfast.tasks.batches import Blind, evaluating
from vlmfast.tasks.generation import GenerationOptions, generate
from vlmfast.tasks.heads import Labelled, TaskModel, first_of, question_collator
from vlmfast.tasks.page import INK, MUTED, RIGHT, WRONG, Cell, gallery
from vlmfast.tasks.questions import Question, Questions
from vlmfast.tasks.rices import Similar
from vlmfast.tasks.scores import Compared
from vlmfast.tasks.task import Run, Task, Trainable

SHOWN = 12
PLACE = "<image>"  # where an image of several stands in the prompt


@dataclass
class VQAOptions(GenerationOptions):
    """Flags of `--task vqa`."""

    max_new_tokens: int = field(default=10, metadata={"help": "Tokens that are generated at most."})
    prompt: str = field(
        default="question: {} answer:",
        metadata={"help": "What a model that generates is asked; {} is the place of the question."},
    )
    shots: int = field(
        default=0, metadata={"help": "Examples in the prompt, each with its image, drawn from --train-data."}
    )
    shots_seed: int = field(default=0, metadata={"help": "Of the draw of examples."})
    rices: bool = field(
        default=False,
        metadata={"help": "Examples with images like the one that is asked about, the most similar last."},
    )
    train_data: str | None = field(
        default=None, metadata={"help": "Training samples, for examples and for what their answers alone reach."}
    )
    num_answers: int = field(
        default=3129, metadata={"help": "Answers that a head chooses from at most, the most frequent of training."}
    )
    generative: bool = field(
        default=False, metadata={"help": "Train the model to generate answers, though it could have a head."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt.count("{}") != 1:
            raise ValueError(f"--prompt: expected '{{}}' exactly once, got {self.prompt!r}")
        if self.shots < 0:
            raise ValueError(f"--shots: expected at least 0, got {self.shots}")
        if self.shots and not self.train_data:
            raise ValueError(f"--shots {self.shots} needs --train-data, from which examples are drawn")
        if self.rices and not self.shots:
            raise ValueError("--rices has no effect without --shots")
        if self.num_answers < 1:
            raise ValueError(f"--num-answers: expected at least 1, got {self.num_answers}")


class VQA(Task):
    """The accuracy of the VQA challenge."""

    Options = VQAOptions
    methods: ClassVar = (("generate", "prompt_collator"), ("logits",))

    def score(self, run: Run) -> Compared:
        options = self.options
        questions = Questions(run.dataset)
        training = _training(options.train_data, run.model.transform(run.model_options, train=False))
        answered, kept = self._answers(run, questions, training)
        items = [questions.items[place] for place in kept]
        said = {"model": answered}
        if run.blind:
            shuffled = copy.copy(questions)
            shuffled.images = Blind(run.dataset, [item.index for item in items])
            found, places = self._answers(run, shuffled, training)
            said["blind"] = [dict(zip(places, found, strict=True)).get(place, "") for place in kept]
        truth = [item.answers for item in items]
        known = [item.answers for item in training.items] if training else truth
        common = most_frequent(known)
        said["majority"] = [common[0]] * len(items)
        if training:
            said["question"] = _by_question(training.items, items, common[0])
        scored = {name: [accuracy(a, t) for a, t in zip(said[name], truth, strict=True)] for name in said}
        rows = {name: {"accuracy": sum(values) / len(values)} for name, values in scored.items()}
        rows["chance"] = {"accuracy": _chance(truth, common)}
        return Compared(
            task=self.name,
            rows=rows,
            num_samples=len(items),
            skipped=dict(questions.skipped()),
            arguments={**vars(options), "batch_size": run.batch_size, "device": str(run.device)},
            draw=partial(_draw, run.dataset, items, answered, scored["model"], rows),
            notes=f"times 100, of {len(set(common))} answers",
            details={
                "form": "head" if _has_head(run.model) else "generated",
                "types": _types(items, scored),
                "answers": [
                    {"question": item.text, "answer": answer, "accuracy": value}
                    for item, answer, value in zip(items, answered, scored["model"], strict=True)
                ],
            },
        )

    def trainable(
        self, model: Any, source: Any, tokenizer: Any, model_options: Any, *, features: Any = None, seed: int = 0
    ) -> Trainable:
        """The model with a head over `joint_features`; where it has none, the model that learns to write the answer.

        The head's labels are soft: the accuracy of every answer. A model that generates learns from captions that hold
        prompt and answer, by its own loss and its own training collator.

        Raises:
            TypeError: the model has neither `joint_features` nor `generate`.
        """
        dataset = self.training_data(model, source, model_options, features, seed=seed, requires=())
        questions = Questions(dataset)
        if self.options.generative or not hasattr(model, "joint_features"):
            self.check(model)
            collator = model.collator(model_options, tokenizer, train=True)
            return Trainable(model, _Answered(questions, self.options.prompt), collator)
        names = most_frequent([item.answers for item in questions.items])[: self.options.num_answers]
        collator = question_collator(model, model_options, tokenizer)
        made = TaskModel.around(model, self.name, names, collator([first_of(questions)]))
        return Trainable(made, questions, Labelled(collator, partial(_soft_labels, names)))

    def _answers(self, run: Run, questions: Questions, training: Questions | None) -> tuple[list[str], list[int]]:
        """Normalised answers, and the places in `questions` of those that could be asked."""
        if _has_head(run.model):
            collator = question_collator(run.model, run.model_options, run.tokenizer)
            found, kept = [], []
            with evaluating(run.model):
                for batch, places, _ in run.batches(questions, collator, "answer"):
                    found += run.model.logits(**batch).argmax(dim=1).tolist()
                    kept += places
            return [run.model.config.outputs[place] for place in run.some(found)], kept
        plain = _Asked(questions, self.options.prompt)
        asked: Dataset[Any] = plain
        if training is not None and self.options.shots:
            seed = self.options.shots_seed
            similar = Similar(run, questions, training, seed) if self.options.rices else None
            asked = _Shots(plain, training, self.options, getattr(run.model, "example_end", "\n"), similar)
        texts, kept, _ = generate(run, asked, self.options, _caption)
        # A language model goes on after its answer, with a line or a question of its own.
        stop = self.options.prompt.partition("{}")[0].strip()
        lines = [text.partition("\n")[0] for text in texts]
        return [normalise(line.partition(stop)[0] if stop else line) for line in lines], kept


def _caption(sample: Any) -> str:
    caption: str = sample.caption
    return caption


def _has_head(model: Any) -> bool:
    return callable(getattr(model, "logits", None))


def _training(source: Any, transform: Any) -> Questions | None:
    return None if source is None else Questions(ImageTextDataset(source, transform=transform, requires=()))


class _Asked(Dataset[Any]):
    """Samples whose caption is the prompt with the question in it."""

    def __init__(self, questions: Questions, prompt: str) -> None:
        self.questions = questions
        self.prompt = prompt

    def __len__(self) -> int:
        return len(self.questions)

    def fingerprint(self) -> str:
        return self.questions.fingerprint()

    def __getitem__(self, position: Any) -> Any:
        return self._put(self.questions[position])

    def __getitems__(self, positions: Sequence[Any]) -> list[Any]:
        return [self._put(sample) for sample in self.questions.__getitems__(positions)]

    def skipped(self) -> Counter[str]:
        return self.questions.skipped()

    def _put(self, sample: Any) -> Any:
        return sample and replace(sample, caption=self.prompt.replace("{}", sample.record["question"].text))


class _Answered(_Asked):
    """Samples whose caption is the prompt and the answer that most people gave."""

    def _put(self, sample: Any) -> Any:
        if sample is None:
            return None
        (answer,) = most_frequent([sample.record["question"].answers])
        prompt = super()._put(sample).caption
        return replace(sample, caption=f"{prompt} {answer}", prompt=prompt)


class _Shots(Dataset[Any]):
    """Samples of several images: examples with their answers, then the one that is asked.

    `<image>` stands in the caption for each image. Which examples a question gets depends on the seed and on its place,
    or on `similar`, whose first becomes the last example.
    """

    def __init__(
        self, asked: _Asked, training: Questions, options: VQAOptions, end: str, similar: Similar | None
    ) -> None:
        self.similar = similar
        self.asked = asked
        self.examples = _Answered(training, options.prompt)
        if len(training) < options.shots:
            raise ValueError(f"--shots {options.shots}: --train-data has {len(training)} questions only")
        self.shots, self.seed, self.end = options.shots, options.shots_seed, end

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, place: int) -> Any:
        sample = self.asked[place]
        if sample is None:
            return None
        shots: list[Any] = []
        for number in self._drawn(place) if self.similar is None else self.similar(place):
            shots += [shot for shot in [self.examples[number]] if shot is not None]
            if len(shots) == self.shots:
                break
        if self.similar is not None:
            shots.reverse()
        text = "".join(f"{PLACE}{shot.caption}{self.end}" for shot in shots)
        images = [*(shot.image for shot in shots), sample.image]
        return replace(sample, images=images, caption=f"{text}{PLACE}{sample.caption}")

    def _drawn(self, place: int) -> Iterator[int]:
        """All examples, in random order."""
        order = random.Random(f"{self.seed} {place}")
        tried: set[int] = set()
        while len(tried) < len(self.examples):
            number = order.randrange(len(self.examples))
            if number not in tried:
                tried.add(number)
                yield number


def _soft_labels(names: Sequence[str], samples: Sequence[Any]) -> torch.Tensor:
    """(B, A) float32: the accuracy of each answer."""
    places = {name: place for place, name in enumerate(names)}
    labels = torch.zeros(len(samples), len(names))
    for row, sample in zip(labels, samples, strict=True):
        answers = sample.record["question"].answers
        for answer in set(answers) & places.keys():
            row[places[answer]] = accuracy(answer, answers)
    return labels


def _by_question(training: Sequence[Question], items: Sequence[Question], otherwise: str) -> list[str]:
    """For each question the most frequent answer of training to the same one."""
    found: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for item in training:
        found[item.text.lower()].append(item.answers)
    best = {text: most_frequent(answers)[0] for text, answers in found.items()}
    return [best.get(item.text.lower(), otherwise) for item in items]


def _chance(truth: Sequence[Sequence[str]], names: Sequence[str]) -> float:
    """The mean accuracy of an answer that is drawn from `names`."""
    known = set(names)
    return sum(accuracy(a, t) for t in truth for a in set(t) & known) / len(known) / len(truth)


def _types(items: Sequence[Question], scored: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Scores by the type that questions have in their records."""
    found = {}
    for kind in sorted({item.kind for item in items if item.kind}):
        rows = [row for row, item in enumerate(items) if item.kind == kind]
        means = {name: sum(values[row] for row in rows) / len(rows) for name, values in scored.items()}
        found[kind] = {"count": len(rows), **means}
    return found


def _draw(
    dataset: Any,
    items: Sequence[Question],
    answers: Sequence[str],
    scored: Sequence[float],
    rows: dict[str, dict[str, float]],
    path: str | PathLike[str],
) -> None:
    drawn = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()

    def cell(row: int) -> Cell:
        item = items[row]
        colour = RIGHT if scored[row] >= 0.5 else WRONG
        lines = [(item.text, INK), (answers[row] or "(nothing)", colour)]
        if scored[row] < 1:
            lines.append((most_frequent([item.answers])[0], MUTED))
        return Cell(dataset[item.index].image, lines)

    right, wrong = ([row for row in drawn if (scored[row] >= 0.5) == which][:SHOWN] for which in (True, False))
    scores = ", ".join(f"{name} {100 * values['accuracy']:.1f}" for name, values in rows.items())
    subtitle = f"{len(items):,} questions; accuracy: {scores}.   Grey: the true answer."
    sections = [(name, [cell(row) for row in found]) for name, found in (("Right", right), ("Wrong", wrong)) if found]
    gallery(path, "Questions", subtitle, sections)
