"""Regions of images in batches: padded, with their places, masked; and captions that do not belong to their images.

A region is a row of a sample's `features` (docs/data.md): a detector's, whose `features` are read as they are; or a box
alone, of which an image tower makes the feature. Without either, a grid of equal cells stands for the regions.

All randomness comes from `Sample.seed`, through the generators that `generators_of` makes, one for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmfast.data import Sample
from vlmfast.data.records import captions_of

ENOUGH = 0.5
"""The overlap (IoU) with a phrase's box from which on a region is one of the phrase's."""
ZEROED = -1
"""In `region_source`: zeros stand in this place."""


@dataclass(frozen=True)
class WholeImage:
    """The transform of models that read regions: an image as it is, (H, W, 3) uint8, as boxes are in its pixels.

    `RegionCollator` stretches it. Nothing is cropped or flipped, which would make captions and boxes wrong.
    """

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        return torch.from_numpy(np.array(image))


@dataclass(frozen=True)
class RegionCollator:
    """The regions of samples as the keyword arguments of a model.

    A call gives `region_boxes` float32 (B, R, 4), x1 y1 x2 y2 as shares of width and height; `region_mask` int64
    (B, R), 1 where there is a region; and `region_features` float32 (B, R, D), or with `image_size` in their place
    `pixel_values` uint8 (B, S, S, 3), the whole images stretched to a square. R is at least 1. What lies behind a
    sample's last region is zero.

    Args:
        image_size: S, for a model with an image tower; None for a model of features.
        grid: G; where samples have no features, their regions are G x G equal cells, row by row.
        max_regions: of which a sample that has more keeps the first; a detector's are sorted by score.
    """

    image_size: int | None
    grid: int
    max_regions: int

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The batch.

        Raises:
            ValueError: a sample lacks features that are needed, has those of a detector beside an image tower, or lacks
                the size of its image; the message says what to do.
        """
        kept = [self._cut(sample) for sample in samples]
        boxes = [torch.zeros(0, 4) if own is None else own["boxes"].float() for own in kept]
        shares = [
            grid_boxes(self.grid) if own is None else corners(box, _image_size(sample, own))
            for sample, own, box in zip(samples, kept, boxes, strict=True)
        ]
        batch = {
            "region_boxes": _padded(shares),
            "region_mask": _padded([torch.ones(len(share), dtype=torch.int64) for share in shares]),
        }
        if self.image_size is None:
            batch["region_features"] = _padded([own["features"].float() for own in kept if own is not None])
        else:
            batch["pixel_values"] = torch.stack([stretched(sample, self.image_size) for sample in samples])
        return batch

    def labels(self, samples: Sequence[Sample], name: str, fill: float = 0) -> Tensor | None:
        """Another row of the regions' features, such as "labels" or "probabilities", (B, R, ...), in the order of
        the batch and padded with `fill`; None where one of the samples has none of that name."""
        kept = [self._cut(sample) for sample in samples]
        rows = [own[name] for own in kept if own is not None and name in own]
        return _padded(rows, fill) if len(rows) == len(samples) else None

    def _cut(self, sample: Sample) -> dict[str, Tensor] | None:
        """The first regions of a sample; None where a grid stands for them."""
        own = sample.features
        if self.image_size is None and (own is None or "features" not in own):
            raise ValueError(
                f"features: expected 'boxes' and 'features' of sample {sample.key!r}, got {list(own or {})}; this "
                "model reads a detector's regions (--features FOLDER)"
            )
        if own is None:
            return None
        if "boxes" not in own:
            raise ValueError(f"features: expected 'boxes' of sample {sample.key!r}, got {list(own)}")
        if self.image_size is not None and "features" in own:
            raise ValueError(
                f"features: expected boxes alone of sample {sample.key!r}, got 'features' of width "
                f"{own['features'].shape[-1]} too, beside a model with an image tower; --region-dim makes one without"
            )
        rows = len(own["boxes"])
        return {
            name: value[: self.max_regions] if value.dim() and len(value) == rows and name != "image_size" else value
            for name, value in own.items()
        }


def _padded(rows: Sequence[Tensor], fill: float = 0) -> Tensor:
    """(B, R, ...) of (R_i, ...), R at least 1."""
    found = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)
    return found if found.shape[1] else found.new_full((len(found), 1, *found.shape[2:]), fill)


def _image_size(sample: Sample, own: dict[str, Tensor]) -> tuple[int, int]:
    """Width and height of the image file."""
    if "image_size" in own:
        width, height = own["image_size"].tolist()
        return int(width), int(height)
    if sample.image is None:
        raise ValueError(f"features: expected 'image_size' of sample {sample.key!r}, whose image is not read")
    return sample.image.shape[1], sample.image.shape[0]


def stretched(sample: Sample, side: int) -> Tensor:
    """A sample's image (H, W, 3) as a square uint8 (S, S, 3), by bicubic interpolation."""
    if sample.image is None:
        raise ValueError(f"image: expected one of sample {sample.key!r}, got None")
    if sample.image.shape == (side, side, 3):
        return sample.image
    image = Image.fromarray(sample.image.numpy())
    return torch.from_numpy(np.array(image.resize((side, side), Image.Resampling.BICUBIC)))


