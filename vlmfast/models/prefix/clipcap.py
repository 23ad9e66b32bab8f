"""ClipCap: Mokady, Hertz and Bermano 2021, "ClipCap: CLIP Prefix for Image Captioning" (2111.09734).

An image's one CLIP feature f, projected and not normalised, becomes k embeddings before the caption's tokens y,
which a GPT-2 of width D reads::

    v = mapper(f)                                       # (k, D)
    loss = -mean over l of log p(y_l | v, y_<l)         # from the last embedding of v on

Mappers:

- "mlp": Linear(W, k D / 2), tanh, Linear(k D / 2, k D);
- "transformer": Linear(W, c D) makes c tokens, k learned constants follow them, and 8 layers of 8 heads transform all.
  Layers are pre-norm, MLPs twice as wide with ReLU; queries, keys and values have no bias, and there is neither a norm
  at the end nor an embedding of positions. The states of the k constants are v.

Captions have no begin token and end with `stop`, "." as in COCO; it is added where a caption lacks it, and ends what is
generated. A pretrained image tower is frozen. A pretrained language model is frozen ("ClipCaptionPrefix" of the public
code), or trained too with `train_language_model`. Whatever is new is trained.

Departures from the public code (rmokady/CLIP_prefix_caption):

- There token 0, "!" of GPT-2, stands for pads and is never a target. Here pads are masked, and "!" is predicted.
- There a "frozen" GPT-2 goes on collecting gradients, which no one clears. Here it has none.
- There captions have their stop only where the data has it, and images are encoded before training. Here
  `--cache-features` does that.
- Greedy search by default, or transformers' beam search, whose score is the mean log-probability as in `generate_beam`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast.models.prefix_config import PrefixConfig, PrefixOptions
from vlmfast.models.prefix_model import PrefixModel

MAPPERS = ("mlp", "transformer")


class ClipCapConfig(PrefixConfig):
    """PrefixConfig with the choice of a mapper.

    Args:
        mapper: "mlp" or "transformer".
        clip_length: tokens c that the transformer mapper makes of the image's feature.
        mapper_layers, mapper_heads: of the transformer mapper.
        normalize_prefix: divide image features by their norm.
        Others as PrefixConfig.
    Raises:
        ValueError: mapper is another, or a number is not positive.
    """

    model_type = "clipcap"

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        mapper: str = "mlp",
        clip_length: int = 10,
        mapper_layers: int = 8,
        mapper_heads: int = 8,
        normalize_prefix: bool = False,
        **kwargs: Any,
    ) -> None:
        self.mapper = mapper
        self.clip_length = clip_length
        self.mapper_layers = mapper_layers
        self.mapper_heads = mapper_heads
        self.normalize_prefix = normalize_prefix
        super().__init__(vision_config, text_config, **kwargs)
        self.positive("clip_length", "mapper_layers", "mapper_heads")
        if mapper not in MAPPERS:
            raise ValueError(f"mapper: expected one of {', '.join(MAPPERS)}, got {mapper!r}")


@dataclass
class ClipCapOptions(PrefixOptions):
    """PrefixOptions with the choice of a mapper."""

    prefix_length: int = field(default=10, metadata={"help": "Embeddings that stand for an image."})
    mapper: str = field(default="mlp", metadata={"help": "mlp or transformer."})
    mapper_layers: int = field(default=8, metadata={"help": "Layers of the transformer mapper."})
    clip_length: int = field(default=10, metadata={"help": "Tokens that the transformer mapper makes of a feature."})
    train_language_model: bool = field(default=False, metadata={"help": "Train a pretrained language model too."})

    new_model: ClassVar[tuple[str, ...]] = (
        *PrefixOptions.new_model,
        "mapper",
        "mapper_layers",
        "clip_length",
        "train_language_model",
    )

    def check(self) -> None:
        super().check()
        if self.mapper not in MAPPERS:
            raise ValueError(f"--mapper: expected one of {', '.join(MAPPERS)}, got {self.mapper!r}")
        if self.mapper == "mlp":
            self.refuse(("mapper_layers", "clip_length"), "--mapper mlp")
        if not self.language_model:
            self.refuse(("train_language_model",), "a new language model, which is trained anyway")


class ClipCapModel(PrefixModel):
    """An image's one feature as the first embeddings that a language model reads; see the top of this file."""

    config: ClipCapConfig
    config_class = ClipCapConfig
    paper = "Mokady et al. 2021 (2111.09734)"
    Options = ClipCapOptions
    tasks = ("captioning",)
    training_defaults: ClassVar[dict[str, Any]] = {
        "weight_decay": 0.0,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "lr_scheduler_type": "linear",
    }

    def new_mapper(self, width: int, embedding_size: int) -> nn.Module:
        config = self.config
        if config.mapper == "mlp":
            return MLPMapper(width, embedding_size, config.prefix_length)
        return TransformerMapper(
            width, embedding_size, config.prefix_length, config.clip_length, config.mapper_layers, config.mapper_heads
        )

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """As PrefixModel's, of norm 1 where `normalize_prefix` is set."""
        features = super().image_features(pixel_values)
        return F.normalize(features, dim=-1) if self.config.normalize_prefix else features

    def frozen_fingerprint(self) -> str:
        """As PrefixModel's, and whether features are normalised."""
        return super().frozen_fingerprint() + (" normalised" if self.config.normalize_prefix else "")

    @classmethod
    def freezes(cls, options: Any) -> tuple[bool, bool]:
        return not options.train_language_model, True

    @classmethod
    def settings(cls, options: Any) -> dict[str, Any]:
        names = ("prefix_length", "mapper", "mapper_layers", "clip_length")
        return {name: getattr(options, name) for name in names}


