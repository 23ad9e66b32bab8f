"""What a format's function yields and the shards are written from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Item(NamedTuple):
    """One sample to be.

    Attributes:
        key: unique, without dots.
        images: file names below the folder of images; the first that is there is taken.
        record: the JSON object, or a function that makes it when its turn comes and may raise SkipError.
    """

    key: str
    images: tuple[str, ...]
    record: dict[str, Any] | Callable[[], dict[str, Any]]


class SkipError(Exception):
    """An item that cannot be used; the message is the reason under which it is counted."""


def inside(folder: Path, name: str) -> Path | None:
    """A regular file below the folder, or None: annotation files are not trusted with names that lead out of it."""
    path = folder / name
    leads_out = ".." in Path(name).parts or Path(name).is_absolute()
    return path if not leads_out and path.is_file() else None
