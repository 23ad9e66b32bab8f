"""The rule by which a module is judged against the one that it replaces: output and all gradients, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numerics import assert_as_exact_as_eager
from torch import Tensor, nn
from torch.func import functional_call


def randomise(module: nn.Module) -> nn.Module:
    """Random parameters, none of them special: gates and biases are not 0, norms not 1, outputs of inputs' size."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.numel() ** -0.25)  # width ** -0.5 of square ones
            if parameter.dim() < 2 or "alpha" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (0.5 if parameter.numel() == 1 else 0.0))
                if "norm" in name.lower() and name.endswith("weight"):
                    parameter.add_(1)
    return module


def check_module(
    ours: nn.Module,
    original: nn.Module,
    inputs: Sequence[Tensor],
    ours_call: Mapping[str, Any] | None = None,
    original_call: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    epsilon: float = 2e-6,
) -> None:
    """Output, gradients of inputs and of every parameter of ours by the twice-eager rule, eager being original.

    Args:
        inputs: positional, with gradients. ours_call, original_call: the other arguments of each.
    """
    parameters = dict(original.named_parameters())
    assert set(parameters) == {name for name, _ in ours.named_parameters()}

    def scalar(module: nn.Module, arguments: Mapping[str, Any]) -> Callable[..., Tensor]:
        def function(*tensors: Tensor) -> Tensor:
            weights, *given = tensors[: 1 + len(inputs)]
            named = dict(zip(parameters, tensors[1 + len(inputs) :], strict=True))
            out = functional_call(module, named, tuple(given), dict(arguments))
            out = out[0] if isinstance(out, tuple) else out
            return (out * weights).sum(dtype=torch.promote_types(out.dtype, torch.float32))

        return function

    values = [t.to(dtype) for t in (*inputs, *(p.detach() for p in parameters.values()))]
    with torch.no_grad():
        out = original(*inputs, **(original_call or {}))
    out = out[0] if isinstance(out, tuple) else out
    weights = torch.randn(out.shape).to(dtype)
    floors = dict.fromkeys(parameters, 0.0)
    for name, parameter in parameters.items():
        if parameter.numel() == 1:
            eager, exact = (
                _terms(original, name, inputs, original_call or {}, weights, d) for d in (dtype, torch.float64)
            )
            floors[name] = 2 * (eager - exact).norm().item()
    names = ["sum", "out", *(f"gradient of input {i}" for i in range(len(inputs)))]
    names += [f"gradient of {name}" for name in parameters]
    assert_as_exact_as_eager(
        scalar(ours.to(dtype), ours_call or {}),
        scalar(original.to(dtype), original_call or {}),
        (weights, *values),
        epsilon=epsilon,
        floors=(math.inf, *[0.0] * (1 + len(inputs)), *floors.values()),  # the scalar is judged by its gradients
        names=names,
    )


def _terms(
    module: nn.Module, gate: str, inputs: Sequence[Tensor], call: Mapping[str, Any], weights: Tensor, dtype: torch.dtype
) -> Tensor:
    """float64 terms whose sum is a scalar gate's gradient.

    They cancel, and one sum says little about the size of its error: eager's expected one is the norm of its terms'.
    """
    named = {name: p.detach().to(weights.dtype).to(dtype) for name, p in module.named_parameters()}
    each = named[gate].expand(weights.shape).clone().requires_grad_()
    given = tuple(t.to(weights.dtype).to(dtype) for t in inputs)
    out = functional_call(module.to(dtype), {**named, gate: each}, given, dict(call))
    out.backward(weights.to(dtype))
    return each.grad.double()
