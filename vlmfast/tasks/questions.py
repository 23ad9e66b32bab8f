"""Questions about images as samples of their own: a record may list several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import Dataset

from vlmfast.tasks.answers import normalise


@dataclass(frozen=True)
class Question:
    """A question about an image.

    Attributes:
        index: of the image in its dataset.
        text: of the question.
        answers: normalised, one or more.
        kind: its `type` in the record; empty where there is none.
    """

    index: int
    text: str
    answers: tuple[str, ...]
    kind: str = ""


class Questions(Dataset[Any]):
    """One sample a question, its caption the question and `record["question"]` the `Question`.

    Args:
        dataset: as `vlmfast.data.ImageTextDataset`, opened with `requires=()`.
    Raises:
        ValueError: no record has a question with an answer.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = self.images = dataset  # `images` gives the samples, and may be changed for `Blind(dataset, ...)`
        self.items: list[Question] = []
        self.unanswered = 0
        for index in range(len(dataset)):
            for asked in asked_of(dataset.record(index)):
                text, answers = asked.get("question"), asked.get("answers")
                told = [normalise(a) for a in answers if isinstance(a, str)] if isinstance(answers, list) else []
                if isinstance(text, str) and text.strip() and told:
                    self.items.append(Question(index, text.strip(), tuple(told), str(asked.get("type") or "")))
                else:
                    self.unanswered += 1
        if not self.items:
            raise ValueError(f"source: none of {len(dataset)} samples has a question with answers")

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        """The dataset's."""
        found: str = self.dataset.fingerprint()
        return found

    def __getitem__(self, position: Any) -> Any:
        epoch, place = position if isinstance(position, tuple) else (None, position)
        item = self.items[place]
        sample = self.images[item.index if epoch is None else (epoch, item.index)]
        return sample and replace(sample, caption=item.text, record={**sample.record, "question": item})

    def __getitems__(self, positions: Sequence[Any]) -> list[Any]:
        """A batch; in training a question whose image cannot be read gives its place to the next that can."""
        return [self[position] or self._next(position) for position in positions]

    def _next(self, position: Any) -> Any:
        if not isinstance(position, tuple):
            return None
        epoch, place = position
        following = (self[epoch, (place + step) % len(self)] for step in range(1, len(self)))
        return next((sample for sample in following if sample is not None), None)

    def skipped(self) -> Counter[str]:
        """Counts by reason: of images, and of questions without an answer."""
        return Counter(self.dataset.skipped()) + Counter({"question without answer": self.unanswered})


def asked_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The questions of a record: those it lists, or its own where that has answers."""
    several = record.get("questions")
    if isinstance(several, list):
        return [asked for asked in several if isinstance(asked, dict)]
    return [record] if "question" in record and "answers" in record else []
