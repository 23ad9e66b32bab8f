"""linear_cross_entropy as an op of PyTorch: gradients that are wanted, what is kept, compile, autocast, errors."""

from __future__ import annotations

import sys

import pytest
import torch
from backends import use_backend
from language import words
from numerics import loss_and_gradients
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from watching import Watch

import vlmfast
from vlmfast.ops import linear_cross_entropy
from vlmfast.ops.linear_cross_entropy import IMPLS, reference


@pytest.fixture(params=list(IMPLS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_backend(monkeypatch, IMPLS, request.param)
    return request.param


def problem(rows: int = 40, dim: int = 8, vocabulary: int = 70) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight and bias in float32, and labels of which some are ignored."""
    hidden, weight, labels = words(rows, dim, vocabulary)
    labels[::5] = -100
    return hidden.float(), weight.float(), torch.randn(vocabulary), labels


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_what_is_frozen_gets_no_gradient_and_is_not_computed(backend: str, wanted: tuple[bool, ...]) -> None:
    *inputs, labels = problem()
    full = loss_and_gradients(lambda x, w, b: linear_cross_entropy(x, w, labels, bias=b), inputs)[1:]
    leaves = [t.clone().requires_grad_(flag) for t, flag in zip(inputs, wanted, strict=True)]
    loss = linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2])
    with Watch() as watch:
        loss.backward()
    computed = [t.numel() > 0 for t in watch.seen[torch.ops.vlmfast.linear_cross_entropy_backward.default]]
    assert computed == list(wanted)
    for leaf, flag, gradient in zip(leaves, wanted, full, strict=True):
        assert (leaf.grad is not None) == flag
        if flag:
            torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("first", list(IMPLS))
@pytest.mark.parametrize("second", list(IMPLS))
@pytest.mark.parametrize("keep", [False, True])
def test_backends_agree_on_what_is_saved(first: str, second: str, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One backend's backward reads what another's forward left; rows of more than one panel."""
    *inputs, labels = problem(330, 6, 50)
    exact = loss_and_gradients(
        lambda x, w, b: reference(x, w, labels, bias=b), [t.double() for t in inputs], [torch.float64] * 3
    )
    leaves = [t.requires_grad_() for t in inputs]
    use_backend(monkeypatch, IMPLS, first)
    loss = linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], recompute=not keep)
    use_backend(monkeypatch, IMPLS, second)
    for got, want in zip(torch.autograd.grad(loss, leaves), exact[1:], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize(("budget", "kept"), [(40 * 70 * 4, True), (40 * 70 * 4 - 1, False)])
def test_the_budget_decides_what_is_kept(budget: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vlmfast.ops.linear_cross_entropy"], "STORE_BUDGET_BYTES", budget)
    hidden, weight, _, labels = problem()
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels, reduction="none")
    sizes = [t.numel() for t in loss.grad_fn.saved_tensors if t is not None]
    assert (40 * 70 in sizes) == kept
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, reduction="none"), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = problem(12, 4, 9)
    x, w = (t.to(dtype).requires_grad_() for t in (hidden, weight))
    for arguments in (
        (x, w, None, labels.clamp(min=0), -100, 0.0, True),  # without ignored rows all that is kept is written
        (x, w, bias.requires_grad_(), labels, -100, 0.1, False),
        (x, w.detach(), None, torch.full_like(labels, -1), -1, 0.0, False),
    ):
        torch.library.opcheck(torch.ops.vlmfast.linear_cross_entropy_forward.default, arguments)


