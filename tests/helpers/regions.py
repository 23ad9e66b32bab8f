"""Tiny regions, texts and BERTs for the tests of models that read regions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from vlmfast.data import Sample, load_tokenizer

VOCAB, DIM, LENGTH, REGIONS = 50, 12, 9, 5


def sizes(**more: Any) -> dict[str, Any]:
    """A BERT's, with weights wide enough that every output depends on every input, and without dropout."""
    found = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {**found, **drops, "max_position_embeddings": 24, "initializer_range": 0.2, **more}


def batch(rows: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Texts and regions of different lengths; what is behind them is noise that must not show."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, LENGTH), generator=generator)
    mask, region_mask = torch.ones(rows, LENGTH).long(), torch.ones(rows, REGIONS).long()
    for row in range(1, rows):
        mask[row, LENGTH - row :] = 0
        region_mask[row, REGIONS - row + 1 :] = 0
    types = (torch.arange(LENGTH) > 4).long().repeat(rows, 1) * mask
    boxes = torch.rand(rows, REGIONS, 4, generator=generator).sort(dim=-1).values[..., [0, 1, 2, 3]]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": types,
        "region_features": torch.randn(rows, REGIONS, DIM, generator=generator, dtype=torch.float64).to(dtype),
        "region_boxes": boxes.to(dtype),
        "region_mask": region_mask,
    }


def word_labels(given: dict[str, Tensor], every: int = 3) -> Tensor:
    """Labels (B, L) of some words, -100 elsewhere and behind a text's end."""
    places = torch.arange(LENGTH) % every == 1
    return torch.where(places & (given["attention_mask"] == 1), (given["input_ids"] + 7) % VOCAB, -100)


def samples(count: int, **record: Any) -> list[Sample]:
    """With a detector's regions, one to five of them, and captions that all differ."""
    found = []
    for number in range(count):
        rows = 1 + number % REGIONS
        features = {
            "boxes": torch.tensor([[k, 0.0, k + 1, 8.0] for k in range(rows)]),
            "features": torch.full((rows, DIM), float(number)),
            "labels": torch.arange(rows),
            "scores": torch.full((rows,), 0.5),
            "attributes": torch.arange(rows),
            "attribute_scores": torch.full((rows,), 0.25),
            "image_size": torch.tensor([10, 8]),
        }
        caption = f"the caption of picture number {number}"
        found.append(Sample(None, caption, f"{number:04}", None, number, {**record}, features))
    return found


def tokenizer() -> Any:
    found = load_tokenizer()
    found.add_special_tokens({"mask_token": "<|mask|>"})
    return found


def write_bert(folder: Path, **more: Any) -> Path:
    """A pretrained BERT with its heads, whose tables are far from a new model's."""
    torch.manual_seed(5)
    config = transformers.BertConfig(**sizes(num_hidden_layers=2, **more))
    transformers.BertForPreTraining(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
