"""Options and config of MAGiC, and its settings in the paper."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import transformers
from transformers import AutoConfig, PreTrainedConfig

from vlmfast.models import MODELS, model_class
from vlmfast.models.contract import Options
from vlmfast.models.towers import tower_config

DECODING: dict[str, dict[str, Any]] = {
    "coco": {"k": 45, "alpha": 0.1, "beta": 2.0, "length": 16},
    "flickr30k": {"k": 25, "alpha": 0.1, "beta": 2.0, "length": 20},
    "story": {"k": 5, "alpha": 0.6, "beta": 0.15, "length": 100},
}
"""Settings of the paper: captions as COCO's or Flickr30k's, and stories."""


class MAGiCConfig(PreTrainedConfig):
    """A language model, a model that compares images and texts, and the search that both decide.

    Args:
        text_config: of the language model, a config object or a dict of one; without `model_type`, a GPT-2.
        clip_config: of a model of MODELS with features of images and texts and a logit_scale, likewise; None where
            there is none, and beta is 0.
        k: candidates for each token.
        alpha: weight of the penalty for states like earlier ones, 0 to 1.
        beta: weight of the image's score, at least 0; None: 2, or 0 without a clip_config.
        length: tokens that are generated.
        margin: rho of the contrastive loss.
        clip_tokens: the last tokens of what was generated, which the image is compared with.
        image_size: of images that no clip_config's model sees.
        start_token_id: stands before every text.
        end_token_id: ends one.
        Others as PreTrainedConfig.
    Raises:
        ValueError: a number is out of range, beta is not 0 without a clip_config, or that is of another model.
    """

    model_type = "magic"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "clip_config": AutoConfig}

    def __init__(
        self,
        text_config: Any = None,
        clip_config: Any = None,
        *,
        k: int = 45,
        alpha: float = 0.1,
        beta: float | None = None,
        length: int = 16,
        margin: float = 0.5,
        clip_tokens: int = 60,
        image_size: int = 64,
        start_token_id: int | None = None,
        end_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        # Copies, as transformers takes the attention that a model was made with out of a config that two models share:
        # CLIP then goes on without masks.
        self.text_config = deepcopy(tower_config("text_config", text_config, transformers.GPT2Config))
        self.clip_config = deepcopy(clip_config)
        if isinstance(clip_config, dict):
            kind = clip_config.get("model_type")
            if kind not in MODELS:
                raise ValueError(f"clip_config: expected a model of {', '.join(MODELS)}, got model_type {kind!r}")
            self.clip_config = model_class(kind).config_class.from_dict(clip_config)
        self.k = k
        self.alpha = alpha
        self.beta = (2.0 if clip_config is not None else 0.0) if beta is None else beta
        self.length = length
        self.margin = margin
        self.clip_tokens = clip_tokens
        self.image_size = image_size
        self.start_token_id = start_token_id
        self.end_token_id = end_token_id
        super().__init__(**kwargs)
        self.check()

    def check(self) -> None:
        """ValueError where a number is out of range, or beta is not 0 without a clip_config; `from_pretrained` sets
        fields behind `__init__`."""
        for name in ("k", "length", "clip_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        for name, most in (("alpha", 1.0), ("beta", float("inf")), ("margin", 2.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise ValueError(f"{name}: expected a number from 0 to {most:g}, got {value!r}")
        if self.beta and self.clip_config is None:
            raise ValueError(f"beta: expected 0 without a model that compares images and texts, got {self.beta}")

    @property
    def vision_config(self) -> Any:
        """Of the images: what sees them, or this config where nothing does."""
        return self if self.clip_config is None else getattr(self.clip_config, "vision_config", self.clip_config)


@dataclass
class MAGiCOptions(Options):
    """A language model that learns texts, and a model that compares them with images."""

    language_model: str | None = field(
        default=None,
        metadata={"help": "Name or folder of a pretrained language model, or a folder with one .gguf file."},
    )
    clip: str | None = field(
        default=None,
        metadata={
            "help": "Folder or name of a trained clip, siglip, lit, ...; frozen. Without it images are not seen."
        },
    )
    clip_tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer of --clip; by default the one in its folder."}
    )
    decoding: str = field(default="coco", metadata={"help": f"Settings of the paper's search: {', '.join(DECODING)}."})
    text_width: int = field(default=192, metadata={"help": "Width of a new language model, a multiple of 64."})
    text_layers: int = field(default=4, metadata={"help": "Layers of a new language model."})
    image_size: int = field(default=64, metadata={"help": "Side of the images, where --clip has none of its own."})
    max_length: int = field(default=64, metadata={"help": "Tokens of a text at most, its begin and end included."})

    new_model: ClassVar[tuple[str, ...]] = (
        "language_model",
        "clip",
        "clip_tokenizer",
        "decoding",
        "text_width",
        "text_layers",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoding not in DECODING:
            raise ValueError(f"--decoding: expected one of {', '.join(DECODING)}, got {self.decoding!r}")

    def check(self) -> None:
        super().check()
        if self.language_model:
            self.refuse(("text_width", "text_layers"), f"--language-model {self.language_model}")
        if not self.clip:
            self.refuse(("clip_tokenizer",), "a model without --clip")

    def tokenizer_source(self) -> str | None:
        return self.language_model or self.pretrained
