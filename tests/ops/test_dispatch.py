"""How a call goes from autograd to a backend: directly, but for those who are to see the op on its way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only
from watching import Watch

from vlmfast import doctor
from vlmfast.ops import _dispatch, gated_residual, sigmoid_loss

FORWARD, BACKWARD = torch.ops.vlmfast.gated_residual_forward.default, torch.ops.vlmfast.gated_residual_backward.default


def inputs(wanted: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    residual, hidden = (torch.randn(3, 8).requires_grad_(wanted) for _ in range(2))
    return residual, hidden, torch.tensor([0.5]).requires_grad_(wanted)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_mode_sees_the_ops(wanted: bool) -> None:
    given = inputs(wanted)
    with Watch() as watch:
        out = gated_residual(*given)
        if wanted:
            out.backward(torch.ones(3, 8))
    assert FORWARD in watch.seen
    assert (BACKWARD in watch.seen) == wanted


def test_a_subclass_sees_the_ops() -> None:
    seen = []

    class Wrapped(Tensor):
        @staticmethod
        def __new__(cls, inner: Tensor) -> Wrapped:
            wrapper: Wrapped = Tensor._make_wrapper_subclass(
                cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad
            )
            wrapper.inner = inner.detach()
            return wrapper

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            out = func(*tree_map_only(Wrapped, lambda t: t.inner, args), **(kwargs or {}))
            return tree_map_only(Tensor, Wrapped, out)

    given = inputs()
    wrapped = [Wrapped(t) for t in given]
    found = torch.autograd.grad(gated_residual(*wrapped).sum(), wrapped)
    assert {FORWARD, BACKWARD} <= set(seen)
    for gradient, exact in zip(found, torch.autograd.grad(gated_residual(*given).sum(), given), strict=True):
        torch.testing.assert_close(gradient.inner, exact)


def test_a_fake_tensor_is_not_computed() -> None:
    with FakeTensorMode():
        given = [torch.empty(3, 8, requires_grad=True), torch.empty(3, 8, requires_grad=True), torch.empty(1)]
        out = gated_residual(*given)
        out.sum().backward()
    assert isinstance(out, FakeTensor)
    assert isinstance(given[1].grad, FakeTensor)


def test_a_profiler_sees_the_ops() -> None:
    given = inputs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gated_residual(*given).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"vlmfast::gated_residual_forward", "vlmfast::gated_residual_backward"} <= names
    assert any("vlmfast_gated_residual_forwardBackward" in name for name in names)


@pytest.mark.parametrize("wanted", [True, False])
def test_autocast_does_not_reach_into_an_op(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products would be bfloat16."""
    monkeypatch.setenv("VLMFAST_BACKEND", "torch")
    image, text = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1).requires_grad_(wanted) for _ in range(2))
    exact = sigmoid_loss(image, text, 10.0, -10.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sigmoid_loss(image, text, 10.0, -10.0), exact)
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert (image @ text.T).dtype == torch.bfloat16  # autocast is back


@pytest.mark.skipif(_dispatch.core is None, reason="needs the C++ extension")
@pytest.mark.parametrize("op", ["info_nce", "sigmoid_loss", "patch_embed", "media_attention", "gated_residual"])
def test_a_forward_on_a_cpu_is_one_call_of_the_extension(op: str) -> None:
    assert doctor.implementations()[op]["cpu"].forward is getattr(_dispatch.core, f"{op}_forward")


@pytest.mark.skipif(_dispatch.core is None, reason="needs the C++ extension")
def test_an_extension_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _dispatch._load_core() == (_dispatch.core, None)
    monkeypatch.setattr(_dispatch.core, "INTERFACE", 0)
    core, reason = _dispatch._load_core()
    assert core is None
    assert "built from other sources" in str(reason)
