"""Regions of a detector of torchvision, under the names that Faster R-CNN's have here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import clip_boxes_to_image

from vlmfast.models.contract import fingerprint
from vlmfast.models.detection.regions import Scored, Selection, as_batch, describe, select


class TorchvisionRegions(nn.Module):
    """A two-stage detector of torchvision as a provider of regions::

        provider = TorchvisionRegions(fasterrcnn_resnet50_fpn_v2(weights="DEFAULT"))
        cache_features(folder, dataset, provider.regions, provider.frozen_fingerprint())

    Features are what its box head gives, 1024 wide for the detectors with FPN. Its background class, which is the first
    there, is the last here. It is kept in eval mode and without gradient.

    Args:
        detector: fasterrcnn_*, maskrcnn_* or keypointrcnn_* of torchvision. Detectors with one stage, as RetinaNet,
            have no features of boxes.
    Raises:
        TypeError: it is none of these.
    """

    def __init__(self, detector: GeneralizedRCNN) -> None:
        super().__init__()
        heads = getattr(detector, "roi_heads", None)
        if not all(hasattr(heads, name) for name in ("box_roi_pool", "box_head", "box_predictor")):
            raise TypeError(f"detector: expected one of torchvision with box features, got {type(detector).__name__}")
        self.detector = detector.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TorchvisionRegions:
        """As nn.Module's, but the detector stays in eval mode."""
        super().train(mode)
        self.detector.eval()
        return self

    @torch.no_grad()
    def regions(
        self, images: Tensor | Sequence[Tensor], *, least: int = 10, most: int = 100, threshold: float = 0.2
    ) -> dict[str, list[Tensor]]:
        """As `FasterRCNNModel.regions`, without attributes; one image at a time, as torchvision pads a batch."""
        selection = Selection(least, most, threshold)
        return as_batch([self._one(image, selection) for image in images])

    def frozen_fingerprint(self) -> str:
        """A hash of what decides `regions`."""
        return fingerprint({"detector": str(self.detector)}, self.detector)

    def _one(self, image: Tensor, selection: Selection) -> dict[str, Tensor]:
        detector, heads = self.detector, self.detector.roi_heads
        device = next(detector.parameters()).device
        pixels = image.to(device).permute(2, 0, 1).float() / 255
        batch, _ = detector.transform([pixels])
        maps = detector.backbone(batch.tensors)
        if isinstance(maps, Tensor):
            maps = {"0": maps}
        proposals, _ = detector.rpn(batch, maps)
        features = heads.box_head(heads.box_roi_pool(maps, proposals, batch.image_sizes))
        logits, deltas = heads.box_predictor(features)
        boxes = heads.box_coder.decode(deltas, proposals)  # (P, K + 1, 4)
        scored = Scored(
            clip_boxes_to_image(boxes[:, 1:], batch.image_sizes[0]),
            logits.softmax(dim=1).roll(-1, dims=1),
            features.flatten(1),
        )
        places, labels = select(scored, selection)
        size, seen = (image.shape[1], image.shape[0]), batch.image_sizes[0][::-1]
        return describe(scored, places, labels, [seen[0] / size[0], seen[1] / size[1]], size)
