"""FLAVA's flags, and the config of a new model from a few numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import FlavaConfig

from vlmfast.models.contract import ImageTextOptions, flag


@dataclass
class FLAVAOptions(ImageTextOptions):
    """Data of one kind alone, the codebook, and the sizes of a new model."""

    image_data: str | None = field(
        default=None, metadata={"help": "Images without text, in turn with the pairs of --data; layouts as --data."}
    )
    text_data: str | None = field(
        default=None,
        metadata={"help": "Texts without images, in turn with the pairs: a .txt, one text a line, or as --data."},
    )
    mismatched: float = field(default=0.1, metadata={"help": "Probability of a pair to be given another's caption."})
    codebook: str | None = field(
        default=None,
        metadata={"help": "Name or folder of a FlavaImageCodebook; by default a small one is made of --data's images."},
    )
    codebook_size: int = field(default=256, metadata={"help": "Words of a codebook that is made."})
    width: int = field(default=192, metadata={"help": "Width of the three transformers, a multiple of 64."})
    vision_layers: int = field(default=4, metadata={"help": "Layers of the image transformer."})
    text_layers: int = field(default=2, metadata={"help": "Layers of the text transformer."})
    fusion_layers: int = field(default=2, metadata={"help": "Layers of the multimodal transformer."})
    patch_size: int = field(default=8, metadata={"help": "Side of a patch, pixels."})
    embed_dim: int = field(default=256, metadata={"help": "Dimension of the features that are compared."})

    pretraining: ClassVar[tuple[str, ...]] = ("image_data", "text_data", "mismatched")
    new_model: ClassVar[tuple[str, ...]] = (
        "codebook",
        "codebook_size",
        "width",
        "vision_layers",
        "text_layers",
        "fusion_layers",
        "patch_size",
        "embed_dim",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mismatched <= 1:
            raise ValueError(f"--mismatched: expected a probability, got {self.mismatched}")

    def check(self) -> None:
        super().check()
        if self.codebook:
            self.refuse(("codebook_size",), f"--codebook {self.codebook}")


def small_config(options: FLAVAOptions, tokenizer: Any, codebook: dict[str, Any] | None) -> FlavaConfig:
    """Heads of 64, MLPs four times as wide, weights that start at a deviation of width^-0.5.

    Args:
        codebook: the config of a loaded one; None makes a small one.
    Raises:
        ValueError: the width is not a multiple of 64, or the image not one of the patch.
    """
    for name, divisor in (("width", 64), ("image_size", options.patch_size)):
        if getattr(options, name) % divisor:
            raise ValueError(f"{flag(name)}: expected a multiple of {divisor}, got {getattr(options, name)}")
    codebook = codebook or {"hidden_size": 32, "num_blocks_per_group": 1, "vocab_size": options.codebook_size}
    sizes = {
        "hidden_size": options.width,
        "intermediate_size": 4 * options.width,
        "num_attention_heads": options.width // 64,
        "initializer_range": options.width**-0.5,
    }
    return FlavaConfig(
        image_config={
            **sizes,
            "num_hidden_layers": options.vision_layers,
            "image_size": options.image_size,
            "patch_size": options.patch_size,
            "vocab_size": codebook["vocab_size"],
        },
        text_config={
            **sizes,
            "num_hidden_layers": options.text_layers,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": options.max_length,
            "pad_token_id": tokenizer.pad_token_id,
        },
        multimodal_config={**sizes, "num_hidden_layers": options.fusion_layers},
        image_codebook_config=codebook,
        hidden_size=options.width,
        projection_dim=options.embed_dim,
        initializer_range=options.width**-0.5,
    )