def test_compile_as_one_opaque_op(backend: str) -> None:
    hidden, weight, bias, labels = problem(33)

    def step(x: Tensor, w: Tensor, b: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(x.tanh(), w, labels, bias=b) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (33, 20):  # the batch size is no constant of the graph
        part = (hidden[:rows], weight, bias)
        found, want = (
            loss_and_gradients(lambda *t, f=f, rows=rows: f(*t, labels[:rows]), part) for f in (compiled, step)
        )
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_autocast_casts_as_a_linear_layer_would(backend: str) -> None:
    hidden, weight, bias, labels = problem()
    x = hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_cross_entropy(x, weight, labels, bias=bias)
    outside = linear_cross_entropy(x.bfloat16(), weight.bfloat16(), labels, bias=bias)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    inside.backward()
    assert x.grad.dtype == torch.float32


def test_scaled_and_checkpointed(backend: str) -> None:
    """A GradScaler's factor in float16, and a forward that is run again."""
    hidden, weight, _, labels = problem()
    x, w = hidden.half().requires_grad_(), weight.half()
    (one,) = torch.autograd.grad(linear_cross_entropy(x, w, labels), x)
    (many,) = torch.autograd.grad(linear_cross_entropy(x, w, labels) * 2.0**10, x)
    torch.testing.assert_close(many, one * 2.0**10, rtol=1e-2, atol=1e-3)
    (again,) = torch.autograd.grad(checkpoint(lambda x: linear_cross_entropy(x, w, labels), x, use_reentrant=False), x)
    assert torch.equal(again, one)


def test_a_second_derivative_raises(backend: str) -> None:
    hidden, weight, _, labels = problem(6)
    (gradient,) = torch.autograd.grad(
        linear_cross_entropy(hidden.requires_grad_(), weight, labels), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


def test_training_follows_eagers_curve(backend: str) -> None:
    """A small model that learns to repeat; 30 steps with each loss."""
    torch.manual_seed(0)
    ids = torch.randint(40, (64,))

    def curve(loss: object) -> list[float]:
        torch.manual_seed(1)
        embedding, layer = torch.nn.Embedding(40, 16), torch.nn.Linear(16, 16)
        parameters = [*embedding.parameters(), *layer.parameters()]
        optimizer = torch.optim.AdamW(parameters, 0.02)
        found = []
        for _ in range(30):
            optimizer.zero_grad()
            value = loss(layer(embedding(ids)).tanh(), embedding.weight, ids)
            value.backward()
            optimizer.step()
            found.append(value.item())
        return found

    ours = curve(linear_cross_entropy)
    theirs = curve(lambda hidden, weight, labels: F.cross_entropy(hidden @ weight.T, labels))
    assert ours[-1] < 0.5 * ours[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3, atol=1e-4)


def test_explain() -> None:
    hidden, weight, _, labels = problem()
    reasons = vlmfast.explain("linear_cross_entropy", hidden, weight, labels)
    assert list(reasons) == list(IMPLS)
    assert reasons["torch"] is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.randn(4)}, ValueError, r"hidden must be \(n, D\), .*got \(4,\)"),
        ({"hidden": torch.randn(4, 0)}, ValueError, r"hidden must be \(n, D\), D not 0; got \(4, 0\)"),
        ({"weight": torch.randn(9, 7)}, ValueError, r"weight must be \(V, 8\), .*got \(9, 7\)"),
        ({"weight": torch.randn(0, 8)}, ValueError, r"weight must be \(V, 8\), V not 0.*got \(0, 8\)"),
        ({"hidden": torch.randn(4, 8).double()}, TypeError, "hidden must be float32, .*got torch.float64"),
        ({"weight": torch.randn(9, 8).half()}, TypeError, "weight must have hidden's dtype torch.float32; got torch.f"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be integers; got torch.float32"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels must be \(4,\), one per row; got \(3,\)"),
        ({"bias": torch.zeros(9).long()}, TypeError, "bias must be floating point; got torch.int64"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must be \(9,\), one per word; got \(8,\)"),
        ({"labels": torch.zeros(4, device="meta").long()}, ValueError, "labels must be on hidden's device cpu; got m"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]; got 1.5"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, none; got 'avg'"),
        ({"labels": torch.tensor([1, -100, 9, -7])}, IndexError, r"\[0, 9\) or ignore_index -100; got 9 in row 2"),
        ({"labels": torch.tensor([-7, -100, 9, 0])}, IndexError, r"\[0, 9\) or ignore_index -100; got -7 in row 0"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {
        "hidden": torch.randn(4, 8), "weight": torch.randn(9, 8), "labels": torch.tensor([0, 8, -100, 3]), **change
    }  # fmt: skip
    with pytest.raises(error, match=f"^linear_cross_entropy: .*{message}"):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "dim", "vocabulary"), [(2300, 1024, 700), (40, 24, 4100), (300, 24, 130)])
def test_any_number_of_threads(rows: int, dim: int, vocabulary: int, dtype: torch.dtype) -> None:
    """Of the hidden gradient there are as many copies as threads, or fewer where they are large, or few rows."""
    hidden, weight, labels = words(rows, dim, vocabulary)
    inputs = hidden.to(dtype), weight.to(dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 7):
            torch.set_num_threads(threads)
            found.append(loss_and_gradients(lambda x, w: linear_cross_entropy(x, w, labels), inputs))
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*found, strict=True):
        tolerance = 2e-6 if dtype == torch.float32 else 1e-2  # in 16 bits a sum rounds one way or the other
        torch.testing.assert_close(many, one, rtol=0, atol=tolerance * one.abs().max().item())
