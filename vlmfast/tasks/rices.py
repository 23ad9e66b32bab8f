"""Examples for a prompt whose images are like the one that is asked about (RICES).

Retrieval-based In-Context Example Selection: Yang et al. 2022 (2109.05014), as Flamingo has it (2204.14198). Images are
compared by the cosine of what the model's own image tower makes of them; of states of patches that is their mean.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from vlmfast.tasks.batches import evaluating
from vlmfast.tasks.questions import Question, Questions
from vlmfast.tasks.task import Run


class Similar:
    """For each question the questions of training whose images are most like its own, one of each image.

    Args:
        run: whose model has `image_features(pixel_values)` and `prompt_collator`.
        asked, training: questions, whose images may be others' (`Questions.images`).
        seed: of which question of an image is taken.
    Raises:
        TypeError: the model has no `image_features`.
    """

    def __init__(self, run: Run, asked: Questions, training: Questions, seed: int) -> None:
        if not callable(getattr(run.model, "image_features", None)):
            raise TypeError(f"--rices: expected a model with image_features, {type(run.model).__name__} has none")
        self.items: Sequence[Question] = asked.items
        self.seed = seed
        self.numbers: dict[int, list[int]] = defaultdict(list)
        for number, item in enumerate(training.items):
            self.numbers[item.index].append(number)
        self.of_training = _vectors(run, training.images, list(self.numbers))
        images, self.vectors = _vectors(run, asked.images, list(dict.fromkeys(item.index for item in asked.items)))
        self.rows = {image: row for row, image in enumerate(images)}

    def __call__(self, place: int) -> Iterator[int]:
        """Numbers of questions of training, the most similar image's first."""
        order = random.Random(f"{self.seed} {place}")
        images, vectors = self.of_training
        similarity = vectors @ self.vectors[self.rows[self.items[place].index]]
        for nearest in similarity.argsort(descending=True, stable=True).tolist():
            yield order.choice(self.numbers[images[nearest]])


def _vectors(run: Run, images: Any, indices: list[int]) -> tuple[list[int], Tensor]:
    """The indices of the images that could be read, and their unit vectors (N, W) float32 on the CPU."""
    collator = run.model.prompt_collator(run.model_options, run.tokenizer)
    kept: list[int] = []
    found: list[Tensor] = []
    with evaluating(run.model):
        for batch, places, _ in run.batches(_Images(images, indices), collator, "compare"):
            features = batch.get("image_features")
            if features is None:
                features = run.model.image_features(batch["pixel_values"])
            features = features.float().flatten(1, -2).mean(1) if features.ndim > 2 else features.float()
            found.append(F.normalize(features, dim=-1).cpu())
            kept += [indices[place] for place in places]
    return run.some(kept), torch.cat(found)


class _Images(Dataset[Any]):
    """Samples with an image and nothing to say."""

    def __init__(self, images: Any, indices: list[int]) -> None:
        self.images = images
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Any:
        sample = self.images[self.indices[place]]
        return sample and replace(sample, caption="")
