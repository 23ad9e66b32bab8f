"""Samples in webdataset tar shards: indexed once by their headers, read by offset."""

import errno
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from io import FileIO
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from vlmfast.data.records import IMAGE_EXTENSIONS, PackedStrings, Text, open_source_file, parse_text, unreadable
from vlmfast.data.tar import Member, scan

# webdataset's convention: the key ends at the first dot of the base name; names of the form __x__ are metadata.
MEMBER_NAME = re.compile(r"^(?!__[^/]*__(?:$|/))((?:.*/|)[^.]+)[.]([^/]*)$")
MAX_OPEN_SHARDS = 64

PAIR = np.dtype(
    [
        ("shard", np.int32),
        ("image", np.int64, 2),  # offset and size; of a document, of its first image
        ("plain", np.int64, 2),  # of the .txt; size -1 where there is none
        ("structured", np.int64, 2),  # of the .json; size -1 where there is none
    ]
)
Part = tuple[int, int]  # offset, size
NOTHING: Part = (0, -1)
TEXT_EXTENSIONS = ("txt", "json")


class ShardPairs:
    """Samples `key.webp|jpg|jpeg|png` + `key.txt` or `key.json`, or both, in uncompressed tar files.

    A sample without an image of its own may have numbered ones, `key.0.jpg`, `key.1.jpg`, ... beside `key.json`: an
    interleaved document. The scan reads headers only. Of a truncated shard, the samples before the cut are used. Of
    several images or texts under one key the first is used, and the others are counted.

    Memory: 52 bytes and the key's length per sample, in numpy arrays and one buffer.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.faults: Counter[str] = Counter()
        self._files = _OpenFiles(paths)
        self._keys = PackedStrings()
        self._numbered: dict[int, list[Part]] = {}
        self._pairs = np.concatenate([np.array(self._index(n, path), dtype=PAIR) for n, path in enumerate(paths)])

    def _index(self, shard: int, path: str) -> list[tuple[Any, ...]]:
        """The fields of PAIR for each sample of one shard, whose keys it appends."""
        with open_source_file(path) as file:
            try:
                members, truncated = scan(path, file.fileno())
            except OSError as error:  # of a descriptor: it names no file
                raise unreadable(OSError(error.errno, error.strerror, path)) from error
        self.faults["truncated shard"] += truncated
        pairs: list[tuple[Any, ...]] = []
        seen: set[str] = set()
        matched = ((match, member) for member in members if (match := MEMBER_NAME.match(member.name)))
        last = next((match[1] for member in reversed(members) if (match := MEMBER_NAME.match(member.name))), None)
        for group, parts in groupby(matched, key=lambda part: part[0][1]):
            for sample in group_samples(group, [(match[2], member) for match, member in parts]):
                if truncated and group == last and not sample.complete:
                    continue  # the other half lies behind the cut
                self.faults["duplicate key"] += sample.repeated
                if not sample.images:
                    self.faults["missing image"] += sample.plain != NOTHING or sample.structured != NOTHING
                    continue
                if sample.key in seen:
                    self.faults["duplicate key"] += 1
                    continue
                seen.add(sample.key)
                if sample.numbered:
                    self._numbered[len(self._keys)] = sample.images
                else:
                    self.faults["second image"] += len(sample.images) - 1
                self._keys.append(sample.key)
                pairs.append((shard, sample.images[0], sample.plain, sample.structured))
        return pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def key(self, index: int) -> str:
        return self._keys[index]

    def text(self, index: int) -> Text:
        shard = int(self._pairs[index]["shard"])
        plain, structured = (self._pairs[index][part].tolist() for part in ("plain", "structured"))
        return parse_text(
            *(None if size < 0 else self._files.read(shard, at, size) for at, size in (plain, structured))
        )

    def numbered(self, index: int) -> int:
        return len(self._numbered.get(index, ()))

    def image(self, index: int, number: int = 0) -> bytes | None:
        numbered = self._numbered.get(index)
        offset, size = numbered[number] if numbered else self._pairs[index]["image"].tolist()
        return self._files.read(int(self._pairs[index]["shard"]), offset, size)

    def image_size(self, index: int) -> int:
        return int(self._pairs[index]["image"][1])

    def identity(self) -> Iterator[bytes]:
        above = os.path.commonpath([os.path.dirname(path) for path in self._files.paths])
        for path in self._files.paths:
            yield f"{os.path.relpath(path, above)}\0{os.path.getsize(path)}\0".encode("utf-8", "surrogateescape")
        yield from self._keys.buffers()
        yield self._pairs.tobytes()
        yield repr(self._numbered).encode()

    def landmarks(self) -> list[int]:
        first: list[int] = np.unique(self._pairs["shard"], return_index=True)[1].tolist()
        return first


class GroupedSample(NamedTuple):
    """Offsets and sizes of the parts of one sample.

    `repeated` says how often all of it is there once more; `numbered`, that the images are those of a document.
    """

    key: str
    images: list[Part]
    plain: Part
    structured: Part
    repeated: int
    numbered: bool = False

    @property
    def complete(self) -> bool:
        """Whether the sample has all that it needs, if no member follows; of a document nobody knows."""
        return bool(self.images) and not self.numbered and (self.plain != NOTHING or self.structured != NOTHING)


def group_samples(key: str, parts: list[tuple[str, Member]]) -> Iterator[GroupedSample]:
    """The samples among the members of one webdataset key, given by extensions, which may hold dots.

    Names with further dots (`22.05.png` beside `22.05.txt`) are samples of their own. Beside members without them,
    numbered images are those of an interleaved document, and others that are no pair are left to other programs.
    """
    stems: dict[str | None, list[tuple[str, Part]]] = {}
    for extension, member in parts:
        stem, dot, last = extension.rpartition(".")
        if last.lower() in (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS):
            stems.setdefault(stem if dot else None, []).append((last.lower(), (member.offset, member.size)))
    found = {stem: _sample(key if stem is None else f"{key}.{stem}", own) for stem, own in stems.items()}
    main = found.pop(None, None)
    if main is None:
        yield from found.values()
        return
    if not main.images and main.structured != NOTHING:
        numbered = sorted(
            (int(stem), sample.images[0])
            for stem, sample in found.items()
            if stem and stem.isascii() and stem.isdecimal() and not _has_text(sample) and sample.images
        )
        if numbered:
            main = main._replace(images=[image for _, image in numbered], numbered=True)
    yield main
    yield from (sample for sample in found.values() if sample.images and _has_text(sample))


def _sample(key: str, parts: list[tuple[str, Part]]) -> GroupedSample:
    """A sample of the parts with one name, by their extensions; of a name that is repeated the first counts."""
    first: dict[str, Part] = {}
    for extension, part in parts:
        first.setdefault(extension, part)
    repeated = max(Counter(extension for extension, _ in parts).values()) - 1
    images = [part for extension, part in first.items() if extension in IMAGE_EXTENSIONS]
    return GroupedSample(key, images, first.get("txt", NOTHING), first.get("json", NOTHING), repeated)


def _has_text(sample: GroupedSample) -> bool:
    return sample.plain != NOTHING or sample.structured != NOTHING


class _OpenFiles:
    """Files opened on first use; the least recently used is closed when there are too many.

    Reads carry their own offset, so a handle that a forked worker inherits shares no position with its parent; a
    pickled copy opens its own.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = [os.path.abspath(path) for path in paths]
        self._open: OrderedDict[int, FileIO] = OrderedDict()

    def read(self, number: int, offset: int, size: int) -> bytes | None:
        """The bytes, None where the disk does not give them."""
        if number not in self._open:
            if len(self._open) == MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[number] = FileIO(self.paths[number])
        self._open.move_to_end(number)
        try:
            data = os.pread(self._open[number].fileno(), size, offset)
        except OSError as error:
            if error.errno == errno.EIO:
                return None
            raise
        if len(data) != size:
            raise OSError(f"{self.paths[number]} became shorter after it was indexed")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_open": OrderedDict()}

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()
