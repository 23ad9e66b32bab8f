import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from vlmfast.data.images import decode_image, to_rgb


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
