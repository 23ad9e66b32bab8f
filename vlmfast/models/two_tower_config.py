"""Options and configs of models of two towers, and small towers from a few numbers."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from typing_extensions import Self

from vlmfast.models.contract import ImageTextOptions
from vlmfast.models.image_tower import small_vit
from vlmfast.models.towers import tower_config, tower_width


@dataclass
class TwoTowerOptions(ImageTextOptions):
    """Two pretrained towers, or small ones from a few numbers."""

    vision_tower: str | None = field(default=None, metadata={"help": "Name or folder of a pretrained image model."})
    text_tower: str | None = field(
        default=None, metadata={"help": "Name or folder of a pretrained text model; its tokenizer is the default one."}
    )
    vision_width: int = field(default=192, metadata={"help": "Width of the image tower, a multiple of 64."})
    vision_layers: int = field(default=4, metadata={"help": "Layers of the image tower."})
    text_width: int = field(default=192, metadata={"help": "Width of the text transformer, a multiple of 64."})
    text_layers: int = field(default=2, metadata={"help": "Layers of the text transformer."})

    new_model: ClassVar[tuple[str, ...]] = (
        "vision_tower",
        "text_tower",
        "vision_width",
        "vision_layers",
        "text_width",
        "text_layers",
        "patch_size",
        "embed_dim",
    )

    def check(self) -> None:
        super().check()
        if self.vision_tower:
            self.refuse(("vision_width", "vision_layers", "patch_size"), f"--vision-tower {self.vision_tower}")
        if self.text_tower:
            self.refuse(("text_width", "text_layers"), f"--text-tower {self.text_tower}")

    def tokenizer_source(self) -> str | None:
        return self.text_tower or self.pretrained


@dataclass
class PatchOptions(TwoTowerOptions):
    """TwoTowerOptions of a vision transformer."""

    patch_size: int = field(default=8, metadata={"help": "Side of a patch, pixels."})


@dataclass
class ProjectionOptions(PatchOptions):
    """PatchOptions of a model that projects both sides."""

    embed_dim: int = field(default=256, metadata={"help": "Dimension of the features that are compared."})


def small_towers(
    *,
    vocab_size: int,
    eos_token_id: int,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
    image_size: int = 64,
    patch_size: int = 8,
    vision_width: int = 192,
    vision_layers: int = 4,
    text_width: int = 192,
    text_layers: int = 2,
    embed_dim: int = 256,
    max_length: int = 32,
) -> dict[str, Any]:
    """Configs of CLIP's towers from a few numbers, by name: heads of 64, MLPs four times as wide, exact GELU.

    Raises:
        ValueError: a width is not a multiple of 64, `image_size` not one of `patch_size`, or `eos_token_id` not one
            that transformers' text tower can pool at.
    """
    for name, width in {"vision_width": vision_width, "text_width": text_width}.items():
        if width <= 0 or width % 64:
            raise ValueError(f"{name}: expected a positive multiple of 64 (the head size), got {width}")
    vision = small_vit(image_size, patch_size, vision_width, vision_layers, projection_dim=embed_dim)
    if eos_token_id == 2 or not 0 <= eos_token_id < vocab_size:
        reason = "which transformers takes for 'the highest id ends the text'"
        raise ValueError(f"eos_token_id: expected one below {vocab_size} but 2, {reason}, got {eos_token_id}")
    return {
        "vision_config": vision,
        "text_config": transformers.CLIPTextConfig(
            vocab_size=vocab_size,
            max_position_embeddings=max_length,
            hidden_size=text_width,
            intermediate_size=4 * text_width,
            num_hidden_layers=text_layers,
            num_attention_heads=text_width // 64,
            projection_dim=embed_dim,
            hidden_act="gelu",
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        ),
    }


class TwoTowerConfig(PreTrainedConfig):
    """Two towers of any transformers type, and the space in which their features are compared.

    Args:
        vision_config, text_config: a config object or a dict of one. A dict without `model_type` is CLIP's own tower.
        projection_dim: size D of the shared embedding space.
        initializer_factor: multiplies the initial standard deviation of the projections.
        image_mean, image_std: per channel, of pixels in [0, 1]; they normalise uint8 `pixel_values` only.
        Others as PreTrainedConfig.
    Raises:
        ValueError: a setting is of another type, or a tower's `model_type` unknown.
        TypeError: a tower's config is neither.
    """

    # Not one of transformers' config dataclasses, which came after 5.0.
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}
    default_towers: ClassVar[dict[str, Any]] = {
        "vision_config": transformers.CLIPVisionConfig,
        "text_config": transformers.CLIPTextConfig,
    }

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        projection_dim: int | None = 512,
        initializer_factor: float = 1.0,
        image_mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN),
        image_std: Sequence[float] = tuple(OPENAI_CLIP_STD),
        **kwargs: Any,
    ) -> None:
        for name, given in {"vision_config": vision_config, "text_config": text_config}.items():
            # Some of OpenAI's checkpoints have each tower's config twice; transformers, too, lets the second win.
            duplicate = kwargs.pop(f"{name}_dict", None)
            chosen = given if duplicate is None else duplicate
            setattr(self, name, tower_config(name, chosen, self.default_towers[name]))
        self.projection_dim: Any = projection_dim
        self.initializer_factor = initializer_factor
        self.image_mean = image_mean
        self.image_std = image_std
        for name, default in self.settings().items():
            value = getattr(self, name)
            if not _is_like(value, default):
                raise ValueError(f"{name}: expected a value like {default!r}, got {value!r}")
        if self.projection_dim is None:
            self.projection_dim = tower_width("vision_config", self.vision_config)
        super().__init__(**kwargs)

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """What the class has beside PreTrainedConfig's and the towers' configs, by name, and its default values."""
        found = {}
        for parent in reversed(cls.__mro__):
            if issubclass(parent, TwoTowerConfig):
                parameters = inspect.signature(parent.__init__).parameters.values()
                found.update({p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY})
        return found

    @classmethod
    def small(cls, *, embed_dim: int = 256, **sizes: Any) -> Self:
        """CLIP's towers from a few numbers, those of `small_towers`."""
        return cls(**small_towers(embed_dim=embed_dim, **sizes), projection_dim=embed_dim)


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(_is_like(item, 0.0) for item in value)
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, int if default is None else type(default)) or (value is None and default is None)
