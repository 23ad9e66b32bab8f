"""Tiny language models, towers and batches for the tests of models that show images to a language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from vlmfast.nn.prefix import IMAGE, token_ids

VOCAB, STOP, PAD, POSITIONS = 40, 7, 0, 48


def gpt2(**options: Any) -> transformers.GPT2Config:
    """With dropout, which nothing frozen may show."""
    sizes = {"vocab_size": VOCAB, "n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": None, "eos_token_id": None}
    # Wider than usual, so that what a model says depends on what it reads.
    return transformers.GPT2Config(**{**sizes, **ends, "initializer_range": 0.3, **options})


def llama(**options: Any) -> transformers.LlamaConfig:
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return transformers.LlamaConfig(**{**sizes, **heads, **ends, "initializer_range": 0.3, **options})


LANGUAGE = {"gpt2": gpt2, "llama": llama}


def vit(**options: Any) -> transformers.CLIPVisionConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.CLIPVisionConfig(**{**sizes, "image_size": 16, "patch_size": 8, **options})


def make(cls: Any, language: PreTrainedConfig, **options: Any) -> Any:
    """A model without dropout of what is trained, so that it can be compared, in eval mode."""
    torch.manual_seed(1)
    fields = {"vision_config": vit(), "text_config": language, "prefix_length": 3, "stop_token_id": STOP}
    return cls(cls.config_class(**{**fields, "filler_token_id": PAD, **options})).eval()


def write_language_model(folder: Path, config: PreTrainedConfig) -> Path:
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write_tower(folder: Path) -> Path:
    """CLIP with both towers, of which the image tower and its projection are read."""
    torch.manual_seed(3)
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        vision_config=vit().to_dict(), text_config={**text, "vocab_size": VOCAB}, projection_dim=24
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def batch(
    rows: Sequence[Sequence[Sequence[int] | None]], length: int, *, left: bool = False, labels: bool = True
) -> dict[str, Tensor]:
    """Rows of tokens and images (None), padded, with an image's pixels for each None."""
    ids = [token_ids(row, length) for row in rows]
    size = max(map(len, ids))
    made = torch.full((len(ids), size), PAD)
    mask = torch.zeros_like(made)
    for k, row in enumerate(ids):
        place = slice(size - len(row), size) if left else slice(0, len(row))
        made[k, place], mask[k, place] = torch.tensor(row, dtype=torch.long), 1
    count = sum(part is None for row in rows for part in row)
    pixels = torch.randint(256, (count, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    found = {"pixel_values": pixels, "input_ids": made, "attention_mask": mask}
    if labels:
        found["labels"] = made.masked_fill((mask == 0) | (made == IMAGE), -100)
    return found


CAPTIONS: list[list[Sequence[int] | None]] = [
    [None, [5, 9, 11, STOP]],
    [None, [6, STOP]],
    [None, [12, 13, 5, 5, 9, STOP]],
]
"""One image each, before tokens of three lengths."""
