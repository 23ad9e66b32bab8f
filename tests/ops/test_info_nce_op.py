from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from backends import use_backend
from contrastive import pairs
from grids import pairwise
from numerics import loss_and_gradients
from torch import Tensor
from torch.nn import functional as F
from watching import Watch

import vlmfast
from vlmfast.ops import _dispatch, info_nce
from vlmfast.ops._dispatch import core
from vlmfast.ops.info_nce import IMPLS, reference


@pytest.fixture(params=list(IMPLS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_backend(monkeypatch, IMPLS, request.param)
    return request.param


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_frozen_inputs_get_no_gradient(backend: str, wanted: tuple[bool, ...]) -> None:
    image, text = pairs(140, 16)
    full = loss_and_gradients(info_nce, (image.float(), text.float(), torch.tensor(9.0)))[1:]
    leaves = [t.float().requires_grad_(flag) for t, flag in zip((image, text, torch.tensor(9.0)), wanted, strict=True)]
    info_nce(*leaves).backward()
    for leaf, flag, gradient in zip(leaves, wanted, full, strict=True):
        assert (leaf.grad is not None) == flag
        if flag:
            torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-5, atol=1e-7)


def test_a_frozen_side_is_not_computed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward op returns nothing for it."""
    image, text = pairs(30, 8)
    y = text.float().requires_grad_()
    loss = info_nce(image.float(), y, 10.0)
    with Watch() as watch:
        loss.backward()
    shapes = [tuple(t.shape) for t in watch.seen[torch.ops.vlmfast.info_nce_backward.default]]
    assert shapes[:2] == [(0,), (30, 8)]


def test_what_is_kept_for_backward(backend: str) -> None:
    """The exponentials with recompute=False, O(N) without, nothing when there is no gradient."""
    x = torch.randn(64, 8)
    op = torch.ops.vlmfast.info_nce_forward
    for keep, shape in ((True, (64, 64)), (False, (0, 0))):
        saved = op(x, x, torch.tensor(5.0), None, None, None, 0, True, False, keep)
        assert [tuple(t.shape) for t in saved] == [(), (3, 64), (3, 64), (), shape, ()]
        assert all(t.dtype == torch.float32 for t in saved)


@pytest.mark.parametrize(
    ("first", "second", "scale", "keep"), pairwise(list(IMPLS), list(IMPLS), [20.0, 300.0], [False, True])
)
def test_backends_agree_on_what_is_saved(first: str, second: str, scale: float, keep: bool, monkeypatch) -> None:
    """One backend's backward reads what another's forward left."""
    image, text = (t.float().requires_grad_() for t in pairs(140, 24))
    expected = loss_and_gradients(reference, (image, text, torch.tensor(scale)), [torch.float64] * 3)
    use_backend(monkeypatch, IMPLS, first)
    s = torch.tensor(scale, requires_grad=True)
    loss = info_nce(image, text, s, recompute=not keep)
    use_backend(monkeypatch, IMPLS, second)
    # Two backends round dot products differently, by 2^-22 at most, and probabilities by the scale times that.
    tolerance = max(2e-5, 2 * scale * 2.0**-22)
    for got, want in zip(torch.autograd.grad(loss, (image, text, s)), expected[1:], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * want.abs().max().item())


def test_gradcheck_of_the_reference() -> None:
    x, y = (t.requires_grad_() for t in pairs(5, 3))
    s = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference, (x, y, s))
    assert torch.autograd.gradcheck(lambda a, b, c: reference(a[:3], b, c, label_offset=1), (x, y, s))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    x, y = (t.to(dtype).requires_grad_() for t in pairs(20, 6))
    s = torch.tensor(4.0, requires_grad=True)
    mask, codes = torch.rand(7) < 0.5, (torch.arange(20).int() % 4, torch.arange(20).int() % 5)
    for arguments in (
        (x, y, s, None, None, None, 0, True, False, True),
        (x[:7], y, s, mask, None, None, 3, False, True, False),
        (x, y, s, None, *codes, 0, True, False, False),
    ):
        torch.library.opcheck(torch.ops.vlmfast.info_nce_forward.default, arguments)


def test_compile_as_one_opaque_op(backend: str) -> None:
    x, y = (t.float() for t in pairs(33, 8))

    def step(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
        return info_nce(F.normalize(a, dim=1), F.normalize(b, dim=1), log_scale.exp()) * 2

    inputs = (x, y, torch.tensor(2.0))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (33, 20):  # the batch size is no constant of the graph
        part = (x[:rows], y[:rows], inputs[2])
        for a, b in zip(loss_and_gradients(compiled, part), loss_and_gradients(step, part), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_autocast_changes_nothing(backend: str) -> None:
    x, y = (t.float() for t in pairs(40, 8))
    outside = info_nce(x, y, 30.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(x, y, 30.0)
    assert torch.equal(inside, outside)


def test_no_grad_gives_the_same_loss_and_saves_nothing(backend: str) -> None:
    x, y = (t.float() for t in pairs(140, 8))
    with torch.no_grad():
        without = info_nce(x.requires_grad_(), y, 30.0)
    assert not without.requires_grad
    torch.testing.assert_close(without, info_nce(x, y, 30.0).detach(), rtol=1e-6, atol=0)


def test_a_second_derivative_raises(backend: str) -> None:
    x, y = (t.float().requires_grad_() for t in pairs(6, 4))
    (gradient,) = torch.autograd.grad(info_nce(x, y, 3.0), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


def test_gradient_of_a_scaled_loss(backend: str) -> None:
    x, y = (t.float().requires_grad_() for t in pairs(20, 4))
    (one,) = torch.autograd.grad(info_nce(x, y, 3.0), x)
    (many,) = torch.autograd.grad(info_nce(x, y, 3.0) * 1024, x)
    torch.testing.assert_close(many, one * 1024)


def test_scale_of_other_kinds(backend: str) -> None:
    x, y = (t.float() for t in pairs(20, 4))
    expected = info_nce(x, y, torch.tensor(3.0))
    s = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    loss = info_nce(x, y, s)
    loss.backward()
    assert torch.equal(loss.detach(), expected)
    assert torch.equal(info_nce(x, y, 3.0), expected)
    assert s.grad.shape == (1,)
    assert s.grad.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": torch.randn(4)}, ValueError, r"image must be \(batch, dim\).*\(4,\)"),
        ({"text": torch.randn(0, 8)}, ValueError, r"text must be .* not empty; got \(0, 8\)"),
        (
            {"image": torch.randn(4, 8).double()},
            TypeError,
            "image must be float32, float16 or bfloat16; got torch.float64",
        ),
        (
            {"text": torch.randn(4, 8).half()},
            TypeError,
            "text must have image's dtype torch.float32; got torch.float16",
        ),
        ({"text": torch.randn(4, 7)}, ValueError, r"text must have image's dim 8; got \(4, 7\)"),
        (
            {"text": torch.randn(3, 8)},
            ValueError,
            "label_offset .* each of the 4 images; got label_offset 0 with 3 rows",
        ),
        ({"label_offset": -1}, ValueError, "label_offset must be at least 0"),
        ({"label_offset": 1}, ValueError, "got label_offset 1 with 4 rows"),
        ({"scale": torch.tensor(3)}, TypeError, "scale must be floating point; got torch.int64"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must have one element; got \(2,\)"),
        ({"text": torch.randn(4, 8, device="meta")}, ValueError, "text must be on image's device cpu; got meta"),
        ({"scale": torch.ones((), device="meta")}, ValueError, "scale must be on image's device cpu; got meta"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]; got 1.5"),
        ({"label_smoothing": 0.1, "exclude_positive": True}, ValueError, "exclude_positive cannot be combined with"),
        ({"image": torch.randn(1, 8), "exclude_positive": True}, ValueError, "a negative for every positive; got 1 im"),
        ({"row_mask": torch.ones(4)}, TypeError, "row_mask must be bool; got torch.float32"),
        ({"row_mask": torch.ones(3).bool()}, ValueError, r"row_mask must be \(4,\), one per image; got \(3,\)"),
        ({"row_mask": torch.ones(4).bool().to("meta")}, ValueError, "row_mask must be on image's device cpu"),
        ({"groups": torch.arange(4)}, TypeError, r"groups must be \(row_ids, col_ids\); got Tensor"),
        (
            {"groups": (torch.arange(4), torch.rand(4))},
            TypeError,
            "groups col_ids must be an integer tensor; got torch.f",
        ),
        ({"groups": (torch.arange(3), torch.arange(4))}, ValueError, r"groups row_ids must be \(4,\); got \(3,\)"),
        (
            {"groups": (torch.arange(4),) * 2, "exclude_positive": True, "row_mask": torch.ones(4).bool()},
            ValueError,
            "groups cannot be combined with exclude_positive, row_mask",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"image": torch.randn(4, 8), "text": torch.randn(4, 8), "scale": torch.tensor(3.0), **change}
    with pytest.raises(error, match=f"^info_nce: .*{message}"):
        info_nce(**arguments)


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_float32_by_tf32_where_torch_may(backend: str, tf32: None) -> None:
    """Asked for by the newer of torch's settings, after which its older getters raise."""
    with pytest.raises(RuntimeError, match="without a specific backend name"):
        torch.get_float32_matmul_precision()
    image, text = (F.normalize(torch.randn(9, 8), dim=1).requires_grad_() for _ in range(2))
    found, exact = (torch.autograd.grad(op(image, text, 20.0), (image, text)) for op in (info_nce, reference))
    for ours, want in zip(found, exact, strict=True):
        assert (ours - want).abs().max() <= 2e-3 * want.abs().max()


def test_explain_and_forced_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 8)
    reasons = vlmfast.explain("info_nce", x, x, 1.0)
    assert list(reasons) == list(IMPLS)
    assert reasons["torch"] is None
    assert vlmfast.explain("info_nce", x.to("meta"), x, 1.0)["cpu"] == "the tensors are on meta" or core is None
    with pytest.raises(ValueError, match=r"op must be one of .*info_nce, .*sigmoid_loss; got 'nce'"):
        vlmfast.explain("nce")
    monkeypatch.setenv("VLMFAST_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="VLMFAST_BACKEND cannot run: cuda: "):
        info_nce(x, x, 1.0)
    assert _dispatch.runs_on("80,90a", (8, 6))
    assert _dispatch.runs_on("80,90a", (9, 0))
    assert _dispatch.runs_on("80", (12, 0))
    assert not _dispatch.runs_on("80,90a", (7, 5))
    assert not _dispatch.runs_on("90a,100", (9, 1))
    monkeypatch.setenv("VLMFAST_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"VLMFAST_BACKEND must be one of auto, .*; got 'fast'"):
        info_nce(x, x, 1.0)


@pytest.mark.parametrize(("budget", "kept"), [(64 * 64 * 4, True), (64 * 64 * 4 - 1, False)])
def test_the_budget_decides_what_is_kept(budget: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vlmfast.ops.info_nce"], "STORE_BUDGET_BYTES", budget)
    loss = info_nce(torch.randn(64, 8, requires_grad=True), torch.randn(64, 8), 3.0)
    shapes = [t.shape for t in loss.grad_fn.saved_tensors if t is not None]
    assert (torch.Size([64, 64]) in shapes) == kept
