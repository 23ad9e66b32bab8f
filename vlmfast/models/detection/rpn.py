"""The region proposal network: torchvision's, trained by the paper's labels and loss.

torchvision's own differs from the paper: anchors that cross the border of the image are trained too, smooth L1 has
beta 1/9, and both terms are divided by the number of anchors drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_iou

POSITIVE, NEGATIVE = 0.7, 0.3
"""Overlaps (IoU) of an anchor with a true box from which, and below which, it is trained."""
ANCHORS = 256
"""Anchors of an image that are drawn for the loss, half of them positive at most."""
BOX_WEIGHT = 10.0
"""The paper's lambda."""


class RPN(RegionProposalNetwork):
    """See the top of this file.

    Args:
        channels: C of the map.
        anchor_sizes: square roots of the anchors' areas, pixels.
        aspect_ratios: of their height to their width.
        candidates: best anchors before NMS.
        proposals: boxes that NMS at IoU 0.7 leaves at most, in training and in evaluation.
    """

    def __init__(
        self,
        channels: int,
        anchor_sizes: Sequence[float],
        aspect_ratios: Sequence[float],
        candidates: int,
        proposals: tuple[int, int],
    ) -> None:
        anchors = AnchorGenerator((tuple(anchor_sizes),), (tuple(aspect_ratios),))
        super().__init__(
            anchors,
            RPNHead(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=POSITIVE,
            bg_iou_thresh=NEGATIVE,
            batch_size_per_image=ANCHORS,
            positive_fraction=0.5,
            pre_nms_top_n={"training": candidates, "testing": candidates},
            post_nms_top_n={"training": proposals[0], "testing": proposals[1]},
            nms_thresh=0.7,
        )

    def forward(
        self, images: ImageList, maps: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals (R_i, 4) of each image, best first, and with targets the losses, sums over images.

        Args:
            images: of one size, padded on the right and below; `image_sizes` are heights and widths without padding.
            maps (B, C, H, W): of the images.
            targets: of each image "boxes" (G_i, 4).
        """
        logits, deltas, anchors = self.predict(images, maps)
        decoded = self.box_coder.decode(deltas.detach().flatten(0, 1), anchors).view(len(maps), -1, 4)
        proposals, _ = self.filter_proposals(decoded, logits, images.image_sizes, [logits.shape[1]])
        losses = {}
        if targets is not None:
            labels, boxes = zip(
                *(
                    label_anchors(own, target["boxes"], size)
                    for own, target, size in zip(anchors, targets, images.image_sizes, strict=True)
                ),
                strict=True,
            )
            goals = torch.stack(self.box_coder.encode(list(boxes), anchors))
            positive, negative = (torch.stack(drawn).bool() for drawn in self.fg_bg_sampler(list(labels)))
            losses = rpn_losses(logits, deltas, goals, positive, negative, maps.shape[-2] * maps.shape[-1])
        return proposals, losses

    def predict(self, images: ImageList, maps: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits (B, A) and deltas (B, A, 4), float32 whatever the map's dtype, and each image's anchors (A, 4)."""
        logits, deltas = (level[0].float() for level in self.head([maps]))
        count, (height, width) = logits.shape[1], maps.shape[-2:]
        logits = logits.permute(0, 2, 3, 1).flatten(1)
        deltas = deltas.view(len(maps), count, 4, height, width).permute(0, 3, 4, 1, 2).reshape(len(maps), -1, 4)
        return logits, deltas, self.anchor_generator(images, [maps.float()])


def label_anchors(anchors: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which anchors of an image are trained, and towards which true box.

    Positive are anchors that overlap a true box by 0.7 or more, and those that overlap a true box most; negative are
    those that overlap none by 0.3. Anchors that cross the border are not trained, but for a true box that no other
    anchor touches.

    Args:
        anchors (A, 4), boxes (G, 4): pixels.
        size: height and width of the image.
    Returns:
        labels (A,), float32: 1 positive, 0 negative, -1 not trained; and the true box (A, 4) that each overlaps most,
        zeros where there is no true box.
    """
    height, width = size
    border = anchors.new_tensor([width, height])
    inside = ((anchors[:, :2] >= 0) & (anchors[:, 2:] <= border)).all(dim=1)
    inside |= ~inside.any()  # anchors are larger than the image
    labels = torch.where(inside, 0.0, -1.0)
    if not len(boxes):
        return labels, torch.zeros_like(anchors)
    every = box_iou(boxes, anchors)
    shared = every * inside
    missed = shared.amax(dim=1) == 0
    shared[missed] = every[missed]
    most, which = shared.max(dim=0)
    labels[inside & (most >= NEGATIVE)] = -1
    best = shared.amax(dim=1, keepdim=True)
    labels[(most >= POSITIVE) | ((shared == best) & (best > 0)).any(dim=0)] = 1
    return labels, boxes[which].to(anchors)


def rpn_losses(
    logits: Tensor, deltas: Tensor, goals: Tensor, positive: Tensor, negative: Tensor, places: int
) -> dict[str, Tensor]:
    """The paper's equation 1, as sums over images of its two terms::

        objectness = 1 / N_cls sum_i BCE(logits_i, positive_i)            over the N_cls anchors drawn
        box = 10 / N_reg sum_(i positive) smooth_l1(deltas_i - goals_i)   N_reg the number of places of the map

    Args:
        logits (B, A), deltas, goals (B, A, 4), positive, negative (B, A): bool, the anchors drawn.
        places: of the map, H * W.
    """
    drawn = positive | negative
    entropy = F.binary_cross_entropy_with_logits(logits, positive.to(logits), reduction="none")
    objectness = (entropy * drawn).sum(dim=1) / drawn.sum(dim=1).clamp(min=1)
    box = F.smooth_l1_loss(deltas[positive], goals[positive], reduction="sum")
    return {"objectness": objectness.sum(), "proposal_box": BOX_WEIGHT / places * box}


def image_list(images: Tensor, sizes: Sequence[tuple[int, int]]) -> Any:
    """Images of one size, with the heights and widths that are not padding."""
    return ImageList(images, list(sizes))
