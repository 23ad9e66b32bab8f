import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from vlmfast.data import eval_transform, moco_transform, train_transform, transforms
from vlmfast.data.transforms import _jitter, _turn_hue


def random_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", [(64, 64), (91, 64), (64, 91), (10, 300), (1, 1)])
@pytest.mark.parametrize(
    "transform", [train_transform(32), train_transform(32, flip=0.5, jitter=0.4), eval_transform(32)]
)
def test_output_is_uint8_nhwc(transform, size):
    output = transform(random_image(*size), generator())
    assert output.shape == (32, 32, 3)
    assert output.dtype == torch.uint8
    assert output.is_contiguous()


@pytest.mark.parametrize("transform", [train_transform(2), eval_transform(2)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "CMYK", "1", "I;16"])
def test_images_of_any_mode_are_taken(transform, mode):
    assert transform(Image.new(mode, (4, 4)), generator()).shape == (2, 2, 3)


@pytest.mark.parametrize("transform", [train_transform(4, scale=(1, 1), ratio=(1, 1)), eval_transform(4)])
def test_transparency_is_composited_on_white(transform):
    assert transform(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), generator()).unique().tolist() == [255]


def test_eval_leaves_an_image_of_the_right_size_alone():
    image = random_image(48, 48)
    np.testing.assert_array_equal(eval_transform(48)(image, generator()), np.asarray(image))


@pytest.mark.parametrize(("width", "height", "box"), [(53, 48, (2, 0, 50, 48)), (48, 61, (0, 6, 48, 54))])
def test_eval_crops_without_resampling_when_the_shorter_side_is_right(width, height, box):
    image = random_image(width, height)
    np.testing.assert_array_equal(eval_transform(48)(image, generator()), np.asarray(image.crop(box)))


def test_eval_equals_resize_then_centre_crop():
    image = random_image(200, 100)
    expected = image.resize((100, 50), Image.Resampling.BICUBIC).crop((25, 0, 75, 50))
    np.testing.assert_array_equal(eval_transform(50)(image, generator()), np.asarray(expected))


def test_a_full_crop_of_the_right_size_is_the_image():
    image = random_image(32, 32)
    output = train_transform(32, scale=(1, 1), ratio=(1, 1))(image, generator())
    np.testing.assert_array_equal(output, np.asarray(image))


def test_train_depends_on_the_generator_only():
    transform, image = train_transform(32, flip=0.5, jitter=0.4), random_image(64, 48)
    first = transform(image, generator(1))
    np.random.seed(7)
    torch.manual_seed(7)
    assert torch.equal(first, transform(image, generator(1)))
    assert not torch.equal(first, transform(image, generator(2)))


def test_flip_mirrors_and_moves_no_other_draw():
    image = random_image(64, 64)
    plain, flipped = train_transform(32)(image, generator(3)), train_transform(32, flip=1.0)(image, generator(3))
    assert torch.equal(flipped, plain.flip(1))
    half = [train_transform(32, flip=0.5)(image, generator(seed)) for seed in range(200)]
    unflipped = [train_transform(32)(image, generator(seed)) for seed in range(200)]
    share = np.mean([torch.equal(a, b) for a, b in zip(half, unflipped, strict=True)])
    assert 0.3 < share < 0.7  # 0.5 with a standard deviation of 0.035


def test_jitter_equals_pil_where_nothing_clips():
    image = Image.fromarray(np.random.default_rng(0).integers(100, 140, (16, 16, 3), dtype=np.uint8))
    expected = ImageEnhance.Color(image).enhance(1.3)
    expected = ImageEnhance.Contrast(expected).enhance(0.7)
    expected = ImageEnhance.Brightness(expected).enhance(1.2)
    difference = np.asarray(_jitter(image, 1.2, 0.7, 1.3)).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 3  # PIL truncates to 8 bits after each of its three steps


