"""Images of any size in one batch, their boxes moved along."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmfast.data import Sample
from vlmfast.data.images import to_rgb
from vlmfast.data.text import usable


@dataclass(frozen=True)
class WholeImage:
    """A transform that leaves an image as it is: boxes need the size of the file, which the collator still sees."""

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        return torch.from_numpy(np.array(to_rgb(image)))


@dataclass(frozen=True)
class Sizes:
    """How large images are made: the shorter side is `shorter`, unless the longer one would pass `longer`; pixels."""

    shorter: int
    longer: int

    def of(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that an image is made."""
        scale = min(self.shorter / min(width, height), self.longer / max(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))

    def resize(self, image: Tensor) -> Tensor:
        """uint8 (H, W, 3) to uint8 (H', W', 3), bilinear with antialias."""
        width, height = self.of(image.shape[1], image.shape[0])
        if (height, width) == image.shape[:2]:
            return image
        planes = image.permute(2, 0, 1)[None].float()
        small = F.interpolate(planes, (height, width), mode="bilinear", antialias=True)
        return small[0].round_().clamp_(0, 255).byte().permute(1, 2, 0)


def pad(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Images uint8 (H_i, W_i, 3) in the upper left corners of (B, H, W, 3), and their widths and heights (B, 2)."""
    sizes = torch.tensor([[image.shape[1], image.shape[0]] for image in images])
    width, height = sizes.amax(dim=0).tolist()
    batch = images[0].new_zeros(len(images), height, width, 3)
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return batch, sizes


class Group(NamedTuple):
    """Images of a batch that go through the backbone together.

    Attributes:
        places: in the batch.
        images (N, 3, H, W): normalised, zero in the padding.
        sizes: their heights and widths without it.
    """

    places: list[int]
    images: Tensor
    sizes: list[tuple[int, int]]


def groups(
    pixel_values: Tensor,
    image_sizes: Tensor | None,
    stride: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    least: int = 1,
) -> list[Group]:
    """A batch as groups of images that have one size once each is padded to multiples of the stride.

    So what is made of an image does not depend on the others of its batch.

    Args:
        pixel_values, image_sizes: as `pad` gives them; without sizes no image is padded.
        mean, std: per channel, of pixels in [0, 1].
        dtype: of the images.
        least: side of a padded image at least, pixels.
    Raises:
        ValueError: pixel_values are not uint8 (B, H, W, 3).
    """
    if pixel_values.dtype != torch.uint8 or pixel_values.ndim != 4 or pixel_values.shape[-1] != 3:
        shape = tuple(pixel_values.shape)
        raise ValueError(f"pixel_values: expected uint8 (B, H, W, 3), got {pixel_values.dtype} {shape}")
    whole = (pixel_values.shape[2], pixel_values.shape[1])
    known = [whole] * len(pixel_values) if image_sizes is None else [(w, h) for w, h in image_sizes.tolist()]
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, (width, height) in enumerate(known):
        rows, columns = (-(-max(side, least) // stride) * stride for side in (height, width))
        alike[rows, columns].append(place)
    centre, scale = (pixel_values.new_tensor(values, dtype=torch.float32) for values in (mean, std))
    found = []
    for (rows, columns), places in alike.items():
        images = pixel_values.new_zeros(len(places), rows, columns, 3, dtype=dtype)
        for image, place in zip(images, places, strict=True):
            width, height = known[place]
            image[:height, :width] = (pixel_values[place, :height, :width].float() / 255 - centre) / scale
        # NHWC in memory (channels_last), in which convolutions are fastest.
        found.append(Group(places, images.permute(0, 3, 1, 2), [known[place][::-1] for place in places]))
    return found


class DetectionCollator:
    """Samples, their images whole, to `pixel_values` uint8 (B, H, W, 3), padded, and `image_sizes` int64 (B, 2).

    In training also `boxes` float32 (B, G, 4), pixels of the resized images; `labels` int64 (B, G), -1 behind an
    image's last; `attributes` int64 (B, G, M), -1 where there is none. Objects that are crowds, have another name, or
    are less than a pixel wide or high are left out.

    Args:
        sizes: of images.
        names, attributes: what objects are called to its number; None in evaluation, where no object is read.
        flip: probability that an image and its boxes are turned left to right, by `Sample.seed`.
    """

    def __init__(
        self,
        sizes: Sizes,
        names: Mapping[str, int] | None = None,
        attributes: Mapping[str, int] | None = None,
        flip: float = 0.0,
    ) -> None:
        self.sizes, self.names, self.attributes, self.flip = sizes, names, attributes or {}, flip

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        images, found = [], []
        for sample in usable(samples):
            assert sample.image is not None
            image = self.sizes.resize(sample.image)
            scale = (image.shape[1] / sample.image.shape[1], image.shape[0] / sample.image.shape[0])
            turned = random.Random(sample.seed).random() < self.flip
            images.append(image.flip(1) if turned else image)
            if self.names is not None:
                found.append(self._objects(sample.record, scale, image.shape[1], image.shape[0], turned))
        pixel_values, image_sizes = pad(images)
        batch = {"pixel_values": pixel_values, "image_sizes": image_sizes}
        return batch | _stack(found) if found else batch

    def _objects(
        self, record: dict[str, Any], scale: tuple[float, float], width: int, height: int, turned: bool
    ) -> list[tuple[list[float], int, list[int]]]:
        """Of each object its box, class and attributes."""
        assert self.names is not None
        found = []
        for box, name, attributes in named_objects(record):
            if name not in self.names:
                continue
            sides = resized_box(box, scale, width, height)
            if sides is None:
                continue
            left, top, right, bottom = sides
            if turned:
                left, right = width - right, width - left
            numbers = [self.attributes[each] for each in attributes if each in self.attributes]
            found.append(([left, top, right, bottom], self.names[name], numbers))
        return found


def named_objects(record: dict[str, Any]) -> list[tuple[list[float], str, list[str]]]:
    """Box, name and attributes of the objects of a record that have a name and a box, as `box_of` has it."""
    found = []
    for each in record.get("objects") or ():
        box = box_of(each)
        if box is not None and isinstance(each.get("name"), str):
            attributes = each.get("attributes")
            said = [one for one in attributes if isinstance(one, str)] if isinstance(attributes, list) else []
            found.append((box, each["name"], said))
    return found


def box_of(each: Any) -> list[float] | None:
    """The box of a record's object, where that is no crowd and has one of four finite numbers."""
    box = each.get("box") if isinstance(each, dict) and not each.get("crowd") else None
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) and isfinite(x) for x in box)
    return box if numbers else None


