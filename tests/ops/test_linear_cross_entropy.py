from __future__ import annotations

import math

import pytest
import torch
from backends import use_backend
from contrastive import rounding_of_dots
from grids import by_backend, pairwise
from hypothesis import given, settings
from hypothesis import strategies as st
from language import check, words
from numerics import loss_and_gradients
from torch import Tensor
from torch.nn import functional as F

from vlmfast.nn import language_model_loss
from vlmfast.ops import linear_cross_entropy
from vlmfast.ops.linear_cross_entropy import IMPLS, reference


@pytest.fixture(params=list(IMPLS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_backend(monkeypatch, IMPLS, request.param)
    return request.param


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"reduction": "sum"}, {"ignore_index": 3}])
def test_the_reference_is_cross_entropy(options: dict[str, object]) -> None:
    hidden, weight, labels = words(12, 5, 9)
    bias = torch.randn(9, dtype=torch.float64)
    labels[[2, 7]] = options.get("ignore_index", -100)
    found = loss_and_gradients(lambda x, w, b: reference(x, w, labels, bias=b, **options), (hidden, weight, bias))
    want = loss_and_gradients(
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), labels, **options), (hidden, weight, bias)
    )
    torch.testing.assert_close(found, want)
    each = reference(hidden, weight, labels, **{**options, "reduction": "none"})
    expected = F.cross_entropy(hidden @ weight.T, labels, **{**options, "reduction": "none"})
    torch.testing.assert_close(each, expected)


def test_gradcheck_of_the_reference() -> None:
    hidden, weight, labels = words(4, 3, 6)
    inputs = (hidden.requires_grad_(), weight.requires_grad_(), torch.randn(6, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(lambda x, w, b: reference(x, w, labels, bias=b, label_smoothing=0.1), inputs)


SIZES = [
    (1, 64, 300), (2, 1, 2), (7, 3, 1), (127, 3, 191), (128, 64, 192), (129, 588, 193), (257, 113, 130),
    (300, 32, 1009), (66, 80, 385),
]  # fmt: skip
# A block that is hardly begun beside a full one shows in its interpreter what more would.
OF_TRITON = [(1, 64, 300), (2, 1, 2), (7, 3, 1), (127, 3, 191), (128, 64, 192), (129, 100, 193), (66, 80, 385)]
KINDS = [torch.float32, torch.bfloat16, torch.float16], [False, True]


@pytest.mark.parametrize(
    ("backend", "size", "dtype", "recompute"),
    by_backend(IMPLS, pairwise(SIZES, *KINDS), pairwise(OF_TRITON, *KINDS)),
    indirect=["backend"],
)
def test_shapes_and_dtypes(backend: str, size: tuple[int, int, int], dtype: torch.dtype, recompute: bool) -> None:
    rows, dim, vocabulary = size
    hidden, weight, labels = words(rows, dim, vocabulary)
    bias = torch.randn(vocabulary, dtype=torch.float64) if rows % 2 else None
    check(hidden, weight, labels, bias, dtype, recompute=recompute, dots=rounding_of_dots(backend, dtype))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"label_smoothing": 1.0}, {"reduction": "sum"}])
def test_options(backend: str, options: dict[str, object], recompute: bool) -> None:
    hidden, weight, labels = words(70, 24, 150)
    labels[::3] = -100
    check(hidden, weight, labels, torch.randn(150).double(), recompute=recompute, **options)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e3, 1e4])
