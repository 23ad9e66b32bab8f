"""The one rule by which fused ops are judged: against float64, at most twice the error of the eager expression."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def loss_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None
) -> list[Tensor]:
    """float64 copies of function(*inputs) and of its gradient at every input, the inputs cast to dtypes first."""
    dtypes = dtypes or [t.dtype for t in inputs]
    leaves = [t.detach().to(dtype).requires_grad_() for t, dtype in zip(inputs, dtypes, strict=True)]
    loss = function(*leaves)
    return [t.detach().double() for t in (loss, *torch.autograd.grad(loss, leaves))]


def assert_as_exact_as_eager(
    fused: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    epsilon: float,
    floors: Sequence[float],
    names: Sequence[str],
) -> None:
    """Error of fused <= 2 * error of eager + epsilon * (largest exact value) + floor, in each output's worst entry."""
    exact = loss_and_gradients(eager, inputs, [torch.float64] * len(inputs))
    ours = loss_and_gradients(fused, inputs)
    theirs = loss_and_gradients(eager, inputs)
    for name, a, b, reference, floor in zip(names, ours, theirs, exact, floors, strict=True):
        error, allowed = (a - reference).abs().max().item(), (b - reference).abs().max().item()
        largest = reference.abs().max().item()
        bound = 2 * allowed + epsilon * largest + floor
        assert error <= bound, (
            f"{name}: error {error:.2e}, eager {allowed:.2e}, bound {bound:.2e}, values to {largest:.2e}"
        )


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Those of a model's parameters by name; the model has none afterwards."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
