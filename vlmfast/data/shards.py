"""Pairs in webdataset tar shards: indexed once by their headers, read by offset."""

import os
import re
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Sequence
from io import FileIO
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from vlmfast.data.records import IMAGE_EXTENSIONS, PackedStrings, Text, open_source_file, parse_text

# webdataset's convention: the key ends at the first dot of the base name; names of the form __x__ are metadata.
MEMBER_NAME = re.compile(r"^(?!__[^/]*__(?:$|/))((?:.*/|)[^.]+)[.]([^/]*)$")
MAX_OPEN_SHARDS = 64

PAIR = np.dtype(
    [
        ("shard", np.int32),
        ("image_offset", np.int64),
        ("image_size", np.int64),
        ("text_offset", np.int64),
        ("text_size", np.int64),  # -1: no caption file
        ("text_is_json", np.bool_),
    ]
)


class ShardPairs:
    """Pairs `key.webp|jpg|jpeg|png` + `key.txt` (or else `key.json` with "caption") in uncompressed tar files.

    The scan reads headers only. Of a truncated shard, the pairs before the cut are used. Of several images under one
    key the first is used, as is a .txt before a .json.

    Memory: 45 bytes and the key's length per pair, in numpy arrays and one buffer.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.faults: Counter[str] = Counter()
        self._files = _OpenFiles(paths)
        self._keys = PackedStrings()
        self._pairs = np.concatenate([np.array(self._index(n, path), dtype=PAIR) for n, path in enumerate(paths)])

    def _index(self, shard: int, path: str) -> list[tuple[Any, ...]]:
        """The fields of PAIR for each pair of one shard, whose keys it appends."""
        members, truncated = _scan(path)
        self.faults["truncated shard"] += truncated
        pairs: list[tuple[Any, ...]] = []
        for key, group in groupby(members, key=itemgetter(0)):
            parts: dict[str, tuple[int, int]] = {}
            for _, extension, offset, size in group:
                parts.setdefault(extension, (offset, size))
            image = next((parts[extension] for extension in parts if extension in IMAGE_EXTENSIONS), None)
            text = parts.get("txt") or parts.get("json")
            if truncated and key == members[-1][0] and not (image and text):
                continue  # the other half lies behind the cut
            if image is None:
                self.faults["missing image"] += text is not None
                continue
            self._keys.append(key)
            pairs.append((shard, *image, *(text or (0, -1)), "txt" not in parts))
        return pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def key(self, index: int) -> str:
        return self._keys[index]

    def image(self, index: int) -> bytes:
        shard, offset, size, _, _, _ = self._pairs[index].item()
        return self._files.read(shard, offset, size)

    def image_size(self, index: int) -> int:
        return int(self._pairs[index]["image_size"])

    def text(self, index: int) -> Text:
        shard, _, _, offset, size, is_json = self._pairs[index].item()
        return Text(None) if size < 0 else parse_text(self._files.read(shard, offset, size), is_json)


def _scan(path: str) -> tuple[list[tuple[str, str, int, int]], bool]:
    """Members (key, lower-case extension, offset, size) that are complete, and whether the archive is cut short."""
    members: list[tuple[str, str, int, int]] = []
    with open_source_file(path) as file:
        length = os.fstat(file.fileno()).st_size
        header = file.read(tarfile.BLOCKSIZE)
        if header.startswith(b"\x1f\x8b"):
            raise ValueError(f"source: {path} is gzip-compressed; expected a plain .tar, which can be read by offset")
        if len(header) < tarfile.BLOCKSIZE:
            return [], True
        file.seek(0)
        try:
            tar = tarfile.TarFile(fileobj=file)
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # TarFile keeps every header it has seen
                if member.offset_data + member.size > length:
                    return members, True
                if member.isreg() and (match := MEMBER_NAME.match(member.name)):
                    members.append((match[1], match[2].lower(), member.offset_data, member.size))
        except tarfile.ReadError as error:
            if not members and header[257:262] != b"ustar":
                raise ValueError(f"source: {path} is no tar archive ({error}); expected webdataset shards") from error
            return members, True
        file.seek(tar.offset)
        return members, file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE)  # an archive ends with zero blocks


class _OpenFiles:
    """Files opened on first use; the least recently used is closed when there are too many.

    Reads carry their own offset, so a handle that a forked worker inherits shares no position with its parent; a
    pickled copy opens its own.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = [os.path.abspath(path) for path in paths]
        self._open: OrderedDict[int, FileIO] = OrderedDict()

    def read(self, number: int, offset: int, size: int) -> bytes:
        if number not in self._open:
            if len(self._open) == MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[number] = FileIO(self._paths[number])
        self._open.move_to_end(number)
        data = os.pread(self._open[number].fileno(), size, offset)
        if len(data) != size:
            raise OSError(f"{self._paths[number]} became shorter after it was indexed")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {"_paths": self._paths, "_open": OrderedDict()}

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()
