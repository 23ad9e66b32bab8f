"""FIBER's config, and its flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import transformers
from transformers import PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vlmfast.models.contract import ImageTextOptions, Options

OBJECTIVES = ("pretraining", "matching", "contrast", "captioning")


class FusedTowersConfig(PreTrainedConfig):
    """Of a Swin and a RoBERTa that are fused, which both stages of FIBER stand on.

    Args:
        vision_config, text_config: transformers' SwinConfig and RobertaConfig, or dicts.
        num_fused_layers: of RoBERTa's last layers and Swin's last blocks, in pairs; fewer than either tower has.
        lr_factor: by which what fuses learns faster than the rest.
        initializer_range: deviation of the initial weights of what is in no tower.
        image_mean, image_std: per channel, of pixels in [0, 1]; they normalise uint8 pixels only.
        Others as PreTrainedConfig.
    Raises:
        ValueError: sizes do not go together.
    """

    sub_configs: ClassVar[dict[str, Any]] = {
        "vision_config": transformers.SwinConfig,
        "text_config": transformers.RobertaConfig,
    }

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        num_fused_layers: int = 6,
        lr_factor: float = 5.0,
        initializer_range: float = 0.02,
        image_mean: Sequence[float] = tuple(IMAGENET_DEFAULT_MEAN),
        image_std: Sequence[float] = tuple(IMAGENET_DEFAULT_STD),
        **kwargs: Any,
    ) -> None:
        for name, given in {"vision_config": vision_config, "text_config": text_config}.items():
            kind = self.sub_configs[name]
            setattr(self, name, given if isinstance(given, PreTrainedConfig) else kind(**(given or {})))
        self.num_fused_layers = num_fused_layers
        self.lr_factor = lr_factor
        self.initializer_range = initializer_range
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self._check()
        super().__init__(**kwargs)

    def _check(self) -> None:
        text, vision = self.text_config, self.vision_config
        most = min(text.num_hidden_layers, sum(vision.depths)) - 1
        if not 1 <= self.num_fused_layers <= most:
            raise ValueError(
                f"num_fused_layers: expected 1 to {most}, fewer than a tower has layers; got {self.num_fused_layers}"
            )
        if getattr(text, "is_decoder", False) or getattr(text, "add_cross_attention", False):
            raise ValueError("text_config: expected an encoder, got is_decoder or add_cross_attention")


class FIBERConfig(FusedTowersConfig):
    """Of the coarse stage.

    Args:
        objective: "pretraining" is MLM + ITM + ITC, "matching" ITM + ITC, "contrast" ITC alone, without fusion, and
            "captioning" the encoder-decoder.
        hidden_size: H, of what heads read.
        queued_pairs: pairs of earlier batches that ITC and ITM see besides; 0 for none.
        queued_tokens: of a text, that the queue keeps at most.
        temperature_init_value: T.
        mask_probability: of a token, in MLM.
        Others as FusedTowersConfig; the cross-modal layers learn at `lr_factor` times the rate too.
    Raises:
        ValueError: sizes do not go together, or the objective is none of OBJECTIVES.
    """

    model_type = "fiber"

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        objective: str = "pretraining",
        hidden_size: int = 768,
        queued_pairs: int = 4096,
        queued_tokens: int = 50,
        temperature_init_value: float = 0.07,
        mask_probability: float = 0.15,
        **kwargs: Any,
    ) -> None:
        self.objective = objective
        self.hidden_size = hidden_size
        self.queued_pairs = queued_pairs
        self.queued_tokens = queued_tokens
        self.temperature_init_value = temperature_init_value
        self.mask_probability = mask_probability
        super().__init__(vision_config, text_config, **kwargs)
        # What the MLM head of transformers reads beside hidden_size.
        self.hidden_act, self.layer_norm_eps = self.text_config.hidden_act, self.text_config.layer_norm_eps

    def _check(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}; got {self.objective!r}")
        super()._check()
        vision = self.vision_config
        side = vision.image_size // vision.patch_size
        for _ in vision.depths[1:]:
            side = (side + 1) // 2
        if side < vision.window_size:
            raise ValueError(
                f"vision_config: expected windows of at most the last stage's {side} tokens, got {vision.window_size}"
            )
        if self.queued_pairs < 0:
            raise ValueError(f"queued_pairs: expected at least 0, got {self.queued_pairs}")
        if not 0 <= self.mask_probability <= 1:
            raise ValueError(f"mask_probability: expected a probability, got {self.mask_probability}")


@dataclass
class TowerOptions(Options):
    """Pretrained towers, or small ones from a few numbers."""

    vision_tower: str | None = field(default=None, metadata={"help": "Name or folder of a pretrained Swin."})
    text_tower: str | None = field(
        default=None, metadata={"help": "Name or folder of a pretrained RoBERTa; its tokenizer is the default one."}
    )
    swin_width: int = field(default=64, metadata={"help": "Width of Swin's first stage, a multiple of 32."})
    swin_depths: str = field(default="2,4", metadata={"help": "Blocks of each of Swin's stages."})
    window: int = field(default=4, metadata={"help": "Side of Swin's windows, patches; less on small images."})
    width: int = field(default=192, metadata={"help": "Width of RoBERTa, a multiple of 64."})
    layers: int = field(default=4, metadata={"help": "Layers of RoBERTa."})
    fused_layers: int = field(default=3, metadata={"help": "Layers of RoBERTa and blocks of Swin that are fused."})

    new_model: ClassVar[tuple[str, ...]] = (
        "vision_tower",
        "text_tower",
        "swin_width",
        "swin_depths",
        "window",
        "width",
        "layers",
        "fused_layers",
    )

    def check(self) -> None:
        super().check()
        if self.vision_tower:
            self.refuse(("swin_width", "swin_depths", "window"), f"--vision-tower {self.vision_tower}")
        if self.text_tower:
            self.refuse(("width", "layers"), f"--text-tower {self.text_tower}")

    def tokenizer_source(self) -> str | None:
        return self.text_tower or self.pretrained


@dataclass
class FIBEROptions(TowerOptions, ImageTextOptions):
    """Of the coarse stage."""

    objective: str = field(
        default="pretraining",
        metadata={
            "help": "pretraining (masked words, matching, contrast), matching (and contrast), contrast, or captioning."
        },
    )
    queued_pairs: int | None = field(
        default=None,
        metadata={"help": "Pairs of earlier batches that are negatives too; none by default. The paper's is 4096."},
    )

    new_model: ClassVar[tuple[str, ...]] = (*TowerOptions.new_model, "queued_pairs")

    def check(self) -> None:
        super().check()
        if self.objective not in OBJECTIVES:
            raise ValueError(f"--objective: expected one of {', '.join(OBJECTIVES)}; got {self.objective!r}")


def small_swin(options: Any) -> transformers.SwinConfig:
    """A Swin from a few numbers: patches of 4, heads of 32, windows no larger than the last stage.

    Raises:
        ValueError: --swin-depths are no numbers, or --swin-width is no multiple of 32.
    """
    try:
        depths = [int(depth) for depth in options.swin_depths.split(",")]
    except ValueError as error:
        raise ValueError(f"--swin-depths: expected numbers like 2,4, got {options.swin_depths!r}") from error
    if options.swin_width % 32:
        raise ValueError(f"--swin-width: expected a multiple of 32 (the head size), got {options.swin_width}")
    side = options.image_size // 4
    for _ in depths[1:]:
        side = (side + 1) // 2
    return transformers.SwinConfig(
        image_size=options.image_size,
        patch_size=4,
        embed_dim=options.swin_width,
        depths=depths,
        num_heads=[options.swin_width // 32 * 2**stage for stage in range(len(depths))],
        window_size=min(options.window, side),
    )


def small_roberta(options: Any, tokenizer: Any) -> transformers.RobertaConfig:
    """A RoBERTa from a few numbers: heads of 64, MLPs four times as wide, positions counted from the padding token.

    Raises:
        ValueError: --width is no multiple of 64.
    """
    if options.width % 64:
        raise ValueError(f"--width: expected a multiple of 64 (the head size), got {options.width}")
    return transformers.RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        intermediate_size=4 * options.width,
        max_position_embeddings=options.max_length + tokenizer.pad_token_id + 1,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
