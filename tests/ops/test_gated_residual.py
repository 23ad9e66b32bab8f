from __future__ import annotations

import itertools
import math

import pytest
import torch
from backends import use_backend
from grids import by_backend, pairwise
from media import ROUNDING
from numerics import assert_as_exact_as_eager, loss_and_gradients
from torch import Tensor

import vlmfast
from vlmfast.ops import gated_residual
from vlmfast.ops._dispatch import core
from vlmfast.ops.gated_residual import IMPLS, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=list(IMPLS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_backend(monkeypatch, IMPLS, request.param)
    return request.param


def weighted(function, **options: object):
    """A scalar of (residual, hidden, gate, w) whose gradient at w is the function's value."""
    return lambda r, h, g, w: (function(r, h, g, **options) * w).sum(dtype=torch.promote_types(w.dtype, torch.float32))


GRID = [(1, 1), (3, 17), (2, 5, 64), (130, 15), (2, 70, 588)], [False, True], ["tanh", "identity"], DTYPES


@pytest.mark.parametrize(
    ("backend", "shape", "per_channel", "activation", "dtype"),
    by_backend(IMPLS, itertools.product(*GRID), pairwise(*GRID)),
    indirect=["backend"],
)
def test_against_float64(backend: str, shape: tuple, per_channel: bool, activation: str, dtype: torch.dtype) -> None:
    residual, hidden, weights = (torch.randn(shape).to(dtype) for _ in range(3))
    gate = torch.randn(shape[-1] if per_channel else 1).to(dtype)
    for mask in (None, torch.rand(shape[:-1]) < 0.6):
        assert_as_exact_as_eager(
            weighted(gated_residual, activation=activation, row_mask=mask),
            weighted(reference, activation=activation, row_mask=mask),
            (residual, hidden, gate, weights),
            epsilon=ROUNDING[dtype],
            # The scalar is judged by its gradients; the gate's is a sum of products that may cancel.
            floors=(math.inf, 0.0, 0.0, 2.0**-24 * (hidden.float() * weights.float()).norm().item(), 0.0),
            names=("sum", "residual gradient", "hidden gradient", "gate gradient", "out"),
        )


@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("hidden_dtype", DTYPES)
def test_mixed_dtypes(backend: str, residual_dtype: torch.dtype, hidden_dtype: torch.dtype) -> None:
    """As under autocast: the stream float32, the branch 16 bits, the gate a float32 parameter."""
    r, h = torch.randn(9, 33).to(residual_dtype).requires_grad_(), torch.randn(9, 33).to(hidden_dtype).requires_grad_()
    g = torch.tensor([0.7], requires_grad=True)
    out = gated_residual(r, h, g)
    exact = reference(r.detach().double(), h.detach().double(), g.detach().double())
    assert out.dtype == residual_dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(residual_dtype).eps, atol=1e-6)
    weights = torch.randn(9, 33)
    out.backward(weights.to(out.dtype))
    assert [t.grad.dtype for t in (r, h, g)] == [residual_dtype, hidden_dtype, torch.float32]
    w = weights.to(out.dtype).double()
    torch.testing.assert_close(h.grad.double(), math.tanh(0.7) * w, rtol=torch.finfo(hidden_dtype).eps, atol=1e-6)
    expected = (w * h.detach().double()).sum() * (1 - math.tanh(0.7) ** 2)
    torch.testing.assert_close(g.grad.double(), expected[None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["tanh", "identity"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_gate_zero_is_the_residual_bit_for_bit(
    backend: str, per_channel: bool, activation: str, dtype: torch.dtype
) -> None:
    """Also -0.0 and what hidden could break; and the gate alone has a gradient."""
    residual, hidden = torch.randn(7, 21).to(dtype), torch.randn(7, 21).to(dtype)
    residual[0, :5] = -0.0
    residual[1, 0], residual[1, 1] = math.inf, torch.finfo(dtype).smallest_normal / 2
    gate = torch.zeros(21 if per_channel else 1, requires_grad=True)
    leaves = [residual.requires_grad_(), hidden.requires_grad_()]
    out = gated_residual(*leaves, gate, activation=activation)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.detach().view(bits), residual.detach().view(bits))
    out.backward(torch.ones_like(out))
    assert torch.equal(residual.grad, torch.ones_like(residual))
    assert not hidden.grad.any()
    expected = hidden.detach().double().sum(0)
    expected = expected if per_channel else expected.sum()[None]
    torch.testing.assert_close(gate.grad.double(), expected, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        hidden[3] = math.nan
        assert torch.equal(gated_residual(residual, hidden, gate, activation=activation), residual)


def test_masked_rows(backend: str) -> None:
    """Copies of the residual whatever the branch holds, and no part of any gradient but the residual's."""
    residual, hidden, gate = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(8, requires_grad=True)
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    hidden[~mask] = math.nan
    hidden.requires_grad_()
    residual.requires_grad_()
    out = gated_residual(residual, hidden, gate, row_mask=mask)
    assert torch.equal(out[~mask], residual[~mask])
    assert not torch.equal(out[mask], residual[mask])
    out.backward(torch.randn(2, 5, 8))
    assert not hidden.grad[~mask].any()
    assert hidden.grad[mask].all()
    assert gate.grad.isfinite().all()


def test_a_vector_of_equal_gates_is_the_scalar(backend: str) -> None:
    inputs = [torch.randn(6, 40), torch.randn(6, 40)]
    weights = torch.randn(6, 40)
    scalar = loss_and_gradients(weighted(gated_residual), (*inputs, torch.tensor([0.3]), weights))
    vector = loss_and_gradients(weighted(gated_residual), (*inputs, torch.full((40,), 0.3), weights))
    assert torch.equal(scalar[4], vector[4])
    assert torch.equal(scalar[2], vector[2])
    torch.testing.assert_close(vector[3].sum()[None], scalar[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (8,), (1, 1, 8)])
def test_shapes_of_the_gate(backend: str, shape: tuple) -> None:
    gate = torch.full(shape, 0.5, requires_grad=True)
    residual, hidden = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    out = gated_residual(residual, hidden, gate)
    torch.testing.assert_close(out, residual + math.tanh(0.5) * hidden)
    out.sum().backward()
    assert gate.grad.shape == shape


def test_strides_and_repeatability(backend: str) -> None:
    residual, hidden = torch.randn(6, 8, 5).transpose(1, 2), torch.randn(5, 12, 8)[:, ::2].transpose(0, 1)
    mask = (torch.rand(5, 6) < 0.5).T
    inputs = [residual, hidden, torch.randn(8, 2)[:, 0], torch.randn(6, 5, 1).expand(6, 5, 8)]
    strided = loss_and_gradients(weighted(gated_residual, row_mask=mask), inputs)
    dense = [t.contiguous() for t in inputs]
    for _ in range(2):
        again = loss_and_gradients(weighted(gated_residual, row_mask=mask.contiguous()), dense)
        assert all(torch.equal(a, b) for a, b in zip(strided, again, strict=True))


@pytest.mark.skipif(core is None, reason="the C++ extension was not built")
def test_the_number_of_threads_changes_nothing() -> None:
    inputs = [torch.randn(700, 64), torch.randn(700, 64), torch.tensor([0.2]), torch.randn(700, 64)]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(loss_and_gradients(weighted(gated_residual), inputs)[1:])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_frozen_inputs_get_no_gradient(backend: str, wanted: tuple[bool, ...]) -> None:
    leaves = [torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)]
    leaves = [t.requires_grad_(flag) for t, flag in zip(leaves, wanted, strict=True)]
    gated_residual(*leaves).sum().backward()
    assert [t.grad is not None for t in leaves] == list(wanted)


def test_gradcheck_of_the_reference() -> None:
    r, h = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([True, False, True])
    for size in (1, 4):
        g = torch.randn(size, dtype=torch.float64, requires_grad=True)
        for activation in ("tanh", "identity"):
            assert torch.autograd.gradcheck(
                lambda *t, a=activation: reference(*t, activation=a, row_mask=mask), (r, h, g)
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    r, h = (torch.randn(5, 8).to(dtype).requires_grad_() for _ in range(2))
    g, mask = torch.randn(1, requires_grad=True), torch.rand(5) < 0.5
    for arguments in ((r, h, g, None, True), (r, h.detach(), g, mask, False), (r, h, torch.randn(8), mask, True)):
        torch.library.opcheck(torch.ops.vlmfast.gated_residual_forward.default, arguments)


def test_compile_as_one_opaque_op(backend: str) -> None:
    def step(r: Tensor, h: Tensor, g: Tensor) -> Tensor:
        return gated_residual(r * 2, h, g).pow(2).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 3):
        inputs = (torch.randn(2, rows, 8), torch.randn(2, rows, 8), torch.randn(8))
        for a, b in zip(loss_and_gradients(compiled, inputs), loss_and_gradients(step, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_autocast_and_no_grad_change_nothing(backend: str) -> None:
    r, h, g = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8, requires_grad=True)
    outside = gated_residual(r, h, g)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated_residual(r, h, g), outside)
    with torch.no_grad():
        without = gated_residual(r, h, g)
    assert not without.requires_grad
    assert torch.equal(without, outside)


def test_a_second_derivative_raises(backend: str) -> None:
    r, h, g = (t.requires_grad_() for t in (torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)))
    for leaf in (h, g):
        (gradient,) = torch.autograd.grad(gated_residual(r, h, g).pow(2).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"residual": torch.randn(())}, ValueError, r"residual must be \(..., dim\) and not empty; got \(\)"),
        ({"residual": torch.randn(0, 8)}, ValueError, r"residual must be .* not empty; got \(0, 8\)"),
        ({"residual": torch.randn(4, 8).double()}, TypeError, "residual must be float32, float16 or bfloat16; got t"),
        ({"gate": torch.ones(8).long()}, TypeError, "gate must be float32, float16 or bfloat16; got torch.int64"),
        ({"hidden": torch.randn(4, 7)}, ValueError, r"hidden must have residual's shape \(4, 8\); got \(4, 7\)"),
        ({"hidden": torch.randn(4, 8, device="meta")}, ValueError, "hidden must be on residual's device cpu; got meta"),
        ({"gate": torch.randn(7)}, ValueError, r"gate must have 1 element or 8; got \(7,\)"),
        ({"gate": torch.randn(8, device="meta")}, ValueError, "gate must be on residual's device cpu; got meta"),
        ({"activation": "sigmoid"}, ValueError, "activation must be 'tanh' or 'identity'; got 'sigmoid'"),
        ({"row_mask": torch.ones(4)}, TypeError, "row_mask must be bool; got torch.float32"),
        ({"row_mask": torch.ones(5).bool()}, ValueError, r"row_mask must be \(4,\), one per row; got \(5,\)"),
        ({"row_mask": torch.ones(4, device="meta").bool()}, ValueError, "row_mask must be on residual's device cpu"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"residual": torch.randn(4, 8), "hidden": torch.randn(4, 8), "gate": torch.randn(8), **change}
    with pytest.raises(error, match=f"^gated_residual: .*{message}"):
        gated_residual(**arguments)


