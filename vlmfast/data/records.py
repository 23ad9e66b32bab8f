"""What every source of pairs shares: the protocol, compact string storage, caption files."""

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable
from typing import IO, Any, Protocol

IMAGE_EXTENSIONS = ("webp", "jpg", "jpeg", "png")


class Pairs(Protocol):
    """An index over image-text pairs; nothing is decoded, and the pairs themselves stay on disk.

    `faults` counts what the scan could not index, by reason. The caption is None when there is none or it cannot
    be read as text, and is stripped otherwise.
    """

    faults: Counter[str]

    def __len__(self) -> int: ...
    def key(self, index: int) -> str: ...
    def image(self, index: int) -> bytes: ...
    def caption_and_category(self, index: int) -> tuple[str | None, str | None]: ...


class PackedStrings:
    """A growing list of strings in one buffer: tens of millions cost their bytes plus eight each."""

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        self._text += string.encode("utf-8", "surrogateescape")  # file names need not be UTF-8
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._text[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")


def parse_caption(data: bytes, is_json: bool) -> tuple[str | None, str | None]:
    """(caption, category) of a .txt or .json file's bytes; see `Pairs` for None."""
    try:
        if not is_json:
            return data.decode("utf-8-sig").strip(), None
        record = json.loads(data)
        caption, category = record["caption"], record.get("category")
        caption.encode()  # JSON can spell lone surrogates, which no tokenizer takes
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None, None
    return caption.strip(), None if category is None else str(category)


def open_source_file(path: str, mode: str = "rb", **options: Any) -> IO[Any]:
    """`open`, whose errors name the argument `source`."""
    try:
        return open(path, mode, **options)
    except OSError as error:
        raise unreadable(error) from error


def unreadable(error: OSError) -> OSError:
    """An error of the same class that names the argument `source`, the path and what was expected."""
    path = os.path.abspath(os.fsdecode(error.filename))
    return type(error)(f"source: cannot read {path} ({error.strerror}); expected readable image-text pairs")
