"""One file of a feature cache: arrays as numpy saves them, one after another, an index of them, and a checksum."""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

Item = Tensor | dict[str, Tensor] | None

ALONE = ""  # the name of an item that is a tensor, not a dict
END = struct.Struct("<IQ8s")  # checksum of all before it, bytes of the index, MAGIC
MAGIC = b"vlmfast1"
ALIGNMENT = 64
CHUNK = 1 << 24


class Block:
    """A complete file, mapped into memory; `block[row]` is the item of a row.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is cut short or its index cannot be read; checksums are `damage`'s.
    """

    def __init__(self, path: Path) -> None:
        try:
            data = np.memmap(path, np.uint8, "r")
            arrays = {
                (name, part): np.ndarray(shape, np.dtype(dtype), buffer=data, offset=offset)
                for name, part, dtype, shape, offset in _index(data)
            }
            self._places = arrays.pop((ALONE, "places"))
        except FileNotFoundError:
            raise
        except Exception as error:  # numpy and json raise ValueError, TypeError, KeyError, OSError, ... on damage
            raise ValueError(f"{path} is damaged ({error}); cache_features makes it again") from error
        self._rows = {name: rows for (name, part), rows in arrays.items() if part == "rows"}
        self._ends = {name: ends for (name, part), ends in arrays.items() if part == "ends"}

    def __getitem__(self, row: int) -> Item:
        place = int(self._places[row])
        if place < 0:
            return None
        item = {name: self._read(name, place) for name in self._rows}
        return item.get(ALONE, item)

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """All that the items have of a name, mapped (n, ...), and the rows (n,) that they stand in.

        Raises:
            KeyError: no item has it.
            ValueError: it has another number of rows in each item.
        """
        if name in self._ends:
            raise ValueError(f"features: expected {name!r} of one shape in every sample")
        return self._rows[name], np.flatnonzero(self._places >= 0)

    def absent(self) -> list[int]:
        """The rows that have no item."""
        return [int(row) for row in np.flatnonzero(self._places < 0)]

    def _read(self, name: str, place: int) -> Tensor:
        rows, ends = self._rows[name], self._ends.get(name)
        found = rows[place] if ends is None else rows[ends[place] : ends[place + 1]]
        return torch.from_numpy(np.array(found))


def write(file: IO[bytes], items: Sequence[Item]) -> None:
    """Write a block to an empty file that can be read too.

    Raises:
        ValueError: the items differ in kind, names, dtypes or trailing dimensions.
    """
    index: list[tuple[str, str, str, tuple[int, ...], int]] = []

    def save(name: str, part: str, array: np.ndarray) -> None:
        np.save(file, array)
        index.append((name, part, array.dtype.str, array.shape, file.tell() - array.nbytes))
        file.write(bytes(-file.tell() % ALIGNMENT))

    present = [item if isinstance(item, dict) else {ALONE: item} for item in items if item is not None]
    for name in present[0] if present else ():
        if any(item.keys() != present[0].keys() for item in present):
            raise ValueError(f"features: expected {list(present[0])} in every sample, got others in some")
        rows = [_array(item[name]) for item in present]
        shapes = {row.shape for row in rows}
        kinds = {(row.dtype, row.shape[1:]) for row in rows}
        if len(shapes) == 1:
            save(name, "rows", np.stack(rows))
        elif len(kinds) == 1 and () not in shapes:
            save(name, "rows", np.concatenate(rows))
            save(name, "ends", np.cumsum([0, *map(len, rows)]))
        else:
            raise ValueError(f"features: expected {name!r} to differ in its number of rows only, got {sorted(shapes)}")
    there = np.array([item is not None for item in items], dtype=np.bool_)
    save(ALONE, "places", np.where(there, np.cumsum(there) - 1, -1))
    written = json.dumps(index).encode()
    file.write(written)
    file.flush()
    file.seek(0)
    file.write(END.pack(_checksum(file), len(written), MAGIC))


def damage(path: Path) -> str | None:
    """What is wrong with a file, None where nothing is; reads all of it."""
    size = os.path.getsize(path)
    if size < END.size:
        return "it is cut short"
    with open(path, "rb") as file:
        file.seek(size - END.size)
        expected, _, magic = END.unpack(file.read())
        if magic != MAGIC:
            return "its end is missing, or an earlier version wrote it"
        file.seek(0)
        return None if _checksum(file, size - END.size) == expected else "its checksum is wrong"


def _checksum(file: IO[bytes], size: int | None = None) -> int:
    """CRC-32 of the next bytes of a file, all by default."""
    left, checksum = math.inf if size is None else size, 0
    while left > 0 and (chunk := file.read(int(min(left, CHUNK)))):
        checksum = zlib.crc32(chunk, checksum)
        left -= len(chunk)
    return checksum


def _index(data: np.ndarray) -> Any:
    _, length, magic = END.unpack(data[-END.size :].tobytes())
    if magic != MAGIC:
        raise ValueError("its end is missing, or an earlier version wrote it")
    return json.loads(data[len(data) - END.size - length : -END.size].tobytes())


def _array(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    array: np.ndarray = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return array
