"""The objects of records in the place of a detector's: their boxes, names and attributes as `Sample.features`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfast.data.dataset import ImageTextDataset


class RecordBoxes(Sequence[dict[str, Tensor]]):
    """What `ImageTextDataset.features` may be, where no detector has been run: the objects that records name.

    Item i has of sample i `boxes` (R, 4) float32 in pixels of the image file; `labels` (R,) int64, places in `names`,
    and `scores` (R,) float32, the objects' confidence; `attributes` (R,) int64, the place in `attributes` of an
    object's first one, and `attribute_scores` (R,) float32, 0 where it has none. There are no `features`: a model with
    an image tower makes them of the boxes. R may be 0; objects without a box of four numbers are left out.

    All records are read once.

    Args:
        dataset: whose records these are.
    """

    def __init__(self, dataset: ImageTextDataset) -> None:
        self.dataset = dataset
        names: set[str] = set()
        attributes: set[str] = set()
        for index in range(len(dataset)):
            for each in objects_of(dataset.record(index)):
                names.add(_name(each))
                attributes.update(_attributes(each)[:1])
        self.names, self.attributes = sorted(names), sorted(attributes)
        self._names = {name: place for place, name in enumerate(self.names)}
        self._attributes = {name: place for place, name in enumerate(self.attributes)}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        objects = objects_of(self.dataset.record(index))
        first = [_attributes(each)[:1] for each in objects]
        return {
            "boxes": torch.tensor([each["box"] for each in objects], dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor([self._names[_name(each)] for each in objects], dtype=torch.int64),
            "scores": torch.tensor([float(each.get("confidence", 1.0)) for each in objects]),
            "attributes": torch.tensor([self._attributes[own[0]] if own else 0 for own in first], dtype=torch.int64),
            "attribute_scores": torch.tensor([float(bool(own)) for own in first]),
        }


def objects_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a record that have a box of four numbers."""
    found = record.get("objects")
    return [each for each in found if _has_box(each)] if isinstance(found, list) else []


def _has_box(each: Any) -> bool:
    box = each.get("box") if isinstance(each, dict) else None
    return isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) for x in box)


def _name(each: dict[str, Any]) -> str:
    return str(each.get("name") or "")


def _attributes(each: dict[str, Any]) -> list[str]:
    found = each.get("attributes")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
