"""Samples of shards that are read in order and never indexed: split, shuffled, and gone on with after a stop."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlmfast.data.dataset import Recipe, Sample, Source, check_options
from vlmfast.data.records import URL
from vlmfast.data.stream_shards import RawSample, opened, read_shard, shard_urls
from vlmfast.data.transforms import Transform

ATTEMPTS = 4  # to read a shard that is no local file
FRUITLESS = 10  # shards in a row without a sample
UNUSABLE = 1000  # samples in a row

Position = tuple[int, int, int]
"""In a stream: the round over all shards, the place of the shard in the round, the place of the sample in the shard."""
ORDER_OF_SHARDS, ORDER_OF_BLOCK, SAMPLE = range(3)
"""What a random generator is for; part of its seed."""


class StreamingDataset(IterableDataset[Sample]):
    """Images with text in tar shards that are read from the first byte to the last, without end and without an index.

    The data set is split into as many streams as there are processes and workers. In each round all shards are drawn
    in a new order, and every stream takes its share of them. It shuffles its samples in blocks of `buffer`, which do
    not reach beyond a round. What cannot be used is left out and counted. A shard that cannot be read to its end is
    tried again from where it broke off, and given up after `attempts`; what was read of it is used.

    Iterated over, it gives the samples of the process's stream or, in a DataLoader's worker, of the worker's.
    `StreamLoader` makes batches, counts what is skipped in workers too, and can go on where it was.

    Memory: the bytes of `buffer` samples in each worker.

    Args:
        source: `pipe:COMMAND`, a URL, or local shards, with lists in braces; see `shard_urls`.
        transform, keywords, seed, requires: as `ImageTextDataset`.
        buffer: samples in a block, at least 1; 1 keeps the order of a shard.
        attempts: to read a shard that is no local file.
        wait: seconds before the second attempt, twice as many before each further one.
        rank, world_size: of the process; every process is given all shards and takes its share.
    Raises:
        FileNotFoundError: a local shard is not there.
        TypeError: requires is no list or tuple of names.
        ValueError: nothing opens such a source, or an argument is out of its range; while it is read, when
            FRUITLESS shards give no sample, or UNUSABLE samples cannot be used.
    """

    min_batch = 0

    def __init__(
        self,
        source: Source,
        *,
        transform: Transform | None,
        keywords: float = 0.0,
        seed: int = 0,
        requires: Sequence[str] = ("caption",),
        buffer: int = 1000,
        attempts: int = ATTEMPTS,
        wait: float = 1.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_options(seed, keywords, requires)
        for name, value in (("buffer", buffer), ("attempts", attempts)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1}, got {rank}")
        self.source = source
        self.transform = transform
        self.keywords = keywords
        self.seed = seed
        self.requires = tuple(requires)
        self.buffer = buffer
        self.attempts = attempts
        self.wait = wait
        self.rank = rank
        self.world_size = world_size
        self.urls = shard_urls(source)
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        raise TypeError(f"source: {self.source!r} is read as a stream, which has no length")

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, index: Any) -> Sample:
        raise TypeError(f"source: {self.source!r} is read as a stream, in order and not by index")

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self.check_streams(workers)
        stream = Stream(self, self.rank * workers + number, self.world_size * workers)
        for sample in stream:
            self.counts.update(stream.report()[0])
            yield sample

    def check_streams(self, workers: int) -> None:
        """ValueError unless each stream has a shard of its own."""
        streams = self.world_size * max(1, workers)
        if len(self.urls) < streams:
            raise ValueError(
                f"source: {len(self.urls)} shards for {self.world_size} processes of {max(1, workers)} workers; "
                f"expected a shard for each of these {streams} at least"
            )

    def fingerprint(self) -> str:
        """A hash of the names of all shards, in order; what is in them is not looked at."""
        return hashlib.sha256("\0".join(self.urls).encode("utf-8", "surrogateescape")).hexdigest()

    def skipped(self) -> Counter[str]:
        """Counts by reason of what could not be used so far, once for each time that it was read.

        "broken shard" is one that could not be read to its end.
        """
        return +self.counts


@dataclass
class _Block:
    """Samples that are shuffled together; `start` is the position of the first that was read."""

    start: Position
    samples: list[RawSample | None] = field(default_factory=list)
    whole: bool = False


class Stream:
    """The usable samples of one of `count` streams of a data set, without end.

    Args:
        dataset: what is read.
        number: of the stream, below count.
        state: to go on from, as `state` was.
    """

    def __init__(
        self, dataset: StreamingDataset, number: int, count: int, state: Mapping[str, Any] | None = None
    ) -> None:
        state = state or {}
        self.dataset = dataset
        self.number = number
        self.count = count
        self.faults: Counter[str] = Counter()
        self.notes: list[str] = []
        first, second, third = state.get("start", (0, 0, 0))
        self._start: Position = (first, second, third)  # of the block
        self._position = self._start  # of the sample that is read next
        self._block: int = state.get("block", 0)
        self._taken: int = state.get("taken", 0)
        self._fruitless = 0

    @property
    def state(self) -> dict[str, Any]:
        """What has been given, as JSON values."""
        return {"start": list(self._start), "block": self._block, "taken": self._taken}

    def report(self) -> tuple[dict[str, int], list[str]]:
        """Counts by reason, and a sentence on each broken shard, since this was last asked for."""
        found = dict(+self.faults), self.notes
        self.faults, self.notes = Counter(), []
        return found

    def __iter__(self) -> Iterator[Sample]:
        dataset, unusable = self.dataset, 0
        recipe = Recipe(dataset.transform, dataset.keywords, dataset.requires)
        for raw in self._shuffled():
            generator = np.random.default_rng((dataset.seed, SAMPLE, *raw.place))
            found = recipe.sample(raw, 0, generator, draw_caption=True)
            if not isinstance(found, str):
                unusable = 0
                yield found
                continue
            self.faults[found] += 1
            unusable += 1
            if unusable == UNUSABLE:
                raise ValueError(
                    f"source: {unusable} samples in a row cannot be used; the last is skipped for: {found}"
                )

    def _shuffled(self) -> Iterator[RawSample]:
        """Block after block, each in an order of its own. While one is given, the next is read."""
        reader, block = self._read(), _Block(self._start)
        while True:
            while not block.whole:
                self._extend(block, reader)
            following = _Block(self._position)
            self._start = block.start
            seed = (self.dataset.seed, ORDER_OF_BLOCK, self.number, self.count, self._block)
            for given, place in enumerate(np.random.default_rng(seed).permutation(len(block.samples)).tolist()):
                raw, block.samples[place] = block.samples[place], None
                if not following.whole:
                    self._extend(following, reader)
                if given >= self._taken:
                    self._taken = given + 1
                    assert raw is not None
                    yield raw
            self._block, self._taken, block = self._block + 1, 0, following

    def _extend(self, block: _Block, reader: Iterator[RawSample | None]) -> None:
        raw = next(reader)
        if raw is not None:
            block.samples.append(raw)
        block.whole = raw is None or len(block.samples) == self.dataset.buffer

    def _read(self) -> Iterator[RawSample | None]:
        """Samples as they are read, from `_position`, and None where a round ends."""
        round_, place, number = self._position
        while True:
            generator = np.random.default_rng((self.dataset.seed, ORDER_OF_SHARDS, round_))
            shards = generator.permutation(len(self.dataset.urls))[self.number :: self.count].tolist()
            for place, shard in enumerate(shards[place:], start=place):  # noqa: B020  # from where it goes on
                yield from self._shard(shard, round_, place, number)
                number = 0
                self._position = (round_, place + 1, 0)
            round_, place = round_ + 1, 0
            self._position = (round_, 0, 0)
            yield None

    def _shard(self, shard: int, round_: int, place: int, number: int) -> Iterator[RawSample]:
        """The samples of a shard from `number` on."""
        url = self.dataset.urls[shard]
        attempts = self.dataset.attempts if URL.match(url) else 1
        seen = 0
        for attempt in range(1, attempts + 1):
            if attempt > 1:
                time.sleep(self.dataset.wait * 2 ** (attempt - 2))
            faults: Counter[str] = Counter()
            try:
                with opened(url) as stream:
                    for k, raw in enumerate(read_shard(url, stream, faults, last_try=attempt == attempts)):
                        seen = max(seen, k + 1)
                        if k >= number:
                            number = k + 1
                            self._position = (round_, place, number)
                            yield replace(raw, place=(round_, shard, k))
                break
            except (OSError, ValueError) as error:
                reason = str(error)
        else:
            faults["broken shard"] += 1
            tries = f"{attempts} attempts" if attempts > 1 else "one attempt"
            self.notes.append(f"{url}: {reason}; given up after {tries}, of its samples {seen} are used")
        self.faults += faults
        self._fruitless = 0 if seen else self._fruitless + 1
        if self._fruitless == FRUITLESS:
            why = self.notes[-1] if self.notes else f"{url} holds no image with text"
            raise ValueError(f"source: {FRUITLESS} shards in a row gave no sample; the last is {why}")


Message = tuple[int, dict[str, Any], dict[str, int], list[str], Any]


class StreamLoader:
    """Batches of a `StreamingDataset`, without end, and where to go on.

    Each worker has a stream of its own, and the workers' batches take turns. `state_dict()` is what has been given so
    far, as JSON values; a loader that is given it goes on with the samples that would have followed, as long as
    shards, seed, buffer, batch size and the number of processes and workers are the same.

    Args:
        dataset: what is read.
        batch_size: samples in each batch.
        collate: a list of samples to a batch.
        num_workers: processes that read and decode; 0 does both in this one.
        note: called with a sentence on each broken shard.
        options: of the DataLoader, such as pin_memory.
    Raises:
        ValueError: there are fewer shards than streams, or batch_size is below 1.
    """

    def __init__(
        self,
        dataset: StreamingDataset,
        batch_size: int,
        collate: Callable[[list[Sample]], Any],
        *,
        num_workers: int = 0,
        note: Callable[[str], None] = print,
        **options: Any,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        dataset.check_streams(num_workers)
        self.dataset = dataset
        self.note = note
        self._batches = _Batches(dataset, batch_size, collate)
        self._workers = max(1, num_workers)
        # A generator of its own: the DataLoader draws a seed, and the global generator is the model's.
        generator = torch.Generator().manual_seed(dataset.seed)
        self.loader: DataLoader[Any] = DataLoader(
            self._batches, batch_size=None, num_workers=num_workers, generator=generator, **options
        )

    def __iter__(self) -> Iterator[Any]:
        batches = self._batches
        for number, state, faults, notes, batch in self.loader:
            batches.states[number] = state
            batches.first = (number + 1) % self._workers
            self.dataset.counts.update(faults)
            for sentence in notes:
                self.note(sentence)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Of this process."""
        states = {str(number): state for number, state in self._batches.states.items()}
        return {**self._shape(), "first": self._batches.first, "streams": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`, from the next `iter` on.

        Raises:
            ValueError: it is of another process, or of another number of processes, workers or shards.
        """
        for name, value in self._shape().items():
            if state.get(name) != value:
                raise ValueError(f"state: {name} was {state.get(name)!r} and is {value!r}")
        self._batches.first = state["first"]
        self._batches.states = {int(number): own for number, own in state["streams"].items()}

    def _shape(self) -> dict[str, int]:
        dataset = self.dataset
        return {
            "rank": dataset.rank, "world_size": dataset.world_size, "workers": self._workers,
            "shards": len(dataset.urls), "buffer": dataset.buffer,
        }  # fmt: skip


class _Batches(IterableDataset[Any]):
    """What a worker gives: batches, each with the state of its stream behind it, and what was met."""

    def __init__(self, dataset: StreamingDataset, batch_size: int, collate: Callable[[list[Sample]], Any]) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.collate = collate
        self.first = 0  # the stream, of those of this process, whose batch is the next
        self.states: dict[int, dict[str, Any]] = {}

    def __iter__(self) -> Iterator[Message]:
        worker = get_worker_info()
        place, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        number = (self.first + place) % workers
        dataset = self.dataset
        stream = Stream(dataset, dataset.rank * workers + number, dataset.world_size * workers, self.states.get(number))
        samples = iter(stream)
        while True:
            batch = self.collate([next(samples) for _ in range(self.batch_size)])
            yield number, stream.state, *stream.report(), batch
