"""Config and flags of FIBER's fine stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vlmfast.models.checkpoints import find, read_config
from vlmfast.models.fusion.fiber_config import FusedTowersConfig, TowerOptions

LONGER = 1333 / 800
"""The longer side of an image at most, in shorter sides."""
COARSE = (
    "objective",
    "hidden_size",
    "queued_pairs",
    "queued_tokens",
    "temperature_init_value",
    "mask_probability",
    "hidden_act",
    "layer_norm_eps",
)
"""Fields of a coarse stage's config that have no meaning here."""


class FIBERFineConfig(FusedTowersConfig):
    """Fused towers, a feature pyramid and DyHead. The paper's sizes by default.

    Args:
        head_channels: C, of the pyramid and the head.
        head_blocks: of DyHead.
        anchor_scale: side of the anchor at each place, in strides of its level.
        log_scale_init: s, before training.
        image_size, longer_size: pixels; the shorter side of an image is made `image_size`, unless the longer one
            would pass `longer_size`.
        Others as FusedTowersConfig.
    Raises:
        ValueError: a field is out of range.
    """

    model_type = "fiber_fine"

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        head_channels: int = 256,
        head_blocks: int = 6,
        anchor_scale: float = 8.0,
        log_scale_init: float = 0.0,
        image_size: int = 800,
        longer_size: int = 1333,
        **kwargs: Any,
    ) -> None:
        self.head_channels = head_channels
        self.head_blocks = head_blocks
        self.anchor_scale = anchor_scale
        self.log_scale_init = log_scale_init
        self.image_size, self.longer_size = image_size, longer_size
        kept = {name: value for name, value in kwargs.items() if name not in COARSE}
        super().__init__(vision_config, text_config, **kept)

    def _check(self) -> None:
        super()._check()
        for name in ("head_channels", "head_blocks", "image_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if self.longer_size < self.image_size:
            raise ValueError(f"longer_size: expected at least image_size {self.image_size}, got {self.longer_size}")
        if not self.anchor_scale > 0:
            raise ValueError(f"anchor_scale: expected a positive number, got {self.anchor_scale}")
        if self.vision_config.use_absolute_embeddings:
            raise ValueError("vision_config: expected a Swin for images of any size, got use_absolute_embeddings")


@dataclass
class FIBERFineOptions(TowerOptions):
    """A coarse stage's checkpoint in --pretrained, or new or pretrained towers."""

    image_size: int = field(default=128, metadata={"help": "Shorter side of the images, pixels; they are not cropped."})
    max_length: int = field(
        default=64,
        metadata={"help": "Tokens of a text at most; more names than it holds are asked for in several texts."},
    )
    caption_share: float = field(
        default=0.5,
        metadata={"help": "How often the text is the caption, where it has phrases, not a list of names."},
    )
    head_width: int = field(default=64, metadata={"help": "Channels of pyramid and head; the paper's are 256."})
    head_blocks: int = field(default=2, metadata={"help": "Blocks of DyHead; the paper has 6."})
    anchor_scale: float = field(
        default=4.0, metadata={"help": "Side of the anchor at each place, in strides; the paper's is 8."}
    )
    log_scale: float = field(
        default=-2.0,
        metadata={"help": "s of the logits before training; the paper's is 0."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.caption_share <= 1:
            raise ValueError(f"--caption-share: expected a probability, got {self.caption_share}")
        if not self.anchor_scale > 0:
            raise ValueError(f"--anchor-scale: expected a positive number, got {self.anchor_scale}")

    def check(self) -> None:
        super().check()
        if (self.pretrained and not self.is_coarse()) or self.config:
            made = "--pretrained" if self.pretrained else "--config"
            self.refuse(
                ("head_width", "head_blocks", "anchor_scale", "log_scale"), f"{made}, which says how the head is made"
            )

    def is_coarse(self) -> bool:
        """Whether --pretrained names a checkpoint without a fine stage's head."""
        if not self.pretrained:
            return False
        return read_config(find(self.pretrained)).get("model_type") != FIBERFineConfig.model_type