def grid_boxes(side: int) -> Tensor:
    """The cells (G * G, 4) of a grid, row by row, as shares of width and height."""
    edges = torch.arange(side) / side
    y, x = torch.meshgrid(edges, edges, indexing="ij")
    first = torch.stack([x, y], dim=-1).view(-1, 2)
    return torch.cat([first, first + 1 / side], dim=1)


def corners(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (R, 4) in pixels as [x1 / W, y1 / H, x2 / W, y2 / H], cut at the image's borders; LXMERT's places.

    Args:
        size: W and H.
    """
    return (boxes / torch.tensor([*size, *size], dtype=boxes.dtype)).clamp(0, 1)


def corners_and_area(shares: Tensor) -> Tensor:
    """[x1 / W, y1 / H, x2 / W, y2 / H, area / (W H)] (..., 5) of what `corners` gives (..., 4); ViLBERT's places."""
    area = (shares[..., 2] - shares[..., 0]) * (shares[..., 3] - shares[..., 1])
    return torch.cat([shares, area.clamp(min=0)[..., None]], dim=-1)


def generators_of(samples: Sequence[Sample]) -> list[np.random.Generator]:
    """A generator of each sample's own seed; a sample's draws then do not depend on the others of its batch."""
    return [np.random.default_rng(sample.seed) for sample in samples]


class MaskedRegions(NamedTuple):
    """Which regions are predicted, and what the model sees in their places.

    Attributes:
        masked: bool (B, R), True where one is predicted.
        source: int64 (B, R), for `take_regions`: the place among the batch's B * R regions of the feature that is seen
            here, mostly its own; ZEROED for zeros.
    """

    masked: Tensor
    source: Tensor


def mask_regions(
    region_mask: Tensor,
    generators: Sequence[np.random.Generator],
    *,
    probability: float = 0.15,
    zeroed: float = 0.9,
    replaced: float = 0.0,
) -> MaskedRegions:
    """Draws regions to predict: of these a share is zeroed, a share is another image's region, and the rest stays.

    ViLBERT zeroes 0.9; LXMERT zeroes 0.8 and replaces 0.1. Where the batch has no region of another image, what was to
    be replaced stays.

    Args:
        region_mask (B, R): 1 where there is a region.
        generators: B of them.
        probability: of a region to be chosen.
        zeroed, replaced: shares of those that are chosen.
    Raises:
        ValueError: a share is out of range.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: expected a number from 0 to 1, got {probability}")
    if not (zeroed >= 0 and replaced >= 0 and zeroed + replaced <= 1):
        raise ValueError(f"zeroed and replaced: expected shares of 1 together, got {zeroed} and {replaced}")
    present = region_mask.numpy().astype(bool)
    rows, columns = present.shape
    places = np.arange(rows * columns).reshape(rows, columns)
    source, masked = places.copy(), np.zeros_like(present)
    for row, generator in enumerate(generators):
        own = np.flatnonzero(present[row])
        chosen, fate, other = generator.random((3, len(own)))
        predicted = chosen < probability
        masked[row, own[predicted]] = True
        source[row, own[predicted & (fate < zeroed)]] = ZEROED
        swapped = own[predicted & (fate >= zeroed) & (fate < zeroed + replaced)]
        if len(swapped):
            others = places[present & (np.arange(rows) != row)[:, None]]
            if len(others):
                drawn = other[predicted & (fate >= zeroed) & (fate < zeroed + replaced)]
                source[row, swapped] = others[(drawn * len(others)).astype(np.int64)]
    return MaskedRegions(torch.from_numpy(masked), torch.from_numpy(source))


def take_regions(features: Tensor, source: Tensor) -> Tensor:
    """Features (B, R, D) as `mask_regions` has them seen: those of the places `source` (B, R), or zeros."""
    taken = features.flatten(0, 1)[source.clamp(min=0)]
    return taken * (source != ZEROED)[..., None].to(taken.dtype)


class Captions(NamedTuple):
    """Captions, some of them another sample's.

    Attributes:
        texts: one of each sample.
        matched: int64 (B,), 1 where it is the sample's own.
    """

    texts: list[str]
    matched: Tensor


def mismatch(
    samples: Sequence[Sample], generators: Sequence[np.random.Generator], probability: float = 0.5
) -> Captions:
    """With a probability the caption of another sample of the batch in the place of a sample's own.

    The other is drawn among those with another caption, and with another image, by its key. Where there are none, the
    caption stays and is a matched one.

    Args:
        samples, generators: B each.
        probability: of a mismatch.
    """
    texts, matched = [], []
    for sample, generator in zip(samples, generators, strict=True):
        wrong, place = generator.random(2)
        own = {sample.caption, *captions_of(sample)}
        others = [each.caption for each in samples if each.key != sample.key and each.caption not in own]
        swapped = bool(others) and wrong < probability
        texts.append(others[int(place * len(others))] if swapped else sample.caption)
        matched.append(int(not swapped))
    return Captions(texts, torch.tensor(matched))
