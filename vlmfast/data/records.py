"""What every source of pairs shares: the protocol, compact string storage, caption files."""

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable
from typing import IO, Any, NamedTuple, Protocol

IMAGE_EXTENSIONS = ("webp", "jpg", "jpeg", "png")


class Text(NamedTuple):
    """What goes with an image. The caption is None where there is none or it cannot be read, and stripped otherwise."""

    caption: str | None
    category: str | None = None
    keywords: tuple[str, ...] = ()


class Pairs(Protocol):
    """An index over image-text pairs; nothing is decoded, and the pairs themselves stay on disk.

    `faults` counts what the scan could not index, by reason.
    """

    faults: Counter[str]

    def __len__(self) -> int: ...
    def key(self, index: int) -> str: ...
    def image(self, index: int) -> bytes: ...
    def image_size(self, index: int) -> int: ...
    def text(self, index: int) -> Text: ...


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


def parse_text(data: bytes, is_json: bool) -> Text:
    """The content of a .txt file, or of a .json file with "caption" and optionally "category" and "keywords"."""
    try:
        if not is_json:
            return Text(data.decode("utf-8-sig").strip())
        record = json.loads(data)
        caption, category = record["caption"], record.get("category")
        listed = record.get("keywords")
        words = [word for word in listed if isinstance(word, str)] if isinstance(listed, list) else []
        " ".join((caption, *words)).encode()  # JSON can spell lone surrogates, which no tokenizer takes
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return Text(None)
    return Text(
        caption.strip(),
        None if category is None else str(category),
        tuple(word.strip() for word in words if word.strip()),
    )


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
