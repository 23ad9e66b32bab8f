"""vlmfast bench data."""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmfast.bench.harness import NotHere, require
from vlmfast.bench.report import machine, to_json
from vlmfast.data.dataset import Recipe
from vlmfast.data.images import JPEG_DECODER
from vlmfast.data.stream_shards import RawSample, opened, read_shard, shard_urls
from vlmfast.data.transforms import eval_transform, train_transform

SIDES = (400, 800)  # of the images that it makes, pixels
QUALITY = 90
SCALE = (0.9, 1.0)  # open_clip's crop


def run(arguments: Sequence[str]) -> int:
    """Images a second, from a JPEG's bytes to pixels, of our transforms and of open_clip's, in one thread."""
    parser = argparse.ArgumentParser(prog="vlmfast bench data", description=run.__doc__)
    parser.add_argument("--data", help="tar shards whose images are decoded, as vlmfast train reads them; by default"
                        f" JPEGs of {SIDES[0]} to {SIDES[1]} pixels that are made here")  # fmt: skip
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, metavar="DIR", help="write data.json to this folder")
    options = parser.parse_args(arguments)
    for name in ("images", "image_size", "rounds"):
        if (value := getattr(options, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    files = list(islice(read_images(options.data) if options.data else made_images(), options.images))
    if not files:
        raise ValueError(f"--data: no image in {options.data}")
    header = {**machine(), "threads": 1, "pillow": version("pillow"), "jpeg_decoder": JPEG_DECODER}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = measure(files, transforms(options.image_size), options.rounds)
    finally:
        torch.set_num_threads(threads)
    size = {"images": len(files), "bytes": sum(map(len, files)) // len(files), "image_size": options.image_size}
    rows = [row(name, seconds, times, len(files)) for name, seconds in times.items()]
    print(to_json(header).strip())
    print(f"\n{size['images']} images of {size['bytes'] // 1000} kB to {options.image_size} pixels, one thread")
    print(f"{'':20}{'images/s':>10}{'ms':>8}{'IQR':>8}{'x open_clip':>13}")
    for found in rows:
        ratio = "" if found["ratio"] is None else f"{found['ratio']:.2f}"
        times_ = f"{found['ms']:8.2f}{found['iqr_ms']:8.2f}"
        print(f"{found['provider']:20}{found['images_per_second']:10.0f}{times_}{ratio:>13}")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        target = options.output / "data.json"
        target.write_text(to_json({"op": "data", "machine": header, "size": size, "rows": rows}))
        print(f"\nwritten: {target}")
    return 0


def read_images(source: str) -> Iterator[bytes]:
    """The files of the images in shards, in order."""
    for url in shard_urls(source):
        with opened(url) as stream:
            for raw in read_shard(url, stream, Counter(), last_try=True):
                yield from raw.images


def made_images(seed: int = 0) -> Iterator[bytes]:
    """JPEGs whose spectrum falls with the frequency as that of photographs does, three bits a pixel."""
    generator = np.random.default_rng(seed)
    while True:
        width, height = generator.integers(SIDES[0], SIDES[1], size=2, endpoint=True).tolist()
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
        frequency[0, 0] = 1
        noise = np.fft.rfft2(generator.standard_normal((4, height, width))) / frequency**1.3
        fields = np.fft.irfft2(noise, s=(height, width))
        fields = (fields - fields.mean((1, 2), keepdims=True)) / fields.std((1, 2), keepdims=True)
        colours = 128 + 45 * fields[:1] + 18 * fields[1:]
        file = io.BytesIO()
        pixels = np.clip(np.moveaxis(colours, 0, -1), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
        yield file.getvalue()


Decode = Callable[[bytes], torch.Tensor]


def transforms(image_size: int) -> dict[str, Decode]:
    """Name -> bytes to pixels; without open_clip's where it is not installed."""
    generator = np.random.default_rng(0)

    def ours(transform: Any) -> Decode:
        recipe = Recipe(transform)

        def decode(data: bytes) -> torch.Tensor:
            found = recipe.image(RawSample("", None, None, [data], False), 0, 0, generator)
            if isinstance(found, str):
                raise ValueError(f"--data: expected images that can be decoded, got a {found}")
            return found

        return decode

    def theirs(transform: Any) -> Decode:
        return lambda data: transform(Image.open(io.BytesIO(data)))

    made = {
        "vlmfast train": ours(train_transform(image_size, scale=SCALE)),
        "vlmfast eval": ours(eval_transform(image_size)),
    }
    try:
        make = require("open_clip.transform").image_transform
    except NotHere as reason:
        print(f"open_clip: not measured ({reason})")
        return made
    return {
        "vlmfast train": made["vlmfast train"],
        "open_clip train": theirs(make(image_size, is_train=True)),
        "vlmfast eval": made["vlmfast eval"],
        "open_clip eval": theirs(make(image_size, is_train=False)),
    }


def measure(files: Sequence[bytes], decoders: Mapping[str, Decode], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time for all files, in each round; the decoders take turns, file by file."""
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for number in range(rounds + 1):  # the first is not counted
        spent = dict.fromkeys(decoders, 0.0)
        for data in files:
            for name, decode in decoders.items():
                start = time.process_time()
                decode(data)
                spent[name] += time.process_time() - start
        for name, seconds in spent.items():
            if number:
                times[name].append(seconds)
    return times


def row(name: str, seconds: Sequence[float], times: Mapping[str, Sequence[float]], count: int) -> dict[str, Any]:
    """Medians over the rounds; the ratio is that of the same round."""
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    other = times.get(name.replace("vlmfast", "open_clip"))
    median = statistics.median(seconds) / count
    return {
        "provider": name, "images_per_second": 1 / median, "ms": median * 1e3,
        "iqr_ms": (quartiles[2] - quartiles[0]) / count * 1e3, "rounds": len(seconds),
        "ratio": None if other is None else statistics.median(b / a for a, b in zip(seconds, other, strict=True)),
    }  # fmt: skip
