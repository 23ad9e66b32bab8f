"""Text streams of models that read regions: a BERT of transformers that they start from, or a small new one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from vlmfast.models.checkpoints import find, load_auto, read_config
from vlmfast.models.contract import flag
from vlmfast.models.region_tower import RegionOptions


@dataclass
class RegionTextOptions(RegionOptions):
    """Regions, and a new BERT or a pretrained one; the models' own options have `text_layers` besides."""

    text_tower: str | None = field(
        default=None, metadata={"help": "Name or folder of a pretrained BERT to start from."}
    )
    text_width: int = field(default=192, metadata={"help": "Width of a new BERT, a multiple of 64."})

    text_flags: ClassVar[tuple[str, ...]] = ("text_width", "text_layers")
    """What says how a new BERT is made, and has no effect beside a pretrained one."""
    new_model: ClassVar[tuple[str, ...]] = (*RegionOptions.new_model, "text_tower", "text_width", "text_layers")

    def check(self) -> None:
        super().check()
        if self.text_tower:
            self.refuse(self.text_flags, f"--text-tower {self.text_tower}")

    def tokenizer_source(self) -> str | None:
        return self.text_tower or self.pretrained


class NewText:
    """The text stream of a new model, as its options have it.

    Attributes:
        source: the pretrained BertForPreTraining, or None.
        sizes: fields of the model's config.
    """

    def __init__(self, options: RegionTextOptions, tokenizer: Any) -> None:
        self.source = None if options.text_tower is None else load_bert(options.text_tower)
        if self.source is not None:
            self.sizes = bert_sizes(self.source.config)
        else:
            self.sizes = small(options.text_width, len(tokenizer), options.max_length)

    def with_layers(self, layers: int) -> dict[str, Any]:
        """`sizes` and the number of layers: the pretrained BERT's, with its epsilon, or as many as there are given."""
        if self.source is None:
            return {**self.sizes, "num_hidden_layers": layers}
        own = {name: getattr(self.source.config, name) for name in ("num_hidden_layers", "layer_norm_eps")}
        return {**self.sizes, **own}

    def fill(self, trunk: nn.Module, heads: nn.Module) -> None:
        """Gives a model's modules the pretrained weights of their names, where there are any."""
        if self.source is not None:
            copy_weights(trunk, self.source.bert)
            copy_weights(heads, self.source.cls)


def load_bert(source: str) -> Any:
    """transformers' BertForPreTraining of a folder or a name on a hub; heads that the checkpoint lacks are new ones.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is of another model than BERT, or damaged.
    """
    from transformers import AutoModelForPreTraining

    found = find(source)
    kind = read_config(found).get("model_type")
    if kind != "bert":
        raise ValueError(f"text_tower: expected a BERT, got {source}, whose model_type is {kind!r}")
    return load_auto(AutoModelForPreTraining, "text_tower", found, new=("cls.", "bert.pooler."))


def bert_sizes(config: Any) -> dict[str, Any]:
    """What a model with a BERT inside takes from its config."""
    names = (
        "vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "hidden_act", "hidden_dropout_prob",
        "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size", "initializer_range",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}


def small(width: int, vocab_size: int, max_length: int) -> dict[str, Any]:
    """The sizes of a BERT from a few numbers: heads of 64, MLPs four times as wide.

    Raises:
        ValueError: the width is not a multiple of 64.
    """
    if width % 64:
        raise ValueError(f"{flag('text_width')}: expected a multiple of 64 (the head size), got {width}")
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        "max_position_embeddings": max_length,
    }


@torch.no_grad()
def copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Gives a module the weights of another that have its names; the others of either stay as they are.

    Raises:
        ValueError: one of that name has another shape.
    """
    weights, own = source.state_dict(), target.state_dict()
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            raise ValueError(
                f"text_tower: expected {name} of shape {tuple(own[name].shape)}, got {tuple(weights[name].shape)}"
            )
        own[name].copy_(weights[name])
