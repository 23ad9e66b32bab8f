"""The ops under torch.func: reverse mode and vmap give what autograd gives; other derivatives are refused, not 0."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from backends import use_backend
from numerics import loss_and_gradients
from torch import Tensor
from torch.autograd import forward_ad
from transforms import OPS, Case, features, the_info_nce

from vlmfast.nn import ClipLoss
from vlmfast.ops import gated_residual, info_nce, sigmoid_loss
from vlmfast.ops.info_nce import IMPLS


@pytest.fixture(params=["cpu", "torch"], autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_backend(monkeypatch, IMPLS, request.param)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # vmap calls the op once per example
        yield


def every(inputs: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def by_autograd(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(gradient.float() for gradient in loss_and_gradients(function, inputs)[1:])


@pytest.mark.parametrize("case", OPS)
def test_grad(case: Case) -> None:
    function, inputs = case()
    gradients, value = torch.func.grad_and_value(function, every(inputs))(*inputs)
    torch.testing.assert_close(value, function(*inputs))
    torch.testing.assert_close(gradients, by_autograd(function, inputs))


def test_jacobian() -> None:
    residual, hidden, gate = torch.randn(3, 8), torch.randn(3, 8), torch.tensor([0.5])
    found = torch.func.jacrev(gated_residual, (0, 1, 2))(residual, hidden, gate)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(gated_residual, (residual, hidden, gate)))


@pytest.mark.parametrize("case", OPS)
def test_a_gradient_for_each_example(case: Case) -> None:
    (function, one), (_, other) = case(), case()
    stacked = tuple(torch.stack(pair) for pair in zip(one, other, strict=True))
    found = torch.func.vmap(torch.func.grad(function, every(one)))(*stacked)
    for gradient, *exact in zip(found, by_autograd(function, one), by_autograd(function, other), strict=True):
        torch.testing.assert_close(gradient, torch.stack(exact))


@pytest.mark.parametrize("case", OPS)
def test_what_has_no_derivative_says_so(case: Case) -> None:
    function, inputs = case()
    first = torch.func.grad(function, every(inputs))

    def second(*inputs: Tensor) -> Tensor:
        return sum((gradient.square().sum() for gradient in first(*inputs)), torch.zeros(()))

    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.grad(second)(*inputs)
    for forward_mode in (function, first):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(forward_mode, inputs, inputs)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        function(*(forward_ad.make_dual(t, t) for t in inputs))


@pytest.mark.parametrize("_backend", ["torch"], indirect=True)  # a compiler sees the op, not what runs it
@pytest.mark.parametrize("case", OPS)
def test_compiled_and_exported(case: Case) -> None:
    torch.compiler.reset()  # what was compiled for other ops counts against the same function of torch.func
    function, inputs = case()
    gradients = torch.func.grad(function, every(inputs))
    fullgraph = function is not sigmoid_loss  # Dynamo does not tell it what requires a gradient, and breaks the graph
    compiled = torch.compile(gradients, backend="aot_eager", fullgraph=fullgraph)(*inputs)
    torch.testing.assert_close(compiled, gradients(*inputs))

    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return function(*inputs)

    torch.testing.assert_close(torch.export.export(Module(), inputs).module()(*inputs), function(*inputs))


def test_constants_under_forward_mode() -> None:
    function, inputs = the_info_nce()
    with forward_ad.dual_level():
        assert torch.equal(function(*inputs), function(*inputs))
        assert len(by_autograd(function, inputs)) == 3


def test_levels_inside_of_a_gradient() -> None:
    """What is constant to the inner transform is not to the outer one, and no_grad holds where it is written."""
    image, text = features()
    scale = torch.tensor(5.0)

    def outer(image: Tensor) -> Tensor:
        return torch.func.vmap(lambda scale: info_nce(image, text, scale))(torch.stack([scale, 2 * scale])).sum()

    exact = by_autograd(lambda image: info_nce(image, text, scale) + info_nce(image, text, 2 * scale), (image,))
    torch.testing.assert_close(torch.func.grad(outer)(image), exact[0])

    @torch.no_grad()
    def constant(image: Tensor) -> Tensor:
        return info_nce(image, text, scale)

    assert torch.equal(torch.func.grad(lambda image: constant(image) + image.sum())(image), torch.ones_like(image))


def test_a_module_as_a_function_of_its_parameters() -> None:
    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text, self.loss = torch.nn.Linear(5, 8), torch.nn.Linear(7, 8), ClipLoss()

        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            out: Tensor = self.loss(self.image(image), self.text(text), torch.tensor(5.0))
            return out

    tower, image, text = Tower(), torch.randn(6, 5), torch.randn(6, 7)
    parameters = {name: p.detach() for name, p in tower.named_parameters()}

    def value(parameters: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(tower, parameters, (image, text))
        return out

    tower(image, text).backward()
    torch.testing.assert_close(torch.func.grad(value)(parameters), {n: p.grad for n, p in tower.named_parameters()})
