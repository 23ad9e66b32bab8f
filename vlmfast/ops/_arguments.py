"""What the public functions of ops check of their arguments' types. What they find wrong is a TypeError that names the
op, the argument, what it must be and what it is.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of what an op computes with."""
INTEGERS = frozenset(
    (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32)
)  # not those of quantised numbers, which PyTorch takes for integers as well


def refuse(op: str, name: str, expected: str, value: object) -> NoReturn:
    if isinstance(value, Tensor):
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.") + " layout"
        got = f"a tensor of {value.dtype}" if kind == "strided layout" else f"a tensor, {kind}"
    else:
        got = f"{type(value)} {value!r}" if isinstance(value, str | int | float) else f"{type(value)}"
    raise TypeError(f"{op}: {name} must be {expected}; got {got}")


def check_tensor(op: str, name: str, value: Any) -> None:
    """A tensor, and neither sparse nor nested. Its dtype, and so whether it is quantised, is checked by the caller."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested:
        refuse(op, name, "a dense tensor", value)


def check_floating(op: str, name: str, value: Any) -> None:
    check_tensor(op, name, value)
    if value.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float16 or bfloat16; got {value.dtype}")


def check_integers(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        refuse(op, name, "an integer tensor", value)
    check_tensor(op, name, value)
    if value.dtype not in INTEGERS:
        raise TypeError(f"{op}: {name} must be an integer tensor; got {value.dtype}")


def check_flag(op: str, name: str, value: Any) -> None:
    if value is not True and value is not False:
        refuse(op, name, "True or False", value)


def check_integer(op: str, name: str, value: Any) -> None:
    if not isinstance(value, (int, Integral, torch.SymInt)):
        refuse(op, name, "an integer", value)


def check_number(op: str, name: str, value: Any) -> None:
    if not isinstance(value, (float, Real, torch.SymFloat, torch.SymInt)):
        refuse(op, name, "a number", value)


def check_string(op: str, name: str, value: Any) -> None:
    if not isinstance(value, str):
        refuse(op, name, "a string", value)