class MLPMapper(nn.Module):
    """Features (N, W) to embeddings (N, k, D) by one hidden layer.

    Args:
        width: W.
        embedding_size: D.
        length: k.
    """

    def __init__(self, width: int, embedding_size: int, length: int) -> None:
        super().__init__()
        self.length = length
        hidden = embedding_size * length // 2
        self.hidden = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, embedding_size * length)

    def forward(self, features: Tensor) -> Tensor:
        embeddings: Tensor = self.output(self.hidden(features).tanh())
        return embeddings.unflatten(1, (self.length, -1))


class TransformerMapper(nn.Module):
    """Features (N, W) to embeddings (N, k, D): the states of k constants beside c tokens of the feature.

    Args:
        width: W.
        embedding_size: D, a multiple of heads.
        length, clip_length: k and c.
    Raises:
        ValueError: D is not a multiple of heads.
    """

    def __init__(
        self, width: int, embedding_size: int, length: int, clip_length: int, layers: int = 8, heads: int = 8
    ) -> None:
        super().__init__()
        if embedding_size % heads:
            raise ValueError(f"mapper_heads: expected a divisor of the width {embedding_size}, got {heads}")
        self.clip_length = clip_length
        self.linear = nn.Linear(width, clip_length * embedding_size)
        self.constant = nn.Parameter(torch.randn(length, embedding_size))
        self.layers = nn.ModuleList([MapperLayer(embedding_size, heads) for _ in range(layers)])

    def forward(self, features: Tensor) -> Tensor:
        tokens = self.linear(features).unflatten(1, (self.clip_length, -1))
        states = torch.cat([tokens, self.constant.expand(len(tokens), -1, -1)], dim=1)
        for layer in self.layers:
            states = layer(states)
        return states[:, self.clip_length :]


class MapperLayer(nn.Module):
    """A transformer layer (N, L, D) to (N, L, D), pre-norm, without biases of queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        normed = self.norm1(states)
        keys, values = self.to_keys_values(normed).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.to_queries(normed), keys, values))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        states = states + self.project(mixed)
        added: Tensor = states + self.fc2(F.relu(self.fc1(self.norm2(states))))
        return added
