"""SigLIP's loss, forward and backward: `vlmfast bench sigmoid_loss`. Scale 10, bias -10."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.bench import pairs
from vlmfast.bench.harness import Function, Op, Provider, backend_rows, bench_of, compiled, on_gpu, require
from vlmfast.bench.pairs import matrices
from vlmfast.ops import sigmoid_loss
from vlmfast.ops.sigmoid_loss import IMPLS, reference


def open_clip(device: str) -> Function:
    loss = require("open_clip.loss").SigLipLoss()
    return lambda image, text, scale, bias: loss(image, text, scale.to(image.dtype), bias.to(image.dtype))


def transformers(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The expression in transformers' SiglipModel.forward, which has no function of its own."""
    logits = text @ image.T * scale.to(image.dtype) + bias.to(image.dtype)
    signs = -torch.ones_like(logits) + 2 * torch.eye(logits.size(0), device=logits.device)
    return -F.logsigmoid(signs * logits).sum(-1).mean()


def siglip_kernel(device: str) -> Function:
    on_gpu(device)
    loss = require("siglip_kernel").fused_siglip_loss
    return lambda image, text, scale, bias: loss(image, text, scale.log(), bias)


OP = Op(
    name="sigmoid_loss",
    size=pairs.size,
    sizes=("1024", "4096", "8192"),
    small="256",
    inputs=pairs.inputs(10.0, -10.0),
    judged=(0, 1),
    reference=reference,
    baseline="open_clip",
    providers={
        "vlmfast": Provider(lambda device: sigmoid_loss, 6),
        "vlmfast, image frozen": Provider(lambda device: sigmoid_loss, 4, frozen=(0,)),
        "vlmfast forward": Provider(lambda device: sigmoid_loss, 2, forward_only=True),
        **backend_rows(IMPLS, {"": Provider(lambda device: sigmoid_loss, 6)}),
        "open_clip": Provider(open_clip, 6, memory=matrices(5), dtypes=("float32", "bfloat16")),
        "transformers": Provider(lambda device: transformers, 6, memory=matrices(5), dtypes=("float32", "bfloat16")),
        "transformers compiled": Provider(
            lambda device: compiled(transformers), 6, memory=matrices(3), dtypes=("float32", "bfloat16")
        ),
        "siglip-kernel": Provider(siglip_kernel, 6),
    },
)

BENCH = bench_of(OP)
