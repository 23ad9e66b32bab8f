"""A gated branch added to its residual: reference, backends, registration and public function.

With g = tanh(gate) or gate, one number or one per channel, and rows of `residual` and `hidden` flattened to (N, D)::

    out = residual + g * hidden    d_hidden = g * grad    d_gate = dg/dgate * sum_rows grad * hidden

in float32, rounded once. Rows where row_mask is False, and channels where g is 0, are copies of residual, bit for bit,
whatever hidden holds; d_hidden is 0 there, and masked rows add nothing to d_gate. A gate of 0 still has its gradient.

A backend's functions are forward(residual, hidden, gate, row_mask, tanh) -> out (N, D) in residual's dtype and
backward(grad, hidden, gate, row_mask, tanh, hidden_grad, gate_grad) -> (d_hidden (N, D) in hidden's dtype, d_gate like
gate), (0,) where not asked for. residual, hidden and grad are (N, D), of any of the dtypes each; gate is (1,) or (D,);
row_mask is (N,) bool or None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfast.ops._arguments import check_floating, check_string, check_tensor
from vlmfast.ops._define import define
from vlmfast.ops._dispatch import Impl, choose


def reference(
    residual: Tensor, hidden: Tensor, gate: Tensor, *, activation: str = "tanh", row_mask: Tensor | None = None
) -> Tensor:
    """The definition of gated_residual. Any floating dtype; float64 is the tests' oracle."""
    factor = gate.tanh() if activation == "tanh" else gate
    branch = hidden if row_mask is None else hidden.masked_fill(~row_mask[..., None], 0)
    return (residual + factor.flatten() * branch).to(residual.dtype)


def gated_residual(
    residual: Tensor, hidden: Tensor, gate: Tensor, *, activation: str = "tanh", row_mask: Tensor | None = None
) -> Tensor:
    """A branch's output times a learned gate, added to the residual, in one pass.

    Equals::

        residual + gate.tanh() * hidden.masked_fill(~row_mask[..., None], 0)

    Args:
        residual (..., D): float32, float16 or bfloat16.
        hidden (..., D): residual's shape; any of these dtypes, as under autocast.
        gate: one number or D of them in a tensor of any shape and of any of these dtypes.
        activation: "tanh" or "identity", of the gate.
        row_mask (...): bool, residual's shape without D; a row where it is False is its residual.
    Returns:
        out (..., D): residual's dtype. With a gate of 0 it is residual bit for bit, and the gate has its gradient.
    Raises:
        TypeError: an argument is not of the type above, a tensor is sparse, nested or quantised, or a dtype is not
            supported.
        ValueError: shapes or devices disagree, or activation is not one of the two; the message names the argument.
        RuntimeError: a second derivative is asked for, or the backend named by VLMFAST_BACKEND cannot run.
    Computed in float32 and rounded once, the gate's gradient summed in float32 or better, always in the same order for
    a given number of threads.
    Source: Alayrac et al. 2022 (Flamingo), section 2.2.
    """
    _check(residual, hidden, gate, activation, row_mask)
    dim = residual.shape[-1]
    mask = None if row_mask is None else row_mask.reshape(-1)
    rows = (t.reshape(-1, dim) for t in (residual, hidden))
    out: Tensor = _forward_op(*rows, gate.reshape(-1), mask, activation == "tanh")
    return out.view(residual.shape)


def _check(residual: Tensor, hidden: Tensor, gate: Tensor, activation: str, row_mask: Tensor | None) -> None:
    for name, tensor in (("residual", residual), ("hidden", hidden), ("gate", gate)):
        check_floating("gated_residual", name, tensor)
    shape = residual.shape
    if not shape or 0 in shape:
        raise ValueError(f"gated_residual: residual must be (..., dim) and not empty; got {tuple(shape)}")
    if hidden.shape != shape:
        raise ValueError(f"gated_residual: hidden must have residual's shape {tuple(shape)}; got {tuple(hidden.shape)}")
    dim = shape[-1]
    if gate.numel() not in (1, dim):
        raise ValueError(f"gated_residual: gate must have 1 element or {dim}; got {tuple(gate.shape)}")
    check_string("gated_residual", "activation", activation)
    if activation not in ("tanh", "identity"):
        raise ValueError(f"gated_residual: activation must be 'tanh' or 'identity'; got {activation!r}")
    if row_mask is not None:
        check_tensor("gated_residual", "row_mask", row_mask)
        if row_mask.dtype != torch.bool:
            raise TypeError(f"gated_residual: row_mask must be bool; got {row_mask.dtype}")
        if row_mask.shape != shape[:-1]:
            raise ValueError(
                f"gated_residual: row_mask must be {tuple(shape[:-1])}, one per row; got {tuple(row_mask.shape)}"
            )
    for name, given in (("hidden", hidden), ("gate", gate), ("row_mask", row_mask)):
        if given is not None and given.device != residual.device:
            raise ValueError(
                f"gated_residual: {name} must be on residual's device {residual.device}; got {given.device}"
            )


