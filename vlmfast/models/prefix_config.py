"""Options and config of models that show images to a language model as a prefix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from vlmfast.models.image_language import ImageLanguageConfig, ImageLanguageOptions


@dataclass
class PrefixOptions(ImageLanguageOptions):
    """A language model and an image tower, each pretrained or a small new one. What is new is trained."""

    language_model: str | None = field(
        default=None,
        metadata={"help": "Name or folder of a pretrained language model, or a folder with one .gguf file; frozen."},
    )
    stop: str = field(
        default=".", metadata={"help": "What ends a caption, one token; '' is the tokenizer's end token."}
    )

    new_model: ClassVar[tuple[str, ...]] = (*ImageLanguageOptions.new_model, "stop", "prefix_length")


class PrefixConfig(ImageLanguageConfig):
    """A language model, an image tower, and what joins them.

    Args:
        prefix_length: embeddings k that stand for an image.
        projection_dim: of the image tower's own projection, as CLIP's; None where it has none, or it is not read.
        language_model, vision_tower: where the frozen weights came from, a folder or a name; checkpoints then leave
            them out. None where checkpoints hold them.
        language_model_hash, vision_tower_hash: `vlmfast.models.contract.fingerprint` of those weights.
        language_model_frozen: whether the language model is kept as it is.
        Others as ImageLanguageConfig.
    Raises:
        ValueError: a number is not positive, or a source is named of a part that is not frozen.
    """

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
        **kwargs: Any,
    ) -> None:
        self.prefix_length = prefix_length
        self.projection_dim = projection_dim
        self.language_model = language_model
        self.language_model_hash = language_model_hash
        self.language_model_frozen = language_model_frozen
        self.vision_tower = vision_tower
        self.vision_tower_hash = vision_tower_hash
        super().__init__(vision_config, text_config, **kwargs)
        self.positive("prefix_length", *(["projection_dim"] if projection_dim is not None else []))
        for source, frozen in (("language_model", "language_model_frozen"), ("vision_tower", "vision_frozen")):
            if getattr(self, source) is not None and not getattr(self, frozen):
                raise ValueError(f"{source}: expected None beside {frozen}=False, got {getattr(self, source)!r}")
