"""Boxes [x1, y1, x2, y2] in pixels: overlap, sizes of image files, and from a model's pixels to the file's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfast.tasks.batches import batches, seen_as
from vlmfast.tasks.task import Run


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (N, M) of boxes (N, 4) and (M, 4); 0 where both are empty."""
    corner = torch.maximum(a[:, None, :2], b[None, :, :2])
    other = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (other - corner).clamp(min=0).prod(dim=2)
    both = area(a)[:, None] + area(b)[None] - shared
    return torch.where(both > 0, shared / both, 0.0)


def area(boxes: Tensor) -> Tensor:
    """(N,), 0 for a box that is turned over."""
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)


def image_sizes(run: Run) -> dict[int, tuple[int, int]]:
    """Width and height in pixels of every image of the dataset that can be read."""
    dataset = run.dataset
    found: dict[int, tuple[int, int]] = {}
    with seen_as(dataset, _size):
        for batch, indices, _ in batches(
            dataset,
            _sizes,
            batch_size=256,
            num_workers=run.num_workers,
            device=torch.device("cpu"),
            progress=run.progress,
            name="sizes",
        ):
            found |= {index: (int(w), int(h)) for index, (w, h) in zip(indices, batch["sizes"], strict=True)}
    return found


def from_model(boxes: Tensor, seen: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Boxes in pixels of what the model sees, in pixels of the image file.

    The model's transform is taken to keep the aspect, as `vlmfast.data.eval_transform` does: the image is scaled until
    it covers what is seen, and is cut to its centre.

    Args:
        boxes (N, 4): in pixels of what is seen.
        seen, size: width and height of what is seen, and of the file.
    """
    scale = max(seen[0] / size[0], seen[1] / size[1])
    cut = [(size[side] * scale - seen[side]) / 2 for side in (0, 1)]
    return (boxes.double() + torch.tensor(cut * 2, dtype=torch.float64)) / scale


def to_model(boxes: Tensor, seen: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The other way round."""
    scale = max(seen[0] / size[0], seen[1] / size[1])
    cut = [(size[side] * scale - seen[side]) / 2 for side in (0, 1)]
    return boxes.double() * scale - torch.tensor(cut * 2, dtype=torch.float64)


def in_file(boxes: Tensor, batch: dict[str, Any], place: int, size: tuple[int, int]) -> Tensor:
    """Boxes that a model found in an image of a batch, in pixels of the image file.

    Args:
        boxes (N, 4): in pixels of `pixel_values`, of which the image is the corner that `image_sizes` tells, or which
            show it as `from_model` takes it.
        batch: of the model's collator.
        place: of the image in it.
        size: width and height of the file.
    """
    if "image_sizes" in batch:  # nothing was cut away
        width, height = batch["image_sizes"][place].tolist()
        return stretched(boxes, (width, height), size)
    pixels = batch["pixel_values"]
    return from_model(boxes, (pixels.shape[2], pixels.shape[1]), size)


def detected(
    model: Any,
    batch: dict[str, Any],
    phrases: Sequence[Sequence[str]] | None,
    tokenizer: Any,
    sizes: Sequence[tuple[int, int]],
) -> list[dict[str, Tensor]]:
    """What a model's `detect` finds in the images of a batch, on the CPU, boxes float64 in pixels of the image files.

    Args:
        batch: of the model's collator.
        phrases: of each image what an open-vocabulary model is to look for; None for a closed one.
        sizes: width and height of each file.
    """
    more: dict[str, Any] = {name: batch[name] for name in ("image_sizes",) if name in batch}
    if phrases is not None:
        more["tokenizer"] = tokenizer
    found = model.detect(batch["pixel_values"], phrases, **more)
    return [
        {
            "boxes": in_file(one["boxes"].cpu(), batch, place, size),
            "scores": one["scores"].float().cpu(),
            "labels": one["labels"].cpu(),
        }
        for place, (one, size) in enumerate(zip(found, sizes, strict=True))
    ]


def stretched(boxes: Tensor, size: tuple[int, int], other: tuple[int, int]) -> Tensor:
    """Boxes of an image at the same place of another."""
    return boxes.double() * torch.tensor([other[0] / size[0], other[1] / size[1]] * 2, dtype=torch.float64)


def _size(image: Any, generator: Any) -> Tensor:
    return torch.tensor(image.size)


def _sizes(samples: Sequence[Any]) -> dict[str, Any]:
    return {"sizes": [tuple(sample.image.tolist()) for sample in samples]}
