"""Features of regions: a detector's as they are, or what a small image tower sees in boxes; and the flags for both."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vlmfast.models.checkpoints import find, load_auto, read_config
from vlmfast.models.contract import Options, Pretrainable, flag
from vlmfast.models.region_batches import RegionCollator, WholeImage
from vlmfast.models.towers import new_tower, tower_config, tower_input, tower_width

POINTS = 4  # a side, at which a box is looked at
PREFIX = "region_tower.tower."  # of the tower's weights in a checkpoint of a model that reads regions


@dataclass
class RegionOptions(Options):
    """Where regions and their features come from; the models' own options extend it."""

    max_length: int = field(default=32, metadata={"help": "Tokens of a text at most, special tokens included."})
    max_regions: int = field(default=36, metadata={"help": "Regions of an image at most, the first of its features."})
    region_dim: int | None = field(
        default=None,
        metadata={"help": "Width of a detector's features in --features, such as 2048; there is then no image tower."},
    )
    image_size: int = field(
        default=128, metadata={"help": "Side to which images are stretched for the image tower, pixels."}
    )
    grid: int = field(
        default=4, metadata={"help": "Side of the grid of cells that are the regions, where there is no --features."}
    )
    tower_width: int = field(default=192, metadata={"help": "Width of a new image tower, a multiple of 4."})
    vision_tower: str | None = field(
        default=None,
        metadata={
            "help": "A pretrained image tower, frozen: name or folder of a ResNet, an EfficientNet or the like, or a "
            "checkpoint of a model that reads regions, whose tower is taken."
        },
    )

    tower_flags: ClassVar[tuple[str, ...]] = ("image_size", "grid", "tower_width", "vision_tower")
    new_model: ClassVar[tuple[str, ...]] = ("region_dim", *tower_flags)

    def check(self) -> None:
        super().check()
        if self.region_dim is not None:
            self.refuse(self.tower_flags, f"--region-dim {self.region_dim}, with which there is no image tower")
        if self.vision_tower is not None:
            self.refuse(("tower_width",), f"--vision-tower {self.vision_tower}")


class NewRegions:
    """Where the regions of a new model come from, as its options have it.

    Attributes:
        settings: `region_tower`, `region_tower_frozen`, `image_size` and `grid` of its config.
        width: of the regions' features.
    """

    def __init__(self, options: RegionOptions) -> None:
        self._weights: dict[str, Tensor] | None = None
        tower: dict[str, Any] | None = None
        if options.vision_tower is not None:
            tower, self._weights = load_region_tower(options.vision_tower)
        elif options.region_dim is None:
            tower = small_resnet(options.tower_width)
        self.settings = {
            "region_tower": tower,
            "region_tower_frozen": options.vision_tower is not None,
            "image_size": options.image_size,
            "grid": options.grid,
        }
        self.width = int(options.region_dim or 0)
        if tower is not None:
            self.width = tower_width("region_tower", tower_config("region_tower", tower, transformers.ResNetConfig))

    def fill(self, tower: RegionTower | None) -> None:
        """Gives the model's tower the pretrained weights, where there are any."""
        if tower is not None and self._weights is not None:
            tower.tower.load_state_dict(self._weights)


def load_region_tower(source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights of the image tower in a checkpoint.

    Args:
        source: name or folder of an image model of transformers, or of a model that reads regions.
    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, or of a model without an image tower.
    """
    found = find(source)
    settings = read_config(found)
    if "region_tower" not in settings:
        model = load_auto(AutoModel, "vision_tower", found)
        return model.config.to_dict(), model.state_dict()
    if settings["region_tower"] is None:
        raise ValueError(f"--vision-tower: expected a model with an image tower, got {source}, which reads features")
    with safe_open(Path(found) / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118  # no mapping
        return settings["region_tower"], {name.removeprefix(PREFIX): file.get_tensor(name) for name in names}


def small_resnet(width: int) -> dict[str, Any]:
    """The config of a ResNet of three stages, each with half of the side and more channels; a map of one 16th.

    Raises:
        ValueError: the width is not a multiple of 4.
    """
    if width < 4 or width % 4:
        raise ValueError(f"{flag('tower_width')}: expected a multiple of 4, got {width}")
    return {
        "model_type": "resnet",
        "embedding_size": width // 4,
        "hidden_sizes": [width // 4, width // 2, width],
        "depths": [1, 1, 1],
        "layer_type": "basic",
    }


class RegionTower(nn.Module):
    """What an image tower of transformers sees in boxes: the mean of its map over a box, (B, R, D).

    The map is read at POINTS x POINTS places of each box by bilinear interpolation, as RoIAlign with one bin does.

    Args:
        config: of the tower, whose last hidden state is a map (B, D, h, w).
    Attributes:
        width: D.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        made = tower_config("region_tower", config, transformers.ResNetConfig)
        self.tower = new_tower(made, "image", "region_tower")
        self.width = tower_width("region_tower", made)
        self.mean, self.std = tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)

    def forward(self, pixel_values: Tensor, region_boxes: Tensor) -> Tensor:
        """(B, R, D) of the tower's dtype.

        Args:
            pixel_values: uint8 (B, S, S, 3), or normalised floating point (B, 3, S, S).
            region_boxes (B, R, 4): x1 y1 x2 y2 as shares of width and height.
        """
        pixels = tower_input(self.tower, pixel_values, self.mean, self.std, reads_bytes=False)
        features = self.tower(pixels).last_hidden_state
        return pool_boxes(features, region_boxes)


