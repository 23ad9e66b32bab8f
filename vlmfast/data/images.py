"""Image bytes to upright RGB."""

import io

import numpy as np
from PIL import ExifTags, Image

FORMATS = ("WEBP", "JPEG", "PNG")  # naming them keeps PIL's other parsers away from untrusted bytes

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, min_side: int | None = None) -> Image.Image:
    """Decode WebP, JPEG or PNG to RGB, turned upright by its EXIF orientation, transparency on white.

    Args:
        data: the file's bytes.
        min_side: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size while both sides keep at least this many
            pixels, which costs less; None keeps the size.
    Raises:
        ValueError: the bytes are no image of these formats, or are damaged or cut short.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if min_side is not None:
            image.draft(None, (min_side, min_side))
        image.load()
        return to_rgb(_upright(image))
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, ... on damaged bytes
        raise ValueError(f"data: expected a WebP, JPEG or PNG image; PIL reports {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # struct.error, SyntaxError, ...: a damaged EXIF block says nothing about the pixels
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB from any mode: transparency composited on white, 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I;16"):  # PIL would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode != "RGB" else image
    image = image.convert("RGBA")
    opaque = Image.new("RGB", image.size, "white")
    opaque.paste(image, mask=image.getchannel("A"))
    return opaque
