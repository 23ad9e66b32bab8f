from __future__ import annotations

import sys

import media
import pytest
import torch
from backends import use_backend
from media import any_media, last_media, qkv, with_weights
from numerics import loss_and_gradients
from torch import Tensor, nn
from watching import Watch

import vlmfast
from vlmfast.ops import media_attention, media_index
from vlmfast.ops._dispatch import core
from vlmfast.ops.media_attention import IMPLS, reference


@pytest.fixture(params=list(IMPLS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_backend(monkeypatch, IMPLS, request.param)
    return request.param


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_frozen_inputs_get_no_gradient(backend: str, wanted: tuple[bool, ...]) -> None:
    """And what the backward op was not asked for, it did not make."""
    values = [t.float() for t in qkv(2, 2, 2, 70, 60, 32)]
    options = any_media(2, 70, 3) | {"tokens_per_media": 20}
    weights = torch.randn(2, 2, 70, 32)
    full = loss_and_gradients(with_weights(media_attention, **options), (*values, weights))[1:4]
    leaves = [t.requires_grad_(flag) for t, flag in zip(values, wanted, strict=True)]
    out = media_attention(*leaves, **options)
    with Watch() as watch:
        out.backward(weights)
    empty = [t.numel() == 0 for t in watch.seen[torch.ops.vlmfast.media_attention_backward.default]]
    assert empty == [not wanted[0], not any(wanted[1:]), not any(wanted[1:])]
    for leaf, flag, gradient in zip(leaves, wanted, full, strict=True):
        assert (leaf.grad is not None) == flag
        if flag:
            assert torch.equal(leaf.grad.double(), gradient)


def test_nothing_of_the_size_of_the_scores_is_saved(backend: str) -> None:
    q, k, v = (t.float().requires_grad_() for t in qkv(1, 2, 2, 128, 256, 32))
    out = media_attention(q, k, v, tokens_per_media=64, **last_media(1, 128, 4))
    saved = [t for t in out.grad_fn.saved_tensors if t is not None]
    assert max(t.numel() for t in saved) <= k.numel()
    assert {t.dtype for t in saved} == {torch.float32, torch.int32}


def test_heads_lie_side_by_side(backend: str) -> None:
    """Projections read the output and the gradients without a copy."""
    q, k, v = (t.float() for t in qkv(2, 4, 2, 9, 30, 32))
    leaves = [t.contiguous().requires_grad_() for t in (q, k, v)]
    out = media_attention(*leaves)
    gradients = torch.ops.vlmfast.media_attention_backward(
        torch.ones_like(out), q, k, v, *torch.ops.vlmfast.media_attention_forward(q, k, v, *[None] * 4, 30, 0.2, False),
        *[None] * 4, 30, 0.2, False, True, True,
    )  # fmt: skip
    for tensor in (out, *gradients):
        assert tensor.transpose(1, 2).is_contiguous()


def test_gradcheck_of_the_reference() -> None:
    inputs = [t.requires_grad_() for t in qkv(2, 4, 2, 5, 6, 3)]
    options = {"tokens_per_media": 2, "media_len": torch.tensor([[2, 1, 0], [0, 2, 2]]), **any_media(2, 5, 3)}
    for empty in ("zero", "all"):
        assert torch.autograd.gradcheck(lambda *t, e=empty: reference(*t, empty=e, **options), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype).requires_grad_() for t in qkv(2, 2, 1, 9, 12, 32))
    lo, hi = (t.int() for t in any_media(2, 9, 3).values())
    lengths, bias = torch.randint(0, 5, (2, 3)).int(), torch.randn(2, 12)
    for arguments in (
        (q, k, v, lo, hi, lengths, bias, 4, 0.2, False),
        (q, k.detach(), v.detach(), None, None, lengths, None, 4, 1.0, True),
        (q.detach(), k, v, lo, hi, None, None, 4, 0.2, True),
    ):
        torch.library.opcheck(torch.ops.vlmfast.media_attention_forward.default, arguments)


def test_compile_as_one_opaque_op(backend: str) -> None:
    q, k, v = (t.float() for t in qkv(2, 4, 2, 33, 30, 32))
    ids = torch.randint(10, 20, (2, 33))
    ids[:, ::10] = 3

    def step(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        lo, hi, _ = media_index(ids, 3, num_media=5)
        out = media_attention(q * 1.5, k, v, media_lo=lo, media_hi=hi, tokens_per_media=6)
        return out.transpose(1, 2).flatten(2).pow(2).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (33, 20):  # the length is no constant of the graph
        part = (q[:, :, :rows], k, v)
        ours, eager = (loss_and_gradients(lambda *t, f=f, r=rows: f(*t, ids[:, :r]), part) for f in (compiled, step))
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_autocast_and_no_grad_change_nothing(backend: str) -> None:
    q, k, v = (t.float() for t in qkv(2, 2, 2, 40, 30, 32))
    outside = media_attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(media_attention(q, k, v), outside)
    with torch.no_grad():
        without = media_attention(q.requires_grad_(), k, v)
    assert not without.requires_grad
    assert torch.equal(without, outside)


def test_a_second_derivative_raises(backend: str) -> None:
    q, k, v = (t.float().requires_grad_() for t in qkv(1, 1, 1, 6, 8, 32))
    for leaf in (q, k, v):
        (gradient,) = torch.autograd.grad(media_attention(q, k, v).pow(2).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            gradient.sum().backward()


@pytest.mark.parametrize("mode", ["last", "all_prev", "group"])
def test_decoding_a_token_at_a_time(backend: str, mode: str) -> None:
    """media_index with its state and one query row give what the whole sequence gives."""
    q, k, v = (t.float() for t in qkv(2, 2, 1, 24, 3 * 10, 32))
    ids = torch.randint(10, 20, (2, 24))
    ids[0, 3] = ids[0, 4] = ids[0, 15] = ids[1, 9] = 1  # the second sample never comes to its other media
    ids[1, 18] = 2
    options = {"mode": mode, "eos_id": 2, "num_media": 3}
    lo, hi, _ = media_index(ids, 1, **options)
    whole = media_attention(q, k, v, media_lo=lo, media_hi=hi, tokens_per_media=10)
    state = None
    for step in range(24):
        lo, hi, state = media_index(ids[:, step : step + 1], 1, state=state, **options)
        one = media_attention(q[:, :, step : step + 1], k, v, media_lo=lo, media_hi=hi, tokens_per_media=10)
        torch.testing.assert_close(one, whole[:, :, step : step + 1], rtol=0, atol=1e-6)


def test_training_follows_the_eager_curve(backend: str) -> None:
    """50 steps of a layer that must tell which medium is a row's own."""

    def losses(attention) -> Tensor:
        torch.manual_seed(1)
        to_q, to_k, to_v = (nn.Linear(16, 32, bias=False) for _ in range(3))
        optimizer = torch.optim.Adam([*to_q.parameters(), *to_k.parameters(), *to_v.parameters()], 3e-3)
        text, tokens, target = torch.randn(2, 32, 16), torch.randn(2, 15, 16), torch.randn(2, 32, 32)
        options = last_media(2, 32, 3) | {"tokens_per_media": 5}
        found = []
        for _ in range(50):
            out = attention(to_q(text)[:, None], to_k(tokens)[:, None], to_v(tokens)[:, None], **options)
            loss = (out[:, 0] - target).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    ours, eager = losses(media_attention), losses(reference)
    assert eager[-1] < 0.9 * eager[0]
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=0)


def arguments(**change: object) -> dict[str, object]:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 3)
    return {"q": q, "k": k, "v": v, "tokens_per_media": 3, **change}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.randn(4, 5, 8)}, ValueError, r"q must be \(batch, heads, length, dim\).*got \(4, 5, 8\)"),
        ({"v": torch.randn(2, 2, 0, 8)}, ValueError, r"v must be .* and not empty; got \(2, 2, 0, 8\)"),
        ({"k": torch.randn(2, 2, 6, 8).double()}, TypeError, "k must be float32, float16 or bfloat16; got torch.flo"),
        ({"v": torch.randn(2, 2, 6, 8).half()}, TypeError, "v must have q's dtype torch.float32; got torch.float16"),
        ({"k": torch.randn(2, 2, 6, 8, device="meta")}, ValueError, "k must be on q's device cpu; got meta"),
        ({"k": torch.randn(1, 2, 6, 8)}, ValueError, r"k must have q's batch .*\(2, 4, 5, 8\); got \(1, 2, 6, 8\)"),
        ({"k": torch.randn(2, 2, 6, 9)}, ValueError, r"k must have q's batch and dim .* got \(2, 2, 6, 9\)"),
        ({"k": torch.randn(2, 3, 6, 8)}, ValueError, r"k must have .* heads that divide q's.* got \(2, 3, 6, 8\)"),
        ({"v": torch.randn(2, 2, 7, 8)}, ValueError, r"v must have k's .*\(2, 2, 6\); got \(2, 2, 7, 8\)"),
        ({"v": torch.randn(2, 4, 6, 8)}, ValueError, r"v must have k's .* got \(2, 4, 6, 8\)"),
        ({"tokens_per_media": 4}, ValueError, "tokens_per_media must divide the 6 keys; got 4"),
        ({"tokens_per_media": 0}, ValueError, "tokens_per_media must divide the 6 keys; got 0"),
        ({"empty": "mean"}, ValueError, "empty must be 'zero' or 'all'; got 'mean'"),
        ({"media_lo": torch.ones(2, 5)}, TypeError, "media_lo must be an integer tensor; got torch.float32"),
        ({"media_hi": torch.ones(2, 5).bool()}, TypeError, "media_hi must be an integer tensor; got torch.bool"),
        (
            {"media_hi": torch.ones(2, 6).int()},
            ValueError,
            r"media_hi must be \(2, 5\), one per query row; got \(2, 6\)",
        ),
        (
            {"media_lo": torch.ones(2, 5, device="meta").int()},
            ValueError,
            "media_lo must be on q's device cpu; got meta",
        ),
        ({"media_hi": torch.full((2, 5), 3)}, ValueError, "media_hi must be at most 2, the number of media; got 3"),
        (
            {"media_len": torch.ones(2, 3).int()},
            ValueError,
            r"media_len must be \(2, 2\), one per medium; got \(2, 3\)",
        ),
        ({"media_len": torch.ones(2, 2)}, TypeError, "media_len must be an integer tensor; got torch.float32"),
        ({"media_len": torch.full((2, 2), 4)}, ValueError, "media_len must be at most tokens_per_media 3; got 4"),
        ({"key_bias": torch.ones(2, 6).int()}, TypeError, "key_bias must be floating point; got torch.int32"),
        ({"key_bias": torch.ones(2, 5)}, ValueError, r"key_bias must be \(2, 6\), one per key; got \(2, 5\)"),
        ({"key_bias": torch.ones(2, 6, device="meta")}, ValueError, "key_bias must be on q's device cpu; got meta"),
        ({"key_bias": torch.ones(2, 6).requires_grad_()}, ValueError, "key_bias has no gradient"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^media_attention: .*{message}"):
        media_attention(**arguments(**change))


def test_explain_and_forced_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 4, 32)
    reasons = vlmfast.explain("media_attention", x, x, x)
    assert list(reasons) == list(IMPLS)
    assert reasons["torch"] is None
    assert (reasons["cpu"] is None) == (core is not None)
    monkeypatch.setenv("VLMFAST_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=r"media_attention: .* cannot run: cuda: "):
        media_attention(x, x, x)


def test_the_torch_backend_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query rows by sevens, the last chunk shorter."""
    monkeypatch.setenv("VLMFAST_BACKEND", "torch")
    monkeypatch.setattr(sys.modules["vlmfast.ops.media_attention"], "CHUNK_ELEMENTS", 7 * 2 * 4 * 30)
    media.check(media_attention, reference, qkv(2, 4, 2, 37, 30, 16), tokens_per_media=10, **any_media(2, 37, 3))
