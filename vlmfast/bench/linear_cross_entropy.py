"""A language model's loss from hidden states and the head's weight: `vlmfast bench linear_cross_entropy`.

A size is N or NxV, rows and words, V 50257 unless told (GPT-2's); 768 dims. Every row has a label.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.bench.harness import (
    Function,
    Op,
    Provider,
    Size,
    backend_rows,
    bench_of,
    compiled,
    on_gpu,
    one_or_two,
    require,
)
from vlmfast.ops import linear_cross_entropy
from vlmfast.ops.linear_cross_entropy import IMPLS, reference

DIM = 768


def size(text: str) -> Size:
    rows, words = one_or_two(text, 50257)
    return Size({"N": rows, "V": words}, rows * words * DIM, (rows, words, DIM), exact=rows * words <= 1 << 27)


def inputs(size: Size, dtype: torch.dtype) -> list[Tensor]:
    """hidden, weight, labels; the logits have a spread of about 3."""
    rows, words = size.numbers["N"], size.numbers["V"]
    hidden, weight = torch.randn(rows, DIM), torch.randn(words, DIM) * 3 * DIM**-0.5
    return [hidden.to(dtype), weight.to(dtype), torch.randint(words, (rows,))]


def ours(recompute: bool) -> Function:
    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, recompute=recompute)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, labels)


def liger(device: str) -> Function:
    on_gpu(device)
    loss = require("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def cut(device: str) -> Function:
    """Without its filter of small gradients, which the others do not drop."""
    on_gpu(device)
    loss = require("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, labels: loss(hidden, weight, labels, filter_eps=None)


def logits(count: int) -> Callable[[Size, int], float]:
    """Memory of a provider that holds so many times the logits."""
    return lambda size, itemsize: float(count * size.numbers["N"] * size.numbers["V"] * itemsize)


OP = Op(
    name="linear_cross_entropy",
    size=size,
    sizes=("256", "1024"),
    small="64x512",
    inputs=inputs,
    judged=(0, 1),
    reference=reference,
    baseline="eager",
    providers={
        "vlmfast kept": Provider(lambda device: ours(False), 6, memory=logits(1)),
        "vlmfast recomputed": Provider(lambda device: ours(True), 8),
        "vlmfast forward": Provider(lambda device: ours(True), 2, forward_only=True),
        "vlmfast kept, weight frozen": Provider(lambda device: ours(False), 4, frozen=(1,), memory=logits(1)),
        **backend_rows(IMPLS, {" recomputed": Provider(lambda device: ours(True), 8)}),
        "eager": Provider(lambda device: eager, 6, memory=logits(3)),
        "eager, weight frozen": Provider(lambda device: eager, 4, frozen=(1,), memory=logits(3)),
        "compiled": Provider(lambda device: compiled(eager), 6, memory=logits(2)),
        "liger": Provider(liger, 6),
        "cut-cross-entropy": Provider(cut, 8),
    },
)

BENCH = bench_of(OP)
