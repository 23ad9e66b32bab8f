"""Patch embedding, uint8 pixels to tokens, forward and backward: `vlmfast bench patch_embed`.

A size is PATCH or PATCHxBATCH, batch 64 unless told; images are 224 pixels wide, tokens 768.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.bench.harness import Function, Op, Provider, Size, backend_rows, bench_of, compiled, one_or_two
from vlmfast.ops import patch_embed
from vlmfast.ops.patch_embed import IMPLS, reference

IMAGE, WIDTH = 224, 768
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def size(text: str) -> Size:
    patch, batch = one_or_two(text, 64)
    if IMAGE % patch:
        raise ValueError(f"PATCH must divide {IMAGE}, the images' width")
    patches, entries = (IMAGE // patch) ** 2, 3 * patch * patch
    operations = 2.0 * batch * patches * WIDTH * entries
    return Size({"patch": patch, "batch": batch}, operations, (batch * patches, WIDTH, entries))


def inputs(size: Size, dtype: torch.dtype) -> list[Tensor]:
    """pixels (B, H, W, C), weight, class token, position."""
    patch, batch = size.numbers["patch"], size.numbers["batch"]
    pixels = torch.randint(0, 256, (batch, IMAGE, IMAGE, 3), dtype=torch.uint8)
    weight = torch.randn(WIDTH, 3, patch, patch) * (3 * patch * patch) ** -0.5
    token, position = torch.randn(1, WIDTH), torch.randn(1 + (IMAGE // patch) ** 2, WIDTH)
    return [pixels, *(t.to(dtype) for t in (weight, token, position))]


def ours(pixels: Tensor, weight: Tensor, token: Tensor, position: Tensor, keep: Tensor | None = None) -> Tensor:
    return patch_embed(pixels, weight, layout="NHWC", mean=MEAN, std=STD, prefix=token, position=position, keep=keep)


def half(device: str) -> Function:
    """Half of the patches dropped, as FLIP does."""
    keeps: dict[tuple[int, int], Tensor] = {}

    def dropped(pixels: Tensor, weight: Tensor, token: Tensor, position: Tensor) -> Tensor:
        shape = (len(pixels), len(position) - 1)
        if shape not in keeps:
            keeps[shape] = torch.rand(shape, device=device).argsort(dim=1)[:, : shape[1] // 2]
        return ours(pixels, weight, token, position, keeps[shape])

    return dropped


def eager(pixels: Tensor, weight: Tensor, token: Tensor, position: Tensor) -> Tensor:
    """The image processor's normalisation and transformers' CLIPVisionEmbeddings.forward."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    x = ((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(weight.dtype)
    patches = F.conv2d(x, weight, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return torch.cat([token.expand(len(x), 1, -1), patches], dim=1) + position


def definition(pixels: Tensor, weight: Tensor, token: Tensor, position: Tensor) -> Tensor:
    return reference(pixels, weight, layout="NHWC", mean=MEAN, std=STD, prefix=token, position=position)


OP = Op(
    name="patch_embed",
    size=size,
    sizes=("16", "14", "32"),
    small="16x4",
    inputs=inputs,
    judged=(1, 2, 3),
    reference=definition,
    baseline="transformers",
    providers={
        "vlmfast": Provider(lambda device: ours, 2),
        "vlmfast, half of the patches": Provider(half, 1),
        "vlmfast forward": Provider(lambda device: ours, 1, forward_only=True),
        **backend_rows(IMPLS, {"": Provider(lambda device: ours, 2)}),
        "transformers": Provider(lambda device: eager, 2, dtypes=("float32", "bfloat16")),
        "transformers compiled": Provider(lambda device: compiled(eager), 2, dtypes=("float32", "bfloat16")),
    },
)

BENCH = bench_of(OP)
