"""The table of what runs where: for each variant of each op and each dtype, the backends that the code itself names.

Each variant is called once, small and on the CPU. What its backends are asked there, they are asked again as if the
tensors were on a GPU, with the extension built for both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton  # noqa: F401  without it every table would lack its backend
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmfast import ops
from vlmfast.ops import _dispatch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
Call = Callable[[torch.dtype], Tensor]


def pair(dtype: torch.dtype, rows: int = 4, columns: int = 4) -> tuple[Tensor, Tensor, float]:
    unit = torch.full((max(rows, columns), 4), 0.5, dtype=dtype)
    return unit[:rows].clone().requires_grad_(), unit[:columns].clone(), 2.0


def attention(dtype: torch.dtype, dim: int = 8, **options: Any) -> Tensor:
    q, kv = torch.ones(1, 2, 4, dim, dtype=dtype, requires_grad=True), torch.ones(1, 2, 6, dim, dtype=dtype)
    return ops.media_attention(q, kv, kv, **options)


def entropy(dtype: torch.dtype, **options: Any) -> Tensor:
    hidden, weight = torch.ones(4, 8, dtype=dtype, requires_grad=True), torch.ones(5, 8, dtype=dtype)
    return ops.linear_cross_entropy(hidden, weight, IDS, **options)


def embedded(dtype: torch.dtype, pixels: torch.dtype | None = None, layout: str = "NCHW", **options: Any) -> Tensor:
    shape = (2, 3, 4, 4) if layout == "NCHW" else (2, 4, 4, 3)
    images = torch.ones(shape, dtype=pixels or dtype)
    normalisation = {"mean": (0.5,) * 3, "std": (0.5,) * 3} if pixels else {}
    weight = torch.ones(8, 3, 2, 2, dtype=dtype, requires_grad=True)
    return ops.patch_embed(images, weight, layout=layout, **normalisation, **options)


def residual(dtype: torch.dtype, gate: int = 1, **options: Any) -> Tensor:
    x = torch.ones(2, 4, dtype=dtype)
    return ops.gated_residual(x, x.clone().requires_grad_(), torch.ones(gate, dtype=dtype), **options)


INTERVAL = {"media_lo": torch.ones(1, 4, dtype=torch.int32), "media_hi": torch.ones(1, 4, dtype=torch.int32)}
MEDIA = {**INTERVAL, "tokens_per_media": 3}
IDS = torch.tensor([0, 0, 1, 2])
VARIANTS: dict[str, dict[str, Call]] = {
    "info_nce": {
        "symmetric": lambda dtype: ops.info_nce(*pair(dtype)),
        "`recompute=True`": lambda dtype: ops.info_nce(*pair(dtype), recompute=True),
        "`label_smoothing`": lambda dtype: ops.info_nce(*pair(dtype), label_smoothing=0.1),
        "`exclude_positive` (InfoLOOB)": lambda dtype: ops.info_nce(*pair(dtype), exclude_positive=True),
        "`groups` (several positives)": lambda dtype: ops.info_nce(*pair(dtype), groups=(IDS, IDS)),
        "`row_mask`": lambda dtype: ops.info_nce(*pair(dtype), row_mask=IDS > 0),
        "one direction, rectangle": lambda dtype: ops.info_nce(*pair(dtype, 2, 4), label_offset=1, bidirectional=False),
    },
    "sigmoid_loss": {
        "square": lambda dtype: ops.sigmoid_loss(*pair(dtype), -1.0),
        "rectangle, `label_offset`": lambda dtype: ops.sigmoid_loss(*pair(dtype, 2, 4), -1.0, label_offset=1),
        "`groups`": lambda dtype: ops.sigmoid_loss(*pair(dtype), -1.0, groups=(IDS, IDS)),
    },
    "linear_cross_entropy": {
        "no bias": entropy,
        "`bias`": lambda dtype: entropy(dtype, bias=torch.ones(5, dtype=dtype, requires_grad=True)),
        "`label_smoothing`": lambda dtype: entropy(dtype, label_smoothing=0.1),
        '`reduction="none"`': lambda dtype: entropy(dtype, reduction="none"),
    },
    "patch_embed": {
        "pixels of the weight's dtype": embedded,
        "uint8 pixels, NCHW": lambda dtype: embedded(dtype, torch.uint8),
        "uint8 pixels, NHWC": lambda dtype: embedded(dtype, torch.uint8, "NHWC"),
        "`prefix`, `position`": lambda dtype: embedded(
            dtype, prefix=torch.ones(1, 8, dtype=dtype), position=torch.ones(5, 8, dtype=dtype)
        ),
        "`keep`": lambda dtype: embedded(dtype, keep=torch.tensor([[0, 2], [1, 3]])),
        "`patch_embed_packed`": lambda dtype: ops.patch_embed_packed(
            [torch.ones(3, 4, 4, dtype=dtype), torch.ones(3, 2, 6, dtype=dtype)],
            torch.ones(8, 3, 2, 2, dtype=dtype, requires_grad=True),
        )[0],
    },
    "media_attention": {
        "everything visible": attention,
        "`media_lo`, `media_hi`": lambda dtype: attention(dtype, **MEDIA),
        "`media_len`": lambda dtype: attention(dtype, **MEDIA, media_len=torch.tensor([[2, 3]], dtype=torch.int32)),
        "`key_bias`": lambda dtype: attention(dtype, key_bias=torch.zeros(1, 6)),
        '`empty="all"`': lambda dtype: attention(dtype, **MEDIA, empty="all"),
        "heads of 128": lambda dtype: attention(dtype, 128),
        "heads of 256": lambda dtype: attention(dtype, 256),
    },
    "gated_residual": {
        "one gate": residual,
        "a gate per channel": lambda dtype: residual(dtype, 4),
        '`activation="identity"`': lambda dtype: residual(dtype, activation="identity"),
        "`row_mask`": lambda dtype: residual(dtype, row_mask=torch.tensor([True, False])),
    },
}


def page() -> str:
    """Markdown: a table per op."""
    return "\n\n".join(f"### {op}\n\n{table(op)}" for op in VARIANTS)


def table(op: str) -> str:
    rows = [f"| variant | {' | '.join(DTYPES)} |", "|---" * (1 + len(DTYPES)) + "|"]
    rows += [
        f"| {variant} | {' | '.join(cell(op, call, dtype) for dtype in DTYPES.values())} |"
        for variant, call in VARIANTS[op].items()
    ]
    return "\n".join(rows)


def cell(op: str, call: Call, dtype: torch.dtype) -> str:
    found = backends(op, call, dtype)
    if found is None:
        return "raises TypeError"
    return "<br>".join(f"{device}: {', '.join(names)}" for device, names in found.items())


def backends(op: str, call: Call, dtype: torch.dtype) -> dict[str, list[str]] | None:
    """By device, those that can run forward and backward, in order of preference; None where the dtype is refused."""
    with recorded(op) as questions:
        try:
            call(dtype).sum().backward()
        except TypeError:
            return None
    if len(questions) < 2:
        raise RuntimeError(f"{op}: forward and backward must both choose a backend; asked {len(questions)} times")
    impls = sys.modules[f"vlmfast.ops.{op}"].IMPLS  # type: ignore[attr-defined]
    found = {}
    for device in ("cpu", "cuda"):
        with built_for_all(), FakeTensorMode() as mode:
            moved = [
                [
                    mode.from_tensor(t) if device == "cpu" else torch.empty(t.shape, dtype=t.dtype, device=device)
                    for t in question
                ]
                for question in questions
            ]
            found[{"cpu": "CPU", "cuda": "GPU"}[device]] = [
                name for name, impl in impls.items() if all(impl.unsupported(*tensors) is None for tensors in moved)
            ]
    return found


@contextmanager
def recorded(op: str) -> Iterator[list[tuple[Tensor, ...]]]:
    """The tensors by which each choice of a backend is made."""
    module, questions = sys.modules[f"vlmfast.ops.{op}"], []
    choose = _dispatch.choose

    def record(name: str, impls: Any, *tensors: Tensor) -> Any:
        questions.append(tuple(t.detach() for t in tensors))
        return choose(name, {"torch": impls["torch"]}, *tensors)

    with mock.patch.object(module, "choose", record), mock.patch.dict("os.environ", {"VLMFAST_BACKEND": "auto"}):
        yield questions


@contextmanager
def built_for_all() -> Iterator[None]:
    """As with the extension built, CUDA included, on a machine with a GPU of compute capability 8.0."""
    with (
        mock.patch.object(_dispatch, "core", SimpleNamespace(build_info=lambda: {"cuda_archs": "80"})),
        mock.patch.object(_dispatch, "CORE_MISSING", None),
        mock.patch.object(_dispatch, "cuda_core", SimpleNamespace(DEVICE="cuda")),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 0)),
        mock.patch.dict("os.environ", {"TRITON_INTERPRET": "0", "VLMFAST_BACKEND": "auto"}),
    ):
        yield
