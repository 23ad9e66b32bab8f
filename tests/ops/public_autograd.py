"""Ops where PyTorch's undocumented names are hidden; run by test_private_names.py, in a process of its own."""

from __future__ import annotations

import pytest
import torch
from numerics import loss_and_gradients
from torch.autograd import forward_ad
from transforms import OPS, Case, the_gated_residual

from vlmfast.ops import _define, gated_residual


def test_the_names_are_hidden() -> None:
    assert _define.autograd_kernel is None
    with pytest.raises(ImportError, match=r"_C of torch\._C is hidden"):
        exec("import torch._C", {"__name__": "vlmfast.ops.other"})
    with pytest.raises(AttributeError, match=r"torch\._C is hidden"):
        exec("import torch; torch._C", {"__name__": "vlmfast.ops.other"})


@pytest.mark.parametrize("case", OPS)
def test_every_op(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    function, inputs = case()
    found = loss_and_gradients(function, inputs)
    monkeypatch.setenv("VLMFAST_BACKEND", "torch")
    for ours, exact in zip(found, loss_and_gradients(function, inputs), strict=True):
        torch.testing.assert_close(ours.float(), exact.float())
    leaf = inputs[1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(inputs[0], leaf, *inputs[2:]), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.square().sum().backward()


def test_a_compiled_op() -> None:
    function, inputs = the_gated_residual()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for ours, exact in zip(loss_and_gradients(compiled, inputs), loss_and_gradients(function, inputs), strict=True):
        assert torch.equal(ours, exact)


def test_transforms_raise_or_are_right() -> None:
    """None gives a derivative of 0 in silence."""
    function, given = the_gated_residual()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(function, (0, 1, 2))(*given)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(function, given, given)
    for wanted in (False, True):
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
            function(*(forward_ad.make_dual(t.clone().requires_grad_(wanted), t) for t in given))
    with forward_ad.dual_level():
        assert torch.equal(function(*given), function(*given))
    stacked = torch.func.vmap(gated_residual)(*(torch.stack([t, 2 * t]) for t in given))
    assert torch.equal(stacked[1], gated_residual(*(2 * t for t in given)))
