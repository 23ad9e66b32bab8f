"""A call of every op: the function and the inputs that it is differentiated by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from contrastive import pairs
from media import qkv
from torch import Tensor

from vlmfast.ops import gated_residual, info_nce, linear_cross_entropy, media_attention, patch_embed, sigmoid_loss

Inputs = tuple[Callable[..., Tensor], tuple[Tensor, ...]]
Case = Callable[[], Inputs]


def features() -> tuple[Tensor, Tensor]:
    image, text = pairs(6, 8)
    return image.float(), text.float()


def the_info_nce() -> Inputs:
    return info_nce, (*features(), torch.tensor(5.0))


def the_sigmoid_loss() -> Inputs:
    return sigmoid_loss, (*features(), torch.tensor(5.0), torch.tensor(-4.0))


def the_linear_cross_entropy() -> Inputs:
    labels = torch.tensor([0, 8, -100, 3])
    return (
        lambda hidden, weight, bias: linear_cross_entropy(hidden, weight, labels, bias=bias, label_smoothing=0.1),
        (torch.randn(4, 8), torch.randn(9, 8), torch.randn(9)),
    )


def the_gated_residual() -> Inputs:
    return (
        lambda *inputs: gated_residual(*inputs).square().sum(),
        (torch.randn(3, 8), torch.randn(3, 8), torch.tensor([0.5])),
    )


def the_patch_embed() -> Inputs:
    return (
        lambda pixels, weight, bias, position: patch_embed(pixels, weight, bias, position=position).square().sum(),
        (torch.randn(2, 3, 8, 8), torch.randn(8, 3, 4, 4), torch.randn(8), torch.randn(4, 8)),
    )


def the_media_attention() -> Inputs:
    last = torch.tensor([[0, 1, 1, 2, 2]])
    q, k, v = (t.float() for t in qkv(1, 2, 2, 5, 6, 8))
    return lambda q, k, v: media_attention(q, k, v, media_hi=last, tokens_per_media=3).square().sum(), (q, k, v)


OPS = [
    the_info_nce,
    the_sigmoid_loss,
    the_linear_cross_entropy,
    the_gated_residual,
    the_patch_embed,
    the_media_attention,
]
