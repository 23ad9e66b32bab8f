"""What Fast R-CNN makes of proposals: which are trained towards what, their loss, and pooling from the map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.ops import box_iou, roi_align, roi_pool

FOREGROUND = 0.5
"""Overlap (IoU) with a true box from which a proposal is an object; below it is background."""

CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))
"""Boxes to regression targets and back; torchvision's, with the paper's weights."""


class Drawn(NamedTuple):
    """The proposals of an image that are trained.

    Attributes:
        boxes (N, 4).
        labels (N,): int64 of classes, the number of classes for background.
        goals (N, 4): regression targets; of background meaningless.
        attributes (N, M): int64, -1 where there is none.
    """

    boxes: Tensor
    labels: Tensor
    goals: Tensor
    attributes: Tensor


def draw(proposals: Tensor, target: dict[str, Tensor], num_classes: int, count: int, share: float = 0.25) -> Drawn:
    """The proposals of an image, and its true boxes, drawn for the loss.

    Args:
        proposals (P, 4).
        target: "boxes" (G, 4), "labels" (G,) int64 and "attributes" (G, M) int64.
        num_classes: K.
        count: of those that are drawn, fewer where there are fewer.
        share: of them that are objects, at most.
    """
    truth = target["boxes"].to(proposals)
    candidates = torch.cat([proposals, truth])
    labels = torch.full((len(candidates),), num_classes, device=proposals.device)
    which = torch.zeros_like(labels)
    if len(truth):
        most, which = box_iou(truth, candidates).max(dim=0)
        labels = torch.where(most >= FOREGROUND, target["labels"][which], labels)
    sampler = BalancedPositiveNegativeSampler(count, share)
    positive, negative = sampler([(labels < num_classes).long()])
    kept = (positive[0] | negative[0]).nonzero()[:, 0]
    candidates, labels, which = candidates[kept], labels[kept], which[kept]
    if not len(truth):
        none = target["attributes"].new_full((len(kept), target["attributes"].shape[1]), -1)
        return Drawn(candidates, labels, torch.zeros_like(candidates), none)
    goals = CODER.encode_single(truth[which], candidates)
    return Drawn(candidates, labels, goals, target["attributes"][which])


def roi_losses(logits: Tensor, deltas: Tensor, labels: Tensor, goals: Tensor) -> dict[str, Tensor]:
    """Fast R-CNN's loss, a mean over proposals::

        classes = -log softmax(logits)[label];  boxes = smooth_l1(deltas[label] - goals), 0 for background

    Args:
        logits (N, K + 1): background last.
        deltas (N, K, 4): of each class.
        labels (N,), goals (N, 4).
    """
    objects = (labels < deltas.shape[1]).nonzero()[:, 0]
    boxes = F.smooth_l1_loss(deltas[objects, labels[objects]], goals[objects], reduction="sum")
    return {"classes": F.cross_entropy(logits, labels), "boxes": boxes / len(labels)}


def attribute_loss(logits: Tensor, attributes: Tensor) -> Tensor:
    """The mean over all attributes that objects are said to have of -log softmax(logits)[attribute]; 0 without any.

    Args:
        logits (N, A + 1).
        attributes (N, M): int64, -1 where there is none.
    """
    said = (attributes >= 0).nonzero()
    total = F.cross_entropy(logits[said[:, 0]], attributes[said[:, 0], said[:, 1]], reduction="sum")
    return total / max(1, len(said))


def pool(maps: Tensor, boxes: Sequence[Tensor], size: int, stride: int, op: str) -> Tensor:
    """The parts of maps (B, C, H, W) that boxes see, (R, C, size, size), image by image; float32.

    Args:
        boxes: of each image (R_i, 4), pixels.
        stride: pixels between two places of the map.
        op: "pool", the maximum in each bin, its borders rounded to places of the map; or "align", the mean of samples
            between places.
    """
    own = [each.to(maps.device, torch.float32) for each in boxes]
    if op == "pool":
        pooled: Tensor = roi_pool(maps.float(), own, size, 1 / stride)
    else:
        pooled = roi_align(maps.float(), own, size, 1 / stride, sampling_ratio=-1, aligned=True)
    return pooled
