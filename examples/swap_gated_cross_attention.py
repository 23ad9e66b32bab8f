"""Swap the gated cross-attention of a model that you have, in one line, and train it beside the original.

The model is transformers' IDEFICS, Flamingo's public reproduction, small and with random weights; the batch is text
with images in between, one sample with fewer images and padded. Both models must give the same losses at every step.

    python examples/swap_gated_cross_attention.py
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from vlmfast.nn.transformers_cross_attention import IdeficsGatedCrossAttentionLayer

VOCABULARY, IMAGES, LENGTH = 100, 3, 48


def small_model() -> IdeficsForVisionText2Text:
    vision = {"embed_dim": 64, "image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = IdeficsConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        cross_layer_interval=2,
        alpha_initializer="ones",
        vision_config={**vision, "intermediate_size": 128},
    )
    return IdeficsForVisionText2Text(config)


def batch() -> dict[str, Tensor]:
    """Tokens see the last image before them: three from 0, 16 and 32 on in the first sample, two from 8 and 20 on."""
    token = torch.arange(LENGTH)
    starts = torch.tensor([[0, 16, 32], [8, 20, LENGTH]])
    last = (starts[:, None] <= token[:, None]).sum(2)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH))
    attention_mask = token < torch.tensor([[LENGTH], [40]])
    return {
        "input_ids": ids,
        "attention_mask": attention_mask.long(),
        "pixel_values": torch.randn(2, IMAGES, 3, 32, 32),
        "image_attention_mask": (last[..., None] == torch.arange(1, IMAGES + 1)).long(),
        "labels": ids.masked_fill(~attention_mask, -100),
    }


def losses(model: nn.Module, samples: dict[str, Tensor], steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(steps):
        loss = model(**samples).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    steps = parser.parse_args(arguments).steps
    torch.manual_seed(0)
    original, samples = small_model().train(), batch()
    swapped = copy.deepcopy(original)

    layers = swapped.model.gated_cross_attn_layers
    swapped.model.gated_cross_attn_layers = nn.ModuleList(map(IdeficsGatedCrossAttentionLayer.from_module, layers))

    expected, ours = (losses(model, samples, steps) for model in (original, swapped))
    print("step   transformers   vlmfast      difference")
    for step, (a, b) in enumerate(zip(expected, ours, strict=True), 1):
        print(f"{step:4d}   {a:.6f}       {b:.6f}     {b - a:+.1e}")
    largest = max(abs(a - b) for a, b in zip(expected, ours, strict=True))
    if largest > 1e-3:
        raise SystemExit(f"the losses differ by {largest:.1e}")


if __name__ == "__main__":
    main()
