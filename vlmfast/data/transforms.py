"""Augmentation: PIL image to uint8 pixels. Randomness comes from the generator that is passed in, and nowhere else."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from vlmfast.data.images import to_rgb

Array = np.ndarray[Any, np.dtype[np.uint8]]
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL's "L"


# (image of any mode and size, generator) -> uint8 (H, W, 3). It may have an attribute `min_side`: then a JPEG can come
# decoded at a fraction of its size, its sides still at least that many pixels. It may have a method
# `min_side_of(width, height, generator)` beside it, the same for one image, which leaves the generator as it is; and
# `takes_arrays = True`, which says that an image may also be uint8 (H, W, 3).
Transform = Callable[[Image.Image, np.random.Generator], Tensor]


def train_transform(
    image_size: int,
    *,
    scale: tuple[float, float] = (0.6, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.0,
    jitter: float = 0.0,
) -> Transform:
    """Random resized crop, then optionally a horizontal flip and colour jitter.

    Args:
        image_size: side of the square output, pixels.
        scale: range of the crop's area as a fraction of the image's. A crop that would stick out is shrunk, its ratio
            kept, so on elongated images the area can be smaller.
        ratio: range of the crop's width / height, log-uniform.
        flip: probability of a left-right flip. Zero by default: captions name sides and images show text.
        jitter: brightness, contrast and saturation are each scaled by a factor uniform in [1 - jitter, 1 + jitter].
    Returns:
        A picklable (PIL image, generator) -> uint8 (image_size, image_size, 3).
    Raises:
        ValueError: an argument is out of its range; the message names it.
    """
    _check_size(image_size)
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale: expected 0 < low <= high <= 1, got {scale}")
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"ratio: expected 0 < low <= high, got {ratio}")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip: expected a probability, got {flip}")
    if not 0 <= jitter <= 1:
        raise ValueError(f"jitter: expected a number in [0, 1], got {jitter}")
    return _TrainTransform(image_size, scale, ratio, flip, jitter)


def moco_transform(
    image_size: int, *, scale: tuple[float, float] = (0.2, 1.0), flip: float = 0.5, strength: float = 0.4
) -> Transform:
    """The augmentation of MoCo v2, for self-supervision between views: crop, flip, changes of colour, and blur.

    After a random resized crop: with probability 0.8 brightness, contrast and saturation are scaled by up to
    `strength` and the hue turned by up to a quarter of it; with 0.2 grey; with 0.5 Gaussian blur of 0.1 to 2 pixels per
    224 of the side, so that it is as strong at any size.

    Args:
        image_size, scale, flip: as `train_transform`.
        strength: of the colour jitter, in [0, 1]; the hue is turned by at most strength / 4 of the circle.
    Returns:
        A picklable (PIL image, generator) -> uint8 (image_size, image_size, 3).
    Raises:
        ValueError: an argument is out of its range; the message names it.
    Source: Chen et al. 2020 (2003.04297), section 3; the view augmentation of DeCLIP's released configurations.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: expected a number in [0, 1], got {strength}")
    crop = train_transform(image_size, scale=scale, flip=flip)
    assert isinstance(crop, _TrainTransform)
    return _MocoTransform(crop, strength)


def two_views(transform: Transform) -> Transform:
    """Two independent draws of a transform: a picklable (PIL image, generator) -> uint8 (2, H, W, 3)."""
    return _TwoViews(transform)


def eval_transform(image_size: int) -> Transform:
    """Resize the shorter side to `image_size` and crop the centre; pixels are untouched when the size is right already.

    Returns:
        A picklable (PIL image, generator) -> uint8 (image_size, image_size, 3); the generator is not used.
    Raises:
        ValueError: image_size is not a positive int.
    """
    _check_size(image_size)
    return _EvalTransform(image_size)


