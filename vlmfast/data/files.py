"""Pairs of loose image files: a table of path and caption, or a folder."""

import csv
import os
from collections import Counter

from vlmfast.data.records import IMAGE_EXTENSIONS, PackedStrings, Text, open_source_file, parse_text, unreadable


class TablePairs:
    """Rows of a .csv or .tsv file with a header naming `path` and `caption`, and optionally `category`.

    Relative paths start at the table's folder. The key of a pair is its path as written. Every image must exist.
    """

    def __init__(self, table: str) -> None:
        self.faults: Counter[str] = Counter()
        self._folder = os.path.dirname(os.path.abspath(table))
        self._paths, self._captions, self._categories = PackedStrings(), PackedStrings(), PackedStrings()
        with open_source_file(table, "r", newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if table.lower().endswith(".tsv") else ",")
            try:
                columns = reader.fieldnames or []
                for needed in ("path", "caption"):
                    if needed not in columns:
                        raise ValueError(f"source: {table} needs the columns path and caption; it has {list(columns)}")
                for number, row in enumerate(reader, start=1):
                    path = row["path"]
                    if not path or not os.path.isfile(os.path.join(self._folder, path)):
                        raise FileNotFoundError(f"source: {table}, row {number}: no image file {path!r}")
                    self._paths.append(path)
                    self._captions.append((row["caption"] or "").strip())
                    self._categories.append(row.get("category") or "")
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"source: {table}, line {reader.line_num + 1}: not UTF-8 CSV ({error})") from error
        if not self._paths:
            raise ValueError(f"source: {table} has no rows; expected image-text pairs")

    def __len__(self) -> int:
        return len(self._paths)

    def key(self, index: int) -> str:
        return self._paths[index]

    def image(self, index: int) -> bytes:
        return _read(os.path.join(self._folder, self._paths[index]))

    def image_size(self, index: int) -> int:
        return os.path.getsize(os.path.join(self._folder, self._paths[index]))

    def text(self, index: int) -> Text:
        return Text(self._captions[index], self._categories[index] or None)


class FolderPairs:
    """Image files anywhere below a folder, each with a .txt (or else .json with "caption") of the same stem beside it.

    The key of a pair is its image's path below the folder, without extension. The order is that of sorted paths.
    """

    def __init__(self, folder: str) -> None:
        self.faults: Counter[str] = Counter()
        self._folder = os.path.abspath(folder)
        self._images, self._texts = PackedStrings(), PackedStrings()
        for parent, folders, names in os.walk(self._folder, onerror=_raise):
            folders.sort()
            self._add(os.path.relpath(parent, self._folder), sorted(names))
        if not self._images:
            raise ValueError(f"source: the folder {folder} holds no {', '.join(IMAGE_EXTENSIONS)} file")

    def _add(self, parent: str, names: list[str]) -> None:
        """The pairs of one folder."""
        files = [(*os.path.splitext(name), os.path.normpath(os.path.join(parent, name))) for name in names]
        texts = {stem: path for stem, extension, path in files if extension.lower() == ".json"}
        texts |= {stem: path for stem, extension, path in files if extension.lower() == ".txt"}
        stems = set()
        for stem, extension, path in files:
            if extension[1:].lower() in IMAGE_EXTENSIONS:
                self._images.append(path)
                self._texts.append(texts.get(stem, ""))
                stems.add(stem)
        self.faults["missing image"] += len(texts.keys() - stems)

    def __len__(self) -> int:
        return len(self._images)

    def key(self, index: int) -> str:
        return os.path.splitext(self._images[index])[0]

    def image(self, index: int) -> bytes:
        return _read(os.path.join(self._folder, self._images[index]))

    def image_size(self, index: int) -> int:
        return os.path.getsize(os.path.join(self._folder, self._images[index]))

    def text(self, index: int) -> Text:
        text = self._texts[index]
        if not text:
            return Text(None)
        return parse_text(_read(os.path.join(self._folder, text)), text.lower().endswith(".json"))


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _raise(error: OSError) -> None:
    raise unreadable(error) from error
