"""Registration of an op with PyTorch: schema, implementation, fake, and how a call gets there through autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("vlmfast", "DEF")


@contextmanager
def _without_autocast() -> Iterator[None]:
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        for device in ("cpu", *([accelerator.type] if accelerator else [])):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


autograd_kernel: Callable[..., Callable[..., Any]] | None
without_autocast: Callable[[], Any]
"""A context for an op's implementation, whose products autocast is to leave as they are."""
try:
    from vlmfast.ops._private import autograd_kernel, without_autocast
except (ImportError, AttributeError):  # a PyTorch without them: its public ways serve, and cost more time
    autograd_kernel, without_autocast = None, _without_autocast


def define(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., tuple[Any, ...]] | None = None,
) -> Any:
    """Registers vlmfast::name for every device and returns the callable op.

    Args:
        schema: of positional arguments without defaults.
        setup_context, backward: the derivative, as `torch.library.register_autograd` takes it, called by position.
            Without, it raises RuntimeError, where autograd would drop it in silence.
    """
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vlmfast::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.vlmfast, name).default

    def no_backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{op} has no derivative: the second derivative of this op is not implemented")

    if autograd_kernel is None:
        torch.library.register_autograd(op, backward or no_backward, setup_context=setup_context, lib=LIBRARY)
        return _without_tangents(op)
    kernel = autograd_kernel(name, op, implementation, setup_context, backward or no_backward)
    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    return op


def _without_tangents(op: Any) -> Callable[..., Any]:
    """The op, but that it raises where `register_autograd`'s derivative would drop those of forward mode in silence."""

    refusal = f"{op} has no forward-mode derivative; reverse mode serves, as in torch.func.grad"

    def call(*inputs: Any) -> Any:
        if not torch.compiler.is_compiling():
            for tensor in inputs:
                if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
                    raise RuntimeError(refusal)
        return op(*inputs)

    return call
