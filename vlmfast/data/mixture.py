"""Several data sets in turn, each batch of one of them; and images or texts alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from vlmfast.data.dataset import ImageTextDataset, Sample, Source
from vlmfast.data.transforms import Transform


class ImagesAlone(ImageTextDataset):
    """The images of a source; a caption that a sample may have is not given.

    Args:
        source, transform, seed, min_batch: as ImageTextDataset.
    """

    def __init__(self, source: Source, *, transform: Transform, seed: int = 0, min_batch: int = 0) -> None:
        super().__init__(source, transform=transform, requires=(), seed=seed, min_batch=min_batch)

    def _sample(self, index: int, generator: np.random.Generator, draw_caption: bool) -> Sample | str:
        found = super()._sample(index, generator, draw_caption)
        return found if isinstance(found, str) else replace(found, caption="", images=[])


class TextsAlone(ImageTextDataset):
    """The captions of a source, or the lines of a .txt file; no image is read.

    Args:
        source, seed, min_batch: as ImageTextDataset.
    """

    def __init__(self, source: Source, *, seed: int = 0, min_batch: int = 0) -> None:
        super().__init__(source, transform=None, seed=seed, min_batch=min_batch)


class Mixture(Dataset[Any]):
    """Data sets whose batches take turns: one of the first, one of the second, ..., and again one of the first.

    Indices count through all parts. `sampler` gives the order: an epoch goes once through the first part, and takes
    as many batches of each other part. A part that is shorter begins again, in another order and with other
    augmentation; of a longer one the epoch takes what it needs.

    Args:
        parts: one or more.
    Raises:
        ValueError: there are none.
    """

    def __init__(self, parts: Sequence[ImageTextDataset]) -> None:
        if not parts:
            raise ValueError("parts: expected at least one data set, got none")
        self.parts = list(parts)
        self.offsets = np.cumsum([0, *map(len, self.parts)]).tolist()

    def __len__(self) -> int:
        """Samples of one epoch; those of a last batch that is not full are among them and not drawn."""
        return len(self.parts) * len(self.parts[0])

    @property
    def min_batch(self) -> int:
        return self.parts[0].min_batch

    def __getitem__(self, position: tuple[int, int]) -> Sample | None:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[tuple[int, int]]) -> list[Sample | None]:
        """A batch, all of one part.

        Raises:
            ValueError: positions are of several parts.
        """
        found = {int(np.searchsorted(self.offsets, index, side="right")) - 1 for _, index in positions}
        if len(found) > 1:
            raise ValueError(f"positions: expected those of one data set, as `sampler` gives them, got {sorted(found)}")
        part = found.pop()
        return self.parts[part].__getitems__([(epoch, index - self.offsets[part]) for epoch, index in positions])

    def sampler(self, batch: int, seed: int) -> RoundRobinSampler:
        """The order of (epoch, index).

        Args:
            batch: samples in a step of all processes.
            seed: of the order, at least 0.
        Raises:
            ValueError: the first part has fewer samples than one batch.
        """
        return RoundRobinSampler([len(part) for part in self.parts], batch, seed=seed)

    def fingerprint(self) -> str:
        """A hash of what decides the course of a run; see ImageTextDataset.fingerprint."""
        return hashlib.sha256("".join(part.fingerprint() for part in self.parts).encode()).hexdigest()

    def skipped(self) -> Counter[str]:
        """Counts by reason of what could not be used, over all parts."""
        return sum((part.skipped() for part in self.parts), Counter())

    def stand_ins(self) -> int:
        """How many different samples completed a batch so far."""
        return sum(part.stand_ins() for part in self.parts)


class RoundRobinSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) in blocks of `batch`, each of one part, the parts in turn; see `Mixture`.

    A function of (seed, epoch). The first number of a position counts how often its part was gone through, so that
    what is drawn anew in each epoch is so in each round too.

    Args:
        lengths: of the parts.
        batch: samples in a block: those of one step of all processes.
        seed: at least 0.
    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(self, lengths: Sequence[int], batch: int, *, seed: int = 0) -> None:
        if batch < 1 or seed < 0:
            raise ValueError(f"batch, seed: expected at least 1 and 0, got {(batch, seed)}")
        if not lengths or lengths[0] < batch or min(lengths) < 1:
            raise ValueError(f"lengths: expected one batch of {batch} in the first part at least, got {list(lengths)}")
        self.lengths = list(lengths)
        self.batch = batch
        self.seed = seed
        self.epoch = 0
        self.blocks = lengths[0] // batch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) * self.blocks * self.batch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        streams = [self._stream(part) for part in range(len(self.lengths))]
        for _ in range(self.blocks):
            for stream in streams:
                for _ in range(self.batch):
                    yield next(stream)

    def _stream(self, part: int) -> Iterator[tuple[int, int]]:
        """Positions of one part without end, one order of the whole part after another."""
        length, offset = self.lengths[part], sum(self.lengths[:part])
        rounds = -(-self.blocks * self.batch // length)  # of one epoch
        number = self.epoch * rounds
        while True:
            order = np.random.default_rng((self.seed, part, number)).permutation(length)
            for index in order.tolist():
                yield number, offset + index
            number += 1
