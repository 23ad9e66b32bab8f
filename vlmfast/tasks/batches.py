"""Batches of a dataset for evaluation, each with the samples that are in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

Collate = Callable[[Sequence[Any]], dict[str, Any]]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and inference mode; on leaving, with or without an error, every submodule gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def seen_as(dataset: Any, transform: Any) -> Iterator[None]:
    """The images of a dataset by another transform, without its features; on leaving both are as before."""
    before = dataset.transform, dataset.features
    dataset.transform, dataset.features = transform, None
    try:
        yield
    finally:
        dataset.transform, dataset.features = before


def place(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Move the model to the device; None leaves it where it is. Returns the device it is on."""
    if device is not None:
        model.to(device)
        return torch.device(device)
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def batches(
    dataset: Any,
    collator: Collate,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    progress: bool,
    name: str,
) -> Iterator[tuple[dict[str, Any], list[int], list[Any]]]:
    """In order: a batch with its tensors on the device, the indices in the dataset of its samples, and the samples
    without their images. Samples that cannot be used (None) are in none of them.

    Args:
        dataset: `dataset[index]` is a `vlmfast.data.Sample` or None.
        name: of the progress bar.
        Others as of `Task.evaluate`.
    """
    loader: DataLoader[Any] = DataLoader(
        _Indexed(dataset),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_Collate(collator),
        pin_memory=device.type == "cuda",
    )
    for batch, indices, samples in tqdm(loader, desc=name, unit="batch", disable=None if progress else True):
        if batch is not None:
            moved = {
                key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
            yield moved, indices, samples


def cycle(length: int, seed: int = 0) -> list[int]:
    """A random permutation that is one cycle, so that nothing stays in place where there are two or more."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return [following[place] for place in range(length)]


class Blind(Dataset[Any]):
    """A dataset whose images, and features, are another sample's: what a model scores that looks at no image.

    The samples `kept` swap theirs along one cycle, drawn by the seed, so that none keeps its own where there are two.

    Args:
        dataset: `dataset[index]` is a `vlmfast.data.Sample` or None.
        kept: indices of samples that can be read; the others are None here.
    """

    def __init__(self, dataset: Any, kept: Sequence[int], seed: int = 0) -> None:
        self.dataset = dataset
        kept = sorted(set(kept))
        self.other = {kept[place]: kept[other] for place, other in enumerate(cycle(len(kept), seed))}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if index not in self.other:
            return None
        sample, other = self.dataset[index], self.dataset[self.other[index]]
        seen = {name: getattr(other, name) for name in ("image", "features", "images") if hasattr(other, name)}
        return replace(sample, **seen)


class EachCaption:
    """A collator that sets every sample beside each of some captions, sample by sample.

    Args:
        collator: of the model.
        captions: for all samples; or a function of a sample.
    """

    def __init__(self, collator: Collate, captions: Sequence[str] | Callable[[Any], Sequence[str]]) -> None:
        self.collator = collator
        self.captions = captions

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        return self.collator(
            [
                replace(sample, caption=caption)
                for sample in samples
                for caption in (self.captions(sample) if callable(self.captions) else self.captions)
            ]
        )


class _Indexed(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]


class _Collate:
    """What the collator drops is dropped from the samples too, in the same place."""

    def __init__(self, collator: Collate) -> None:
        self.collator = collator

    def __call__(self, indexed: list[tuple[int, Any]]) -> tuple[dict[str, Any] | None, list[int], list[Any]]:
        read = [(index, sample) for index, sample in indexed if sample is not None]
        batch = self.collator([sample for _, sample in read]) if read else None
        return batch, [index for index, _ in read], [replace(sample, image=None) for _, sample in read]
