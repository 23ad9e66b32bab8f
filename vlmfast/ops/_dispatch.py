"""The backends of an op, and which of them a call gets, with reasons."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, NoReturn, TypeVar

import torch

INTERFACE = 3
"""Of vlmfast._C, in csrc/bindings.cpp: what its functions take and return."""
BACKENDS = ("auto", "triton", "cuda", "cpu", "torch")


def _load_core() -> tuple[Any, str | None]:
    """The C++ extension and None, or None and why it is not there."""
    try:
        core = import_module("vlmfast._C")
    except ImportError as error:
        return None, f"the C++ extension vlmfast._C was not built ({error}); see 'Install' in the README"
    if getattr(core, "INTERFACE", None) != INTERFACE:
        return None, "the C++ extension was built from other sources than this package's; install again"
    built_for = core.build_info()["torch"]
    if built_for != torch.__version__:
        return None, f"the C++ extension was built for torch {built_for}, this is {torch.__version__}; install again"
    return core, None


core, CORE_MISSING = _load_core()
cuda_core = getattr(core, "cuda", None)
"""The part of the extension for GPUs, or None. Tests put one there whose kernels run on CPU tensors."""


AnyImpl = TypeVar("AnyImpl", bound="Impl")


@dataclass(frozen=True)
class Impl:
    """One backend of one op; what else an op's backends differ in, it adds in a class of its own.

    `unsupported` looks at metadata only and returns why the backend cannot run, or None.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    unsupported: Callable[..., str | None] = lambda *args: None

    @classmethod
    def cpu(cls: type[AnyImpl], op: str, **others: Callable[..., Any]) -> AnyImpl:
        """The C++ backend, `<op>_forward` and `<op>_backward` of vlmfast._C, with `others` in place or besides."""
        functions = {name: cpu_function(f"{op}_{name}") for name in ("forward", "backward")}
        return cls(**{**functions, "unsupported": cpu_unsupported, **others})

    @classmethod
    def triton(cls: type[AnyImpl], op: str, **others: Callable[..., Any]) -> AnyImpl:
        """The Triton backend, `forward` and `backward` of vlmfast.kernels.<op>; likewise."""
        functions = {name: triton_function(op, name) for name in ("forward", "backward")}
        return cls(**{**functions, "unsupported": triton_unsupported(op), **others})

    @classmethod
    def cuda(cls: type[AnyImpl], op: str, **others: Callable[..., Any]) -> AnyImpl:
        """The CUDA C++ backend, `<op>_forward` and `<op>_backward` of vlmfast._C.cuda; likewise."""
        functions = {name: cuda_function(f"{op}_{name}") for name in ("forward", "backward")}
        return cls(**{**functions, "unsupported": cuda_unsupported, **others})


def cpu_function(name: str) -> Callable[..., Any]:
    """A function of the C++ extension, for where `cpu_unsupported` has no reason against it."""
    function: Callable[..., Any] = getattr(core, name, _missing)
    return function


def _missing(*args: object) -> NoReturn:
    raise RuntimeError(CORE_MISSING or "the C++ extension is older than this package; install again")


def triton_function(op: str, name: str) -> Callable[..., Any]:
    """A function of vlmfast.kernels.<op>, which is imported when it is called."""
    return lambda *args: getattr(_triton_kernels(op)[0], name)(*args)


def cuda_function(name: str) -> Callable[..., Any]:
    """A function of the extension for GPUs, or of what tests put in its place."""
    return lambda *args: getattr(cuda_core, name)(*args)


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


def triton_unsupported(kernels: str) -> Callable[..., str | None]:
    """Why the Triton backend in vlmfast.kernels.<kernels> cannot run; `unsupported` of that module, or else of
    vlmfast.kernels.products, is asked last.

    It is imported, and with it triton, only for tensors that it may run on: on a GPU, or when asked for by name on CPU
    tensors, in triton's interpreter, slowly and for tests.
    """

    def unsupported(first: torch.Tensor, *args: object) -> str | None:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1" and _wanted() == "triton"
        if first.device.type != "cuda" and not interpreted:
            return f"the tensors are on {first.device.type}"
        module, missing = _triton_kernels(kernels)
        if missing:
            return missing
        own = module if hasattr(module, "unsupported") else _triton_kernels("products")[0]
        reason: str | None = own.unsupported(first, *args)
        return reason

    return unsupported


@cache
def _triton_kernels(kernels: str) -> tuple[Any, str | None]:
    """The module and None, or None and why it cannot be imported; asked once, as a failing import takes its time."""
    try:
        return import_module(f"vlmfast.kernels.{kernels}"), None
    except ImportError as error:
        return None, f"triton is not there ({error})"


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


def choose(op: str, impls: Mapping[str, AnyImpl], *args: object) -> AnyImpl:
    """The first backend that can run, or the one VLMFAST_BACKEND names.

    Raises:
        RuntimeError: the backend named by VLMFAST_BACKEND cannot run; the message holds its reason.
        ValueError: VLMFAST_BACKEND is not one of the backends.
    """
    wanted = _wanted()
    if wanted == "auto":  # mostly the first one
        impl = next(iter(impls.values()))
        if impl.unsupported(*args) is None:
            return impl
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
