"""The map-style dataset over every source of samples."""

import functools
import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vlmfast.data.files import FolderPairs, TablePairs
from vlmfast.data.images import TooManyPixelsError, decode_pixels
from vlmfast.data.lines import TextLines
from vlmfast.data.records import Files, Pairs, Text, has_field, is_stream
from vlmfast.data.shards import ShardPairs
from vlmfast.data.transforms import Transform

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Position = int | tuple[int, int]

SKIPPED = (
    "corrupt image",
    "empty caption",
    "missing caption",
    "unreadable image",
    "corrupt record",
    "images unlike places",
    "image of too many pixels",
)
IMAGE_PLACE = "<image>"  # where an image stands in the text of an interleaved document
SAMPLED = 1000  # samples whose bytes a fingerprint reads
DRAWS = 1000  # tries to complete a batch


@dataclass(frozen=True, slots=True)
class Sample:
    r"""One sample: an image, what is written about it, or features that were computed before.

    Attributes:
        image: what the transform makes of it, uint8 (H, W, 3) or, of `two_views`, (2, H, W, 3); or its row of the
            dataset's `features`, where these are single tensors; the first of `images`; None where no image is read.
        caption: not padded with white space; empty where there is none and none is required.
        key: its name in the source; \xff stands for a byte that is not UTF-8.
        seed: of what is random about the sample once it is in a batch, such as which tokens are masked; a function of
            the dataset's seed, epoch and index.
        record: the JSON object beside the image, or a table's other columns; empty where there is none.
        features: its row of the dataset's `features`, where these are dicts of tensors.
        images: all images of an interleaved document, in the order of their numbers; empty for other samples.
        prompt: what the caption begins with where a task gives that much, such as a question; a model that has what is
            given in its encoder learns to predict the rest alone. Empty where nothing is given.
    """

    image: Tensor | None
    caption: str
    key: str
    category: str | None
    seed: int = 0
    record: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Tensor] | None = None
    images: list[Tensor] = field(default_factory=list)
    prompt: str = ""


@dataclass(frozen=True)
class Recipe:
    """What is made of a source's sample; the arguments of `ImageTextDataset`."""

    transform: Transform | None
    keywords: float = 0.0
    requires: tuple[str, ...] = ()

    def sample(
        self,
        pairs: Files,
        index: int,
        generator: np.random.Generator,
        draw_caption: bool,
        found: Tensor | dict[str, Tensor] | None = None,
    ) -> Sample | str:
        """The sample, or the reason why it cannot be used.

        Args:
            draw_caption: one of several, where the first is taken otherwise.
            found: its row of a dataset's `features`.
        """
        text = pairs.text(index)
        if reason := self.lacks(text):
            return reason
        record = text.record or {}
        image, images, features = None, [], None
        if isinstance(found, Tensor):
            image = found
        else:
            features = found
            if self.transform is not None:
                decoded = self._images(pairs, index, generator, record)
                if isinstance(decoded, str):
                    return decoded
                image, images = decoded[0], decoded if pairs.numbered(index) else []
        caption, keywords = text.caption or "", text.keywords
        if draw_caption and len(text.captions) > 1:
            caption = text.captions[generator.integers(len(text.captions))]
        if keywords and generator.random() < self.keywords:
            chosen = generator.permutation(len(keywords))[: generator.integers(1, len(keywords), endpoint=True)]
            caption = " ".join(keywords[k] for k in chosen)
        seed = int(generator.integers(2**63))
        return Sample(image, caption, _key(pairs, index), text.category, seed, record, features, images)

    def lacks(self, text: Text) -> str | None:
        """The reason why a sample with this text is of no use."""
        if "caption" in self.requires and not text.caption:
            return "missing caption" if text.caption is None else "empty caption"
        if "caption" not in self.requires and text.record is None:
            return "corrupt record"
        for name in self.requires:
            if name != "caption" and not (text.category if name == "category" else has_field(text.record or {}, name)):
                return f"missing {name}"
        return None

    def image(self, pairs: Files, index: int, number: int, generator: np.random.Generator) -> Tensor | str:
        """A transformed image, or the reason why there is none."""
        if self.transform is None:
            raise ValueError("transform: expected one that makes a tensor of an image, got None")
        data = pairs.image(index, number)
        if data is None:
            return "unreadable image"
        try:
            image = decode_pixels(data, min_side=self._min_side(generator))
        except TooManyPixelsError:
            return "image of too many pixels"
        except ValueError:
            return "corrupt image"
        if not isinstance(image, Image.Image) and not getattr(self.transform, "takes_arrays", False):
            image = Image.fromarray(image)
        return self.transform(image, generator)  # type: ignore[arg-type]  # as takes_arrays says

    def _min_side(self, generator: np.random.Generator) -> int | Callable[[int, int], int] | None:
        """What the transform says of the size at which an image may be decoded."""
        if (min_side_of := getattr(self.transform, "min_side_of", None)) is not None:
            return functools.partial(min_side_of, generator=generator)
        return getattr(self.transform, "min_side", None)

    def _images(
        self, pairs: Files, index: int, generator: np.random.Generator, record: dict[str, Any]
    ) -> list[Tensor] | str:
        """The transformed images, or the reason why there are none."""
        count = pairs.numbered(index)
        text = record.get("text")
        if count and isinstance(text, str) and text.count(IMAGE_PLACE) != count:
            return "images unlike places"
        images: list[Tensor] = []
        for number in range(count or 1):
            image = self.image(pairs, index, number, generator)
            if isinstance(image, str):
                return image
            images.append(image)
        return images


