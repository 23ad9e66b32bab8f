"""What an op takes of PyTorch that PyTorch does not document. No other file of vlmfast names any of it.

All of it is for speed. It is looked up when this file is imported, which raises ImportError or AttributeError where a
name is gone; `vlmfast/ops/_define.py` then goes the public way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _after_autograd_keyset,
    _any_requires_grad,
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _DisableAutocast,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _current_level, _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

assert isinstance(_current_level, int)  # read anew at every call, as it changes

without_autocast = _DisableAutocast
"""`without_autocast` of vlmfast/ops/_define.py in a tenth of its time."""

_BELOW_AUTOGRAD_BITS = _after_autograd_keyset.raw_repr()
_BACKENDS_BITS = frozenset(DispatchKeySet(key).raw_repr() for key in (DispatchKey.CPU, DispatchKey.CUDA))


def autograd_kernel(
    name: str,
    op: Any,
    implementation: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None,
    backward: Callable[..., tuple[Any, ...]],
) -> Callable[..., Any]:
    """The op's kernel for autograd: as `torch.library.register_autograd` makes it, but sooner at the implementation.

    That one always dispatches a second time. Here it is done only where something is to see the op that lies between
    autograd and backends: a subclass of tensors, a mode that traces or counts, or a transform of torch.func. Each level
    of those dispatches the op anew, so that its function is one of a single level, as those of PyTorch's own ops are.
    """

    def below(keyset: Any, inputs: tuple[Any, ...]) -> Any:
        with _AutoDispatchBelowAutograd():
            if keyset.raw_repr() & _BELOW_AUTOGRAD_BITS in _BACKENDS_BITS:
                return implementation(*inputs)
            return op.redispatch(keyset & _after_autograd_keyset, *inputs)

    def forward(ctx: Any, *args: Any) -> Any:
        inputs = args[:-1]
        if _are_functorch_transforms_active():  # an outer level has derivatives of its own
            with torch.enable_grad(), _set_fwd_grad_enabled(True):
                output = below(args[-1], inputs)
        else:
            output = below(args[-1], inputs)
        if setup_context is not None:
            setup_context(ctx, inputs, output)
        return output

    def gradients(ctx: Any, *grads: Any) -> Any:
        return (*backward(ctx, *grads), None)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(f"{op} has no forward-mode derivative; reverse mode serves, as in torch.func.grad")

    static = {"forward": staticmethod(forward), "backward": staticmethod(gradients), "jvp": staticmethod(jvp)}
    function: Any = type(f"vlmfast_{name}", (_SingleLevelFunction,), static)  # profilers show this name

    def kernel(keyset: Any, *inputs: Any) -> Any:
        reverse_mode = torch.is_grad_enabled() and _any_requires_grad(*inputs)
        if not reverse_mode and forward_ad._current_level < 0:
            return below(keyset, inputs)
        if _are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(*inputs, keyset)
        return function.apply(*inputs, keyset)

    return kernel
