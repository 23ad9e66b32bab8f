import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from vlmfast.data import images
from vlmfast.data.images import TooManyPixelsError, decode_image, to_rgb


def encode(image, image_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture
def colour():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))


def test_lossless_formats_decode_to_the_same_pixels(colour):
    for data in (encode(colour), encode(colour, "WEBP", lossless=True)):
        np.testing.assert_array_equal(pixels(decode_image(data)), np.asarray(colour))


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_transparency_is_composited_on_white(image_format):
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = 0, 128, 255
    data = encode(Image.fromarray(rgba), image_format, **({"lossless": True} if image_format == "WEBP" else {}))
    expected = [[255, 255, 255], [227, 127, 127], [200, 0, 0]]  # 255 - alpha * (255 - colour) / 255
    assert np.abs(pixels(decode_image(data)).astype(int)[0] - expected).max() <= 1  # PIL rounds either way


@pytest.mark.parametrize(
    ("mode", "transparent", "other", "grey"),
    [("P", 0, 1, 9), ("L", 0, 9, 9), ("1", 0, 1, 255), ("RGB", (0, 0, 0), (9, 9, 9), 9)],
)
def test_a_transparent_colour_becomes_white(mode, transparent, other, grey):
    image = Image.new(mode, (2, 1), transparent)
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9])
    image.putpixel((1, 0), other)
    decoded = pixels(decode_image(encode(image, transparency=transparent)))
    assert decoded.tolist() == [[[255] * 3, [grey] * 3]]


def test_grey_and_palette_and_grey_with_alpha(colour):
    grey = colour.convert("L")
    np.testing.assert_array_equal(pixels(decode_image(encode(grey)))[..., 2], np.asarray(grey))
    palette = colour.quantize(16)
    np.testing.assert_array_equal(pixels(decode_image(encode(palette))), np.asarray(palette.convert("RGB")))
    faded = Image.merge("LA", (Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 51)))
    assert pixels(decode_image(encode(faded))).tolist() == [[[204, 204, 204]]]


