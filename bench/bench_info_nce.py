"""Forward and backward of the contrastive loss: `pytest bench/bench_info_nce.py`, float32, D = 512, scale 50.

GFLOP/s count the operations that the row's own algorithm does (`units` * N * N * D); `gemm` is the machine's matrix
product in the same run, so that a share of it can be read off however fast or busy the machine is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.ops import info_nce

DIM, SCALE = 512, 50.0
SIZES = (1024, 4096, 8192)


def _open_clip() -> Callable[..., Tensor]:
    return pytest.importorskip("open_clip.loss").ClipLoss()


def _transformers() -> Callable[..., Tensor]:
    clip_loss = pytest.importorskip("transformers.models.clip.modeling_clip").image_text_contrastive_loss
    return lambda image, text, scale: clip_loss(scale * text @ image.T)


# name: (loss, units of N * N * D in forward and backward)
PROVIDERS: dict[str, tuple[Callable[[], Callable[..., Tensor]], int]] = {
    "vlmfast-kept": (lambda: lambda *inputs: info_nce(*inputs, recompute=False), 6),
    "vlmfast-streamed": (lambda: lambda *inputs: info_nce(*inputs, recompute=True), 8),
    "open_clip": (_open_clip, 12),
    "transformers": (_transformers, 6),
    "transformers-compiled": (lambda: torch.compile(_transformers()), 6),
}


def features(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(rows, DIM), dim=1).requires_grad_() for _ in range(2))
    return image, text, torch.tensor(SCALE, requires_grad=True)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("provider", list(PROVIDERS))
def test_forward_backward(benchmark: Any, provider: str, rows: int) -> None:
    make, units = PROVIDERS[provider]
    loss, inputs = make(), features(rows)
    benchmark.group = f"N = {rows}"
    benchmark.pedantic(lambda: torch.autograd.grad(loss(*inputs), inputs), rounds=5, warmup_rounds=2)
    record(benchmark, units * rows * rows * DIM)


@pytest.mark.parametrize("rows", SIZES)
def test_gemm(benchmark: Any, rows: int) -> None:
    image, text, _ = features(rows)
    benchmark.group = f"N = {rows}"
    with torch.no_grad():
        benchmark.pedantic(lambda: image @ text.T, rounds=5, warmup_rounds=2)
    record(benchmark, 2 * rows * rows * DIM)


def record(benchmark: Any, operations: int) -> None:
    benchmark.extra_info["gflops"] = round(operations / benchmark.stats.stats.median / 1e9, 1)
    benchmark.extra_info["threads"] = torch.get_num_threads()
