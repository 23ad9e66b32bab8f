"""Samples in loose image files: a table of paths, or a folder."""

import contextlib
import csv
import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from typing import Any

from vlmfast.data.records import (
    FIELDS,
    IMAGE_EXTENSIONS,
    PackedStrings,
    Text,
    check_regular,
    clean,
    open_source_file,
    parse_text,
    text_of,
    unreadable,
)

MAX_CELL = 2**31 - 1  # bytes; the largest that csv takes everywhere
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)  # a fault of the process, not of the file


class TablePairs:
    """Rows of a .csv or .tsv file with a header naming `path` and, where it is required, `caption`.

    Relative paths start at the table's folder. The key of a sample is its path as written. Every image must exist.
    Other columns are the record.
    """

    def __init__(self, table: str, caption: bool = True) -> None:
        self.faults: Counter[str] = Counter()
        self._folder = os.path.dirname(os.path.abspath(table))
        with open_source_file(table, "r", newline="", encoding="utf-8-sig") as file, _any_cell():
            # strict: a quote that is not closed would otherwise make one cell of all that follows
            reader = csv.reader(file, delimiter="\t" if table.lower().endswith(".tsv") else ",", strict=True)
            first = 0
            try:
                columns = next(reader, [])
                self._columns = {name: PackedStrings() for name in columns}
                needed = ("path", "caption") if caption else ("path",)
                if not {*needed} <= {*columns}:
                    raise ValueError(f"source: {table} needs the columns {' and '.join(needed)}; it has {columns}")
                if len(self._columns) < len(columns):
                    raise ValueError(f"source: {table} names a column twice: {columns}")
                number, first = 0, reader.line_num + 1
                for row in reader:
                    if row:
                        number += 1
                        self._add(table, number, columns, row)
                    first = reader.line_num + 1
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"source: {table}, line {first or 1}: not UTF-8 CSV ({error})") from error
        if not len(self):
            raise ValueError(f"source: {table} has no rows; expected image-text pairs")

    def _add(self, table: str, number: int, columns: list[str], row: list[str]) -> None:
        if any(cell.strip() for cell in row[len(columns) :]):
            raise ValueError(
                f"source: {table}, row {number}: {len(row)} cells, the header has {len(columns)}; a caption that holds "
                f'the delimiter must be in "quotes"; got {row}'
            )
        cells = dict(zip(columns, row + [""] * len(columns), strict=False))
        if fault := self._no_image(cells["path"]):
            raise fault[0](f"source: {table}, row {number}: {fault[1]} {cells['path']!r}")
        for name, cell in cells.items():
            self._columns[name].append(cell if name == "path" else cell.strip())

    def _no_image(self, path: str) -> tuple[type[Exception], str] | None:
        """What is wrong with an image's path; a link that leads nowhere is a fault of one sample, not of the table."""
        whole = os.path.join(self._folder, path)
        try:
            mode = os.stat(whole).st_mode
        except (OSError, ValueError):
            return None if path and _is_link(whole) else (FileNotFoundError, "no image file")
        if stat.S_ISREG(mode):
            return None
        if stat.S_ISDIR(mode):
            return FileNotFoundError, "no image file"
        return ValueError, "a FIFO, socket or device, expected an image file, at"

    def __len__(self) -> int:
        return len(self._columns["path"])

    def key(self, index: int) -> str:
        return self._columns["path"][index]

    def numbered(self, index: int) -> int:
        return 0

    def image(self, index: int, number: int = 0) -> bytes | None:
        return _read(self._path(index))

    def image_size(self, index: int) -> int:
        return _size(self._path(index))

    def text(self, index: int) -> Text:
        cells = {name: cells[index] for name, cells in self._columns.items() if name not in ("path", "caption")}
        text = text_of({name: _value(name, cell) for name, cell in cells.items() if cell})
        caption = self._columns["caption"][index] if "caption" in self._columns else None
        return text._replace(caption=caption or text.caption or caption)

    def identity(self) -> Iterator[bytes]:
        for name, cells in self._columns.items():
            yield name.encode()
            yield from cells.buffers()
        for index in range(len(self)):
            yield b"%d," % self.image_size(index)

    def landmarks(self) -> list[int]:
        return []

    def _path(self, index: int) -> str:
        return os.path.join(self._folder, self._columns["path"][index])


