"""Modules of cross-attention in float64, which no kernel takes: the same in PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from modules import randomise
from torch import Tensor, nn

from vlmfast.nn import GatedCrossAttentionBlock, ImageToTextFusion, PerceiverResampler, TextToImageFusion
from vlmfast.nn.transformers_cross_attention import GPT2CrossAttention

KEYS = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0]])  # one sample has none
LOCATIONS = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()


def gpt2() -> nn.Module:
    return GPT2CrossAttention(transformers.GPT2Config(n_embd=8, n_head=2, attn_pdrop=0.0, resid_pdrop=0.0), layer_idx=0)


CASES: dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]] = {
    "flamingo, last": (
        GatedCrossAttentionBlock(dim=8, dim_head=4, heads=2),
        (torch.randn(3, 4, 8), torch.randn(3, 2, 5, 8)), {"media_locations": LOCATIONS},
    ),
    "flamingo, all": (
        GatedCrossAttentionBlock(
            dim=8, dim_head=4, heads=2, only_attend_immediate_media=False, before_media="uniform"
        ),
        (torch.randn(3, 4, 8), torch.randn(3, 2, 5, 8)), {"media_locations": LOCATIONS},
    ),
    "resampler": (
        PerceiverResampler(dim=8, depth=1, dim_head=4, heads=2, num_latents=3), (torch.randn(3, 2, 5, 8),), {}
    ),
    "text to image": (TextToImageFusion(8, 2, 8), (torch.randn(3, 4, 8), torch.randn(3, 5, 8)), {}),
    "image to text": (
        ImageToTextFusion(8, 2, 8), (torch.randn(6, 4, 8), torch.randn(3, 5, 8)), {"y_mask": KEYS},
    ),
    "gpt2": (gpt2(), (torch.randn(3, 4, 8),), {"encoder_hidden_states": None, "encoder_attention_mask": KEYS}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_float64_is_float32_to_its_rounding(name: str) -> None:
    module, tensors, options = CASES[name]
    randomise(module)
    torch.manual_seed(1)
    states = torch.randn(3, 5, 8)

    def results(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
        given = dict(options)
        if "encoder_hidden_states" in given:
            given["encoder_hidden_states"] = states.to(dtype)
        out = module.to(dtype)(*inputs, **given)
        out = out[0] if isinstance(out, tuple) else out
        out.square().sum().backward()
        return [out.detach(), *(t.grad for t in inputs), *(p.grad for p in module.parameters())]

    single, double = results(copy.deepcopy(module), torch.float32), results(copy.deepcopy(module), torch.float64)
    for a, b in zip(single, double, strict=True):
        assert b.dtype == torch.float64
        assert b.isfinite().all()
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))
