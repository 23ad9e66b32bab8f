"""Options and config of models whose decoder reads an image by cross-attention and writes a caption."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from vlmfast.models.image_language import ImageLanguageConfig, ImageLanguageOptions


@dataclass
class CaptionerOptions(ImageLanguageOptions):
    """A language model that is pretrained or a small new one, and an image tower or features of regions."""

    language_model: str | None = field(
        default=None, metadata={"help": "Name or folder of a pretrained language model; it is trained on."}
    )
    region_dim: int | None = field(
        default=None,
        metadata={"help": "Width of a detector's features in --features, such as 2048; there is then no image tower."},
    )
    self_critical: bool = field(
        default=False,
        metadata={"help": "Train for CIDEr (SCST) instead of likelihood; needs --pretrained, a trained model."},
    )

    new_model: ClassVar[tuple[str, ...]] = (*ImageLanguageOptions.new_model, "region_dim")

    def check(self) -> None:
        super().check()
        if self.region_dim is not None:
            because = f"--region-dim {self.region_dim}, with which there is no image tower"
            self.refuse(("vision_tower", *self.tower_flags), because)
        if self.self_critical and not self.pretrained:
            raise ValueError("--self-critical needs --pretrained, a model that was trained by maximum likelihood")


class CaptionerConfig(ImageLanguageConfig):
    """A language model, and an image tower or features of regions.

    Args:
        region_dim: width of a detector's features of regions, read in the image tower's place; None where there is one.
        max_regions: of an image; of more, the first are read, which have the highest scores.
        begin_token_id: stands before every caption.
        Others as ImageLanguageConfig.
    Raises:
        ValueError: a number is not positive.
    """

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        region_dim: int | None = None,
        max_regions: int = 50,
        begin_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.region_dim = region_dim
        self.max_regions = max_regions
        self.begin_token_id = begin_token_id
        super().__init__(vision_config, text_config, **kwargs)
        self.positive("max_regions", *(["region_dim"] if region_dim is not None else []))

    def with_cross_attention(self) -> None:
        """The language model's config as that of a GPT-2 with cross-attention.

        Raises:
            ValueError: it is of another type.
        """
        kind = self.text_config.model_type
        if kind != "gpt2":
            raise ValueError(f"text_config: expected a GPT-2, whose layers get cross-attention, got {kind!r}")
        self.text_config.add_cross_attention = True