def test_jitter_is_the_identity_at_one_and_clips_at_the_ends():
    image = random_image(16, 16)
    np.testing.assert_array_equal(_jitter(image, 1.0, 1.0, 1.0), np.asarray(image))
    assert np.asarray(_jitter(image, 50.0, 1.0, 1.0)).max() == 255
    assert np.asarray(_jitter(image, 0.0, 1.0, 1.0)).max() == 0
    assert np.ptp(np.asarray(_jitter(image, 1.0, 1.0, 0.0)), axis=2).max() == 0
    assert np.ptp(np.asarray(_jitter(image, 1.0, 0.0, 1.0))) == 0


def test_jitter_stays_within_its_range():
    image = Image.new("RGB", (8, 8), (100, 100, 100))  # on plain grey only brightness shows
    levels = [int(train_transform(8, jitter=0.2)(image, generator(seed))[0, 0, 0]) for seed in range(200)]
    assert 80 <= min(levels) < 85
    assert 115 < max(levels) <= 120


unit = st.floats(0, 1, exclude_max=True)


@given(st.integers(1, 500), st.integers(1, 500), st.lists(unit, min_size=4, max_size=4))
def test_crops_lie_inside_with_area_and_ratio_in_range(width, height, draws):
    left, top, right, bottom = train_transform(8, scale=(0.3, 0.9), ratio=(0.5, 1.5))._crop(width, height, *draws)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    assert 0.5 - 1e-9 <= w / h <= 1.5 + 1e-9
    assert w * h <= 0.9 * width * height * (1 + 1e-9)
    touches = math.isclose(w, width) or math.isclose(h, height)
    assert touches or w * h >= 0.3 * width * height * (1 - 1e-9)


@given(st.integers(0, 300), st.booleans(), st.lists(unit, min_size=4, max_size=4))
def test_min_side_leaves_every_crop_enough_pixels(longer, tall, draws):
    transform = train_transform(40)
    size = [transform.min_side, transform.min_side + longer]
    left, top, right, bottom = transform._crop(*(size if tall else size[::-1]), *draws)
    assert min(right - left, bottom - top) >= 40 - 1e-9


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"image_size": 0}, "image_size"),
        ({"image_size": 2.5}, "image_size"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.9, 0.5)}, "scale"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"flip": 1.5}, "flip"),
        ({"jitter": -0.1}, "jitter"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        train_transform(**{"image_size": 8, **arguments})


def test_moco_checks_its_arguments():
    with pytest.raises(ValueError, match=r"^strength: expected a number in \[0, 1\], got 1.5"):
        moco_transform(8, strength=1.5)
    with pytest.raises(ValueError, match=r"^flip: expected"):
        moco_transform(8, flip=-1)


def test_eval_size_is_checked():
    with pytest.raises(ValueError, match=r"^image_size: expected a positive int, got -1"):
        eval_transform(-1)


@pytest.mark.parametrize("transform", [train_transform(8, flip=0.5), eval_transform(8)])
def test_transforms_pickle(transform):
    assert pickle.loads(pickle.dumps(transform)) == transform


@pytest.mark.parametrize(("strength", "untouched"), [(0.0, 0.8 * 0.5), (0.4, 0.2 * 0.8 * 0.5)])
def test_moco_changes_colour_greys_and_blurs_as_often_as_it_says(strength, untouched):
    image = random_image(96, 96)
    plain, moco = train_transform(96, scale=(0.5, 1)), moco_transform(96, scale=(0.5, 1), flip=0.0, strength=strength)
    outputs = [(moco(image, generator(seed)), plain(image, generator(seed))) for seed in range(300)]
    same = np.mean([torch.equal(a, b) for a, b in outputs])
    grey = np.mean([bool((a == a[..., :1]).all()) for a, _ in outputs])
    for share, expected in ((same, untouched), (grey, 0.2)):
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / 300)


