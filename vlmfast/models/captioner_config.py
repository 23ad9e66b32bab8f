"""Options and config of models whose decoder reads an image by cross-attention and writes a caption."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vlmfast.models.contract import ImageTextOptions
from vlmfast.models.towers import tower_config


@dataclass
class CaptionerOptions(ImageTextOptions):
    """A language model that is pretrained or a small new one, and an image tower or features of regions."""

    language_model: str | None = field(
        default=None, metadata={"help": "Name or folder of a pretrained language model; it is trained on."}
    )
    vision_tower: str | None = field(default=None, metadata={"help": "Name or folder of a pretrained image model."})
    region_dim: int | None = field(
        default=None,
        metadata={"help": "Width of a detector's features in --features, such as 2048; there is then no image tower."},
    )
    vision_width: int = field(default=192, metadata={"help": "Width of a new image tower, a multiple of 64."})
    vision_layers: int = field(default=4, metadata={"help": "Layers of a new image tower."})
    patch_size: int = field(default=8, metadata={"help": "Side of a new image tower's patches, pixels."})
    text_width: int = field(default=192, metadata={"help": "Width of a new language model, a multiple of 64."})
    text_layers: int = field(default=4, metadata={"help": "Layers of a new language model."})
    self_critical: bool = field(
        default=False,
        metadata={"help": "Train for CIDEr (SCST) instead of likelihood; needs --pretrained, a trained model."},
    )

    new_model: ClassVar[tuple[str, ...]] = (
        "language_model",
        "vision_tower",
        "region_dim",
        "vision_width",
        "vision_layers",
        "patch_size",
        "text_width",
        "text_layers",
    )

    def check(self) -> None:
        super().check()
        tower = ("vision_width", "vision_layers", "patch_size")
        if self.region_dim is not None:
            self.refuse(("vision_tower", *tower), f"--region-dim {self.region_dim}, with which there is no image tower")
        if self.vision_tower:
            self.refuse(tower, f"--vision-tower {self.vision_tower}")
        if self.language_model:
            self.refuse(("text_width", "text_layers"), f"--language-model {self.language_model}")
        if self.self_critical and not self.pretrained:
            raise ValueError("--self-critical needs --pretrained, a model that was trained by maximum likelihood")

    def tokenizer_source(self) -> str | None:
        return self.language_model or self.pretrained


class CaptionerConfig(PreTrainedConfig):
    """A language model, and an image tower or features of regions.

    Args:
        vision_config, text_config: a config object or a dict of one; without `model_type`, CLIP's image tower and a
            GPT-2.
        region_dim: width of a detector's features of regions, read in the image tower's place; None where there is one.
        max_regions: of an image; of more, the first are read, which have the highest scores.
        vision_frozen: whether the image tower is kept as it is.
        begin_token_id: stands before every caption.
        stop_token_id: ends what is generated.
        filler_token_id: stands behind the end in a batch that is generated.
        image_mean, image_std: per channel, of pixels in [0, 1]; they normalise uint8 `pixel_values` only.
        Others as PreTrainedConfig.
    Raises:
        ValueError: a number is not positive.
    """

    # Not one of transformers' config dataclasses, which came after 5.0.
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        region_dim: int | None = None,
        max_regions: int = 50,
        vision_frozen: bool = False,
        begin_token_id: int | None = None,
        stop_token_id: int | None = None,
        filler_token_id: int | None = None,
        image_mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN),
        image_std: Sequence[float] = tuple(OPENAI_CLIP_STD),
        **kwargs: Any,
    ) -> None:
        # Copies, as transformers takes the attention that a model was made with out of a config that two models share.
        self.vision_config = deepcopy(tower_config("vision_config", vision_config, transformers.CLIPVisionConfig))
        self.text_config = deepcopy(tower_config("text_config", text_config, transformers.GPT2Config))
        self.region_dim = region_dim
        self.max_regions = max_regions
        self.vision_frozen = vision_frozen
        self.begin_token_id = begin_token_id
        self.stop_token_id = stop_token_id
        self.filler_token_id = filler_token_id
        self.image_mean = image_mean
        self.image_std = image_std
        super().__init__(**kwargs)
        self.positive("max_regions", *(["region_dim"] if region_dim is not None else []))

    def positive(self, *names: str) -> None:
        """ValueError where one of the fields is no positive integer."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")

    def with_cross_attention(self) -> None:
        """The language model's config as that of a GPT-2 with cross-attention.

        Raises:
            ValueError: it is of another type.
        """
        kind = self.text_config.model_type
        if kind != "gpt2":
            raise ValueError(f"text_config: expected a GPT-2, whose layers get cross-attention, got {kind!r}")
        self.text_config.add_cross_attention = True
