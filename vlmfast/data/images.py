"""Image bytes to upright RGB."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image

try:
    import simplejpeg
except ImportError:  # PIL decodes the same, slower
    simplejpeg = None

FORMATS = ("WEBP", "JPEG", "PNG")  # naming them keeps PIL's other parsers away from untrusted bytes
MAX_PIXELS = 89_478_485  # of an image as its header states it; where PIL warns of a decompression bomb

JPEG_DECODER = "PIL" if simplejpeg is None else f"simplejpeg {simplejpeg.__version__}"

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = {UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}
"""Width and height change places."""


class TooManyPixelsError(ValueError):
    """An image's header states more than MAX_PIXELS."""


def decode_image(data: bytes, min_side: int | Callable[[int, int], int] | None = None) -> Image.Image:
    """Decode WebP, JPEG or PNG to RGB, turned upright by its EXIF orientation, transparency on white.

    An image of more than MAX_PIXELS is refused before memory is taken for its pixels.

    Args:
        data: the file's bytes.
        min_side: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size while both sides keep at least this many
            pixels, which costs less; None keeps the size. A function gives it for the upright image's width and height.
    Raises:
        TooManyPixelsError, a ValueError: the header states more than MAX_PIXELS.
        ValueError: the bytes are no image of these formats, or are damaged or cut short.
    """
    found = decode_pixels(data, min_side)
    return found if isinstance(found, Image.Image) else Image.fromarray(found)


def decode_pixels(
    data: bytes, min_side: int | Callable[[int, int], int] | None = None
) -> Image.Image | np.ndarray[Any, np.dtype[np.uint8]]:
    """As `decode_image`, but a plain JPEG is uint8 (H, W, 3) where simplejpeg is installed, of the same pixels."""
    try:
        _check_pixels(*_webp_size(data))  # PIL's decoder takes memory for two frames when it opens a file
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_pixels(*image.size)
        if image.format in ("JPEG", "MPO"):
            turn = _turn(image)
            if min_side is not None:
                upright = image.size[::-1] if turn in TURNED else image.size
                least = min_side if isinstance(min_side, int) else min_side(*upright)
                image.draft(None, (least, least))
            if turn is None and image.mode == "RGB" and (pixels := _simple_jpeg(data, *image.size)) is not None:
                return pixels
        image.load()
        if image.format == "PNG" and "transparency" in image.info:
            image.info["transparency"] = _png_transparency(image, depth=data[24])
        return to_rgb(_upright(image))
    except (MemoryError, TooManyPixelsError):
        raise
    except Image.DecompressionBombError as error:  # PIL's own limit is twice as high, and looked at first
        raise TooManyPixelsError(f"data: {error}") from error
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, ... on damaged bytes
        raise ValueError(f"data: expected a WebP, JPEG or PNG image; PIL reports {error}") from error


def _simple_jpeg(data: bytes, width: int, height: int) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
    """A JPEG at the size to which PIL would decode it, by simplejpeg; None where it cannot, for PIL to judge.

    Both have libjpeg-turbo inside. PIL spends a fifth of its time on four bytes a pixel, and more at half of the size.
    """
    if simplejpeg is None:
        return None
    try:
        pixels: np.ndarray[Any, np.dtype[np.uint8]] = simplejpeg.decode_jpeg(data, min_height=height, min_width=width)
    except ValueError:  # damaged
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _upright(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright, by its EXIF orientation."""
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # struct.error, SyntaxError, ...: a damaged EXIF block says nothing about the pixels
        return None


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise TooManyPixelsError(f"data: {width} x {height} pixels, more than the limit of {MAX_PIXELS:,}")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height in a WebP header; (0, 0) of other bytes."""

    def number(start: int, size: int) -> int:
        return int.from_bytes(data[start : start + size], "little")

    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return 0, 0
    if data[12:16] == b"VP8X":
        return number(24, 3) + 1, number(27, 3) + 1
    if data[12:16] == b"VP8L":
        return (number(21, 4) & 0x3FFF) + 1, (number(21, 4) >> 14 & 0x3FFF) + 1
    return number(26, 2) & 0x3FFF, number(28, 2) & 0x3FFF


def _png_transparency(image: Image.Image, depth: int) -> Any:
    """The transparent colour as the loaded pixels have it: PIL scales those of other depths to 8 bits, not this."""
    colour = image.info["transparency"]
    if image.mode == "L" and depth in (2, 4):
        return colour * 255 // (2**depth - 1)
    if image.mode == "RGB" and depth == 16:
        return tuple(channel >> 8 for channel in colour)
    return colour


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB from any mode: transparency composited on white, 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I"):  # PIL would clip at 255, and look for the transparent level among 8 bits
        levels, transparent = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray((levels >> 8).astype(np.uint8))
        if transparent is not None:
            image.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode != "RGB" else image
    image = image.convert("RGBA")
    opaque = Image.new("RGB", image.size, "white")
    opaque.paste(image, mask=image.getchannel("A"))
    return opaque