def test_logits_of_any_size(backend: str, size: float, recompute: bool) -> None:
    check(*words(70, 16, 260, size), recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
def test_saturated_rows_keep_their_small_gradients(backend: str, recompute: bool) -> None:
    """Nearly all probability on the label: 1 - p is the whole gradient."""
    hidden, weight, labels = words(90, 64, 200)
    hidden = hidden + 30 * weight[labels] / weight[labels].norm(dim=1, keepdim=True)
    check(hidden, weight, labels, recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
def test_infinite_and_large_biases(backend: str, recompute: bool) -> None:
    """A word taken out, and one far above all others; where a label is taken out its loss is infinite."""
    hidden, weight, labels = words(40, 8, 300)
    bias = torch.randn(300, dtype=torch.float64)
    bias[[5, 250]] = -math.inf
    labels[labels == 5] = labels[labels == 250] = 6
    check(hidden, weight, labels, bias, recompute=recompute)
    bias[17] = 1e4
    labels[3] = 17
    check(hidden, weight, labels, bias, recompute=recompute)
    bias[:17] = bias[18:] = -math.inf
    labels[:] = 17
    labels[4] = 5
    args = [t.float().requires_grad_() for t in (hidden, weight, bias)]
    loss = linear_cross_entropy(args[0], args[1], labels, bias=args[2], reduction="none", recompute=recompute)
    assert loss.isinf().nonzero().tolist() == [[4]]
    assert (loss[labels == 17] == 0).all()
    gradients = torch.autograd.grad(loss[4], args)
    assert gradients[2].nonzero().tolist() == [[5], [17]]
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_stays_so(backend: str, value: float) -> None:
    hidden, weight, labels = (t.float() if t.is_floating_point() else t for t in words(5, 4, 30))
    weight[3, 0], labels[:] = value, 1
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    assert torch.equal(linear_cross_entropy(hidden, weight, labels, reduction="none").isnan(), expected.isnan())


@pytest.mark.parametrize("recompute", [False, True])
def test_duplicates_and_zeros(backend: str, recompute: bool) -> None:
    hidden, weight, labels = words(70, 8, 150)
    check(hidden[:1].repeat(70, 1), weight[:3].repeat(50, 1), labels[:1].repeat(70), recompute=recompute)
    check(hidden * 0, weight, labels, recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 0, 7])
def test_ignored_rows_are_as_if_they_were_not_there(backend: str, ignore_index: int, recompute: bool) -> None:
    hidden, weight, labels = words(300, 16, 90)
    labels[labels == ignore_index] = 5
    labels[::2] = ignore_index
    hidden[::2] = math.nan

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, ignore_index=ignore_index, recompute=recompute)

    found = loss_and_gradients(loss, (hidden.float(), weight.float()))
    want = loss_and_gradients(
        lambda x, w: linear_cross_entropy(x, w, labels[1::2], recompute=recompute),
        (hidden[1::2].float(), weight.float()),
    )
    torch.testing.assert_close(found[0], want[0], rtol=1e-6, atol=0)
    assert torch.equal(found[1][1::2], want[1])
    assert not found[1][::2].any()
    assert torch.equal(found[2], want[2])


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_labels_the_loss_is_zero(backend: str, rows: int, reduction: str) -> None:
    hidden, weight, bias = torch.randn(rows, 3), torch.randn(7, 3).half().float(), torch.randn(7)
    labels = torch.full((rows,), -100)
    found = loss_and_gradients(
        lambda x, w, b: linear_cross_entropy(x, w, labels, bias=b, reduction=reduction), (hidden, weight, bias)
    )
    assert [t.shape for t in found[1:]] == [t.shape for t in (hidden, weight, bias)]
    assert not any(t.any() for t in found)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_loss_for_each_row(backend: str, recompute: bool) -> None:
    """Each with a gradient of its own, of any size and sign."""
    hidden, weight, labels = words(80, 12, 140)
    labels[5:9] = -100
    each = torch.randn(80).double() * 10.0 ** torch.randint(-3, 4, (80,))

    def weighted(loss: Tensor) -> Tensor:
        return (loss * each.to(loss.dtype)).sum()

    found = loss_and_gradients(
        lambda x, w: weighted(linear_cross_entropy(x, w, labels, reduction="none", recompute=recompute)),
        (hidden.float(), weight.float()),
    )
    want = loss_and_gradients(lambda x, w: weighted(reference(x, w, labels, reduction="none")), (hidden, weight))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_strides_and_integer_labels(backend: str) -> None:
    hidden, weight = torch.randn(64, 40).T, torch.randn(90, 128)[:, ::2]
    labels = torch.randint(90, (40,), dtype=torch.int32)
    a = loss_and_gradients(lambda x, w: linear_cross_entropy(x, w, labels), (hidden, weight))
    b = loss_and_gradients(
        lambda x, w: linear_cross_entropy(x, w, labels.repeat_interleave(2).long()[::2]),
        (hidden.contiguous(), weight.contiguous()),
    )
    for got, want in zip(a, b, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_a_tied_weight_used_twice(backend: str) -> None:
    """As embedding and as head: the gradients add up."""
    ids, labels = torch.randint(50, (30,)), torch.randint(50, (30,))
    _, weight, _ = words(1, 16, 50)
    found = loss_and_gradients(lambda w: linear_cross_entropy(F.embedding(ids, w), w, labels), (weight.float(),))
    want = loss_and_gradients(lambda w: reference(F.embedding(ids, w), w, labels), (weight,))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(IMPLS))