@dataclass(frozen=True)
class _TrainTransform:
    image_size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    jitter: float

    @property
    def min_side(self) -> int:
        """The image side at which the smallest crop still has `image_size` pixels."""
        narrowest = min(self.ratio[0], 1 / self.ratio[1])
        return math.ceil(self.image_size / min(math.sqrt(self.scale[0] * narrowest), narrowest))

    def min_side_of(self, width: int, height: int, generator: np.random.Generator) -> int:
        """The image side at which the crop that comes next has `image_size` pixels."""
        left, top, right, bottom = self._crop(width, height, *copy.deepcopy(generator).random(8).tolist()[:4])
        return math.ceil(self.image_size * min(width, height) / min(right - left, bottom - top))

    takes_arrays = True

    def __call__(self, image: Image.Image | Array, generator: np.random.Generator) -> Tensor:
        if isinstance(image, Image.Image):
            image = to_rgb(image)
            width, height = image.size
        else:
            height, width = image.shape[:2]
        # All draws at once: turning one augmentation on leaves the others' numbers as they were.
        area, shape, x, y, flip, *colour = generator.random(8).tolist()
        box = self._crop(width, height, area, shape, x, y)
        pixels = _resized(image, box, self.image_size)
        if flip < self.flip:
            pixels = pixels.flip(1)
        if self.jitter:
            coloured = _jitter(Image.fromarray(pixels.numpy()), *(1 + self.jitter * (2 * u - 1) for u in colour))
            pixels = _pixels(coloured)
        return pixels

    def augment(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        return Image.fromarray(self(image, generator).numpy())

    def _crop(
        self, width: int, height: int, area: float, shape: float, x: float, y: float
    ) -> tuple[float, float, float, float]:
        """The box (left, top, right, bottom) that four uniform numbers stand for."""
        area = width * height * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
        shape = self.ratio[0] * (self.ratio[1] / self.ratio[0]) ** shape
        w, h = math.sqrt(area * shape), math.sqrt(area / shape)
        shrink = min(1.0, width / w, height / h)
        w, h = min(w * shrink, width), min(h * shrink, height)
        left, top = x * (width - w), y * (height - h)
        return left, top, min(left + w, width), min(top + h, height)


@dataclass(frozen=True)
class _MocoTransform:
    crop: _TrainTransform
    strength: float

    @property
    def min_side(self) -> int:
        return self.crop.min_side

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        image = self.crop.augment(image, generator)
        coloured, grey, blurred, turn, sigma, *colour = generator.random(8).tolist()
        if coloured < 0.8:
            image = _jitter(image, *(1 + self.strength * (2 * u - 1) for u in colour))
            image = _turn_hue(image, self.strength / 4 * (2 * turn - 1))
        if grey < 0.2:
            image = image.convert("L").convert("RGB")
        if blurred < 0.5:
            radius = (0.1 + 1.9 * sigma) * self.crop.image_size / 224
            image = image.filter(ImageFilter.GaussianBlur(radius))
        return _pixels(image)


@dataclass(frozen=True)
class _TwoViews:
    transform: Transform

    @property
    def min_side(self) -> int | None:
        return getattr(self.transform, "min_side", None)

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        return torch.stack([self.transform(image, generator), self.transform(image, generator)])


@dataclass(frozen=True)
class _EvalTransform:
    image_size: int

    @property
    def min_side(self) -> int:
        return self.image_size

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        image = to_rgb(image)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        if side != self.image_size:
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC, box=box)
        elif image.width != image.height:
            image = image.crop(box)
        return _pixels(image)


def _jitter(image: Image.Image, brightness: float, contrast: float, saturation: float) -> Image.Image:
    """Scale saturation about each pixel's grey, contrast about the mean grey, brightness about black: one matrix."""
    offset = brightness * (1 - contrast) * float(np.asarray(image.convert("L")).mean())
    matrix: list[float] = []
    for row in range(3):
        colour = [(1 - saturation) * weight + saturation * (row == column) for column, weight in enumerate(LUMA)]
        matrix += [*(brightness * contrast * value for value in colour), offset]
    return image.convert("RGB", tuple(matrix))


def _turn_hue(image: Image.Image, share: float) -> Image.Image:
    """Turn the hue by a share of the circle, in steps of 1/256 of it."""
    steps = round(256 * share)
    if steps == 0:  # HSV rounds
        return image
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + steps) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _whole_pixels(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    """The box with sides between pixels, at least one pixel wide and high."""
    left, top = int(box[0]), int(box[1])
    return left, top, max(left + 1, round(box[2])), max(top + 1, round(box[3]))


def _resized(image: Image.Image | Array, box: tuple[float, float, float, float], side: int) -> Tensor:
    """A box of an RGB image at (side, side), bicubic.

    Where it is reduced, whole pixels of it by torch's kernel: within one level of PIL's crop and resize, in less than
    half the time. Where it is enlarged, by PIL: torch's kernel is up to two levels away there, and a pixel counts.
    """
    left, top, right, bottom = _whole_pixels(box)
    width, height = right - left, bottom - top
    if min(width, height) <= side:
        whole = image if isinstance(image, Image.Image) else Image.fromarray(image)
        return _pixels(whole.resize((side, side), Image.Resampling.BICUBIC, box=box))
    if isinstance(image, Image.Image):  # as PIL has it in memory, four bytes a pixel
        data = bytearray(image.crop((left, top, right, bottom)).tobytes("raw", "RGBX"))
        crop = torch.frombuffer(data, dtype=torch.uint8).view(height, width, 4)
    else:
        crop = torch.from_numpy(image)[top:bottom, left:right]
    planes = crop.permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, (side, side), mode="bicubic", antialias=True)
    return resized[0, :3].permute(1, 2, 0).contiguous()


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


def _check_size(image_size: int) -> None:
    if not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"image_size: expected a positive int, got {image_size!r}")