def check_options(seed: int, keywords: float, requires: Sequence[str]) -> None:
    """What `ImageTextDataset` and a stream say of them where they are out of range or of a wrong type."""
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    if not 0 <= keywords <= 1:
        raise ValueError(f"keywords: expected a probability, got {keywords}")
    if not isinstance(requires, list | tuple) or not all(isinstance(name, str) for name in requires):
        raise TypeError(f"requires: expected a list or tuple of names of fields, got {requires!r}")


def _key(pairs: Files, index: int) -> str:
    """The key as text that can be written: file names need not be UTF-8."""
    return pairs.key(index).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class ImageTextDataset(Dataset[Sample | None]):
    """Images with text on local files, indexed once and read at random.

    `dataset[index]`, or `dataset[epoch, index]` as `EpochSampler` yields it, is a `Sample`, or None where the sample
    cannot be used; `skipped()` counts those. Augmentation depends on (seed, epoch, index) only, so neither the number
    of workers nor a resumed run changes it. Of a record's "captions", `dataset[epoch, index]` draws one, and
    `dataset[index]` has the first.

    Where `features` is assigned, such as a `FeatureCache`, `features[index]` belongs to the sample. A single tensor
    stands for the image, which is not read. A dict becomes `Sample.features`, beside the image; with `transform = None`
    the image is not read.

    Args:
        source: tar shards in webdataset's layout, as a path, a glob, a comma-separated list of those, or a sequence
            of those; or one .csv or .tsv file with columns path and caption; or one folder of images, each beside a
            .txt or .json of the same stem; or one .txt file of texts without images, one a line, for transform=None.
            docs/data.md describes the layouts and the fields of a record.
        transform: see `Transform`; called with an upright RGB image. None reads no image.
        keywords: probability that some of a sample's keywords, drawn in random order and number, stand for its caption.
        seed: of the augmentation, at least 0.
        requires: fields of the record without which a sample is of no use and skipped; "caption" also means a .txt.
        min_batch: usable samples that a batch of a DataLoader over (epoch, index) has at least. Samples that are drawn
            as a function of seed and batch make up for those that are skipped; `stand_ins()` counts them.
    Raises:
        FileNotFoundError: nothing is there, or a table names an image that is not.
        PermissionError: a file may not be read.
        ValueError: the source holds no samples, or is none of the above, or keywords, seed or min_batch is out of
            range.
        TypeError: source is neither a path nor a sequence of paths, or requires no list or tuple of names.
    """

    def __init__(
        self,
        source: Source,
        *,
        transform: Transform | None,
        keywords: float = 0.0,
        seed: int = 0,
        requires: Sequence[str] = ("caption",),
        min_batch: int = 0,
    ) -> None:
        check_options(seed, keywords, requires)
        if min_batch < 0:
            raise ValueError(f"min_batch: expected at least 0, got {min_batch}")
        self.source = source
        self.transform = transform
        self.keywords = keywords
        self.seed = seed
        self.requires = tuple(requires)
        self.min_batch = min_batch
        self.features: Sequence[Tensor | dict[str, Tensor] | None] | None = None
        self._pairs = _open_source(source, self.requires)
        self._reasons = (*SKIPPED, *(f"missing {name}" for name in self.requires if name != "caption"))
        # One byte per sample, 0 or 1 + position in _reasons; shared memory, as worker processes write it.
        self._status = torch.zeros(len(self._pairs), dtype=torch.uint8).share_memory_()
        self._stood_in = torch.zeros(len(self._pairs), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, position: Position) -> Sample | None:
        epoch, index = position if isinstance(position, tuple) else (0, position)
        self._check_index(index)
        found = self._sample(index, np.random.default_rng((self.seed, epoch, index)), isinstance(position, tuple))
        if isinstance(found, str):
            self._status[index] = 1 + self._reasons.index(found)
            return None
        return found

    def __getitems__(self, positions: Sequence[Position]) -> list[Sample | None]:
        """A batch for a DataLoader; see `min_batch`."""
        samples = [self[position] for position in positions]
        missing = self.min_batch - sum(sample is not None for sample in samples)
        if missing <= 0 or not isinstance(positions[0], tuple):
            return samples
        epoch, tried = positions[0][0], {index for _, index in positions}  # type: ignore[misc]
        generator = np.random.default_rng((self.seed, epoch, *sorted(tried)))
        for index in generator.integers(len(self), size=DRAWS).tolist():
            if missing == 0:
                break
            if index not in tried:
                tried.add(index)
                if (sample := self[epoch, index]) is not None:
                    samples.append(sample)
                    self._stood_in[index] = True
                    missing -= 1
        if all(sample is None for sample in samples):
            raise ValueError(
                f"source: neither the {len(positions)} samples of a batch nor {len(tried) - len(positions)} others can "
                f"be used; skipped so far: {dict(self.skipped())}"
            )
        return samples

    def image(self, index: int, generator: np.random.Generator) -> Tensor | None:
        """The transformed (first) image whatever its caption, or None where it cannot be read or decoded."""
        self._check_index(index)
        image = Recipe(self.transform).image(self._pairs, index, 0, generator)
        return None if isinstance(image, str) else image

    def record(self, index: int) -> dict[str, Any]:
        """The sample's record without reading the image; empty where there is none or it cannot be read."""
        self._check_index(index)
        return self._pairs.text(index).record or {}

    def metadata(self, index: int) -> tuple[str, str | None, str | None]:
        """(key, caption, category) without reading the image; the caption is None where it is missing or empty."""
        self._check_index(index)
        text = self._pairs.text(index)
        return _key(self._pairs, index), text.caption or None, text.category

    def fingerprint(self) -> str:
        """A hash of what decides the course of a run, to be compared when it is resumed.

        It covers the names and sizes of all files, all keys and captions of a table, the sizes of all images, and the
        bytes of SAMPLED samples or all, one of every shard among them. Folders above the files do not matter. What
        changes no size or name, in a sample that is not among these, goes unnoticed.

        Cost: about SAMPLED reads, plus one a shard beyond SAMPLED of them; for a table or a folder, one `stat` an
        image besides.
        """
        digest = hashlib.sha256()
        for part in self._pairs.identity():
            digest.update(part)
        chosen = {*self._pairs.landmarks(), *range(0, len(self), max(1, -(-len(self) // SAMPLED)))}
        for index in sorted(chosen):
            text = self._pairs.text(index)
            digest.update(repr((index, text.caption, text.record)).encode("utf-8", "surrogatepass"))
            digest.update(self._pairs.image(index) or b"")
        return digest.hexdigest()

    def image_fingerprint(self) -> str:
        """A hash, in order, of every sample's key and size of image file, and of the bytes of 1000 images or all."""
        digest = hashlib.sha256()
        every = max(1, len(self) // 1000)
        for index in range(len(self)):
            pair = f"{self._pairs.key(index)}\0{self._pairs.image_size(index)}\0"
            digest.update(pair.encode("utf-8", "surrogateescape"))
            if index % every == 0:
                digest.update(self._pairs.image(index) or b"")
        return digest.hexdigest()

    def skipped(self) -> Counter[str]:
        """Counts by reason of what could not be used so far, reasons that did not occur left out.

        "truncated shard", "missing image" (text that no image goes with), "duplicate key" and "link to a folder above"
        were counted when the source was indexed. The others count samples asked for, by this process and its data
        loader workers, each once however often; "missing NAME" is of a field that is required.
        """
        counts = Counter(self._pairs.faults)
        for code, reason in enumerate(self._reasons, start=1):
            counts[reason] += int((self._status == code).sum())
        return +counts

    def stand_ins(self) -> int:
        """How many different samples completed a batch so far; see `min_batch`."""
        return int(self._stood_in.sum())

    def _sample(self, index: int, generator: np.random.Generator, draw_caption: bool) -> Sample | str:
        """The sample, or the reason why it cannot be used."""
        recipe = Recipe(self.transform, self.keywords, self.requires)
        if self.features is None:
            return recipe.sample(self._pairs, index, generator, draw_caption)
        found = self.features[index]
        if found is None:
            return recipe.lacks(self._pairs.text(index)) or "corrupt image"
        return recipe.sample(self._pairs, index, generator, draw_caption, found)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")


def _open_source(source: Source, requires: Sequence[str]) -> Pairs:
    if is_stream(source):
        raise ValueError(
            f"source: {source!r} is a stream, and samples are read by index here; expected files on a local disk"
        )
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if os.path.isdir(path):
            return FolderPairs(path)
        if path.lower().endswith((".csv", ".tsv")):
            return TablePairs(path, caption="caption" in requires)
        if path.lower().endswith(".txt"):
            return TextLines(path)
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
