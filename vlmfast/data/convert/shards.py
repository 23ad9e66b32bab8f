"""Items, each an image file and a record, to webdataset shards: shard after shard, each whole or not there."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmfast.data.convert.formats import FORMATS
from vlmfast.data.convert.items import Item, SkipError, inside
from vlmfast.data.images import TooManyPixelsError, decode_image

STATE = "convert.json"  # in the output folder: what was converted, and the shards that are whole
EXTENSIONS = {"jpg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n", "webp": b"RIFF"}


@dataclass
class Converted:
    """What became of the items: samples written, their shards, and how many were skipped for which reason."""

    samples: int = 0
    shards: list[Path] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def convert(
    format: str,
    annotations: Sequence[str | os.PathLike[str]],
    images: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    shard_size: int = 1000,
    progress: bool = False,
) -> Converted:
    """Write `output`/shard-00000.tar and so on: image files as they are, and records in the schema of docs/data.md.

    A shard takes its name when it is whole, so a run that was stopped leaves none that is cut. The same call again
    goes on after the last whole shard. Images that are missing, damaged, of too many pixels, or neither WebP, JPEG
    nor PNG are skipped and counted.

    Args:
        format: a name in FORMATS.
        annotations: the data set's annotation files, as FORMATS says.
        images: folder of the image files.
        output: folder for the shards; what it holds of another conversion is refused.
        shard_size: items of a shard, those that are skipped included.
        progress: show a bar on standard error.
    Raises:
        ValueError: an argument is out of its range, a file is of another format, `output` holds another conversion,
            or no item could be used.
        FileNotFoundError: an annotation file or the folder of images is not there.
    """
    from tqdm import tqdm

    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}; got {format!r}")
    if shard_size < 1:
        raise ValueError(f"shard_size: expected at least 1, got {shard_size}")
    files, source, target = [Path(path) for path in annotations], Path(images), Path(output)
    if not source.is_dir():
        raise FileNotFoundError(f"images: {source} is no folder")
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"annotations: there is no file {path}")
    state = _State.open(target, format, files, source, shard_size)
    items = FORMATS[format].items(files, source)
    if len({item.key for item in items}) < len(items):
        raise ValueError(f"annotations: {files[0]} has two images or samples of one id")
    begun = len(state.shards)
    with tqdm(total=len(items), initial=min(begun * shard_size, len(items)), disable=not progress) as bar:
        for number, start in enumerate(range(0, len(items), shard_size)):
            if number >= begun:
                part = items[start : start + shard_size]
                state.add(_write_shard(target / f"shard-{number:05d}.tar", part, source, bar.update))
    done = state.result()
    if not done.samples:
        looked = ", ".join(str(source / name) for name in items[0].images) if items else "no item"
        reasons = ", ".join(f"{count} {reason}" for reason, count in done.skipped.items()) or "the file lists nothing"
        raise ValueError(f"images: none of {len(items)} items could be used ({reasons}); looked for {looked}")
    return done


class _State:
    """The file STATE: the arguments, and samples and skipped items of each shard that is whole."""

    def __init__(self, folder: Path, arguments: dict[str, Any], shards: list[dict[str, Any]]) -> None:
        self.folder, self.arguments, self.shards = folder, arguments, shards

    @classmethod
    def open(cls, folder: Path, format: str, files: list[Path], images: Path, shard_size: int) -> _State:
        """That of a conversion which was begun with the same arguments, or a new one."""
        arguments = {
            "format": format,
            "annotations": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
            "images": str(images.resolve()),
            "shard_size": shard_size,
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / STATE
        if path.exists():
            try:
                found = json.loads(path.read_bytes())
                before, shards = found["arguments"], found["shards"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"output: {path} is damaged ({error}); remove {folder} or choose another") from error
            different = [name for name, value in arguments.items() if before.get(name) != value]
            if different:
                raise ValueError(
                    f"output: {folder} holds a conversion with another value of {', '.join(different)}; "
                    "remove it or choose another folder"
                )
            missing = [shard["name"] for shard in shards if shard["samples"] and not (folder / shard["name"]).exists()]
            if missing:
                raise ValueError(f"output: {folder} lacks {', '.join(missing)}; remove it or choose another folder")
            return cls(folder, arguments, shards)
        if any(folder.glob("*.tar")):
            raise ValueError(f"output: {folder} holds tar files of another origin; choose another folder")
        return cls(folder, arguments, [])

    def add(self, shard: dict[str, Any]) -> None:
        self.shards.append(shard)
        part = self.folder / f"{STATE}.part"
        part.write_text(json.dumps({"arguments": self.arguments, "shards": self.shards}, indent=1) + "\n")
        part.replace(self.folder / STATE)

    def result(self) -> Converted:
        result = Converted()
        for shard in self.shards:
            result.samples += shard["samples"]
            result.skipped.update(shard["skipped"])
            if shard["samples"]:
                result.shards.append(self.folder / shard["name"])
        return result


def _write_shard(path: Path, items: Sequence[Item], images: Path, one_more: Callable[[], object]) -> dict[str, Any]:
    """Samples and skipped items of a shard; without a sample there is no file."""
    samples, skipped = 0, Counter[str]()
    part = path.with_name(f"{path.name}.part")
    with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
        for item in items:
            one_more()
            try:
                extension, image = _read_image(images, item.images)
                record = item.record if isinstance(item.record, dict) else item.record()
            except SkipError as reason:
                skipped[str(reason)] += 1
                continue
            text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
            for suffix, content in ((extension, image), ("json", text)):
                member = tarfile.TarInfo(f"{item.key}.{suffix}")
                member.size, member.mode = len(content), 0o644
                tar.addfile(member, io.BytesIO(content))
            samples += 1
    if samples:
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    else:
        part.unlink()
    return {"name": path.name, "samples": samples, "skipped": dict(skipped)}


def _read_image(folder: Path, names: tuple[str, ...]) -> tuple[str, bytes]:
    """(extension, bytes) of the first file that is there."""
    path = next((path for name in names if (path := inside(folder, name))), None)
    if path is None:
        raise SkipError("missing image")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SkipError("unreadable image") from error
    extension = next((name for name, magic in EXTENSIONS.items() if data.startswith(magic)), None)
    if extension is None:
        raise SkipError("damaged image")
    try:
        decode_image(data, min_side=1)  # a JPEG is decoded at an eighth of its size, to the end
    except TooManyPixelsError as error:
        raise SkipError("image of too many pixels") from error
    except ValueError as error:
        raise SkipError("damaged image") from error
    return extension, data
