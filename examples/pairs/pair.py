"""One image-text pair, and what both sources share: finding Debian's files and fitting an image to the canvas."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64  # side of the square canvas, pixels


class MissingPackageError(RuntimeError):
    """A file of a Debian package is not installed."""


@dataclass(frozen=True)
class Pair:
    """An image (SIZE, SIZE) RGB and its text.

    `title` is the source's own name for the image, before any mending; `group` and `subgroup` are the source's own
    classification; `category` is one of the phrases shared by both sources.
    """

    image: Image.Image
    caption: str
    category: str
    source: str
    title: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    author: str | None = None


def installed(path: str, package: str) -> Path:
    """Return `path`, or raise MissingPackageError naming the Debian package that holds it."""
    if not Path(path).exists():
        raise MissingPackageError(f"{path} not found: install the Debian package {package} (apt-get install {package})")
    return Path(path)


def on_canvas(image: Image.Image) -> Image.Image:
    """Scale to fit a white SIZE x SIZE canvas, keeping the aspect ratio. Transparency is composited on white."""
    image = image.convert("RGBA")
    scale = SIZE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(image, ((SIZE - width) // 2, (SIZE - height) // 2))
    return canvas.convert("RGB")


def nearly_blank(image: Image.Image, share: float = 0.01, tolerance: int = 24) -> bool:
    """True when fewer than `share` of the pixels differ from the median colour by more than `tolerance` of 255."""
    pixels = np.asarray(image, dtype=np.int16).reshape(-1, 3)
    away = np.abs(pixels - np.median(pixels, axis=0)).max(axis=1) > tolerance
    return bool(away.mean() < share)