def test_moco_crops_and_flips_as_train_does():
    image = random_image(64, 48)
    outputs = [moco_transform(32, strength=0.0)(image, generator(seed)) for seed in range(40)]
    expected = [train_transform(32, scale=(0.2, 1), flip=0.5)(image, generator(seed)) for seed in range(40)]
    assert 5 < sum(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True)) < 30
    assert moco_transform(32).min_side == train_transform(32, scale=(0.2, 1)).min_side


def test_moco_blur_is_as_strong_at_any_size():
    def contrast_left(size):
        stripes = np.zeros((size, size, 3), dtype=np.uint8)
        stripes[:, (np.arange(size) * 28 // size) % 2 == 0] = 255  # 28 stripes, whatever the size
        image = Image.fromarray(stripes)
        plain, moco = (
            train_transform(size, scale=(1, 1), ratio=(1, 1)),
            moco_transform(size, scale=(1, 1), strength=0.0),
        )
        moco = dataclasses.replace(moco, crop=plain)
        left = [moco(image, generator(seed)).float().std() for seed in range(60)]
        return torch.stack(left) / plain(image, generator()).float().std()

    small, large = contrast_left(112), contrast_left(224)
    assert large.min() < 0.9
    torch.testing.assert_close(small, large, rtol=0.05, atol=0)


def test_hue_turns_round_the_circle():
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    assert _turn_hue(red, 0.0).getpixel((0, 0)) == (255, 0, 0)
    assert _turn_hue(red, 1.0).getpixel((0, 0)) == (255, 0, 0)
    green, blue = (_turn_hue(red, share).getpixel((0, 0)) for share in (1 / 3, -1 / 3))
    assert green[1] == 255
    assert max(green[0], green[2]) < 10
    assert blue[2] == 255
    assert max(blue[0], blue[1]) < 10


@pytest.mark.parametrize("size", [(400, 300), (333, 777), (224, 1), (31, 50)])
@pytest.mark.parametrize("side", [224, 64])
def test_train_is_within_a_level_of_pil(size, side):
    """PIL's crop and bicubic resize, as torchvision has them too, in larger and in smaller images."""
    image = random_image(*size)
    for seed in range(3):
        box = train_transform(side)._crop(*size, *generator(seed).random(8)[:4])
        whole = transforms._whole_pixels(box)
        found = train_transform(side)(image, generator(seed)).numpy()
        if min(whole[2] - whole[0], whole[3] - whole[1]) > side:
            expected = np.asarray(image.crop(whole).resize((side, side), Image.Resampling.BICUBIC)).astype(int)
            assert np.abs(found - expected).max() <= 1
        else:  # with the fractions of pixels
            expected = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box))
            np.testing.assert_array_equal(found, expected)
        flipped = train_transform(side, flip=1.0)(image, generator(seed)).numpy()
        np.testing.assert_array_equal(flipped, found[:, ::-1])


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 1000))
def test_the_side_asked_of_an_image_is_that_of_the_crop_that_comes(width, height, seed):
    transform, drawn = train_transform(64), generator(seed)
    side = transform.min_side_of(width, height, drawn)
    left, top, right, bottom = transform._crop(width, height, *generator(seed).random(8)[:4])
    scale = side / min(width, height)  # of the image when it is decoded
    assert 64 - 1e-6 <= scale * min(right - left, bottom - top) <= 64 * (1 + 1 / max(1, side - 1)) + 1e-6
    assert drawn.random() == generator(seed).random()


@pytest.mark.parametrize("size", [(400, 300), (40, 300), (64, 64)])
def test_an_array_is_treated_as_an_image(size):
    image = random_image(*size)
    for seed in range(4):
        transform = train_transform(64, flip=0.5, jitter=0.2 * (seed % 2))
        found = transform(np.asarray(image).copy(), generator(seed))
        assert found.is_contiguous()
        assert torch.equal(found, transform(image, generator(seed)))
