"""Operands of tl.dot: their dtypes, their precision, and what the interpreter needs."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x as an operand of tl.dot; the interpreter cannot multiply bfloat16, and truncates to it."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def loaded(x):
    """What was loaded, as an operand of tl.dot."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return x.to(tl.float32)
    return x


def precision(tensor: Tensor) -> str:
    """tl.dot's input_precision: float32 products are one of TF32 where torch may, else six of bfloat16, or in older
    versions of Triton three of TF32.
    """
    if tensor.device.type != "cuda":
        return "ieee"
    return "tf32" if allows_tf32() else "bf16x6" if VERSION >= (3, 6) else "tf32x3"


def ceil_div(count: int, size: int) -> int:
    """triton.cdiv for the host: that one takes microseconds, as it also runs in kernels."""
    return -(-count // size)


def allows_tf32() -> bool:
    """Whether torch may multiply float32 matrices as TF32. Older getters raise where newer setters were used."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def capability(tensor: Tensor) -> int:
    """Compute capability, major * 10 + minor, that configurations are chosen by; 80 where there is none."""
    if tensor.device.type != "cuda" or torch.version.hip:
        return 80
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return major * 10 + minor


def unsupported(tensor: Tensor, *args: Any) -> str | None:
    """Why the Triton kernels cannot run on a tensor's device."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device.type}"
    if not torch.version.hip and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def tensor_or(tensor: Tensor | None, otherwise: Tensor) -> Tensor:
    """A kernel's pointer argument that is not read where there is no tensor."""
    return otherwise if tensor is None else tensor
