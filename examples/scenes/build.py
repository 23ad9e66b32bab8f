"""Make scenes from the bundled pairs: `python examples/scenes/build.py --output runs/scenes`.

Writes train-00000.tar and so on, val-00000.tar, val-open-00000.tar and names.json. The same Python, Pillow and libwebp
give the same bytes. README.md beside this file says what a scene holds.
"""

import argparse
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image
from scene_layout import COLOURS, Pool, Scene
from scene_names import HELD_OUT, NAMES, Picture, read_pictures
from scene_record import pair_of_scenes

PAIRS = Path(__file__).resolve().parents[1] / "pairs"
SHARD = 1000  # scenes
QUALITY = 85
BORDER = 0.08  # of a tile's side, on each side of its picture


def pool_of(split: str, pairs: Path) -> Pool:
    """Train and val know no name that is held out; each scene of val-open has one."""
    pictures = read_pictures(pairs, split.split("-")[0])
    if split == "val-open":
        return Pool(pictures, HELD_OUT)
    return Pool({name: found for name, found in pictures.items() if name not in HELD_OUT})


def scenes(split: str, pool: Pool, start: int, stop: int) -> Iterator[tuple[str, Scene, dict[str, Any]]]:
    """(key, scene, record) of the scenes from `start` to `stop`, both even; they depend on split and number only."""
    for number in range(start, stop, 2):
        pair = pair_of_scenes(Random(f"{split} {number}"), pool)
        for index, (scene, record) in enumerate(pair, start=number):
            yield f"{split}-{index:06d}", scene, record


@cache
def decoded(picture: Picture) -> Image.Image:
    with Image.open(io.BytesIO(picture.webp)) as image:
        return image.convert("RGB")


def render(scene: Scene) -> Image.Image:
    canvas = Image.new("RGB", (scene.side, scene.side), scene.ground)
    for tile in scene.tiles:
        x1, y1, x2, _ = tile.box
        border = max(2, round(BORDER * (x2 - x1)))
        inner = x2 - x1 - 2 * border
        canvas.paste(COLOURS[tile.colour], tile.box)
        canvas.paste(decoded(tile.picture).resize((inner, inner), Image.Resampling.BICUBIC), (x1 + border, y1 + border))
    return canvas


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=QUALITY, method=2)
    return file.getvalue()


def write_shard(output: Path, pairs: Path, split: str, number: int, start: int, stop: int) -> Path:
    """A webdataset shard, with no time, owner or other trace of the build. It takes its name when it is whole."""
    path = output / f"{split}-{number:05d}.tar"
    part = path.with_suffix(".part")
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, scene, record in scenes(split, pool_of(split, pairs), start, stop):
            text = json.dumps(record, separators=(",", ":")).encode()
            for extension, content in (("webp", encoded(render(scene))), ("json", text)):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size, member.mode, member.mtime = len(content), 0o644, 0
                tar.addfile(member, io.BytesIO(content))
    part.replace(path)
    return path


def build(
    output: Path,
    *,
    train: int = 8000,
    val: int = 800,
    val_open: int = 200,
    pairs: Path = PAIRS,
    workers: int = 1,
) -> list[Path]:
    """Write the shards of so many scenes in place of shards there, and names.json; return the shards.

    Args:
        train, val, val_open: scenes of each split; even, since scenes come in pairs.
        pairs: folder of the bundled pairs.
        workers: processes; with 1, this one.
    Raises:
        ValueError: a number is odd or negative, or the pairs lack pictures of a name.
    """
    counts = {"train": train, "val": val, "val-open": val_open}
    for split, count in counts.items():
        if count < 0 or count % 2:
            raise ValueError(f"{split.replace('-', '_')}: expected an even number of scenes, got {count}")
    output.mkdir(parents=True, exist_ok=True)
    for old in [*output.glob("train-*.tar"), *output.glob("val-*.tar")]:
        old.unlink()
    jobs = [
        (output, pairs, split, number, start, min(start + SHARD, count))
        for split, count in counts.items()
        for number, start in enumerate(range(0, count, SHARD))
    ]
    if workers == 1:
        shards = [write_shard(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(workers) as executor:
            shards = list(executor.map(write_shard, *zip(*jobs, strict=True)))
    names = {kind: list(found) for kind, found in NAMES.items()}
    about = {"names": names, "held_out": list(HELD_OUT), "colours": list(COLOURS)}
    (output / "names.json").write_text(json.dumps(about, indent=2) + "\n")
    return shards


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--pairs", type=Path, default=PAIRS, help="folder of the bundled pairs")
    parser.add_argument("--train", type=int, default=8000, help="scenes to train on")
    parser.add_argument("--val", type=int, default=800, help="scenes of the same names and other pictures")
    parser.add_argument("--val-open", type=int, default=200, help="scenes with names that train has not")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    options = vars(parser.parse_args())
    start = time.perf_counter()
    try:
        shards = build(**options)
    except ValueError as error:
        parser.error(str(error))
    size = sum(path.stat().st_size for path in shards)
    print(f"{len(shards)} shards, {size / 1e6:.0f} MB, in {options['output']} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
