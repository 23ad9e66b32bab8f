"""Options and config of Faster R-CNN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from vlmfast.models.contract import Options

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LONGER = 5 / 3
"""The longer side of an image at most, in shorter sides: 1333 for 800."""


@dataclass
class FasterRCNNOptions(Options):
    """A small new detector by default, which two cores train; `--backbone` names a large one."""

    image_size: int = field(default=96, metadata={"help": "Shorter side of the images, pixels; they are not cropped."})
    flip: float = field(default=0.5, metadata={"help": "Probability of a left-right flip, boxes included."})
    backbone: str = field(default="small", metadata={"help": "small, or a ResNet of torchvision, such as resnet101."})
    backbone_weights: str | None = field(
        default=None, metadata={"help": "A .pth or .safetensors of torchvision's weights for that ResNet."}
    )
    backbone_width: int = field(default=12, metadata={"help": "Width of a small backbone; features are 32 times this."})
    anchor_sizes: list[int] | None = field(
        default=None, metadata={"help": "Sides of the square anchors, pixels; by default shares of --image-size."}
    )
    num_names: int = field(default=1600, metadata={"help": "Names of objects that are classes, the most frequent."})
    num_attributes: int = field(default=400, metadata={"help": "Attributes that are told, the most frequent."})

    new_model: ClassVar[tuple[str, ...]] = ("backbone", "backbone_weights", "backbone_width", "anchor_sizes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.flip <= 1:
            raise ValueError(f"--flip: expected a probability, got {self.flip}")

    def check(self) -> None:
        super().check()
        if self.backbone != "small":
            self.refuse(("backbone_width",), f"--backbone {self.backbone}")
        elif self.backbone_weights:
            raise ValueError("--backbone-weights needs the --backbone that they are of")


class FasterRCNNConfig(PreTrainedConfig):
    """The paper's sizes by default; `FasterRCNNOptions` make a small model.

    Args:
        id2label: number to name of the classes.
        attributes: their names; without any there is no attribute head.
        backbone: "small", or a ResNet of torchvision.
        backbone_width: of a small one, see `vlmfast.models.detection.backbone.Backbone`.
        stride: pixels between two places of the map, 16 or 8.
        frozen_norm: whether batch norm of the backbone is a fixed affine map.
        frozen_stages: how many parts are frozen from below: 1 is the stem, 2 is res2 too, 5 all.
        image_size, longer_size: pixels; the shorter side of an image is made `image_size`, unless the longer one
            would pass `longer_size`.
        anchor_sizes, aspect_ratios: anchors at each place; pixels, and height to width.
        candidates: best anchors before NMS.
        train_proposals, proposals: boxes of an image after it at most, in training and in evaluation.
        roi_size: P, bins along a side of a pooled region.
        roi_op: "pool" or "align".
        roi_batch: proposals of an image that are drawn for the loss.
        roi_objects: the share of them that are objects, at most.
        attribute_embed_dim, attribute_hidden_size: of the attribute head.
        image_mean, image_std: per channel, of pixels in [0, 1].
        Others as PreTrainedConfig.
    Raises:
        ValueError: a field is out of range.
    """

    model_type = "faster_rcnn"

    def __init__(
        self,
        *,
        attributes: Sequence[str] = (),
        backbone: str = "resnet101",
        backbone_width: int = 64,
        stride: int = 16,
        frozen_norm: bool = True,
        frozen_stages: int = 2,
        image_size: int = 800,
        longer_size: int = 1333,
        anchor_sizes: Sequence[float] = (128, 256, 512),
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        candidates: int = 6000,
        train_proposals: int = 2000,
        proposals: int = 300,
        roi_size: int = 14,
        roi_op: str = "pool",
        roi_batch: int = 64,
        roi_objects: float = 0.25,
        attribute_embed_dim: int = 256,
        attribute_hidden_size: int = 512,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        **kwargs: Any,
    ) -> None:
        self.attributes = list(attributes)
        self.backbone = backbone
        self.backbone_width = backbone_width
        self.stride = stride
        self.frozen_norm = frozen_norm
        self.frozen_stages = frozen_stages
        self.image_size = image_size
        self.longer_size = longer_size
        self.anchor_sizes = list(anchor_sizes)
        self.aspect_ratios = list(aspect_ratios)
        self.candidates = candidates
        self.train_proposals = train_proposals
        self.proposals = proposals
        self.roi_size = roi_size
        self.roi_op = roi_op
        self.roi_batch = roi_batch
        self.roi_objects = roi_objects
        self.attribute_embed_dim = attribute_embed_dim
        self.attribute_hidden_size = attribute_hidden_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        kwargs.setdefault("id2label", {0: "object"})
        super().__init__(**kwargs)
        for name in ("image_size", "candidates", "train_proposals", "proposals", "roi_size", "roi_batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if self.longer_size < self.image_size:
            raise ValueError(f"longer_size: expected at least image_size {self.image_size}, got {self.longer_size}")
        if not 0 < self.roi_objects <= 1:
            raise ValueError(f"roi_objects: expected a share above 0, got {self.roi_objects}")
        if not 0 <= self.frozen_stages <= 5:
            raise ValueError(f"frozen_stages: expected 0 to 5, got {self.frozen_stages}")
        if self.roi_op not in ("pool", "align"):
            raise ValueError(f"roi_op: expected 'pool' or 'align', got {self.roi_op!r}")
        for name in ("anchor_sizes", "aspect_ratios"):
            numbers = getattr(self, name)
            if not numbers or not all(number > 0 for number in numbers):
                raise ValueError(f"{name}: expected positive numbers, got {numbers}")

    @property
    def names(self) -> list[str]:
        """Of the classes, in order."""
        return [self.id2label[number] for number in range(len(self.id2label))]
