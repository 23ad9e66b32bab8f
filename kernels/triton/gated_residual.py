"""Triton kernels of gated_residual and their launchers; the contract is in vlmfast/ops/gated_residual.py.

The gate's gradient is summed over ranges of rows that are added in a fixed order: no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vlmfast.kernels.products import ceil_div, rounded

import triton
import triton.language as tl

ROWS = 16
COLUMNS = 256
PROGRAMS = 256
"""Programs that the rows are split into at most; not the device's number, so that results are the same."""


@triton.jit
def factors(factor, row_mask, rows, columns, count, dim, PER_CHANNEL: tl.constexpr, MASK: tl.constexpr):
    """The gate's factor at each element, 0 where the branch is not added; and where rows take part at all."""
    if PER_CHANNEL:
        of_column = tl.load(factor + columns, mask=columns < dim, other=0.0)
    else:
        of_column = tl.load(factor) + tl.zeros_like(columns).to(tl.float32)
    taken = rows < count
    if MASK:
        taken &= tl.load(row_mask + rows, mask=taken, other=0) != 0
    return tl.where(taken[:, None], of_column[None, :], 0.0), taken


@triton.jit
def forward_kernel(
    residual, hidden, factor, row_mask, out, count, dim, r_row, r_column, h_row, h_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PER_CHANNEL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """out (count, dim): where the factor is 0 the residual's own bits, also where hidden is not finite."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < count)[:, None] & (columns < dim)[None, :]
    gate, _ = factors(factor, row_mask, rows, columns, count, dim, PER_CHANNEL, MASK)
    r = tl.load(residual + rows[:, None] * r_row + columns[None, :] * r_column, mask=inside, other=0.0)
    h = tl.load(hidden + rows[:, None] * h_row + columns[None, :] * h_column, mask=inside, other=0.0)
    added = rounded(r.to(tl.float32) + gate * h.to(tl.float32), out.dtype.element_ty).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * dim + columns[None, :], tl.where(gate == 0, r, added), mask=inside)


@triton.jit
def backward_kernel(
    grad, hidden, factor, row_mask, hidden_grad, partial, count, dim, per_program, g_row, g_column, h_row, h_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PER_CHANNEL: tl.constexpr, MASK: tl.constexpr,
    HIDDEN_GRAD: tl.constexpr, GATE_GRAD: tl.constexpr,
):  # fmt: skip
    """hidden_grad (count, dim), and partial (programs, dim): grad * hidden summed over each program's rows."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((COLUMNS,), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * per_program
    for start in range(begin, tl.minimum(begin + per_program, count), ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < count)[:, None] & (columns < dim)[None, :]
        gate, taken = factors(factor, row_mask, rows, columns, count, dim, PER_CHANNEL, MASK)
        g = tl.load(grad + rows[:, None] * g_row + columns[None, :] * g_column, mask=inside, other=0.0)
        g = g.to(tl.float32)
        if HIDDEN_GRAD:
            stored: tl.constexpr = hidden_grad.dtype.element_ty
            product = tl.where(gate == 0, 0.0, gate * g)
            tl.store(
                hidden_grad + rows[:, None] * dim + columns[None, :], rounded(product, stored).to(stored), mask=inside
            )
        if GATE_GRAD:
            h = tl.load(hidden + rows[:, None] * h_row + columns[None, :] * h_column, mask=inside, other=0.0)
            sums += tl.sum(tl.where(taken[:, None], g * h.to(tl.float32), 0.0), 0)
    if GATE_GRAD:
        tl.store(partial + tl.program_id(0).to(tl.int64) * dim + columns, sums, mask=columns < dim)


def forward(residual: Tensor, hidden: Tensor, gate: Tensor, row_mask: Tensor | None, tanh: bool) -> Tensor:
    """out (rows, D)."""
    count, dim = residual.shape
    out = residual.new_empty(count, dim)
    with torch.cuda.device_of(residual):
        factor = _factor(gate, tanh)
        forward_kernel[(ceil_div(count, ROWS), ceil_div(dim, COLUMNS))](
            residual, hidden, factor, factor if row_mask is None else row_mask.contiguous(), out, count, dim,
            *residual.stride(), *hidden.stride(), **_meaning(gate, row_mask),
        )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    hidden: Tensor,
    gate: Tensor,
    row_mask: Tensor | None,
    tanh: bool,
    hidden_grad: bool,
    gate_grad: bool,
) -> tuple[Tensor, Tensor]:
    """hidden_grad (rows, D), gate_grad of gate's shape; (0,) where not wanted."""
    count, dim = grad.shape
    per_program = ceil_div(ceil_div(count, PROGRAMS), ROWS) * ROWS
    programs = ceil_div(count, per_program)
    d_hidden = hidden.new_empty((count, dim) if hidden_grad else 0)
    d_gate = gate.new_empty(0)
    partial = grad.new_empty((programs, dim) if gate_grad else 0, dtype=torch.float32)
    with torch.cuda.device_of(grad):
        factor = _factor(gate, tanh)
        backward_kernel[(programs, ceil_div(dim, COLUMNS))](
            grad, hidden, factor, factor if row_mask is None else row_mask.contiguous(), d_hidden, partial,
            count, dim, per_program, *grad.stride(), *hidden.stride(), **_meaning(gate, row_mask),
            HIDDEN_GRAD=hidden_grad, GATE_GRAD=gate_grad,
        )  # fmt: skip
        if gate_grad:
            total = partial.double().sum(0) if gate.numel() > 1 or dim == 1 else partial.double().sum().reshape(1)
            d_gate = (total * (1 - factor * factor) if tanh else total).to(gate.dtype)
    return d_hidden, d_gate


def _factor(gate: Tensor, tanh: bool) -> Tensor:
    return gate.float().tanh() if tanh else gate.float().contiguous()


def _meaning(gate: Tensor, row_mask: Tensor | None) -> dict[str, int | bool]:
    """The compile-time constants."""
    return {"ROWS": ROWS, "COLUMNS": COLUMNS, "PER_CHANNEL": gate.numel() > 1, "MASK": row_mask is not None}
