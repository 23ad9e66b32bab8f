"""What a frozen part of a model makes of every image, computed once and kept on disk."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmfast.data import feature_blocks
from vlmfast.data.dataset import ImageTextDataset, Sample
from vlmfast.data.feature_blocks import Block, Item
from vlmfast.data.record_boxes import RecordBoxes

IDENTITY = "identity.json"
OBJECTS = "objects"
BLOCK_ROWS = 4096

# What `encode` gives for B images: a tensor (B, ...), or by name a tensor (B, ...) or B tensors (R_i, ...).
Encoded = Tensor | Mapping[str, Tensor | Sequence[Tensor]]


class FeatureCache(Sequence[Item]):
    """A folder of features: item i is what `encode` gave for sample i of a dataset, None where nothing could be read.

    An item is a tensor or a dict of tensors, which may have another number of rows in each sample. A dict keeps its
    dtypes, bfloat16 becoming float32; a tensor alone is float32.

    Items are in files of `block_rows`, each written under another name, synchronised and renamed: a block is there
    completely or not at all, and a run that was killed goes on with the next one. Reading maps the files into memory.
    `identity.json` says what the features are of; a folder with another identity is refused, never reused or
    overwritten.

    Args:
        folder: made when missing.
        identity: named strings that decide the features: of the model, the data, the transform.
        num_pairs: N.
        block_rows: items of a file, which are in memory together when it is written; None is BLOCK_ROWS.
    Raises:
        ValueError: the folder holds features of another identity, or files that are no cache.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        identity: dict[str, str],
        num_pairs: int,
        block_rows: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.num_pairs = num_pairs
        self.block_rows = BLOCK_ROWS if block_rows is None else block_rows
        self._open: dict[int, Block] = {}
        self._claim({**identity, "pairs": str(num_pairs), "rows per file": str(self.block_rows)})

    def __len__(self) -> int:
        return self.num_pairs

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.num_pairs:
            raise IndexError(f"index: expected 0 to {self.num_pairs - 1}, got {index}")
        block, row = divmod(index, self.block_rows)
        return self.block(block)[row]

    def unreadable(self) -> list[int]:
        """Indices of the samples without features, whose image could not be read; every file is opened."""
        blocks = range(-(-self.num_pairs // self.block_rows))
        return [block * self.block_rows + row for block in blocks for row in self.block(block).absent()]

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Numbers of the blocks of a process that are not there or are damaged.

        Cost: every file of these blocks is read, for its checksum.
        """
        return list(self._faults(rank, world_size))

    def _faults(self, rank: int = 0, world_size: int = 1) -> dict[int, str | None]:
        """As `missing`, with what is wrong with a block, or None where it is not there."""
        found: dict[int, str | None] = {}
        for block in range(rank, -(-self.num_pairs // self.block_rows), world_size):
            path = self._path(block)
            if not path.exists():
                found[block] = None
            elif damage := feature_blocks.damage(path):
                found[block] = f"{path} is damaged ({damage})"
        return found

    @classmethod
    def reopen(cls, folder: str | os.PathLike[str]) -> FeatureCache:
        """The complete cache in a folder, whatever its features are of; checksums are not read.

        Raises:
            ValueError: the folder is no cache, or is not complete.
        """
        path = Path(folder) / IDENTITY
        if not path.exists():
            raise ValueError(f"{folder} is no feature cache: it holds no {IDENTITY}")
        identity = _identity(path)
        if not identity.get("pairs", "").isdigit():
            raise ValueError(f"{path} is damaged (no number of pairs); delete {folder} to have it made again")
        pairs = int(identity.pop("pairs"))
        cache = cls(folder, identity, pairs, _take_rows(identity))
        cache._check_complete()
        return cache

    def _check_complete(self) -> None:
        for block in range(-(-self.num_pairs // self.block_rows)):
            if not self._path(block).exists():
                raise ValueError(f"{self.folder} lacks {self._path(block)}: the cache is not complete")

    def block(self, block: int) -> Block:
        """All items of a block, mapped into memory."""
        if block not in self._open:
            try:
                self._open[block] = Block(self._path(block))
            except FileNotFoundError as error:
                raise ValueError(f"{self.folder} lacks {error.filename}: the cache is not complete") from error
        return self._open[block]

    def rows(self, block: int) -> range:
        """Indices of the samples of a block."""
        return range(block * self.block_rows, min((block + 1) * self.block_rows, self.num_pairs))

    def write(self, block: int, items: Sequence[Item]) -> None:
        """Put a block's items, one a row, in place.

        Raises:
            ValueError: there are too few or too many, they differ in kind, names, dtypes or trailing dimensions.
        """
        if len(items) != len(self.rows(block)):
            shape = tuple(items.shape) if isinstance(items, Tensor) else len(items)
            raise ValueError(f"features: expected {len(self.rows(block))} rows, got {shape}")
        with open(self._path(block).with_suffix(".part"), "w+b") as file:
            feature_blocks.write(file, items)
            _replace(file, self._path(block))
        self._open.pop(block, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a pickled copy maps the files itself

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:06}.npy"

    def _claim(self, identity: dict[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / IDENTITY
        # Looked at first: whoever shares the folder names the identity before any block.
        others = [other.name for other in self.folder.iterdir() if other.suffix != ".part" and other != path]
        if not path.exists():
            if others:
                raise ValueError(f"{self.folder} is no feature cache: it holds {others[0]} but no {IDENTITY}")
            with open(path.with_suffix(f".{os.getpid()}.part"), "w", encoding="utf-8") as file:
                json.dump(identity, file, indent=2)
                _replace(file, path)
            return
        before = _identity(path)
        changed = [
            f"{name} was {before.get(name)!r} and is {identity.get(name)!r}"
            for name in sorted(before.keys() | identity.keys())
            if before.get(name) != identity.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.folder} holds features of something else; delete it or name another folder. Its "
                + "; its ".join(changed)
            )


def open_features(
    folder: str | os.PathLike[str], dataset: ImageTextDataset, *, rank: int = 0, world_size: int = 1
) -> Sequence[Item]:
    """The complete cache in a folder, whatever model and transform made it, if it is of this dataset's images.

    Args:
        folder: of the cache; "objects" stands for the boxes of the records, see `RecordBoxes`.
        dataset: whose samples the features belong to.
        rank, world_size: this process and how many there are; each reads its share of the files for their checksums.
    Raises:
        ValueError: the folder is no cache, is of other images, or is not complete.
    """
    if folder == OBJECTS:
        return RecordBoxes(dataset)
    path = Path(folder) / IDENTITY
    if not path.exists():
        raise ValueError(f"{folder} is no feature cache: it holds no {IDENTITY}")
    before = _identity(path)
    identity = {**before, "data": dataset.image_fingerprint()}
    identity.pop("pairs", None)
    cache = FeatureCache(folder, identity, len(dataset), _take_rows(identity))
    cache._check_complete()
    for damage in cache._faults(rank, world_size).values():
        raise ValueError(damage)
    return cache


def cache_features(
    folder: str | os.PathLike[str],
    dataset: ImageTextDataset,
    encode: Callable[[Any], Encoded],
    model: str,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    block_rows: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    whole_samples: bool = False,
) -> FeatureCache:
    """The features of all images of a dataset, those not on disk yet computed and written.

    With several processes each computes its share of the blocks in one folder that all see; they must wait for one
    another before the cache is read.

    Args:
        folder: of the cache.
        dataset: its transform must not draw random numbers.
        encode: pixels uint8 (B, H, W, 3), or a list of B where the transform gives several sizes, to a tensor (B, ...),
            or to a dict of tensors (B, ...) or of B tensors (R_i, ...) each; called without gradients.
        model: a fingerprint of what `encode` computes.
        batch_size: images per call.
        num_workers: processes that read and decode; 0 reads in this one.
        block_rows: samples of a file, as of `FeatureCache`; fewer where features are large.
        rank, world_size: this process and how many there are.
        progress: called with the numbers of blocks done and to do by this process.
        whole_samples: `encode` is given a list of `Sample`, and what it gives depends on their captions too.
    Raises:
        ValueError: the folder holds features of another model, dataset or transform, the transform is random, or a
            feature is not finite or not one a sample.
    """
    data = dataset.fingerprint() if whole_samples else dataset.image_fingerprint()
    identity = {"model": model, "data": data, "transform": repr(dataset.transform)}
    cache = FeatureCache(folder, identity, len(dataset), block_rows)
    faults = cache._faults(rank, world_size)
    for damage in filter(None, faults.values()):
        warnings.warn(f"{damage}; it is made again", stacklevel=2)
    mine = list(faults)
    batches = {
        block: [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
        for block, rows in ((block, cache.rows(block)) for block in mine)
    }
    loader = DataLoader(
        _Samples(dataset) if whole_samples else _Images(dataset),
        batch_sampler=list(chain.from_iterable(batches.values())),
        collate_fn=_readable,
        num_workers=num_workers,
    )
    arriving = iter(loader)
    for done, block in enumerate(mine):
        progress(done, len(mine))
        rows = cache.rows(block)
        items: list[Item] = [None] * len(rows)
        for _ in batches[block]:
            indices, read = next(arriving)
            if indices:
                with torch.no_grad():
                    encoded = encode(read if whole_samples else _together(read))
                for index, item in zip(indices, _items(encoded, len(indices), rows), strict=True):
                    items[index - rows.start] = item
        cache.write(block, items)
    progress(len(mine), len(mine))
    return cache


def _together(pixels: list[Tensor]) -> Tensor | list[Tensor]:
    return torch.stack(pixels) if len({image.shape for image in pixels}) == 1 else pixels


def _items(encoded: Encoded, count: int, rows: range) -> list[Item]:
    """What `encode` gave, sample by sample, on the CPU."""
    named = encoded if isinstance(encoded, Mapping) else {"": encoded.float()}
    columns: dict[str, list[Tensor]] = {}
    for name, values in named.items():
        if len(values) != count:
            raise ValueError(f"encode: expected {count} rows of {name or 'features'!r}, got {len(values)}")
        columns[name] = list(values.cpu() if isinstance(values, Tensor) else (value.cpu() for value in values))
        if not all(value.isfinite().all() for value in columns[name]):
            raise ValueError(f"encode: expected finite features, got NaN or infinity among pairs {rows}")
    if not isinstance(encoded, Mapping):
        return list(columns[""])
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class _Images(Dataset[tuple[int, Tensor | None]]):
    def __init__(self, dataset: ImageTextDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        return index, self.dataset.image(index, _NoRandomness())  # type: ignore[arg-type]


class _Samples(Dataset[tuple[int, Sample | None]]):
    def __init__(self, dataset: ImageTextDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Sample | None]:
        return index, self.dataset[index]


class _NoRandomness:
    """Stands for a generator where none may be used."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError(f"dataset: expected a transform that is not random, such as eval_transform; it draws {name}")


def _readable(items: list[tuple[int, Any]]) -> tuple[list[int], list[Any]]:
    kept = [(index, read) for index, read in items if read is not None]
    return [index for index, _ in kept], [read for _, read in kept]


def _take_rows(identity: dict[str, str]) -> int | None:
    """Takes the samples of a file out of an identity; None where it states none."""
    rows = str(identity.pop("rows per file", ""))
    return int(rows) if rows.isdecimal() and int(rows) else None


def _identity(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete {path.parent} to have it made again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (no JSON object); delete {path.parent} to have it made again")
    return found


def _replace(file: IO[Any], path: Path) -> None:
    """Give an open, completely written file its final name, durably."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)