def pool_boxes(features: Tensor, boxes: Tensor) -> Tensor:
    """The mean (B, R, D) of a map (B, D, h, w) over boxes (B, R, 4), which are shares of width and height."""
    steps = (torch.arange(POINTS, device=boxes.device, dtype=boxes.dtype) + 0.5) / POINTS
    x = boxes[..., 0, None] + (boxes[..., 2] - boxes[..., 0])[..., None] * steps
    y = boxes[..., 1, None] + (boxes[..., 3] - boxes[..., 1])[..., None] * steps
    grid = torch.stack(torch.broadcast_tensors(x[..., None, :], y[..., :, None]), dim=-1).flatten(2, 3)
    places = (2 * grid - 1).to(features.dtype)
    seen = F.grid_sample(features, places, mode="bilinear", padding_mode="border", align_corners=False)
    return seen.mean(dim=-1).transpose(1, 2)


class ReadsRegions(Pretrainable):
    """`Pretrainable` of models that read regions: where their features come from.

    The config has `region_tower`, a dict or None, `region_tower_frozen`, `image_size` and `grid`; the model
    `region_tower`, a `RegionTower` or None.
    """

    reads_features: ClassVar[bool] = True
    matched_class: ClassVar[int] = 1
    """The column of `matching_logits` that says that text and image belong together."""
    region_tower: RegionTower | None
    _region_width: int

    def frozen_parts(self) -> tuple[nn.Module, ...]:
        """The image tower, where it is a pretrained one."""
        return (self.region_tower,) if self.region_tower is not None and self.config.region_tower_frozen else ()

    def transform(self, options: Any, *, train: bool) -> Any:
        """Images as they are; none in training where there is no image tower."""
        return None if train and self.region_tower is None else WholeImage()

    def region_collator(self, options: Any) -> RegionCollator:
        """What makes the regions of a batch."""
        side = None if self.region_tower is None else self.config.image_size
        return RegionCollator(side, self.config.grid, options.max_regions)

    def new_region_tower(self, name: str) -> RegionTower | None:
        """The tower that the config asks for.

        Raises:
            ValueError: the field `name` of the config, the width of features, is not the tower's.
        """
        self._region_width = int(getattr(self.config, name))
        if self.config.region_tower is None:
            return None
        tower = RegionTower(self.config.region_tower)
        if tower.width != self._region_width:
            raise ValueError(f"{name}: expected {tower.width}, the width of region_tower, got {self._region_width}")
        return tower

    def match_scores(self, **batch: Tensor) -> Tensor:
        """(B,) log-probability that text and image belong together, of the head of pre-training."""
        logits = self(**batch).matching_logits  # type: ignore[operator]
        found: Tensor = logits.float().log_softmax(dim=1)[:, self.matched_class]
        return found

    def region_features_of(
        self, region_features: Tensor | None, pixel_values: Tensor | None, region_boxes: Tensor | None
    ) -> Tensor:
        """(B, R, D): the features that are given, or what the image tower sees in the boxes.

        Raises:
            ValueError: what this model reads is missing, or of another width.
        """
        if self.region_tower is None:
            if region_features is None:
                raise ValueError("region_features: expected (B, R, D), got None; this model has no image tower")
            if region_features.shape[-1] != self._region_width:
                raise ValueError(
                    f"region_features: expected (B, R, {self._region_width}), got {tuple(region_features.shape)}; "
                    "--region-dim is the width of the features in --features"
                )
            return region_features
        if pixel_values is None or region_boxes is None:
            raise ValueError(
                "pixel_values and region_boxes: expected uint8 (B, S, S, 3) and (B, R, 4), got None; this model has an "
                "image tower"
            )
        features: Tensor = self.region_tower(pixel_values, region_boxes)
        return features
