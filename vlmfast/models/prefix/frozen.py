"""Frozen: Tsimpoukelli et al. 2021, "Multimodal Few-Shot Learning with Frozen Language Models" (2106.13884).

An image encoder, trained from scratch, makes k = 2 embeddings of an image. A frozen language model, D wide, reads them
before the tokens y of a caption::

    v = Linear(W, k D)(encoder(image))                  # (k, D), of the encoder's one feature
    loss = -mean over l of log p(y_l | v, y_<l)

The gradient goes through the language model, which stays as it is, to the encoder. Embeddings of images may stand
anywhere among tokens, so a prompt may show several, each in the place of `<image>`: examples, then a question.

Trained are the encoder and the linear map; `--vision-tower` starts the encoder from pretrained weights, and they are
trained too. A language model that is made new is trained, so `--language-model` makes it the paper's.

Texts have no begin token, and end with the tokenizer's end token (`stop` may name another).

Departures from the paper:

- Its encoder is an NF-ResNet-50. Here it is any tower of transformers, by default a small vision transformer. A config
  whose vision_config is a TimmWrapperConfig with architecture "nf_resnet50" and hidden_size 2048 gives timm's.
- Its 7B language model has relative positions. Those of GPT-2 and OPT are absolute, and what such a model has learnt of
  one image does not carry over to another one further on. Llama, GPT-NeoX and GPT-J have rotary positions.
- Its images are padded to squares; here they are cropped, as for all models.
- ilkerkesen/frozen, the public code, predicts pads too, and has absolute positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from vlmfast.models.prefix_config import PrefixConfig, PrefixOptions
from vlmfast.models.prefix_model import PrefixModel


class FrozenConfig(PrefixConfig):
    """PrefixConfig of two embeddings an image."""

    model_type = "frozen"

    def __init__(
        self, vision_config: Any = None, text_config: Any = None, *, prefix_length: int = 2, **kwargs: Any
    ) -> None:
        super().__init__(vision_config, text_config, prefix_length=prefix_length, **kwargs)


@dataclass
class FrozenOptions(PrefixOptions):
    """PrefixOptions of two embeddings an image."""

    prefix_length: int = field(default=2, metadata={"help": "Embeddings that stand for an image."})
    stop: str = field(
        default="", metadata={"help": "What ends a caption, one token; by default the tokenizer's end token."}
    )


class FrozenModel(PrefixModel):
    """An image encoder that learns to be read by a language model; see the top of this file."""

    config: FrozenConfig
    config_class = FrozenConfig
    paper = "Tsimpoukelli et al. 2021 (2106.13884)"
    Options = FrozenOptions
    tasks = ("captioning", "vqa")
    training_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 3e-4,
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 0,
    }

    def new_mapper(self, width: int, embedding_size: int) -> nn.Module:
        return LinearMapper(width, embedding_size, self.config.prefix_length)

    @classmethod
    def freezes(cls, options: Any) -> tuple[bool, bool]:
        return True, False


class LinearMapper(nn.Module):
    """Features (N, W) to embeddings (N, k, D) by one linear map.

    Args:
        width: W.
        embedding_size: D.
        length: k.
    """

    def __init__(self, width: int, embedding_size: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.linear = nn.Linear(width, length * embedding_size)

    def forward(self, features: Tensor) -> Tensor:
        embeddings: Tensor = self.linear(features)
        return embeddings.unflatten(1, (self.length, -1))
