"""Features of a locked tower, computed once for every pair and kept on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmfast.data.dataset import ImageTextDataset

IDENTITY = "identity.json"
BLOCK_ROWS = 4096


class FeatureCache(Sequence[Tensor | None]):
    """A folder of float32 features (N, D): item i is what belongs to pair i of a dataset, None where nothing does.

    Rows are in files of BLOCK_ROWS, each written under another name, synchronised and renamed: a block is there
    completely or not at all, and a run that was killed goes on with the next one. `identity.json` says what the
    features are of; a folder with another identity is refused, never reused or overwritten.

    Args:
        folder: made when missing.
        identity: named strings that decide the features: of the model, the data, the transform.
        num_pairs: N.
    Raises:
        ValueError: the folder holds features of another identity, or files that are no cache.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: dict[str, str], num_pairs: int) -> None:
        self.folder = Path(folder)
        self.num_pairs = num_pairs
        self.block_rows = BLOCK_ROWS
        self._open: dict[int, np.ndarray] = {}
        self._claim({**identity, "pairs": str(num_pairs), "rows per file": str(BLOCK_ROWS)})

    def __len__(self) -> int:
        return self.num_pairs

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.num_pairs:
            raise IndexError(f"index: expected 0 to {self.num_pairs - 1}, got {index}")
        block, row = divmod(index, self.block_rows)
        if block not in self._open:
            try:
                self._open[block] = np.load(self._path(block), mmap_mode="r")
            except FileNotFoundError as error:
                raise ValueError(f"{self.folder} lacks {error.filename}: the cache is not complete") from error
        features = torch.from_numpy(self._open[block][row].copy())
        return None if not features.numel() or features[0].isnan() else features

    def missing(self) -> list[int]:
        """Numbers of the blocks that are not there yet."""
        blocks = -(-self.num_pairs // self.block_rows)
        return [block for block in range(blocks) if not self._path(block).exists()]

    def rows(self, block: int) -> range:
        """Indices of the pairs of a block."""
        return range(block * self.block_rows, min((block + 1) * self.block_rows, self.num_pairs))

    def write(self, block: int, features: Tensor) -> None:
        """Put a block's features (rows, D) in place; a row of NaN, or of nothing, stands for None."""
        if features.dim() != 2 or len(features) != len(self.rows(block)):
            raise ValueError(f"features: expected {len(self.rows(block))} rows, got {tuple(features.shape)}")
        with open(self._path(block).with_suffix(".part"), "wb") as file:
            np.save(file, features.detach().float().cpu().numpy())
            _replace(file, self._path(block))

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
        before = json.loads(path.read_text(encoding="utf-8"))
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


def cache_features(
    folder: str | os.PathLike[str],
    dataset: ImageTextDataset,
    encode: Callable[[Tensor], Tensor],
    model: str,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FeatureCache:
    """The features of all images of a dataset, those not on disk yet computed and written.

    With several processes each computes its share of the blocks in one folder that all see; they must wait for one
    another before the cache is read.

    Args:
        folder: of the cache.
        dataset: its transform must not draw random numbers.
        encode: pixels uint8 (B, H, W, 3) to features (B, D); called without gradients.
        model: a fingerprint of what `encode` computes.
        batch_size: images per call.
        num_workers: processes that read and decode; 0 reads in this one.
        rank, world_size: this process and how many there are.
        progress: called with the numbers of blocks done and to do by this process.
    Raises:
        ValueError: the folder holds features of another model, dataset or transform, the transform is random, or a
            feature is not finite.
    """
    identity = {"model": model, "data": dataset.fingerprint(), "transform": repr(dataset.transform)}
    cache = FeatureCache(folder, identity, len(dataset))
    mine = [block for block in cache.missing() if block % world_size == rank]
    batches = {
        block: [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
        for block, rows in ((block, cache.rows(block)) for block in mine)
    }
    loader = DataLoader(
        _Images(dataset),
        batch_sampler=list(chain.from_iterable(batches.values())),
        collate_fn=_readable,
        num_workers=num_workers,
    )
    arriving = iter(loader)
    for done, block in enumerate(mine):
        progress(done, len(mine))
        rows, features = [], []
        for _ in batches[block]:
            indices, pixels = next(arriving)
            if indices:
                with torch.no_grad():
                    features.append(encode(torch.stack(pixels)).float().cpu())
                rows += [index - cache.rows(block).start for index in indices]
        found = torch.cat(features) if features else torch.empty(0, 0)
        if not found.isfinite().all():
            raise ValueError(f"encode: expected finite features, got NaN or infinity among pairs {cache.rows(block)}")
        whole = found.new_full((len(cache.rows(block)), found.shape[1]), torch.nan)
        whole[rows] = found
        cache.write(block, whole)
    progress(len(mine), len(mine))
    return cache


class _Images(Dataset[tuple[int, Tensor | None]]):
    def __init__(self, dataset: ImageTextDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        return index, self.dataset.image(index, _NoRandomness())  # type: ignore[arg-type]


class _NoRandomness:
    """Stands for a generator where none may be used."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError(f"dataset: expected a transform that is not random, such as eval_transform; it draws {name}")


def _readable(items: list[tuple[int, Tensor | None]]) -> tuple[list[int], list[Tensor]]:
    kept = [(index, pixels) for index, pixels in items if pixels is not None]
    return [index for index, _ in kept], [pixels for _, pixels in kept]


def _replace(file: IO[Any], path: Path) -> None:
    """Give an open, completely written file its final name, durably."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)