def test_16_bit_grey_keeps_its_range():
    levels = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    decoded = pixels(decode_image(encode(Image.fromarray(levels))))
    assert decoded[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_cmyk_jpeg():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = pixels(decode_image(encode(cmyk, "JPEG", quality=95)))[4, 4].tolist()
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_exif_orientation_is_honoured(colour, orientation, image_format):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(colour, image_format, exif=exif, **({"lossless": True} if image_format == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels(decode_image(data)), np.asarray(expected))
    assert (decode_image(data).size == colour.size) == (orientation < 5)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0MM", b"Exif\0\0rubbish rubbish", b"Exif\0\0MM\0*\0\0\0\x08\0\x09"])
def test_a_damaged_exif_block_does_not_cost_the_image(colour, exif):
    data = encode(colour, "WEBP", lossless=True, exif=exif)
    np.testing.assert_array_equal(pixels(decode_image(data)), np.asarray(colour))


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(colour):
    data = encode(colour.resize((640, 480)), "JPEG")
    assert [decode_image(data, side).size for side in (None, 300, 240, 120, 60, 1)] == [
        (640, 480),
        (640, 480),
        (320, 240),
        (160, 120),
        (80, 60),
        (80, 60),
    ]


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_cut_and_damaged_bytes_raise(colour, image_format):
    data = encode(colour.resize((64, 64)), image_format)
    for bad in (b"", b"not an image", data[:20], data[: len(data) // 2], b"\0\0\0\0" + data[4:]):
        with pytest.raises(ValueError, match="data: expected a WebP, JPEG or PNG image"):
            decode_image(bad)


def test_other_formats_are_refused(colour):
    with pytest.raises(ValueError, match="expected a WebP, JPEG or PNG image"):
        decode_image(encode(colour, "BMP"))


def test_rgb_is_returned_as_it_is(colour):
    assert to_rgb(colour) is colour


def raw_png(depth, colour, size, rows, transparent=None):
    """A PNG of packed rows, such as PIL does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))]
    parts += [chunk(b"tRNS", transparent)] if transparent else []
    parts += [chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("transparent", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_level_of_grey_becomes_white_at_any_depth(depth, transparent):
    """Levels 0, 1 and the highest, of which one is transparent."""
    highest = 2**depth - 1
    levels = [0, 1, highest]
    packed = sum(level << depth * (15 - place) for place, level in enumerate(levels)).to_bytes(2 * depth, "big")
    data = raw_png(depth, 0, (3, 1), [packed[: -(-3 * depth // 8)]], struct.pack(">H", transparent))
    expected = [255 if level == transparent else round(level * 255 / highest - 0.49) for level in levels]
    assert pixels(decode_image(data))[0, :, 0].tolist() == expected


def test_16_bit_grey_is_transparent_at_one_level_only():
    row = np.array([0x1234, 0x1235, 0x34], dtype=">u2").tobytes()
    data = raw_png(16, 0, (3, 1), [row], struct.pack(">H", 0x1234))
    assert pixels(decode_image(data))[0, :, 1].tolist() == [255, 0x12, 0]


def test_a_transparent_colour_of_16_bits_becomes_white():
    row = np.array([0x1234, 0x5678, 0x9ABC, 0xFFFF, 0, 0x100], dtype=">u2").tobytes()
    data = raw_png(16, 2, (2, 1), [row], struct.pack(">3H", 0x1234, 0x5678, 0x9ABC))
    assert pixels(decode_image(data))[0].tolist() == [[255, 255, 255], [255, 0, 1]]


def test_transparency_and_orientation_go_together():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.new("I;16", (2, 1))
    image.putpixel((0, 0), 0x4000)
    decoded = decode_image(encode(image, exif=exif, transparency=0))
    assert pixels(decoded)[:, 0, 0].tolist() == [0x40, 255]


def bomb(image_format, side):
    """A few hundred bytes that state side x side pixels."""
    if image_format == "PNG":
        return raw_png(8, 0, (side, side), [b""])
    if image_format == "VP8L":
        header = b"VP8L" + struct.pack("<IBI", 9, 0x2F, (side - 1) | (side - 1) << 14) + bytes(4)
        return b"RIFF" + struct.pack("<I", len(header) + 4) + b"WEBP" + header
    data = bytearray(encode(Image.new("RGB", (16, 16)), "JPEG" if image_format == "JPEG" else "WEBP"))
    if image_format == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", side, side)
    elif image_format == "VP8":
        data[26:30] = struct.pack("<HH", side, side)
    else:
        canvas = b"VP8X" + struct.pack("<II", 10, 0) + 2 * (side - 1).to_bytes(3, "little")
        data = b"RIFF" + struct.pack("<I", len(data) - 8 + len(canvas)) + b"WEBP" + canvas + data[12:]
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "VP8", "VP8L", "VP8X"])
def test_a_decompression_bomb_is_refused_before_memory_is_taken(image_format, monkeypatch):
    data, before = bomb(image_format, 16000), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = []
    monkeypatch.setattr(Image.Image, "load", lambda image: opened.append(image))
    if image_format.startswith("VP8"):
        monkeypatch.setattr(Image, "open", opened.append)
    with pytest.raises(TooManyPixelsError, match=r"data: (16000 x 16000 pixels|Image size \(256000000 pixels\))"):
        decode_image(data)
    assert not opened
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB; the pixels would be 250,000


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "VP8", "VP8L", "VP8X"])
def test_the_limit_is_stated_and_is_of_pixels(image_format, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99 * 99)
    with pytest.raises(TooManyPixelsError, match=r"data: 100 x 100 pixels, more than the limit of 9,801"):
        decode_image(bomb(image_format, 100))
    monkeypatch.setattr(images, "MAX_PIXELS", 16 * 16)
    assert decode_image(encode(Image.new("RGB", (16, 16)), "JPEG" if image_format == "JPEG" else "PNG")).size == (
        16,
        16,
    )


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_fraction_of_a_jpeg_can_depend_on_its_upright_size(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(Image.new("RGB", (640, 320), (200, 30, 30)), "JPEG", exif=exif)
    asked = []

    def min_side(width, height):
        asked.append((width, height))
        return 160

    upright = (640, 320) if orientation == 1 else (320, 640)
    assert decode_image(data, min_side=min_side).size == tuple(side // 2 for side in upright)
    assert asked == [upright]


@pytest.mark.parametrize("sampling", [0, 1, 2])
@pytest.mark.parametrize(("width", "height", "side"), [(640, 480, None), (641, 479, 224), (1203, 901, 200), (50, 9, 8)])
def test_simplejpeg_gives_what_pil_gives(monkeypatch, width, height, side, sampling):
    """Bit for bit, at every fraction of the size."""
    if images.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    noise = np.random.default_rng(0).integers(0, 256, (-(-height // 5), -(-width // 5), 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    data = encode(image, "JPEG", quality=90, subsampling=sampling, progressive=sampling == 1)
    fast = images.decode_pixels(data, side)
    assert isinstance(fast, np.ndarray)
    monkeypatch.setattr(images, "simplejpeg", None)
    slow = images.decode_pixels(data, side)
    assert isinstance(slow, Image.Image)
    np.testing.assert_array_equal(fast, np.asarray(slow))


def test_what_simplejpeg_refuses_is_for_pil_to_judge(colour):
    whole = encode(colour.resize((200, 100)), "JPEG")
    with pytest.raises(ValueError, match="PIL reports"):
        images.decode_pixels(whole[: len(whole) // 2])
    assert isinstance(images.decode_pixels(encode(colour.convert("L"), "JPEG")), Image.Image)
    assert isinstance(images.decode_pixels(encode(colour.convert("CMYK"), "JPEG")), Image.Image)
    assert isinstance(images.decode_pixels(whole + b"behind the end"), np.ndarray)
