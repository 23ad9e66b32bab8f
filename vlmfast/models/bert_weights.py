"""The weights of a BERT of transformers, for text streams that start from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmfast.models.checkpoints import find, load_auto, read_config
from vlmfast.models.contract import flag


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
