"""The map-style dataset over every source of image-text pairs."""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlmfast.data.files import FolderPairs, TablePairs
from vlmfast.data.images import decode_image
from vlmfast.data.records import Pairs
from vlmfast.data.shards import ShardPairs
from vlmfast.data.transforms import Transform

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

SKIPPED = ("corrupt image", "empty caption", "missing caption")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image-text pair.

    Attributes:
        image: what the transform makes of it, uint8 (H, W, 3) or, of `two_views`, (2, H, W, 3); or its row of the
            dataset's `features`.
        caption: neither empty nor padded with white space.
        seed: of what is random about the pair once it is in a batch, such as which tokens are masked; a function of
            the dataset's seed, epoch and index.
    """

    image: Tensor
    caption: str
    key: str
    category: str | None
    seed: int = 0


class ImageTextDataset(Dataset[Sample | None]):
    """Image-text pairs on local files, indexed once and read at random.

    `dataset[index]`, or `dataset[epoch, index]` as `EpochSampler` yields it, is a `Sample`, or None where the pair
    cannot be used; `skipped()` counts those. Augmentation depends on (seed, epoch, index) only, so neither the number
    of workers nor a resumed run changes it.

    Where `features` is assigned, such as a `FeatureCache`, `features[index]` stands for the image, which is not read;
    captions and skipped pairs are the same.

    Args:
        source: tar shards in webdataset's layout, as a path, a glob, a comma-separated list of those, or a sequence
            of those; or one .csv or .tsv file with columns path and caption, and optionally category; or one folder
            of images, each beside a .txt or .json of the same stem. A JSON file holds "caption" and optionally
            "category" and "keywords", a list.
        transform: see `Transform`; called with an upright RGB image.
        keywords: probability that some of a pair's keywords, drawn in random order and number, stand for its caption.
        seed: of the augmentation, at least 0.
    Raises:
        FileNotFoundError: nothing is there, or a table names an image that is not.
        PermissionError: a file may not be read.
        ValueError: the source holds no pairs, or is none of the above, or keywords or seed is out of range.
        TypeError: source is neither a path nor a sequence of paths.
    """

    def __init__(self, source: Source, *, transform: Transform, keywords: float = 0.0, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        if not 0 <= keywords <= 1:
            raise ValueError(f"keywords: expected a probability, got {keywords}")
        self.transform = transform
        self.keywords = keywords
        self.seed = seed
        self.features: Sequence[Tensor | None] | None = None
        self._pairs = _open_source(source)
        # One byte per pair, 0 or 1 + position in SKIPPED; shared memory, as worker processes write it.
        self._status = torch.zeros(len(self._pairs), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, position: int | tuple[int, int]) -> Sample | None:
        epoch, index = position if isinstance(position, tuple) else (0, position)
        self._check_index(index)
        caption, category, keywords = self._pairs.text(index)
        if caption is None:
            self._skip(index, "missing caption")
            return None
        if not caption:
            self._skip(index, "empty caption")
            return None
        generator = np.random.default_rng((self.seed, epoch, index))
        image = self.image(index, generator) if self.features is None else self.features[index]
        if image is None:
            self._skip(index, "corrupt image")
            return None
        if keywords and generator.random() < self.keywords:
            chosen = generator.permutation(len(keywords))[: generator.integers(1, len(keywords), endpoint=True)]
            caption = " ".join(keywords[k] for k in chosen)
        return Sample(image, caption, self._pairs.key(index), category, int(generator.integers(2**63)))

    def image(self, index: int, generator: np.random.Generator) -> Tensor | None:
        """The transformed image whatever its caption, or None where it cannot be decoded."""
        self._check_index(index)
        data = self._pairs.image(index)
        try:
            image = decode_image(data, min_side=getattr(self.transform, "min_side", None))
        except ValueError:
            return None
        return self.transform(image, generator)

    def fingerprint(self) -> str:
        """A hash, in order, of every pair's key and size of image file, and of the bytes of 1000 images or all."""
        digest = hashlib.sha256()
        every = max(1, len(self) // 1000)
        for index in range(len(self)):
            pair = f"{self._pairs.key(index)}\0{self._pairs.image_size(index)}\0"
            digest.update(pair.encode("utf-8", "surrogateescape"))
            if index % every == 0:
                digest.update(self._pairs.image(index))
        return digest.hexdigest()

    def metadata(self, index: int) -> tuple[str, str | None, str | None]:
        """(key, caption, category) without decoding the image; the caption is None where it is missing or empty."""
        self._check_index(index)
        caption, category, _ = self._pairs.text(index)
        return self._pairs.key(index), caption or None, category

    def skipped(self) -> Counter[str]:
        """Counts by reason of what could not be used so far, reasons that did not occur left out.

        "corrupt image", "empty caption" and "missing caption" count samples asked for, by this process and its data
        loader workers, each once however often; "truncated shard" and "missing image" (a caption file that no image
        goes with) were counted when the source was indexed.
        """
        counts = Counter(self._pairs.faults)
        for code, reason in enumerate(SKIPPED, start=1):
            counts[reason] = int((self._status == code).sum())
        return +counts

    def _skip(self, index: int, reason: str) -> None:
        self._status[index] = 1 + SKIPPED.index(reason)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")


def _open_source(source: Source) -> Pairs:
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if os.path.isdir(path):
            return FolderPairs(path)
        if path.lower().endswith((".csv", ".tsv")):
            return TablePairs(path)
        parts = [path] if os.path.exists(path) else path.split(",")
    elif isinstance(source, Sequence) and all(isinstance(part, str | os.PathLike) for part in source):
        parts = [os.fspath(part) for part in source]
    else:
        raise TypeError(f"source: expected a path or a sequence of paths, got {source!r}")
    paths = [path for part in parts for path in _expand(part.strip())]
    pairs = ShardPairs(paths) if paths else None
    if not pairs:
        raise ValueError(
            f"source: {source!r} holds no image-text pairs; expected tar members key.webp, .jpg, .jpeg or .png, "
            "with key.txt or key.json beside them"
        )
    return pairs


def _expand(part: str) -> list[str]:
    paths = [part] if os.path.exists(part) else sorted(glob.glob(part, recursive=True))
    if not paths:
        raise FileNotFoundError(
            f"source: {part!r} is no file or folder and, as a glob, matches nothing; expected tar shards, a .csv or "
            ".tsv file, or a folder of images"
        )
    return paths