def test_explain() -> None:
    x = torch.randn(4, 8)
    reasons = vlmfast.explain("gated_residual", x, x, x)
    assert list(reasons) == list(IMPLS)
    assert reasons["torch"] is None
    assert (reasons["cpu"] is None) == (core is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_torchs(backend: str, dtype: torch.dtype) -> None:
    """Every 16-bit number is read as itself; ties, subnormal and too large numbers are rounded as torch rounds them."""
    one = torch.ones(1)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(64, 1024)
    flushed = backend == "triton" and dtype == torch.bfloat16  # triton's interpreter takes subnormal ones for 0
    if flushed:
        every = every.masked_fill(every.abs() < torch.finfo(dtype).tiny, 0)
    read = gated_residual(torch.zeros(64, 1024), every, one, activation="identity")
    assert torch.equal(read.nan_to_num(nan=7.0, posinf=8.0), every.float().nan_to_num(nan=7.0, posinf=8.0))
    finite = every.float()[every.isfinite()].sort().values
    middle = (finite[1:] + finite[:-1]) / 2  # exact in float32, ties all of them but around 0
    numbers = torch.cat([middle, middle * (1 + 2.0**-20), torch.tensor([65519.0, 65520.0, 1e38, -3.4e38, math.inf])])
    if flushed:
        numbers = numbers[numbers.abs() >= torch.finfo(dtype).tiny]
    for rows in (numbers[None], numbers[:, None])[: 1 if backend == "triton" else 2]:
        wrote = gated_residual(torch.zeros(rows.shape, dtype=dtype), rows, one, activation="identity")
        assert torch.equal(wrote, rows.to(dtype))
    assert gated_residual(every[:1], torch.full((1, 1024), math.nan), one).isnan().all()
