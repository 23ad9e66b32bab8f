"""What every source of samples shares: the protocol, compact string storage, and text files to records."""

import json
import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple, Protocol

IMAGE_EXTENSIONS = ("webp", "jpg", "jpeg", "png")

# Fields of a record that have one meaning everywhere, and the JSON type that each has; docs/data.md is the schema.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "caption": str,
    "captions": list,
    "category": (str, int, float),
    "keywords": list,
    "question": str,
    "questions": list,
    "answers": list,
    "choices": list,
    "answer_index": int,
    "rationale_choices": list,
    "rationale_index": int,
    "label": int,
    "objects": list,
    "phrases": list,
    "text": str,
}

URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")
SPELT_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Text(NamedTuple):
    """What goes with an image; every string can be encoded.

    Attributes:
        caption: None where there is none or it cannot be read, and stripped otherwise.
        category: stripped; None where there is none or it is empty.
        keywords, captions: the strings that the record lists under these names, stripped, without empty ones.
        record: the whole JSON object; empty where there is none, None where it cannot be read.
    """

    caption: str | None
    category: str | None = None
    keywords: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    record: dict[str, Any] | None = {}  # noqa: RUF012  # nobody writes to it


class Files(Protocol):
    """The files of samples, by index; nothing is decoded."""

    def key(self, index: int) -> str: ...
    def text(self, index: int) -> Text: ...

    def numbered(self, index: int) -> int:
        """How many numbered images the sample has, `key.0.jpg` and so on; 0 where it has one image of its own."""

    def image(self, index: int, number: int = 0) -> bytes | None:
        """The bytes of an image file, None where it cannot be read."""


class Pairs(Files, Protocol):
    """An index over samples, which themselves stay on disk.

    `faults` counts what the scan could not index, by reason.
    """

    faults: Counter[str]

    def __len__(self) -> int: ...

    def image_size(self, index: int) -> int:
        """Bytes of the (first) image file, -1 where it is not there."""

    def identity(self) -> Iterator[bytes]:
        """What the index knows without reading a sample: names and sizes, in order."""

    def landmarks(self) -> Iterable[int]:
        """Indices of samples, one of each file that holds many."""


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

    def buffers(self) -> tuple[bytes, bytes]:
        """Two byte strings that are equal for equal lists only."""
        return bytes(self._text), self._ends.tobytes()


def is_stream(source: Any) -> bool:
    """Whether a source, or the first of several, is a pipe or a URL, which can be read in order only."""
    first = source[0] if isinstance(source, list | tuple) and source else source
    return isinstance(first, str) and URL.match(first) is not None


def parse_text(plain: bytes | None, structured: bytes | None) -> Text:
    """The content of a .txt file, a .json file, or both, of which the .txt has the caption; None where one is missing.

    A caption that cannot be decoded, or is no string, is no caption.
    """
    record: dict[str, Any] | None = {} if structured is None else parse_record(structured)
    text = text_of(record)
    if plain is None:
        return text
    try:
        caption = plain.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return text._replace(caption=None, captions=())
    return text._replace(caption=caption, captions=())


def captions_of(sample: Any) -> list[str]:
    """All true captions of a sample: those that its record lists, or else its one caption."""
    return list(text_of(sample.record).captions) or [sample.caption]


def text_of(record: dict[str, Any] | None) -> Text:
    """A record's caption, category, keywords and captions; the record itself stays as it is."""
    if record is None:
        return Text(None, record=None)
    captions = _strings(record.get("captions"))
    caption, category = record.get("caption"), record.get("category")
    caption = caption.strip() if isinstance(caption, str) else None
    if not caption and captions:
        caption = captions[0]
    named = str(category).strip() if isinstance(category, str | int | float) else ""
    return Text(caption, named or None, _strings(record.get("keywords")), captions, record)


def _strings(value: Any) -> tuple[str, ...]:
    """The strings of a JSON list, stripped, without empty ones."""
    if not isinstance(value, list):
        return ()
    return tuple(word.strip() for word in value if isinstance(word, str) and word.strip())


def parse_record(data: bytes) -> dict[str, Any] | None:
    """A JSON object without lone surrogates, which JSON can spell and no tokenizer takes; None for anything else.

    A field that is a string with a lone surrogate is left out; further inside, U+FFFD stands for the surrogate.
    """
    try:
        # json.loads would take bytes too, and let encoded surrogates pass.
        text = data.decode(json.detect_encoding(data))
        record = json.loads(text)
        if not isinstance(record, dict):
            return None
        if not SPELT_SURROGATE.search(text):
            return record
        cleaned = {clean(name): (value, clean(value)) for name, value in record.items()}
    except (ValueError, RecursionError):
        return None
    return {name: new for name, (old, new) in cleaned.items() if not isinstance(old, str) or new == old}


def clean(value: Any) -> Any:
    """A JSON value with U+FFFD for each lone surrogate in its strings."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {clean(name): clean(item) for name, item in value.items()}
    return value


def has_field(record: dict[str, Any], name: str) -> bool:
    """Whether a record has a field that is not empty and, where the schema knows it, of the right type."""
    value = record.get(name)
    expected = FIELDS.get(name)
    if value is None or (expected is not None and not isinstance(value, expected)):
        return False
    if isinstance(value, bool) and expected is not None:  # bool is an int
        return False
    return bool(value.strip() if isinstance(value, str) else value) or isinstance(value, int | float)


def open_source_file(path: str, mode: str = "rb", **options: Any) -> IO[Any]:
    """`open`, whose errors name the argument `source`, and which neither waits for a pipe nor reads a device."""
    try:
        check_regular(path, os.stat(path).st_mode)
        return open(path, mode, **options)
    except OSError as error:
        raise unreadable(error) from error


def check_regular(path: str, mode: int) -> None:
    """ValueError that names a path which is neither a file nor a folder, by the mode that `stat` gives."""
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    if kind := kinds.get(stat.S_IFMT(mode)):
        raise ValueError(f"source: {os.path.abspath(path)} is {kind}; expected a regular file, which can be read again")


def unreadable(error: OSError) -> OSError:
    """An error of the same class that names the argument `source`, the path and what was expected."""
    path = os.path.abspath(os.fsdecode(error.filename))
    return type(error)(f"source: cannot read {path} ({error.strerror}); expected readable image-text pairs")
