from __future__ import annotations

import itertools
import math

import media
import pytest
import torch
from backends import use_backend
from grids import by_backend, pairwise
from hypothesis import given, settings
from hypothesis import strategies as st
from media import any_media, heads, last_media, qkv, with_weights
from numerics import loss_and_gradients
from torch import Tensor
from torch.nn import functional as F

from vlmfast.ops import media_attention
from vlmfast.ops.media_attention import IMPLS, reference
from vlmfast.ops.media_index import row_valid


@pytest.fixture(params=list(IMPLS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_backend(monkeypatch, IMPLS, request.param)
    return request.param


def check(inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype = torch.float32, **options: object) -> None:
    media.check(media_attention, reference, inputs, dtype, **options)


def results(inputs: tuple[Tensor, ...], **options: object) -> list[Tensor]:
    """dq, dk, dv and out, of float32 inputs (q, k, v, w)."""
    return loss_and_gradients(with_weights(media_attention, **options), inputs)[1:]


QUERIES, MEDIA = (1, 4, 5, 63, 64, 65, 130), ((64, 3), (65, 2), (7, 5), (1, 4), (130, 1))


@pytest.mark.parametrize(
    ("backend", "queries", "media"),
    by_backend(
        IMPLS,
        itertools.product(QUERIES, MEDIA),
        # Every number of queries twice, every kind of media.
        [(queries, MEDIA[(i + j) % 5]) for i, queries in enumerate(QUERIES) for j in (0, 2)],
    ),
    indirect=["backend"],
)
def test_shapes(backend: str, queries: int, media: tuple[int, int]) -> None:
    tokens, number = media
    options = last_media(2, queries, min(number, queries)) | {"tokens_per_media": tokens}
    check(qkv(2, 2, 2, queries, tokens * number, 32), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "v_dim", "group"), [(32, 32, 1), (64, 64, 2), (96, 32, 1), (128, 128, 4), (40, 72, 1)])
def test_dims_dtypes_and_groups(backend: str, dtype: torch.dtype, dim: int, v_dim: int, group: int) -> None:
    batch = 1 if backend == "triton" else 2
    inputs = qkv(batch, 4, 4 // group, 70, 3 * 33, dim, v_dim)
    check(inputs, dtype, tokens_per_media=33, **any_media(batch, 70, 3))


@pytest.mark.parametrize(
    ("backend", "empty", "with_bias", "tokens"),
    by_backend(
        IMPLS,
        itertools.product(["zero", "all"], [False, True], [64, 20]),
        pairwise(["zero", "all"], [False, True], [64, 20]),
    ),
    indirect=["backend"],
)
def test_ragged_media(backend: str, empty: str, with_bias: bool, tokens: int) -> None:
    number, queries = (3, 70) if backend == "triton" else (5, 100)
    inputs = qkv(3, 2, 1, queries, number * tokens, 32)
    lengths = torch.randint(0, tokens + 1, (3, number))
    lengths[:, 1], lengths[2] = 0, 0
    keys = 3, number * tokens
    bias = torch.randn(keys).masked_fill(torch.rand(keys) < 0.3, -math.inf) if with_bias else None
    if with_bias:
        bias[:, :3] = 1.0  # no row of the reference is left without a key by biases alone
        lengths[:2, 0] = tokens
    for intervals in (
        any_media(3, queries, number),
        last_media(3, queries, number),
        {"media_lo": None, "media_hi": None},
    ):
        if with_bias and intervals["media_lo"] is not None:
            intervals["media_lo"] = torch.ones_like(intervals["media_lo"])
        check(inputs, tokens_per_media=tokens, media_len=lengths, key_bias=bias, empty=empty, **intervals)


@pytest.mark.parametrize("scale", [None, 1.0, 1e-3, 30.0, -2.0])
def test_scales(backend: str, scale: float | None) -> None:
    check(qkv(1, 2, 2, 40, 90, 32), scale=scale)
    check(qkv(1, 2, 2, 40, 90, 32), torch.bfloat16, scale=scale)


def test_one_sided_intervals(backend: str) -> None:
    intervals = any_media(2, 50, 4)
    inputs = qkv(2, 2, 2, 50, 40, 32)
    check(inputs, tokens_per_media=10, media_hi=intervals["media_hi"])
    check(inputs, tokens_per_media=10, media_lo=intervals["media_lo"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(backend: str, dtype: torch.dtype) -> None:
    """Packed keys and values, rows of queries apart, heads of keys expanded, dims not last in memory."""
    packed = torch.randn(2, 48, 2, 2, 32).to(dtype)
    k, v = packed.permute(2, 0, 3, 1, 4)
    q = torch.randn(2, 2, 60, 32).to(dtype)[:, :, ::2]
    shared = torch.randn(2, 1, 48, 32).to(dtype).expand(2, 2, 48, 32)
    turned = torch.randn(2, 2, 32, 48).to(dtype).transpose(2, 3)
    weights = torch.randn(2, 2, 30, 32).to(dtype)
    options = any_media(2, 30, 3) | {"tokens_per_media": 16}
    for inputs in ((q, k, v), (q, shared, shared), (q, turned, v), (turned, k, turned)):
        size = inputs[0].shape[2]
        part = {name: t[:, torch.arange(size) % 30] if isinstance(t, Tensor) else t for name, t in options.items()}
        w = weights[:, :, torch.arange(size) % 30]
        # detach() keeps the strides that loss_and_gradients' leaves get.
        expected = results(tuple(t.contiguous() for t in (*inputs, w)), **part)
        for got, want in zip(results((*inputs, w), **part), expected, strict=True):
            assert torch.equal(got, want)


def test_grad_that_is_expanded(backend: str) -> None:
    q, k, v = (t.float().requires_grad_() for t in qkv(1, 2, 2, 30, 40, 32))
    one = torch.autograd.grad(media_attention(q, k, v).sum(), (q, k, v))
    many = torch.autograd.grad(media_attention(q, k, v), (q, k, v), torch.ones(1, 2, 30, 32))
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_is_scaled_dot_product_attention(backend: str) -> None:
    """The expression in the docstring, on rows that see something."""
    q, k, v = (t.float() for t in qkv(2, 4, 2, 50, 60, 32))
    lengths = torch.randint(1, 21, (2, 3))
    intervals = {"media_lo": torch.ones(2, 50).int(), "media_hi": torch.randint(1, 4, (2, 50))}
    medium = torch.arange(60) // 20 + 1
    valid = torch.arange(60) % 20 < lengths.repeat_interleave(20, 1)
    visible = (intervals["media_lo"][:, :, None] <= medium) & (medium <= intervals["media_hi"][:, :, None])
    visible = visible & valid[:, None]

    def expression(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], enable_gqa=True)

    weights = torch.randn(2, 4, 50, 32)
    ours = results((q, k, v, weights), tokens_per_media=20, media_len=lengths, **intervals)
    for got, want in zip(ours, loss_and_gradients(with_weights(expression), (q, k, v, weights))[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


def test_empty_rows_and_unseen_media(backend: str) -> None:
    """0 and -inf, no NaN, and exactly no gradient where nobody looks."""
    q, k, v = (t.float() for t in qkv(1, 2, 2, 70, 4 * 40, 32))
    lo = torch.full((1, 70), 2)
    hi = torch.full((1, 70), 3)
    lo[0, :10], hi[0, :10] = 0, 0
    lo[0, 10:20], hi[0, 10:20] = 3, 2
    lo[0, 20:30], hi[0, 20:30] = 4, 4  # of length 0
    lengths = torch.tensor([[40, 25, 40, 0]])
    options = {"media_lo": lo, "media_hi": hi, "tokens_per_media": 40, "media_len": lengths}
    dq, dk, dv, out = results((q, k, v, torch.randn(1, 2, 70, 32)), **options)
    assert all(t.isfinite().all() for t in (dq, dk, dv, out))
    assert not out[:, :, :30].any()
    assert not dq[:, :, :30].any()
    assert out[:, :, 30:].all()
    seen = torch.zeros(160, dtype=torch.bool)
    seen[40:65] = seen[80:120] = True
    for gradient in (dk, dv):
        assert not gradient[:, :, ~seen].any()
        assert gradient[:, :, seen].all()
    arguments = (lo.int(), hi.int(), lengths.int(), None, 40, 32**-0.5, False)
    _, lse = torch.ops.vlmfast.media_attention_forward(q, k, v, *arguments)
    assert (lse[:, :, :30] == -math.inf).all()
    assert lse[:, :, 30:].isfinite().all()
    valid = row_valid(lo, hi, num_media=4, media_len=lengths)
    assert torch.equal(valid, torch.arange(70)[None] >= 30)


def test_triton_does_not_read_what_nobody_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Media and what lies beyond media_len: were they read, 0 times what is not a number would be none."""
    use_backend(monkeypatch, IMPLS, "triton")
    inputs = [t.float() for t in (*qkv(2, 2, 1, 130, 9 * 40, 32), heads(2, 2, 130, 32))]
    intervals, lengths = last_media(2, 130, 4), torch.full((2, 9), 33)
    options = {**intervals, "tokens_per_media": 40, "media_len": lengths}
    expected = results(inputs, **options)
    for t in inputs[1:3]:
        t.unflatten(2, (9, 40))[:, :, 4:] = math.nan
        t.unflatten(2, (9, 40))[:, :, :, 33:] = math.nan
    for got, want in zip(results(inputs, **options), expected, strict=True):
        assert torch.equal(got, want)


def test_biases_that_leave_no_key(backend: str) -> None:
    inputs = tuple(t.float() for t in (*qkv(2, 2, 2, 70, 80, 32), heads(2, 2, 70, 32)))
    bias = torch.zeros(2, 80)
    bias[1] = -math.inf
    for empty in ("zero", "all"):
        dq, dk, dv, out = results(inputs, key_bias=bias, empty=empty)
        assert not any(t[1].any() for t in (dq, dk, dv, out))
        assert out[0].all()


def test_empty_all_sees_padding(backend: str) -> None:
    """As Mllama's: such a row, and no other, depends on keys beyond media_len."""
    q, k, v = (t.float() for t in qkv(1, 2, 2, 66, 2 * 40, 32))
    lo = torch.tensor([[0, *[1] * 65]])
    options = {"media_lo": lo, "media_hi": lo, "tokens_per_media": 40, "media_len": torch.tensor([[30, 40]])}
    before = media_attention(q, k, v, empty="all", **options)
    v[:, :, 35] += 1.0
    after = media_attention(q, k, v, empty="all", **options)
    assert torch.equal(before[:, :, 1:], after[:, :, 1:])
    assert not torch.equal(before[:, :, 0], after[:, :, 0])
    expected = F.scaled_dot_product_attention(q[:, :, :1], k, v)
    torch.testing.assert_close(after[:, :, :1], expected, rtol=1e-5, atol=1e-5)


def test_rows_that_do_not_see_a_medium_do_not_change(backend: str) -> None:
    q, k, v = (t.float() for t in qkv(2, 2, 2, 90, 4 * 24, 32))
    options = last_media(2, 90, 4) | {"tokens_per_media": 24}
    before = media_attention(q, k, v, **options)
    k[:, :, 24:48] *= 100
    v[:, :, 24:48] += 7
    after = media_attention(q, k, v, **options)
    same = (before == after).all(-1).all(1)
    assert torch.equal(same, options["media_lo"] != 2)


@settings(max_examples=15, deadline=None)
@given(
    queries=st.integers(1, 140), number=st.integers(1, 6), tokens=st.integers(1, 70), group=st.integers(1, 3),
    seed=st.integers(0, 1000),
)  # fmt: skip
@pytest.mark.parametrize("name", [name for name in IMPLS if name != "triton"])
def test_properties(name: str, queries: int, number: int, tokens: int, group: int, seed: int) -> None:
    check_properties(name, queries, number, tokens, group, seed)


@settings(max_examples=3, deadline=None)
@given(
    queries=st.integers(1, 70), number=st.integers(1, 4), tokens=st.integers(1, 40), group=st.integers(1, 2),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_properties_of_triton(queries: int, number: int, tokens: int, group: int, seed: int) -> None:
    """Fewer examples, and smaller: the interpreter is slow, and its tiles are of 32 rows and keys."""
    check_properties("triton", queries, number, tokens, group, seed)


def check_properties(name: str, queries: int, number: int, tokens: int, group: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_backend(monkeypatch, IMPLS, name)
        torch.manual_seed(seed)
        inputs = [
            t.float() for t in (*qkv(2, 2 * group, 2, queries, number * tokens, 32), heads(2, 2 * group, queries, 32))
        ]
        intervals, lengths = any_media(2, queries, number), torch.randint(0, tokens + 1, (2, number))
        own = {"media_lo": intervals["media_lo"], "media_hi": intervals["media_lo"]}  # one medium, or none
        options = {"tokens_per_media": tokens, "media_len": lengths}
        expected = results(inputs, **own, **options)
        close = {"rtol": 1e-4, "atol": 1e-5 * math.sqrt(queries)}

        # Media in another order, and their numbers with them.
        order = torch.randperm(number)
        key_order = (order[:, None] * tokens + torch.arange(tokens)).flatten()
        renumbered = torch.cat([torch.tensor([-1, 0]), order.argsort() + 1])[own["media_lo"] + 1]
        dq, dk, dv, out = results(
            [inputs[0], inputs[1][:, :, key_order], inputs[2][:, :, key_order], inputs[3]],
            media_lo=renumbered, media_hi=renumbered, tokens_per_media=tokens, media_len=lengths[:, order],
        )  # fmt: skip
        back = key_order.argsort()
        for got, want in zip((dq, dk[:, :, back], dv[:, :, back], out), expected, strict=True):
            torch.testing.assert_close(got, want, **close)

        # Rows and samples in another order; and the same again, bit for bit.
        rows, samples = torch.randperm(queries), torch.tensor([1, 0])
        moved = results(
            [inputs[0][:, :, rows][samples], *(t[samples] for t in inputs[1:3]), inputs[3][:, :, rows][samples]],
            **{side: t[:, rows][samples] for side, t in intervals.items()},
            tokens_per_media=tokens, media_len=lengths[samples],
        )  # fmt: skip
        expected = results(inputs, **intervals, **options)
        for got, want, by_rows in zip(moved, expected, (True, False, False, True), strict=True):
            want = want[samples]
            torch.testing.assert_close(got, want[:, :, rows] if by_rows else want, **close)
        again = results(inputs, **intervals, **options)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integers_of_any_kind(backend: str, kind: torch.dtype) -> None:
    inputs = tuple(t.float() for t in qkv(2, 2, 2, 20, 30, 32))
    intervals = {name: t.clamp(min=0) for name, t in any_media(2, 20, 3).items()}
    lengths = torch.randint(0, 11, (2, 3))
    cast = {name: t.to(kind) for name, t in intervals.items()}
    out = media_attention(*inputs, tokens_per_media=10, media_len=lengths, **intervals)
    assert torch.equal(media_attention(*inputs, tokens_per_media=10, media_len=lengths.to(kind), **cast), out)
    apart = {name: torch.stack([t, t], -1)[..., 0] for name, t in intervals.items()}
    assert torch.equal(media_attention(*inputs, tokens_per_media=10, media_len=lengths, **apart), out)


def test_not_a_number_comes_out_as_one(backend: str) -> None:
    q, k, v = (t.float() for t in qkv(1, 1, 1, 70, 80, 32))
    for tensor, place in ((q, (0, 0, 66, 3)), (k, (0, 0, 70, 1)), (v, (0, 0, 2, 5))):
        broken = tensor.clone()
        broken[place] = math.nan
        out = media_attention(*(broken if t is tensor else t for t in (q, k, v)))
        assert out[0, 0, 66].isnan().any()


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in IMPLS for b in IMPLS if a != b])
@pytest.mark.parametrize("empty_all", [False, True])
def test_backends_agree_on_what_is_saved(first: str, second: str, empty_all: bool, monkeypatch) -> None:
    """One backend's backward reads what another's forward left."""
    inputs = qkv(2, 4, 2, 70, 60, 32)
    q, k, v = (t.float().requires_grad_() for t in inputs)
    options = any_media(2, 70, 3) | {"tokens_per_media": 20, "empty": "all" if empty_all else "zero"}
    weights = torch.randn(2, 4, 70, 32)
    exact = loss_and_gradients(with_weights(reference, **options), (*inputs, weights.double()))[1:4]
    use_backend(monkeypatch, IMPLS, first)
    out = media_attention(q, k, v, **options)
    use_backend(monkeypatch, IMPLS, second)
    for got, want in zip(torch.autograd.grad(out, (q, k, v), weights), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)
