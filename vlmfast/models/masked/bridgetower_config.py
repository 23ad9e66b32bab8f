"""BridgeTower's config, and its flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import transformers
from transformers import PreTrainedConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vlmfast.models.contract import ImageTextOptions

OBJECTIVES = ("mlm", "itm", "itc")


class BridgeTowerConfig(PreTrainedConfig):
    """transformers' BridgeTowerConfig, and what the losses need.

    Args:
        text_config, vision_config: transformers' BridgeTowerTextConfig and BridgeTowerVisionConfig, or dicts.
        hidden_size: of the cross-modal encoder and of the text tower.
        num_hidden_layers: K, of the cross-modal encoder; at most the layers of a tower.
        num_attention_heads, hidden_act, layer_norm_eps, initializer_factor, link_tower_type,
        share_cross_modal_transformer_layers, share_link_tower_layers, init_layernorm_from_vision_encoder: as
            transformers has them.
        objectives: of OBJECTIVES; "itm" among them, whose loss reads all that is there.
        projection_dim: size of the features that ITC compares.
        temperature_init_value: T.
        mask_probability: of a token, in MLM.
        lr_factor: by which cross-modal layers and heads learn faster than the towers.
        image_mean, image_std: per channel, of pixels in [0, 1]; they normalise uint8 pixels only.
        Others as PreTrainedConfig.
    Raises:
        ValueError: sizes do not go together, or a setting is one that is refused; the message names it.
    """

    model_type = "bridgetower"
    sub_configs: ClassVar[dict[str, Any]] = {
        "text_config": transformers.BridgeTowerTextConfig,
        "vision_config": transformers.BridgeTowerVisionConfig,
    }

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        *,
        hidden_size: int = 768,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 12,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-5,
        initializer_factor: float = 1.0,
        link_tower_type: str = "add",
        share_cross_modal_transformer_layers: bool = True,
        share_link_tower_layers: bool = False,
        init_layernorm_from_vision_encoder: bool = False,
        tie_word_embeddings: bool = False,
        objectives: Sequence[str] = ("mlm", "itm"),
        projection_dim: int = 256,
        temperature_init_value: float = 0.07,
        mask_probability: float = 0.15,
        lr_factor: float = 5.0,
        image_mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN),
        image_std: Sequence[float] = tuple(OPENAI_CLIP_STD),
        **kwargs: Any,
    ) -> None:
        for name, given in {"text_config": text_config, "vision_config": vision_config}.items():
            kind = self.sub_configs[name]
            setattr(self, name, given if isinstance(given, PreTrainedConfig) else kind(**(given or {})))
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.initializer_factor = initializer_factor
        self.link_tower_type = link_tower_type
        self.share_cross_modal_transformer_layers = share_cross_modal_transformer_layers
        self.share_link_tower_layers = share_link_tower_layers
        self.init_layernorm_from_vision_encoder = init_layernorm_from_vision_encoder
        self.objectives = list(objectives)
        self.projection_dim = projection_dim
        self.temperature_init_value = temperature_init_value
        self.mask_probability = mask_probability
        self.lr_factor = lr_factor
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self._check()
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def _check(self) -> None:
        text: Any = self.text_config
        vision: Any = self.vision_config
        if not set(self.objectives) <= set(OBJECTIVES) or "itm" not in self.objectives:
            raise ValueError(
                f"objectives: expected some of {', '.join(OBJECTIVES)}, itm among them; got {self.objectives}"
            )
        if text.num_hidden_layers != vision.num_hidden_layers:
            raise ValueError(
                "vision_config: expected as many layers as the text tower's "
                f"{text.num_hidden_layers}, got {vision.num_hidden_layers}"
            )
        if not 1 <= self.num_hidden_layers <= text.num_hidden_layers:
            most = f"{text.num_hidden_layers}, the layers of a tower"
            raise ValueError(f"num_hidden_layers: expected at most {most}; got {self.num_hidden_layers}")
        if text.hidden_size != self.hidden_size:
            raise ValueError(f"hidden_size: expected the text tower's {text.hidden_size}, got {self.hidden_size}")
        refused = {
            "share_link_tower_layers": self.share_link_tower_layers,
            "vision_config.share_layernorm=False": not vision.share_layernorm,
            "vision_config.remove_last_layer": vision.remove_last_layer,
            "vision_config.stop_gradient": vision.stop_gradient,
        }
        if wrong := [name for name, is_set in refused.items() if is_set]:
            raise ValueError(f"{wrong[0]}: not supported, as the top of bridgetower.py says")
        if not 0 <= self.mask_probability <= 1:
            raise ValueError(f"mask_probability: expected a probability, got {self.mask_probability}")


@dataclass
class BridgeTowerOptions(ImageTextOptions):
    """Pretrained towers, or small ones from a few numbers."""

    objectives: str = field(
        default="mlm,itm",
        metadata={"help": "Losses, of mlm, itm and itc; 'itm,itc' is the paper's fine-tuning for retrieval."},
    )
    captions_per_image: int = field(
        default=1, metadata={"help": "Of an image's captions, how many a batch has; itc takes all of them for right."}
    )
    vision_tower: str | None = field(default=None, metadata={"help": "Name or folder of a pretrained CLIP."})
    text_tower: str | None = field(
        default=None, metadata={"help": "Name or folder of a pretrained RoBERTa; its tokenizer is the default one."}
    )
    width: int = field(default=192, metadata={"help": "Width of all streams that are new, a multiple of 64."})
    layers: int = field(default=4, metadata={"help": "Layers of each tower."})
    cross_layers: int = field(default=2, metadata={"help": "Layers of the cross-modal encoder, at most --layers."})
    patch_size: int = field(default=8, metadata={"help": "Side of a patch, pixels."})

    new_model: ClassVar[tuple[str, ...]] = (
        "vision_tower",
        "text_tower",
        "width",
        "layers",
        "cross_layers",
        "patch_size",
    )

    def check(self) -> None:
        super().check()
        wrong = [name for name in self.objectives.split(",") if name not in OBJECTIVES]
        if wrong:
            raise ValueError(f"--objectives: expected some of {', '.join(OBJECTIVES)}, got {wrong[0]!r}")
        for name in ("vision_tower", "text_tower"):
            if getattr(self, name):
                self.refuse(("layers",), f"--{name.replace('_', '-')} {getattr(self, name)}, which has its own")
        if self.vision_tower:
            self.refuse(("patch_size",), f"--vision-tower {self.vision_tower}")
        if self.vision_tower and self.text_tower:
            self.refuse(("width",), "both towers")

    def tokenizer_source(self) -> str | None:
        return self.text_tower or self.pretrained
