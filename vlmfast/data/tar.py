"""Names, offsets and sizes of the files in a tar archive on disk or in a stream, from headers that are not trusted.

Python's tarfile seeks backwards for ever at a negative size (CVE-2025-8194), reads a long name of any length into
memory, and keeps every header that it has seen. Here an offset only grows, and a header costs 512 bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

BLOCK = 512
MAX_NAME = 1 << 20  # bytes of a long name or of pax records
CHUNK = 1 << 20

COMPRESSED = {
    b"\x1f\x8b": "gzip-compressed",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ\0": "xz-compressed",
    b"\x5d\0\0": "lzma-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"\x04\x22\x4d\x18": "lz4-compressed",
    b"\x1f\x9d": "compressed",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
}


class Member(NamedTuple):
    """A regular file of an archive."""

    name: str
    offset: int
    size: int


class DamagedError(ValueError):
    """A header that no tar writes, or one that points behind the end; or the end is missing."""


class Archive(Protocol):
    """Bytes that are asked for at offsets that only grow; `length` is infinite where it is not known."""

    length: float

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes, fewer where the archive ends."""

    def after_zeros(self, offset: int) -> int:
        """An offset behind the block of zeros at `offset`; no block between the two holds anything else."""


class ForwardArchive:
    """An archive in a stream, such as a pipe, which is read once and in order."""

    length = math.inf

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._offset = 0

    def read(self, offset: int, size: int) -> bytes:
        while self._offset < offset:
            if not (skipped := self._stream.read(min(CHUNK, offset - self._offset))):
                return b""
            self._offset += len(skipped)
        parts = []
        while size > 0 and (part := self._stream.read(min(CHUNK, size))):  # a size in a header may be any number
            parts.append(part)
            self._offset += len(part)
            size -= len(part)
        return b"".join(parts)

    def after_zeros(self, offset: int) -> int:
        return offset + BLOCK


class _FileArchive:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.length: float = os.fstat(descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def after_zeros(self, offset: int) -> int:
        while chunk := os.pread(self._descriptor, CHUNK, offset):
            if any(chunk):
                first = len(chunk) - len(chunk.lstrip(b"\0"))
                return offset + first // BLOCK * BLOCK
            offset += len(chunk)
        return offset


def scan(path: str, descriptor: int) -> tuple[list[Member], bool]:
    """The regular files before any damage, and whether there is some: a bad header, a cut, or a missing end.

    Archives that were joined by `cat` are read to the last one.

    Args:
        path: for messages.
        descriptor: of the open file; its position is not used.
    Raises:
        ValueError: the file is compressed or no tar archive, or holds sparse files.
    """
    found: list[Member] = []
    try:
        for member in members(path, _FileArchive(descriptor)):
            found.append(member)
    except DamagedError:
        return found, True
    return found, False


def members(path: str, archive: Archive) -> Iterator[Member]:
    """The regular files in order; of a `ForwardArchive` the data of each can be read before the next is asked for.

    Args:
        path: for messages.
    Raises:
        DamagedError: behind the last file before the damage.
        ValueError: the archive is compressed or none, or holds sparse files.
    """
    offset = 0
    shared: dict[str, bytes] = {}  # pax records for all members that follow
    own: dict[str, bytes] = {}  # for the next one
    ended = False
    while header := archive.read(offset, BLOCK):
        if offset == 0:
            _check_start(path, header)
        if len(header) < BLOCK:
            raise DamagedError
        if not any(header):
            offset, ended = archive.after_zeros(offset), True
            continue
        if not _sound(header):
            raise DamagedError
        ended = False
        kind = header[156:157]
        size, start = _number(header[124:136]), offset + BLOCK
        if kind in b"LKxXg":
            data = archive.read(start, size) if size <= MAX_NAME else b""
            if len(data) < size:
                raise DamagedError
            if kind == b"L":
                own["path"] = data.split(b"\0", 1)[0]
            elif kind == b"g":
                shared |= _pax(data)
            elif kind != b"K":
                own |= _pax(data)
            offset = start + _padded(size)
            continue
        records, own = shared | own, {}
        name = records.get("path") or _header_name(header)
        size = _decimal(records["size"]) if "size" in records else size
        if kind == b"S" or any(key.startswith("GNU.sparse.") for key in records):
            shown = os.fsdecode(records.get("GNU.sparse.name", name))
            raise ValueError(
                f"source: {path} holds sparse files, such as {shown!r}; expected whole ones, which can be read by "
                "offset, as tar writes them without --sparse"
            )
        if kind in b"123456":  # links, devices, folders and pipes have no data
            size = 0
        if start + size > archive.length:
            raise DamagedError
        if kind in b"07" or (kind == b"\0" and not name.endswith(b"/")):
            yield Member(name.decode("utf-8", "surrogateescape"), start, size)
        offset = start + _padded(size)
    if not ended:
        raise DamagedError  # an archive ends with blocks of zeros


def _check_start(path: str, start: bytes) -> None:
    """ValueError for what begins as other files do."""
    if len(start) == BLOCK and (not any(start) or _sound(start)):
        return
    for magic, kind in COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(f"source: {path} is {kind}; expected a plain .tar, which can be read by offset")
    if len(start) == BLOCK and start[257:262] != b"ustar":
        raise ValueError(f"source: {path} is no tar archive (bad checksum); expected webdataset shards")


def _sound(header: bytes) -> bool:
    """Whether the checksum is right, taken over bytes or, as some did, over signed ones."""
    try:
        expected = _number(header[148:156])
    except DamagedError:
        return False
    counted = header[:148] + b" " * 8 + header[156:]
    total = sum(counted)
    return expected == total or expected == total - 256 * sum(byte > 127 for byte in counted)


def _number(field: bytes) -> int:
    """A number of a header, octal digits or base 256, at least 0."""
    if field[0] in (0x80, 0xFF):
        value = int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    else:
        digits = field.split(b"\0", 1)[0].strip()
        if digits.strip(b"01234567"):
            raise DamagedError
        value = int(digits or b"0", 8)
    if value < 0:
        raise DamagedError
    return value


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise DamagedError
    return int(digits)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _header_name(header: bytes) -> bytes:
    name, prefix = (field.split(b"\0", 1)[0] for field in (header[:100], header[345:500]))
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _pax(data: bytes) -> dict[str, bytes]:
    """Records of the form b"30 path=..." with the length of the whole, line end included."""
    records: dict[str, bytes] = {}
    data = data.rstrip(b"\0")
    while data:
        digits = data.split(b" ", 1)[0]
        length = _decimal(digits)
        record = data[len(digits) + 1 : length]
        if not record.endswith(b"\n") or b"=" not in record or len(data) < length:
            raise DamagedError
        key, value = record[:-1].split(b"=", 1)
        records[key.decode("utf-8", "replace")] = value
        data = data[length:]
    return records