def test_properties(name: str) -> None:
    examples, most = (3, 200) if name == "triton" else (15, 400)  # its interpreter is slow
    check = settings(max_examples=examples, deadline=None)(
        given(
            rows=st.integers(1, 150),
            dim=st.integers(1, 40),
            vocabulary=st.integers(1, most),
            size=st.floats(0.01, 100),
            seed=st.integers(0, 1000),
        )(_properties)
    )
    check(name=name)


def _properties(name: str, rows: int, dim: int, vocabulary: int, size: float, seed: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_backend(monkeypatch, IMPLS, name)
        torch.manual_seed(seed)
        hidden, weight, labels = (t.float() if t.is_floating_point() else t for t in words(rows, dim, vocabulary, size))

        def loss(labels: Tensor) -> list[Tensor]:
            return loss_and_gradients(lambda x, w: linear_cross_entropy(x, w, labels), (hidden, weight))

        def close(found: Tensor, want: Tensor) -> None:
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5 * (1 + want.abs().max().item()) * max(1, size))

        first = loss(labels)
        assert all(torch.equal(a, b) for a, b in zip(first, loss(labels), strict=True))  # bit for bit
        # The gradients of the logits of a row add up to 0, so that a constant added to all of them changes nothing.
        shifted = linear_cross_entropy(hidden, weight, labels, bias=torch.full((vocabulary,), 3.0))
        close(shifted.double(), first[0])
        order = torch.randperm(vocabulary)
        permuted = linear_cross_entropy(hidden, weight[order], order.argsort()[labels])
        close(permuted.double(), first[0])
        rows_order = torch.randperm(rows)
        close(linear_cross_entropy(hidden[rows_order], weight, labels[rows_order]).double(), first[0])
        kept = loss_and_gradients(lambda x, w: linear_cross_entropy(x, w, labels, recompute=True), (hidden, weight))
        for a, b in zip(kept, first, strict=True):
            close(a, b)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_labels_of_few_bits(dtype: torch.dtype) -> None:
    """-100 is 156 as a byte, and 156 is a word."""
    labels = torch.tensor([100, 3, 0] if dtype == torch.int8 else [156, 3, 0])
    hidden, weight = torch.randn(3, 8), torch.randn(200, 8)
    each = linear_cross_entropy(hidden, weight, labels.to(dtype), reduction="none")
    assert torch.equal(each, linear_cross_entropy(hidden, weight, labels, reduction="none"))
    assert (each > 0).all()
    torch.testing.assert_close(each, reference(hidden, weight, labels.to(dtype), reduction="none"))
    loss = language_model_loss(hidden[None], weight, labels.to(dtype)[None])
    torch.testing.assert_close(loss, language_model_loss(hidden[None], weight, labels[None]))
