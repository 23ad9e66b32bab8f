"""Scores of image-text pairs by a model's `match_scores`, of chosen pairs or of all pairs of a small gallery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlmfast.tasks.batches import EachCaption, evaluating
from vlmfast.tasks.task import Run


def match_matrix(run: Run, indices: Sequence[int], captions: Sequence[str], wanted: Tensor) -> Tensor:
    """How well images and captions match.

    Args:
        indices: in the dataset, of N samples, whose images are the rows.
        captions: N, the columns.
        wanted: bool (N, N), the pairs to score.
    Returns:
        (N, N) float32, NaN where a pair is not wanted or its image cannot be read.
    Raises:
        ValueError: a score is not finite.
    """
    parts = [
        (row, columns)
        for row, own in enumerate(wanted)
        for columns in own.nonzero()[:, 0].split(run.batch_size)
        if len(columns)
    ]
    dataset = _Parts(run.dataset, [(indices[row], [captions[c] for c in columns.tolist()]) for row, columns in parts])
    longest = max((len(columns) for _, columns in parts), default=1)
    run = replace(run, batch_size=max(1, run.batch_size // longest))
    collator = EachCaption(run.model.collator(run.model_options, run.tokenizer, train=False), _texts)
    found = torch.full(wanted.shape, torch.nan)
    with evaluating(run.model):
        for batch, places, _ in run.batches(dataset, collator, "match"):
            scores = run.model.match_scores(**batch).float().cpu()
            if not scores.isfinite().all():
                raise ValueError("model: expected finite match_scores, got NaN or infinity")
            for place, own in zip(places, scores.split([len(parts[place][1]) for place in places]), strict=True):
                row, columns = parts[place]
                found[row, columns] = own
    return found


class _Parts(Dataset[Any]):
    """Samples with the captions that each is matched with, in `record["texts"]`."""

    def __init__(self, dataset: Any, parts: Sequence[tuple[int, list[str]]]) -> None:
        self.dataset = dataset
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, place: int) -> Any:
        index, texts = self.parts[place]
        sample = self.dataset[index]
        return sample and replace(sample, record={"texts": texts})


def _texts(sample: Any) -> list[str]:
    texts: list[str] = sample.record["texts"]
    return texts
