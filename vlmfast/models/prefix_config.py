"""Options and config of models that show images to a language model as a prefix."""

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
class PrefixOptions(ImageTextOptions):
    """A language model and an image tower, each pretrained or a small new one. What is new is trained."""

    language_model: str | None = field(
        default=None,
        metadata={"help": "Name or folder of a pretrained language model, or a folder with one .gguf file; frozen."},
    )
    vision_tower: str | None = field(default=None, metadata={"help": "Name or folder of a pretrained image model."})
    vision_width: int = field(default=192, metadata={"help": "Width of a new image tower, a multiple of 64."})
    vision_layers: int = field(default=4, metadata={"help": "Layers of a new image tower."})
    patch_size: int = field(default=8, metadata={"help": "Side of a new image tower's patches, pixels."})
    text_width: int = field(default=192, metadata={"help": "Width of a new language model, a multiple of 64."})
    text_layers: int = field(default=4, metadata={"help": "Layers of a new language model."})
    stop: str = field(
        default=".", metadata={"help": "What ends a caption, one token; '' is the tokenizer's end token."}
    )

    new_model: ClassVar[tuple[str, ...]] = (
        "language_model",
        "vision_tower",
        "vision_width",
        "vision_layers",
        "patch_size",
        "text_width",
        "text_layers",
        "stop",
        "prefix_length",
    )

    def check(self) -> None:
        super().check()
        if self.vision_tower:
            self.refuse(("vision_width", "vision_layers", "patch_size"), f"--vision-tower {self.vision_tower}")
        if self.language_model:
            self.refuse(("text_width", "text_layers"), f"--language-model {self.language_model}")

    def tokenizer_source(self) -> str | None:
        return self.language_model or self.pretrained


class PrefixConfig(PreTrainedConfig):
    """A language model, an image tower, and what joins them.

    Args:
        vision_config, text_config: a config object or a dict of one; without `model_type`, CLIP's image tower and a
            GPT-2.
        prefix_length: embeddings k that stand for an image.
        projection_dim: of the image tower's own projection, as CLIP's; None where it has none, or it is not read.
        language_model, vision_tower: where the frozen weights came from, a folder or a name; checkpoints then leave
            them out. None where checkpoints hold them.
        language_model_hash, vision_tower_hash: `vlmfast.models.contract.fingerprint` of those weights.
        language_model_frozen, vision_frozen: whether they are kept as they are.
        stop_token_id: ends what is generated.
        filler_token_id: stands behind the end in a batch that is generated.
        image_mean, image_std: per channel, of pixels in [0, 1]; they normalise uint8 `pixel_values` only.
        Others as PreTrainedConfig.
    Raises:
        ValueError: a number is not positive, or a source is named of a part that is not frozen.
    """

    # Not one of transformers' config dataclasses, which came after 5.0.
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        prefix_length: int = 10,
        projection_dim: int | None = None,
        language_model: str | None = None,
        language_model_hash: str | None = None,
        language_model_frozen: bool = False,
        vision_tower: str | None = None,
        vision_tower_hash: str | None = None,
        vision_frozen: bool = False,
        stop_token_id: int | None = None,
        filler_token_id: int | None = None,
        image_mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN),
        image_std: Sequence[float] = tuple(OPENAI_CLIP_STD),
        **kwargs: Any,
    ) -> None:
        # Copies, as transformers takes the attention that a model was made with out of a config that two models share;
        # a GPT-2 without one goes on, without its causal mask.
        towers = {"vision_config": transformers.CLIPVisionConfig, "text_config": transformers.GPT2Config}
        self.vision_config = deepcopy(tower_config("vision_config", vision_config, towers["vision_config"]))
        self.text_config = deepcopy(tower_config("text_config", text_config, towers["text_config"]))
        self.prefix_length = prefix_length
        self.projection_dim = projection_dim
        self.language_model = language_model
        self.language_model_hash = language_model_hash
        self.language_model_frozen = language_model_frozen
        self.vision_tower = vision_tower
        self.vision_tower_hash = vision_tower_hash
        self.vision_frozen = vision_frozen
        self.stop_token_id = stop_token_id
        self.filler_token_id = filler_token_id
        self.image_mean = image_mean
        self.image_std = image_std
        super().__init__(**kwargs)
        self.positive("prefix_length", *(["projection_dim"] if projection_dim is not None else []))
        for source, frozen in (("language_model", "language_model_frozen"), ("vision_tower", "vision_frozen")):
            if getattr(self, source) is not None and not getattr(self, frozen):
                raise ValueError(f"{source}: expected None beside {frozen}=False, got {getattr(self, source)!r}")

    def positive(self, *names: str) -> None:
        """ValueError where one of the fields is no positive integer."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