class FolderPairs:
    """Image files anywhere below a folder, each with a .txt or .json of the same stem beside it, or both.

    The key of a sample is its image's path below the folder, without extension. The order is that of sorted paths.
    Links to folders are followed, but for those to a folder that they are in. An image `key.0.png`, `key.1.png`, ...
    without text of its own, beside `key.json` without an image of its own, is one of an interleaved document.
    """

    def __init__(self, folder: str) -> None:
        self.faults: Counter[str] = Counter()
        self._folder = os.path.abspath(folder)
        self._keys, self._images, self._texts, self._records = (PackedStrings() for _ in range(4))
        self._numbered: dict[int, list[str]] = {}
        for parent, names in self._walk():
            self._add(parent, names)
        if not self._images:
            raise ValueError(f"source: the folder {folder} holds no {', '.join(IMAGE_EXTENSIONS)} file")

    def _walk(self) -> Iterator[tuple[str, list[str]]]:
        """Every folder's path below the first with the names of its files, sorted."""
        waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
        while waiting:
            parent, above = waiting.pop()
            try:
                here = os.stat(os.path.join(self._folder, parent))
                with os.scandir(os.path.join(self._folder, parent)) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                raise unreadable(error) from error
            place = (here.st_dev, here.st_ino)
            if place in above:
                self.faults["link to a folder above"] += 1
                continue
            names, folders = [], []
            for entry in found:
                path = os.path.join(parent, entry.name)
                if _holds(entry.is_dir):
                    folders.append((path, (*above, place)))
                elif os.path.splitext(entry.name)[1][1:].lower() in (*IMAGE_EXTENSIONS, "txt", "json"):
                    if not _holds(entry.is_file) and os.path.exists(entry.path):
                        check_regular(entry.path, entry.stat().st_mode)
                    names.append(entry.name)
            yield parent, names
            waiting += reversed(folders)

    def _add(self, parent: str, names: list[str]) -> None:
        """The samples of one folder."""
        images: dict[str, str] = {}
        texts: dict[str, dict[str, str]] = {"txt": {}, "json": {}}
        for name in names:
            stem, extension = os.path.splitext(name)
            kind = extension[1:].lower()
            if stem in texts.get(kind, images):
                self.faults["duplicate key" if kind in texts else "second image"] += 1
                continue
            texts.get(kind, images)[stem] = os.path.join(parent, name)
        documents = self._documents(images, texts)
        first = images | {stem: numbered[0] for stem, numbered in documents.items()}
        for stem in sorted(first, key=first.__getitem__):
            if stem in documents:
                self._numbered[len(self._keys)] = documents[stem]
            self._keys.append(os.path.join(parent, stem))
            self._images.append(first[stem])
            self._texts.append(texts["txt"].get(stem, ""))
            self._records.append(texts["json"].get(stem, ""))
        self.faults["missing image"] += len({*texts["txt"], *texts["json"]} - first.keys())

    def _documents(self, images: dict[str, str], texts: dict[str, dict[str, str]]) -> dict[str, list[str]]:
        """The numbered images of each interleaved document by its stem; they are taken out of `images`."""
        found: dict[str, list[tuple[int, str]]] = {}
        for stem in list(images):
            key, _, number = stem.rpartition(".")
            alone = stem not in texts["txt"] and stem not in texts["json"]
            if alone and key in texts["json"] and key not in images and number.isascii() and number.isdecimal():
                found.setdefault(key, []).append((int(number), images.pop(stem)))
        return {key: [path for _, path in sorted(numbered)] for key, numbered in found.items()}

    def __len__(self) -> int:
        return len(self._images)

    def key(self, index: int) -> str:
        return self._keys[index]

    def numbered(self, index: int) -> int:
        return len(self._numbered.get(index, ()))

    def image(self, index: int, number: int = 0) -> bytes | None:
        numbered = self._numbered.get(index)
        return _read(os.path.join(self._folder, numbered[number] if numbered else self._images[index]))

    def image_size(self, index: int) -> int:
        return _size(os.path.join(self._folder, self._images[index]))

    def text(self, index: int) -> Text:
        plain, structured = (self._content(path[index]) for path in (self._texts, self._records))
        return parse_text(plain, structured)

    def identity(self) -> Iterator[bytes]:
        for strings in (self._images, self._texts, self._records):
            yield from strings.buffers()
        for index in range(len(self)):
            sizes = [self.image_size(index)]
            for path in (self._texts[index], self._records[index], *self._numbered.get(index, ())):
                sizes += [_size(os.path.join(self._folder, path))] if path else []
            yield repr(sizes).encode()

    def landmarks(self) -> list[int]:
        return []

    def _content(self, path: str) -> bytes | None:
        """The bytes of a text file; what cannot be read is no text."""
        return _read(os.path.join(self._folder, path)) if path else None


def _value(name: str, cell: str) -> Any:
    """A table's cell as a record would have it: JSON lists and objects, and integers where the schema asks for them."""
    expected = FIELDS.get(name)
    if expected is int or (cell[0] in "[{" and expected in (None, list)):
        with contextlib.suppress(ValueError, RecursionError):
            return clean(json.loads(cell))
    return cell


@contextlib.contextmanager
def _any_cell() -> Iterator[None]:
    """The csv module's limit on a cell, which is the process's, out of the way."""
    before = csv.field_size_limit(MAX_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read(path: str) -> bytes | None:
    """A file's bytes, None where it is not there any more, may not be read, or is no regular file by now."""
    try:
        # O_NONBLOCK: to open a pipe would otherwise wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        with open(descriptor, "rb") as file:
            return file.read() if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    except OSError as error:
        if error.errno in OUT_OF_FILES:
            raise
        return None


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def _holds(question: Any) -> bool:
    """An entry's is_file or is_dir; a link in a circle is neither."""
    try:
        return bool(question())
    except OSError:
        return False


def _is_link(path: str) -> bool:
    try:
        return os.path.islink(path)
    except ValueError:
        return False
