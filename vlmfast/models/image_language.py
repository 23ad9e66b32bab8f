"""Options and config of models of an image tower and a causal language model."""

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
class ImageLanguageOptions(ImageTextOptions):
    """A language model and an image tower, each pretrained or a small new one."""

    language_model: str | None = field(
        default=None,
        metadata={"help": "Name or folder of a pretrained language model, or a folder with one .gguf file."},
    )
    vision_tower: str | None = field(default=None, metadata={"help": "Name or folder of a pretrained image model."})
    vision_width: int = field(default=192, metadata={"help": "Width of a new image tower, a multiple of 64."})
    vision_layers: int = field(default=4, metadata={"help": "Layers of a new image tower."})
    patch_size: int = field(default=8, metadata={"help": "Side of a new image tower's patches, pixels."})
    text_width: int = field(default=192, metadata={"help": "Width of a new language model, a multiple of 64."})
    text_layers: int = field(default=4, metadata={"help": "Layers of a new language model."})

    tower_flags: ClassVar[tuple[str, ...]] = ("vision_width", "vision_layers", "patch_size")
    new_model: ClassVar[tuple[str, ...]] = (
        "language_model",
        "vision_tower",
        *tower_flags,
        "text_width",
        "text_layers",
    )

    def check(self) -> None:
        super().check()
        if self.vision_tower:
            self.refuse(self.tower_flags, f"--vision-tower {self.vision_tower}")
        if self.language_model:
            self.refuse(("text_width", "text_layers"), f"--language-model {self.language_model}")

    def tokenizer_source(self) -> str | None:
        return self.language_model or self.pretrained


class ImageLanguageConfig(PreTrainedConfig):
    """A language model, an image tower, and the tokens that end a text.

    Args:
        vision_config, text_config: a config object or a dict of one; without `model_type`, CLIP's image tower and a
            GPT-2.
        vision_frozen: whether the image tower is kept as it is.
        stop_token_id: ends what is generated.
        filler_token_id: stands behind the end in a batch that is generated.
        image_mean, image_std: per channel, of pixels in [0, 1]; they normalise uint8 `pixel_values` only.
        Others as PreTrainedConfig.
    """

    # Not one of transformers' config dataclasses, which came after 5.0.
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        vision_frozen: bool = False,
        stop_token_id: int | None = None,
        filler_token_id: int | None = None,
        image_mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN),
        image_std: Sequence[float] = tuple(OPENAI_CLIP_STD),
        **kwargs: Any,
    ) -> None:
        # Copies, as transformers takes the attention that a model was made with out of a config that two models share;
        # a GPT-2 without one goes on, without its causal mask.
        self.vision_config = deepcopy(tower_config("vision_config", vision_config, transformers.CLIPVisionConfig))
        self.text_config = deepcopy(tower_config("text_config", text_config, transformers.GPT2Config))
        self.vision_frozen = vision_frozen
        self.stop_token_id = stop_token_id
        self.filler_token_id = filler_token_id
        self.image_mean = image_mean
        self.image_std = image_std
        super().__init__(**kwargs)

    def positive(self, *names: str) -> None:
        """ValueError where one of the fields is no positive integer."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