def reference_forward(residual: Tensor, hidden: Tensor, gate: Tensor, row_mask: Tensor | None, tanh: bool) -> Tensor:
    factor, active = _factor(gate, row_mask, tanh)
    return torch.where(active, residual + factor * hidden.float(), residual).to(residual.dtype)


def reference_backward(
    grad: Tensor,
    hidden: Tensor,
    gate: Tensor,
    row_mask: Tensor | None,
    tanh: bool,
    hidden_grad: bool,
    gate_grad: bool,
) -> tuple[Tensor, Tensor]:
    factor, active = _factor(gate, row_mask, tanh)
    d_hidden, d_gate = hidden.new_empty(0), gate.new_empty(0)
    if hidden_grad:
        d_hidden = torch.where(active, factor * grad.float(), 0).to(hidden.dtype)
    if gate_grad:
        products = grad.float() * hidden.float()
        if row_mask is not None:
            products = torch.where(row_mask[:, None], products, 0)
        total = products.sum(0) if gate.numel() > 1 or products.shape[1] == 1 else products.sum().reshape(1)
        d_gate = (total * (1 - factor * factor) if tanh else total).to(gate.dtype)
    return d_hidden, d_gate


def _factor(gate: Tensor, row_mask: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """g, float32, and where the branch is added at all."""
    factor = gate.float().tanh() if tanh else gate.float()
    active = factor != 0
    return factor, active if row_mask is None else active & row_mask[:, None]


IMPLS = {
    "cpu": Impl.cpu("gated_residual"),
    "triton": Impl.triton("gated_residual"),
    "cuda": Impl.cuda("gated_residual"),
    "torch": Impl(reference_forward, reference_backward),
}


def _forward(residual: Tensor, *args: Any) -> Tensor:
    out: Tensor = choose("gated_residual", IMPLS, residual).forward(residual, *args)
    return out


def _backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = choose("gated_residual", IMPLS, grad).backward(grad, *args)
    return gradients


def _fake_forward(residual: Tensor, *args: Any) -> Tensor:
    return residual.new_empty(residual.shape)


def _fake_backward(grad: Tensor, hidden: Tensor, gate: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    hidden_grad, gate_grad = args[-2:]
    return hidden.new_empty(hidden.shape if hidden_grad else 0), gate.new_empty(gate.shape if gate_grad else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, hidden, gate, row_mask, ctx.tanh = inputs
    ctx.save_for_backward(hidden, gate, row_mask)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    residual_grad, hidden_grad, gate_grad = ctx.needs_input_grad[:3]
    gradients = (None, None)
    if hidden_grad or gate_grad:
        gradients = _backward_op(grad, *ctx.saved_tensors, ctx.tanh, hidden_grad, gate_grad)
    d_hidden, d_gate = (g if w else None for g, w in zip(gradients, (hidden_grad, gate_grad), strict=True))
    return grad if residual_grad else None, d_hidden, d_gate, None, None


_forward_op = define(
    "gated_residual_forward",
    "(Tensor residual, Tensor hidden, Tensor gate, Tensor? row_mask, bool tanh) -> Tensor",
    _forward,
    _fake_forward,
    _setup_context,
    _autograd,
)
_backward_op = define(
    "gated_residual_backward",
    "(Tensor grad, Tensor hidden, Tensor gate, Tensor? row_mask, bool tanh, bool hidden_grad, bool gate_grad)"
    " -> (Tensor hidden_grad, Tensor gate_grad)",
    _backward,
    _fake_backward,
)
