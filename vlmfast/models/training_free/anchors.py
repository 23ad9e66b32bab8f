"""Anchor pairs on disk or in memory, and what of them is nearest to a query, without a score for each of them at once.

A folder of anchors has one `FeatureCache` for each time that pairs were added, `000`, `001`, ..., beside it the source
of its samples, `000.source.json`, and `removed.json`. An item has `image` (D,) and `text` (D',), unit-norm float32, and
the UTF-8 bytes of `key` and `caption`. The number of an anchor is that of its sample, counted on from one cache to the
next, so that it stays when others come or go.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from vlmfast.data import FeatureCache, ImageTextDataset, cache_features

Side = Literal["image", "text"]

REMOVED = "removed.json"
SOURCE = "source.json"
CHUNK = 4096  # anchors scored at a time; blocks on disk are as long
QUERIES = 1024  # queries that share one reading of the anchors
TEXTS = 64  # columns of a table of weights at a time
NORM = 1e-3  # what the norm of a feature may differ from 1


@dataclass(frozen=True)
class Piece:
    """Some anchors as they lie in a file or in memory.

    Attributes:
        image (n, D), text (n, D'): float32.
        numbers (n,): int64, rising.
    """

    image: np.ndarray
    text: np.ndarray
    numbers: np.ndarray


class Anchors:
    """N pairs of features of two encoders whose widths may differ.

    Args:
        pieces: in order of their numbers.
        total: all numbers are below it.
        removed: numbers that do not count.
        caches: where the anchors lie on disk, each with the number of its first; empty where they lie in memory.
        folder: of the caches.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        total: int,
        removed: Iterable[int] = (),
        caches: Sequence[tuple[int, FeatureCache]] = (),
        folder: Path | None = None,
    ) -> None:
        self.pieces, self.total, self.caches, self.folder = list(pieces), total, list(caches), folder
        self._readable = np.zeros(total, dtype=np.bool_)
        for piece in self.pieces:
            self._readable[piece.numbers] = True
        self._present = self._readable.copy()
        self._mark(removed, False)

    @classmethod
    def of(cls, image: Tensor, text: Tensor) -> Self:
        """Anchors in memory.

        Args:
            image (N, D), text (N, D'): of any norm; row i of both is one pair.
        Raises:
            ValueError: the numbers of rows differ, or a feature is zero or not finite.
        """
        if image.ndim != 2 or text.ndim != 2 or len(image) != len(text):
            shapes = f"{tuple(image.shape)} and {tuple(text.shape)}"
            raise ValueError(f"anchors: expected images (N, D) and as many texts (N, D'), got shapes {shapes}")
        sides = [F.normalize(side.detach().float().cpu(), dim=1) for side in (image, text)]
        _check_unit(*sides)
        whole = [side.numpy() for side in sides]
        numbers = np.arange(len(image))
        places = [slice(start, start + CHUNK) for start in range(0, len(image), CHUNK)]
        return cls([Piece(whole[0][at], whole[1][at], numbers[at]) for at in places], len(image))

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """The anchors in a folder, mapped into memory.

        Raises:
            ValueError: there are none, or those that were begun are not complete.
        """
        folder = Path(folder)
        pieces, caches, first = [], [], 0
        for path in cache_folders(folder):
            cache = FeatureCache.reopen(path)
            caches.append((first, cache))
            for number in range(-(-len(cache) // cache.block_rows)):
                block = cache.block(number)
                try:
                    (image, rows), (text, _) = block.column("image"), block.column("text")
                except KeyError:
                    continue  # no sample of the block could be read
                pieces.append(Piece(image, text, first + number * cache.block_rows + rows))
            first += len(cache)
        if not caches:
            raise ValueError(f"{folder} holds no anchors; 'vlmfast anchors' makes them")
        path = folder / REMOVED
        return cls(pieces, first, json.loads(path.read_text()) if path.exists() else (), caches, folder)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes anchors that lie in memory into a folder, those that were removed left out."""
        image = np.concatenate([piece.image[self._present[piece.numbers]] for piece in self.pieces])
        text = np.concatenate([piece.text[self._present[piece.numbers]] for piece in self.pieces])
        cache = FeatureCache(Path(folder) / "000", {"model": "given"}, len(image))
        for block in range(-(-len(cache) // cache.block_rows)):
            pairs = [(torch.from_numpy(image[row]), torch.from_numpy(text[row])) for row in cache.rows(block)]
            cache.write(block, [{"image": one, "text": other} for one, other in pairs])

    def __len__(self) -> int:
        return int(self._present.sum())

    def width(self, side: Side) -> int:
        """D of images, D' of texts."""
        return int(getattr(self.pieces[0], side).shape[1])

    def remove(self, numbers: Iterable[int]) -> None:
        """Anchors of these numbers do not count from now on; `write_removed` keeps that.

        Raises:
            IndexError: there is no such anchor.
        """
        self._mark(numbers, False)

    def restore(self, numbers: Iterable[int]) -> None:
        """Undoes `remove`."""
        self._mark(numbers, True)

    def _mark(self, numbers: Iterable[int], present: bool) -> None:
        chosen = np.array(list(numbers), dtype=np.int64)
        outside = chosen[(chosen < 0) | (chosen >= self.total)]
        if len(outside):
            raise IndexError(f"anchors: expected numbers from 0 to {self.total - 1}, got {outside[0]}")
        self._present[chosen] = present & self._readable[chosen]

    def write_removed(self) -> None:
        """Keeps in the folder which anchors were removed."""
        assert self.folder is not None
        removed = np.flatnonzero(self._readable & ~self._present).tolist()
        path = self.folder / REMOVED
        path.with_suffix(".part").write_text(json.dumps(removed))
        os.replace(path.with_suffix(".part"), path)

    def of_keys(self, keys: Iterable[str]) -> list[int]:
        """Numbers of the anchors whose samples have these keys.

        Raises:
            ValueError: a key is none of theirs.
        """
        wanted = set(keys)
        found: dict[str, list[int]] = {}
        for number in np.flatnonzero(self._readable).tolist():
            key = self.sample(number)[0]
            if key in wanted:
                found.setdefault(key, []).append(number)
        if missing := sorted(wanted - found.keys()):
            raise ValueError(f"keys: expected keys of anchors, got {missing[:5]}, which none has")
        return sorted(number for numbers in found.values() for number in numbers)

    def sample(self, number: int) -> tuple[str, str]:
        """Key and caption of an anchor; empty where it came without."""
        for first, cache in reversed(self.caches):
            if number >= first:
                item = cache[number - first]
                return tuple(bytes(item[name].tolist()).decode() if name in item else "" for name in ("key", "caption"))  # type: ignore[return-value]
        return "", ""

    def source(self, number: int) -> tuple[str, int] | None:
        """Where an anchor's sample is from, as of `ImageTextDataset`, and its index there; None where no one knows."""
        for first, cache in reversed(self.caches):
            path = cache.folder.parent / f"{cache.folder.name}.{SOURCE}"
            if number >= first and path.exists():
                return str(json.loads(path.read_text())), number - first
        return None

    def nearest(self, side: Side, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k anchors nearest to each query, or all where there are fewer; the lower number first among equals.

        Exactly what sorting all scores gives, for any number of anchors in memory of O(QUERIES * (CHUNK + k)). Scores
        are summed in float64 and rounded once, so that equal anchors tie wherever they lie.

        Args:
            side: of the anchors, and of the queries.
            queries (B, D): unit-norm; on the device on which to compute.
            k: at least 1.
        Returns:
            scores (B, k): float32, best first.  numbers (B, k): int64.
        Raises:
            ValueError: there are no anchors, or D is not theirs.
        """
        count = len(self)
        if not count:
            raise ValueError("anchors: expected at least one, got none")
        if queries.ndim != 2 or queries.shape[1] != self.width(side):
            raise ValueError(
                f"queries: expected (B, {self.width(side)}) as {side} anchors are, got {tuple(queries.shape)}"
            )
        if not queries.isfinite().all():
            raise ValueError("queries: expected finite features, got NaN or infinity")
        parts = [self._nearest(side, part.double(), min(k, count)) for part in queries.split(QUERIES)]
        if not parts:
            return queries.new_zeros(0, min(k, count)), torch.zeros(0, min(k, count), dtype=torch.int64)
        return torch.cat([scores for scores, _ in parts]), torch.cat([numbers for _, numbers in parts])

    def _nearest(self, side: Side, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = RunningTopK(len(queries), k, queries.device)
        for piece in self.pieces:
            there = self._present[piece.numbers]
            if not there.any():
                continue
            rows, numbers = getattr(piece, side), piece.numbers
            if not there.all():
                rows, numbers = rows[there], numbers[there]
            anchors = torch.from_numpy(rows.astype(np.float64)).to(queries.device)
            best.add((queries @ anchors.T).float(), torch.from_numpy(numbers).to(queries.device))
        return best.result()


class RunningTopK:
    """The k largest of scores that arrive chunk by chunk, the earlier one first among equals.

    Only what exceeds a row's k-th best so far is kept, as a list of candidates of every row; k of them are merged by
    one stable sort. Of N scores in random order about k ln(N / k) exceed it, so nearly all cost one comparison each.

    Args:
        rows: B.
        k: scores kept of each row.
    """

    def __init__(self, rows: int, k: int, device: torch.device | str = "cpu") -> None:
        self.k = k
        self.scores = torch.full((rows, k), -torch.inf, device=device)
        self.numbers = torch.full((rows, k), -1, dtype=torch.int64, device=device)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, scores: Tensor, numbers: Tensor) -> None:
        """A chunk.

        Args:
            scores (B, C): float32, finite.
            numbers (C,): int64, of the columns.
        """
        kept = scores > self.scores[:, -1:]
        counts = kept.sum(dim=1)
        width = int(counts.max())
        if not width:
            return
        row, column = kept.nonzero(as_tuple=True)  # by row, then column
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        waiting = scores.new_full((len(scores), width), -torch.inf)
        theirs = numbers.new_full((len(scores), width), -1)
        waiting[row, place], theirs[row, place] = scores[row, column], numbers[column]
        self._waiting.append((waiting, theirs))
        if sum(one.shape[1] for one, _ in self._waiting) >= self.k:
            self._merge()

    def result(self) -> tuple[Tensor, Tensor]:
        """scores (B, k), best first, and numbers (B, k); -inf and -1 where there were fewer than k."""
        if self._waiting:
            self._merge()
        return self.scores, self.numbers

    def _merge(self) -> None:
        scores = torch.cat([self.scores, *(one for one, _ in self._waiting)], dim=1)
        numbers = torch.cat([self.numbers, *(other for _, other in self._waiting)], dim=1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        self.scores, self.numbers = scores[:, : self.k].contiguous(), numbers.gather(1, order[:, : self.k])
        self._waiting = []


def relative(scores: Tensor, p: float) -> Tensor:
    """The nonzero part of a relative representation: scores (B, k) of the nearest anchors, clamped, to the power p,
    and divided by their norm; float64, and zeros where no score is positive."""
    kept = scores.double().clamp(min=0)
    # A row's largest is 1 before the power, as a small cosine to a high power leaves float64.
    largest = kept.amax(dim=1, keepdim=True)
    return F.normalize((kept / largest.where(largest > 0, 1)) ** p, dim=1)


def sparse_products(image: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor], total: int) -> Tensor:
    """Products (B, C) float32 of sparse rows.

    Args:
        image: weights (B, k) float64 and their columns (B, k).
        text: (C, k') likewise.
        total: number of columns.
    """
    weights, columns = image
    found = [weights.new_zeros(len(weights), 0)]
    for start in range(0, len(text[0]), TEXTS):
        theirs, used_by = text[0][start : start + TEXTS], text[1][start : start + TEXTS]
        used, inverse = used_by.unique(return_inverse=True)
        # A row of weights for each column in use, and one of zeros for all others.
        table = weights.new_zeros(len(used) + 1, len(theirs))
        table[inverse, torch.arange(len(theirs), device=table.device)[:, None]] = theirs
        place = torch.full((total,), len(used), dtype=torch.int64, device=table.device)
        place[used] = torch.arange(len(used), device=table.device)
        parts = [
            F.embedding_bag(place[of], table, per_sample_weights=by, mode="sum")
            for of, by in zip(columns.split(CHUNK), weights.split(CHUNK), strict=True)
        ]
        found.append(torch.cat(parts) if parts else table.new_zeros(0, len(theirs)))
    return torch.cat(found, dim=1).float()


def cache_folders(folder: Path) -> list[Path]:
    """Of the caches in a folder of anchors, in order."""
    return sorted(path for path in folder.glob("[0-9][0-9][0-9]") if path.is_dir()) if folder.is_dir() else []


def add_anchors(
    folder: str | os.PathLike[str],
    dataset: ImageTextDataset,
    encode: Callable[[list[Any]], tuple[Tensor, Tensor]],
    fingerprint: str,
    *,
    source: str | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Anchors of all samples of a dataset, added to those in a folder; a run that was stopped is gone on with.

    Args:
        folder: of the anchors; made when missing.
        dataset: its transform must not be random.
        encode: samples to unit-norm features of their images (B, D) and texts (B, D').
        fingerprint: of `encode`; all anchors of a folder must have the same.
        source: of the dataset, to find the anchors' images again.
        batch_size, num_workers, progress: as of `vlmfast.data.cache_features`.
    Returns:
        The folder of the cache that they are in.
    Raises:
        ValueError: the folder holds anchors of other encoders, or features are not finite or of another norm.
    """
    folder = Path(folder)
    data, place = dataset.fingerprint(), None
    for path in cache_folders(folder):
        known = json.loads((path / "identity.json").read_text())
        if known.get("model") != fingerprint:
            raise ValueError(f"{folder} holds anchors of other encoders or sizes; name another folder")
        place = path if known.get("data") == data else place
    place = place or folder / f"{len(cache_folders(folder)):03}"
    if source is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{place.name}.{SOURCE}").write_text(json.dumps(source))

    def items(samples: list[Any]) -> dict[str, Any]:
        image, text = encode(samples)
        _check_unit(image, text)
        words = {
            name: [torch.tensor(list(getattr(sample, name).encode()), dtype=torch.uint8) for sample in samples]
            for name in ("key", "caption")
        }
        return {"image": image.float(), "text": text.float(), **words}

    cache_features(
        place,
        dataset,
        items,
        fingerprint,
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress,
        whole_samples=True,
    )
    return place


def _check_unit(*sides: Tensor) -> None:
    for side in sides:
        broken = ~((side.float().norm(dim=1) - 1).abs() < NORM)
        if broken.any():
            raise ValueError(f"anchors: expected unit-norm features, got {int(broken.sum())} that are not")
