"""MAPL: Manas et al. 2023, "MAPL: Parameter-Efficient Adaptation of Unimodal Pre-Trained Models" (2210.07179).

All states h of a frozen CLIP image tower, its class token included and before its last norm, become k embeddings before
the tokens y that a frozen language model of width D reads::

    h' = Linear(W, 256)(h)                              # (R, 256)
    s = transformer(concat(h', c))                      # c: k learned constants, 4 layers, 8 heads
    v = Linear(256, D)(the last k of s)                 # (k, D)
    loss = -mean over l of log p(y_l | v, y_<l)

Layers are pre-norm, MLPs twice as wide with ReLU, without dropout. There is neither a norm at the end nor an embedding
of positions. At W = 1024, D = 4096 and k = 32 the mapper has 3,431,680 parameters, and nothing else is trained.

Texts have no begin token and end with `stop`, "." as in the paper's captions. Examples in a prompt are read one after
another, each image's embeddings before its text; `<image>` in a prompt is an image's place.

Departures from the public code (mair-lab/mapl), which has no training script:

- There pads are told from tokens by their id, which is the end token's, so that a real end token counts as a pad. Here
  the attention mask tells.
- There towers are float16. Here all is float32 unless mixed precision is asked for.
- Parts that are made new are trained; --language-model and --vision-tower make it the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmfast.models.prefix_config import PrefixConfig, PrefixOptions
from vlmfast.models.prefix_model import PrefixModel


class MAPLConfig(PrefixConfig):
    """PrefixConfig with the sizes of the mapper.

    Args:
        mapper_width, mapper_layers, mapper_heads: of its transformer.
        Others as PrefixConfig.
    Raises:
        ValueError: a number is not positive, or mapper_width not a multiple of mapper_heads.
    """

    model_type = "mapl"

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        prefix_length: int = 32,
        mapper_width: int = 256,
        mapper_layers: int = 4,
        mapper_heads: int = 8,
        **kwargs: Any,
    ) -> None:
        self.mapper_width = mapper_width
        self.mapper_layers = mapper_layers
        self.mapper_heads = mapper_heads
        super().__init__(vision_config, text_config, prefix_length=prefix_length, **kwargs)
        self.positive("mapper_width", "mapper_layers", "mapper_heads")
        if mapper_width % mapper_heads:
            raise ValueError(f"mapper_width: expected a multiple of mapper_heads {mapper_heads}, got {mapper_width}")


@dataclass
class MAPLOptions(PrefixOptions):
    """PrefixOptions with the sizes of the mapper."""

    prefix_length: int = field(default=32, metadata={"help": "Embeddings that stand for an image."})
    mapper_width: int = field(default=256, metadata={"help": "Width of the mapper, a multiple of 8."})
    mapper_layers: int = field(default=4, metadata={"help": "Layers of the mapper."})

    new_model: ClassVar[tuple[str, ...]] = (*PrefixOptions.new_model, "mapper_width", "mapper_layers")


class MAPLModel(PrefixModel):
    """All states of an image tower, as a few embeddings that a language model reads; see the top of this file."""

    config: MAPLConfig
    config_class = MAPLConfig
    paper = "Manas et al. 2023 (2210.07179)"
    Options = MAPLOptions
    tasks = ("captioning", "vqa")
    reads = "tokens"
    training_defaults: ClassVar[dict[str, Any]] = {"weight_decay": 0.0, "adam_beta2": 0.999, "adam_epsilon": 1e-8}

    def new_mapper(self, width: int, embedding_size: int) -> nn.Module:
        config = self.config
        sizes = (config.prefix_length, config.mapper_width, config.mapper_layers, config.mapper_heads)
        return Mapper(width, embedding_size, *sizes)

    @classmethod
    def settings(cls, options: Any) -> dict[str, Any]:
        return {name: getattr(options, name) for name in ("prefix_length", "mapper_width", "mapper_layers")}


class Mapper(nn.Module):
    """States (N, R, W) of any number R to embeddings (N, k, D).

    Args:
        width: W.
        embedding_size: D.
        length: k.
        hidden, layers, heads: of the transformer between two linear maps.
    """

    def __init__(
        self, width: int, embedding_size: int, length: int = 32, hidden: int = 256, layers: int = 4, heads: int = 8
    ) -> None:
        super().__init__()
        self.length = length
        self.down = nn.Linear(width, hidden)
        self.constant = nn.Parameter(torch.randn(length, hidden))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, heads, 2 * hidden, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.up = nn.Linear(hidden, embedding_size)

    def forward(self, states: Tensor) -> Tensor:
        mixed = torch.cat([self.down(states), self.constant.expand(len(states), -1, -1)], dim=1)
        for layer in self.layers:
            mixed = layer(mixed)
        embeddings: Tensor = self.up(mixed[:, -self.length :])
        return embeddings
