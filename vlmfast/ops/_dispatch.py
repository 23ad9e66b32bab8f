"""The backends of an op, and which of them a call gets, with reasons."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch

BACKENDS = ("auto", "triton", "cuda", "cpu", "torch")


def _load_core() -> tuple[Any, str | None]:
    """The C++ extension and None, or None and why it is not there."""
    try:
        core = import_module("vlmfast._C")
    except ImportError as error:
        return None, f"the C++ extension vlmfast._C was not built ({error}); see 'Install' in the README"
    built_for = core.build_info()["torch"]
    if built_for != torch.__version__:
        return None, f"the C++ extension was built for torch {built_for}, this is {torch.__version__}; install again"
    return core, None


core, CORE_MISSING = _load_core()
cuda_core = getattr(core, "cuda", None)
"""The part of the extension for GPUs, or None. Tests put one there whose kernels run on CPU tensors."""


@dataclass(frozen=True)
class Impl:
    """One backend of one op. `unsupported` looks at metadata only and returns why the backend cannot run, or None."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    unsupported: Callable[..., str | None]


def cpu_unsupported(first: torch.Tensor, *args: object) -> str | None:
    """Why the C++ CPU backend cannot run."""
    if CORE_MISSING:
        return CORE_MISSING
    return None if first.device.type == "cpu" else f"the tensors are on {first.device.type}"


def cuda_unsupported(first: torch.Tensor, *args: object) -> str | None:
    """Why the CUDA C++ backend cannot run."""
    if first.device.type != (cuda_core.DEVICE if cuda_core else "cuda"):
        return f"the tensors are on {first.device.type}"
    if cuda_core is None:
        return CORE_MISSING or f"the C++ extension was built without CUDA: {core.build_info()['without_cuda']}"
    if first.is_cuda:
        archs, capability = core.build_info()["cuda_archs"], torch.cuda.get_device_capability(first.device)
        if not runs_on(archs, capability):
            return f"the GPU has compute capability {capability}, the extension's CUDA kernels are for {archs}"
    return None


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether kernels for `archs`, such as "80,90a", run on a GPU: on that or, but for an "a", a later one."""
    device = 10 * capability[0] + capability[1]
    return any(arch == f"{device}a" if arch.endswith("a") else int(arch) <= device for arch in archs.split(","))


def cuda_kernels() -> Any:
    """The functions of the CUDA C++ backend, where `cuda_unsupported` has no reason against it."""
    return cuda_core


def triton_unsupported(kernels: str) -> Callable[..., str | None]:
    """Why the Triton backend in vlmfast.kernels.<kernels> cannot run; that module's own `unsupported` is asked last.

    It is imported, and with it triton, only for tensors that it may run on: on a GPU, or when asked for by name on CPU
    tensors, in triton's interpreter, slowly and for tests.
    """

    def unsupported(first: torch.Tensor, *args: object) -> str | None:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1" and _wanted() == "triton"
        if first.device.type != "cuda" and not interpreted:
            return f"the tensors are on {first.device.type}"
        module, missing = _triton_kernels(kernels)
        reason: str | None = missing or module.unsupported(first, *args)
        return reason

    return unsupported


@cache
def _triton_kernels(kernels: str) -> tuple[Any, str | None]:
    """The module and None, or None and why it cannot be imported; asked once, as a failing import takes its time."""
    try:
        return import_module(f"vlmfast.kernels.{kernels}"), None
    except ImportError as error:
        return None, f"triton is not there ({error})"


def never(*args: object) -> None:
    """`unsupported` of a backend that runs everywhere."""


def explain(op: str, impls: Mapping[str, Impl], *args: object) -> dict[str, str | None]:
    """Why each backend of an op cannot run on these arguments, in order of preference; None where it can."""
    return dict(_reasons(op, impls, *args))


def _reasons(op: str, impls: Mapping[str, Impl], *args: object) -> Iterator[tuple[str, str | None]]:
    wanted = _wanted()
    if wanted == "auto":
        for name, impl in impls.items():
            yield name, impl.unsupported(*args)
    else:
        yield wanted, impls[wanted].unsupported(*args) if wanted in impls else f"{op} has no {wanted} backend"


def choose(op: str, impls: Mapping[str, Impl], *args: object) -> Impl:
    """The first backend that can run, or the one VLMFAST_BACKEND names.

    Raises:
        RuntimeError: the backend named by VLMFAST_BACKEND cannot run; the message holds its reason.
        ValueError: VLMFAST_BACKEND is not one of the backends.
    """
    reasons: dict[str, str | None] = {}
    for name, reason in _reasons(op, impls, *args):
        if reason is None:
            if name == "torch" and reasons:
                _warn_of_fallback(op, reasons)
            return impls[name]
        reasons[name] = reason
    details = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(f"{op}: the backend named by VLMFAST_BACKEND cannot run: {details}")


def _wanted() -> str:
    wanted = os.environ.get("VLMFAST_BACKEND", "auto")
    if wanted not in BACKENDS:
        raise ValueError(f"VLMFAST_BACKEND must be one of {', '.join(BACKENDS)}; got {wanted!r}")
    return wanted


_warned: set[str] = set()


def _warn_of_fallback(op: str, reasons: Mapping[str, str | None]) -> None:
    message = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"vlmfast.{op} runs on PyTorch ops ({message})", stacklevel=3)
