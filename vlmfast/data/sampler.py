"""The order of samples, as a function of (seed, epoch)."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) for every index once, in a permutation that depends on (seed, epoch) only.

    Carrying the epoch with the index lets worker processes, which do not see `set_epoch`, augment by epoch.

    Args:
        length: number of samples.
        shuffle: permute; False yields ascending indices.
        seed: at least 0.
    Raises:
        ValueError: length is not positive, or the seed is negative.
    """

    def __init__(self, length: int, *, shuffle: bool = True, seed: int = 0) -> None:
        if length < 1:
            raise ValueError(f"length: expected at least 1, got {length}")
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        self.length = length
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        order = np.arange(self.length)
        if self.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        for index in order:
            yield epoch, int(index)
