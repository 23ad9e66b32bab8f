"""What a task is: the methods of a model and the fields of a record that it needs, its flags, and how it scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from vlmfast.data import ImageTextDataset, open_features
from vlmfast.tasks.batches import Collate, batches, place
from vlmfast.tasks.scores import Scores, listed


@dataclass
class Options:
    """The flags that `vlmfast eval --task` has for a task alone."""


@dataclass(frozen=True)
class Run:
    """What a task scores: the arguments of `Task.evaluate`, the source opened and the model on its device."""

    model: Any
    dataset: Any
    tokenizer: Any
    model_options: Any
    device: torch.device
    batch_size: int
    num_workers: int
    blind: bool
    progress: bool

    def batches(
        self, dataset: Any, collator: Collate, name: str
    ) -> Iterator[tuple[dict[str, Any], list[int], list[Any]]]:
        """See `vlmfast.tasks.batches.batches`."""
        return batches(
            dataset,
            collator,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            device=self.device,
            progress=self.progress,
            name=name,
        )

    def some(self, found: list[Any]) -> list[Any]:
        """`found`; ValueError, with the reasons, where it is empty."""
        if not found:
            raise ValueError(
                f"source: no sample of {len(self.dataset)} could be used; {listed(self.dataset.skipped())}"
            )
        return found


class Task:
    """One way to score a model; the classes of TASKS.

    Args:
        options: of the class `Options` of the task; None is its defaults.
    """

    Options: ClassVar[type[Any]] = Options
    methods: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """What a model must have: all methods of one of these."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Fields of the record without which a sample is left out."""

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def check(self, model: Any) -> None:
        """TypeError, naming what is missing, for a model that lacks a method."""
        missing = [[name for name in methods if not callable(getattr(model, name, None))] for methods in self.methods]
        if self.methods and all(missing):
            wanted = " or ".join(" and ".join(methods) for methods in self.methods)
            lacks = f"{type(model).__name__} lacks {', '.join(missing[0])}"
            if ("logits",) in self.methods:
                lacks += f"; `vlmfast train MODEL --task {self.name}` makes a model with logits, a head"
            raise TypeError(f"task {self.name}: expected a model with {wanted}; {lacks}")

    def evaluate(
        self,
        model: Any,
        source: Any,
        tokenizer: Any,
        model_options: Any,
        *,
        features: Any = None,
        device: torch.device | str | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
        blind: bool = True,
        progress: bool = True,
    ) -> Scores:
        """Scores of the model on the samples of `source`.

        Args:
            model: a Module with `transform`, `collator` and the task's methods, as `vlmfast.models.contract` describes
                them. It is put into eval mode, and back.
            source: as of `vlmfast.data.ImageTextDataset`; or what `open` made of it, to score on it several times.
            tokenizer: a transformers tokenizer; None for a model that reads no text.
            model_options: the model's own `Options`, which its transform and its collator read.
            features: a folder of features of these images, such as boxes, as of `vlmfast.data.open_features`; they are
                the samples' `features`.
            device: where to compute; the model is moved there. None is where the model is.
            batch_size: samples per forward pass.
            num_workers: processes that read and decode; 0 reads in this one.
            blind: whether to score the model with shuffled images too, where that is not chance by construction.
            progress: a progress bar on stderr, if that is a terminal.
        Raises:
            TypeError: the model lacks a method.
            ValueError: no sample could be used, or an option is out of range.
        """
        self.check(model)
        dataset = self.open(source)
        dataset.transform = model.transform(model_options, train=False)
        if features is not None and dataset.features is None:
            dataset.features = open_features(features, dataset)
        where = place(model, device)
        return self.score(
            Run(model, dataset, tokenizer, model_options, where, batch_size, num_workers, blind, progress)
        )

    def open(self, source: Any) -> ImageTextDataset:
        """The samples of a source, of which those are used that have the fields that the task needs."""
        if isinstance(source, ImageTextDataset):
            return source
        return ImageTextDataset(source, transform=None, requires=self.requires)

    def score(self, run: Run) -> Scores:
        """What a task defines; `evaluate` has checked the model."""
        raise NotImplementedError(f"{type(self).__name__}.score")

    def trainable(
        self, model: Any, source: Any, tokenizer: Any, model_options: Any, *, features: Any = None, seed: int = 0
    ) -> Trainable:
        """What `vlmfast train MODEL --task` trains.

        Args:
            model, source, tokenizer, model_options, features: as of `evaluate`.
            seed: of the augmentation.
        Raises:
            TypeError: the task is not trained, or the model lacks a method.
        """
        raise TypeError(f"task {self.name}: there is nothing to train")

    @staticmethod
    def training_data(
        model: Any, source: Any, model_options: Any, features: Any, *, seed: int, requires: tuple[str, ...], **more: Any
    ) -> ImageTextDataset:
        """The samples that a task trains on, with their features where there are any; more is of the dataset."""
        transform = model.transform(model_options, train=True)
        dataset = ImageTextDataset(source, transform=transform, requires=requires, seed=seed, **more)
        if features is not None:
            dataset.features = open_features(features, dataset)
        return dataset


class Trainable(NamedTuple):
    """What a training run of a task needs.

    Attributes:
        model: its forward takes a batch as keyword arguments and returns an output with `loss`.
        dataset: read by (epoch, index) or by index; `skipped()` counts what was left out, and `fingerprint()` tells
            whether a resumed run sees the same samples.
        collator: samples to a batch.
    """

    model: Any
    dataset: Any
    collator: Collate
