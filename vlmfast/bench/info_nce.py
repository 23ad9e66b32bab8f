"""The contrastive loss, forward and backward: `vlmfast bench info_nce`. Scale 50, unit-norm features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.bench import pairs
from vlmfast.bench.harness import Function, Op, Provider, backend_rows, bench_of, compiled, on_gpu, require
from vlmfast.bench.pairs import matrices
from vlmfast.ops import info_nce
from vlmfast.ops.info_nce import IMPLS, reference

SCALE = 50.0


def ours(recompute: bool) -> Function:
    return lambda image, text, scale: info_nce(image, text, scale, recompute=recompute)


def open_clip(device: str) -> Function:
    loss = require("open_clip.loss").ClipLoss()
    return lambda image, text, scale: loss(image, text, scale.to(image.dtype))


def transformers(device: str) -> Function:
    loss = require("transformers.models.clip.modeling_clip").image_text_contrastive_loss
    return lambda image, text, scale: loss(text @ image.T * scale.to(image.dtype))


def captured(device: str) -> Function:
    """Ours, forward and backward captured in a CUDA graph for each size; a step copies the features into it."""
    on_gpu(device)
    graphs: dict[tuple[Any, ...], Any] = {}

    def loss(*inputs: Tensor) -> Tensor:
        key = tuple((t.shape, t.dtype, t.requires_grad) for t in inputs)
        if key not in graphs:
            sample = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in inputs)
            graphs[key] = torch.cuda.make_graphed_callables(ours(True), sample)
        found: Tensor = graphs[key](*inputs)
        return found

    return loss


def compiled_graph(device: str) -> Function:
    """transformers' loss, compiled and captured by torch."""
    on_gpu(device)
    return torch.compile(transformers(device), dynamic=False, mode="reduce-overhead")


def chunked(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """What one writes without a kernel: rows in chunks, each recomputed in backward."""
    from torch.utils.checkpoint import checkpoint

    def rows(part: Tensor, every: Tensor, start: int) -> Tensor:
        labels = torch.arange(start, start + len(part), device=part.device)
        return F.cross_entropy(scale.to(part.dtype) * part @ every.T, labels, reduction="sum")

    total = image.new_zeros(())
    for start in range(0, len(image), 1024):
        stop = start + 1024
        total = total + checkpoint(rows, image[start:stop], text, start, use_reentrant=False)
        total = total + checkpoint(rows, text[start:stop], image, start, use_reentrant=False)
    return total / (2 * len(image))


def memeff(device: str) -> Function:
    on_gpu(device)
    # Its temperature is a constant, without gradient.
    loss = require("memeff").MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return lambda image, text, scale: loss(image, text)


def inf_cl(device: str) -> Function:
    on_gpu(device)
    loss = require("inf_cl").cal_flash_loss
    labels: dict[int, Tensor] = {}

    def symmetric(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        own = labels.setdefault(len(image), torch.arange(len(image), device=device))
        one, other = loss(image, text, own, scale), loss(text, image, own, scale)
        return (one.mean() + other.mean()) / 2

    return symmetric


OP = Op(
    name="info_nce",
    size=pairs.size,
    sizes=("1024", "4096", "8192"),
    small="256",
    inputs=pairs.inputs(SCALE),
    judged=(0, 1),
    reference=reference,
    baseline="open_clip",
    providers={
        "vlmfast kept": Provider(lambda device: ours(False), 6, memory=matrices(2)),
        "vlmfast streamed": Provider(lambda device: ours(True), 8),
        "vlmfast forward": Provider(lambda device: ours(True), 2, forward_only=True),
        "vlmfast kept, image frozen": Provider(lambda device: ours(False), 4, frozen=(0,), memory=matrices(2)),
        "vlmfast streamed, image frozen": Provider(lambda device: ours(True), 6, frozen=(0,)),
        **backend_rows(
            IMPLS,
            {
                " kept": Provider(lambda device: ours(False), 6, memory=matrices(3)),
                " streamed": Provider(lambda device: ours(True), 8),
            },
        ),
        "vlmfast in a CUDA graph": Provider(captured, 8),
        "open_clip": Provider(open_clip, 12, memory=matrices(5), dtypes=("float32", "bfloat16")),
        "transformers": Provider(transformers, 6, memory=matrices(5), dtypes=("float32", "bfloat16")),
        "transformers compiled": Provider(
            lambda device: compiled(transformers(device)), 6, memory=matrices(3), dtypes=("float32", "bfloat16")
        ),
        "transformers compiled, CUDA graph": Provider(
            compiled_graph, 6, memory=matrices(3), dtypes=("float32", "bfloat16")
        ),
        "torch in chunks": Provider(lambda device: chunked, 16, dtypes=("float32", "bfloat16")),
        "memeff": Provider(memeff, 10),
        "inf-cl": Provider(inf_cl, 20),
    },
)

BENCH = bench_of(OP)