def resized_box(box: Sequence[float], scale: tuple[float, float], width: int, height: int) -> list[float] | None:
    """A box in pixels of the resized image and within it; None where it is less than a pixel wide or high.

    Args:
        box: left, top, right, bottom, in pixels of the image that was.
        scale: the resized width and height over those of before.
        width, height: of the resized image.
    """
    left, right = (min(max(x * scale[0], 0.0), width) for x in box[0::2])
    top, bottom = (min(max(y * scale[1], 0.0), height) for y in box[1::2])
    return None if right - left < 1 or bottom - top < 1 else [left, top, right, bottom]


def _stack(images: Sequence[Sequence[tuple[list[float], int, list[int]]]]) -> dict[str, Tensor]:
    rows = max(1, max(map(len, images)))
    many = max(1, max((len(attributes) for image in images for _, _, attributes in image), default=0))
    boxes = torch.zeros(len(images), rows, 4)
    labels = torch.full((len(images), rows), -1)
    attributes = torch.full((len(images), rows, many), -1)
    for place, image in enumerate(images):
        for row, (box, label, said) in enumerate(image):
            boxes[place, row] = torch.tensor(box)
            labels[place, row] = label
            attributes[place, row, : len(said)] = torch.tensor(said)
    return {"boxes": boxes, "labels": labels, "attributes": attributes}
