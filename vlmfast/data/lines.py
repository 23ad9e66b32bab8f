"""A plain text file as a source of texts without images."""

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator

from vlmfast.data.records import Text, open_source_file


class TextLines:
    """The lines of a UTF-8 .txt file, each a text; empty lines are left out. No sample has an image.

    The index keeps where each line begins; the text stays on disk. A line that is not UTF-8 has no caption.
    """

    def __init__(self, path: str) -> None:
        self.faults: Counter[str] = Counter()
        self._path = path
        self._starts, self._lengths = array("q"), array("q")
        place = 0
        with open_source_file(path) as file:
            for line in file:
                if line.strip():
                    self._starts.append(place)
                    self._lengths.append(len(line))
                place += len(line)
        if not self._starts:
            raise ValueError(f"source: {path} has no lines; expected one text a line")

    def __len__(self) -> int:
        return len(self._starts)

    def key(self, index: int) -> str:
        return f"{os.path.basename(self._path)}:{self._starts[index]}"

    def text(self, index: int) -> Text:
        with open_source_file(self._path) as file:
            file.seek(self._starts[index])
            line = file.read(self._lengths[index])
        try:
            return Text(line.decode("utf-8-sig").strip())
        except UnicodeDecodeError:
            return Text(None)

    def numbered(self, index: int) -> int:
        return 0

    def image(self, index: int, number: int = 0) -> bytes | None:
        return None

    def image_size(self, index: int) -> int:
        return -1

    def identity(self) -> Iterator[bytes]:
        yield os.path.basename(self._path).encode("utf-8", "surrogateescape")
        yield self._starts.tobytes()
        yield self._lengths.tobytes()

    def landmarks(self) -> Iterable[int]:
        return (0, len(self) - 1)
