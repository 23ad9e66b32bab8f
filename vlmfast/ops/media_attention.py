"""Cross-attention of text to the media that each token may see: reference, backends, registration, public function.

Keys come in media of M = tokens_per_media keys: medium t (from 1) holds the keys (t - 1) * M to t * M - 1, of which the
first media_len[b, t - 1] are valid. A query row sees the media lo to hi, inclusive; it is empty where they hold no
valid key. With s_ij = scale <q_i, k_j> + key_bias_j over the valid keys j of the media that row i sees::

    lse_i = ln sum_j exp(s_ij)        out_i = sum_j exp(s_ij - lse_i) v_j

An empty row has lse -inf and out 0; with `empty_all` it attends to every key, also beyond media_len, key_bias still
added. Query head h reads key and value head h // (H / Hkv).

A backend's functions are forward(q, k, v, media) and backward(grad_out, q, k, v, out, lse, media, q_grad, kv_grad), the
latter two bool and media a `Media`. q, k, v are of one dtype with any strides; scores, softmax and sums are float32.
forward returns out (B, H, Lq, dv) in q's dtype and lse (B, H, Lq), float32, natural logarithm. backward returns dq, dk,
dv in q's dtype, (0,) where not asked for: with delta_i = <grad_out_i, out_i> and P_ij = exp(s_ij - lse_i)::

    dS_ij = P_ij (<grad_out_i, v_j> - delta_i)    dq = scale dS k    dk = scale dS^T q    dv = P^T grad_out

Gradients are deterministic. In memory the heads of out, dq, dk and dv lie side by side, the strides of a contiguous
(B, L, H, d), so that projections read them without a copy; what a backend returns in another order is copied.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmfast.ops._arguments import (
    check_floating,
    check_integer,
    check_integers,
    check_number,
    check_string,
    check_tensor,
)
from vlmfast.ops._define import define, without_autocast
from vlmfast.ops._dispatch import Impl, choose, cuda_unsupported


class Media(NamedTuple):
    """What the query rows see."""

    lo: Tensor | None
    """(B, Lq), int32, contiguous; None like hi where every row sees all media. As the caller gave both: a backend
    clamps lo to at least 1 and hi to at most T = Lk / M, and then a row with hi < lo sees nothing.
    """
    hi: Tensor | None
    len: Tensor | None
    """(B, T), int32, contiguous; None where all keys are valid. A backend clamps it to [0, M]."""
    key_bias: Tensor | None
    """(B, Lk), float32, contiguous; it has no gradient. May be -inf: a row with nothing else has lse -inf and out 0,
    like an empty one.
    """
    tokens_per_media: int
    scale: float
    empty_all: bool

    def of_rows(self, rows: slice) -> Media:
        return self if self.lo is None or self.hi is None else self._replace(lo=self.lo[:, rows], hi=self.hi[:, rows])


MOST = torch.iinfo(torch.int32).max

MAX_CUDA_DIM = 128
"""Of a head in the CUDA C++ backend, kMaxHeadDim in kernels/cuda/media_attention.h."""

CHUNK_ELEMENTS = 1 << 24
"""The torch backend computes at most this many scores at a time, or one query row's."""


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    media_lo: Tensor | None = None,
    media_hi: Tensor | None = None,
    tokens_per_media: int | None = None,
    media_len: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    empty: str = "zero",
) -> Tensor:
    """The definition of media_attention with a dense mask. Any floating dtype; float64 is the tests' oracle."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    media = Media(media_lo, media_hi, media_len, key_bias, tokens_per_media or k.shape[2], factor, empty == "all")
    visible = _visible(q, k, media)
    nothing = ~visible.any(-1, keepdim=True)
    scores = q @ k.transpose(-1, -2) * factor
    if key_bias is not None:
        scores = scores + key_bias[:, None, None].to(scores.dtype)
    scores = scores.masked_fill(~(visible | nothing)[:, None], -math.inf)
    weights = torch.softmax(scores, -1, dtype=None if scores.dtype == torch.float64 else torch.float32)
    if empty == "zero":
        weights = weights.masked_fill(nothing[:, None], 0)
    return weights.to(v.dtype) @ v


def media_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    media_lo: Tensor | None = None,
    media_hi: Tensor | None = None,
    tokens_per_media: int | None = None,
    media_len: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    empty: str = "zero",
) -> Tensor:
    """Cross-attention in which every query row sees an interval of media, without a mask over the keys.

    Equals::

        medium = arange(Lk) // tokens_per_media + 1
        valid = arange(Lk) % tokens_per_media < media_len.repeat_interleave(tokens_per_media, 1)
        visible = (media_lo[:, :, None] <= medium) & (medium <= media_hi[:, :, None]) & valid[:, None]
        F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], scale=scale, enable_gqa=True)

    with 0 for the rows that see nothing, where a softmax over nothing is not a number.

    Args:
        q (B, H, Lq, dh): queries; float32, float16 or bfloat16, any strides.
        k (B, Hkv, Lk, dh): keys, medium after medium, T = Lk / tokens_per_media of them; q's dtype, any strides. Query
            head h reads key and value head h // (H / Hkv).
        v (B, Hkv, Lk, dv): values; likewise.
        media_lo (B, Lq): integers, the first medium that a row sees, counted from 1; less than 1 is 1. None: the first.
        media_hi (B, Lq): integers, the last one; a row with hi < lo or hi < 1 is empty. None: the last. `media_index`
            makes both from token ids.
        tokens_per_media: keys of each medium; None: all, there is one medium.
        media_len (B, T): integers, valid keys of each medium, from its first; None: all are. A row that sees only media
            of length 0 is empty.
        key_bias (B, Lk): floating point, added to the scores of a key, -inf to leave it out; without gradient.
        scale: factor of the scores; None: dh ** -0.5.
        empty: what an empty row gives: "zero", or "all": it attends to every key, also beyond media_len, as in
            transformers' Mllama.
    Returns:
        out (B, H, Lq, dv): q's dtype. Its heads lie side by side: out.transpose(1, 2).flatten(2) is no copy.
    Raises:
        TypeError: an argument is not of the type above, a tensor is sparse, nested or quantised, a dtype is not
            supported, or k or v differ from q in it.
        ValueError: shapes or devices disagree, something is empty, or key_bias wants a gradient; on a CPU also a
            media_lo beyond int32, a media_hi beyond the media or a media_len beyond tokens_per_media, which
            accelerators clamp (a row whose media are all beyond is empty). The message names the argument.
        RuntimeError: a second derivative is asked for, or the backend named by VLMFAST_BACKEND cannot run.
    Memory: beyond the inputs, out and one float32 per row and head. FLOPs, with V the number of pairs of a query row
    and a visible key, over all heads: forward 2*V*(dh + dv), backward 2*V*(3*dh + 2*dv), up to the edges of tiles.
    Softmax and sums are float32. Repeatable bit for bit for a given number of threads.
    Source: Alayrac et al. 2022 (Flamingo), section 2.3.
    """
    _check_tensors(q, k, v)
    num_media, tokens_per_media = _check_media(q, k, tokens_per_media, media_len)
    check_string("media_attention", "empty", empty)
    if empty not in ("zero", "all"):
        raise ValueError(f"media_attention: empty must be 'zero' or 'all'; got {empty!r}")
    for name, index in (("media_lo", media_lo), ("media_hi", media_hi)):
        if index is not None:
            _check_integers(name, index, (q.shape[0], q.shape[2]), "one per query row", q)
    if key_bias is not None:
        _check_key_bias(key_bias, q, k)
        key_bias = key_bias.float().contiguous()
    if media_lo is None and media_hi is not None:
        media_lo = torch.ones_like(media_hi)
    if media_hi is None and media_lo is not None:
        media_hi = torch.full_like(media_lo, num_media)
    lo, hi, lengths = (None if t is None else _as_int32(t) for t in (media_lo, media_hi, media_len))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    check_number("media_attention", "scale", scale)
    media = Media(lo, hi, lengths, key_bias, tokens_per_media, scale, empty == "all")
    out: Tensor = _forward_op(q, k, v, *media)[0]
    return out


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor("media_attention", name, tensor)
    shapes = q.shape, k.shape, v.shape
    for name, tensor, shape in zip("qkv", (q, k, v), shapes, strict=True):
        if len(shape) != 4 or 0 in shape:
            raise ValueError(
                f"media_attention: {name} must be (batch, heads, length, dim) and not empty; got {tuple(shape)}"
            )
        check_floating("media_attention", name, tensor)
        if tensor.dtype != q.dtype:
            raise TypeError(f"media_attention: {name} must have q's dtype {q.dtype}; got {tensor.dtype}")
        _check_device(name, tensor, q)
    of_q, of_k, of_v = shapes
    if of_k[0] != of_q[0] or of_k[3] != of_q[3] or of_q[1] % of_k[1]:
        raise ValueError(
            f"media_attention: k must have q's batch and dim and heads that divide q's, q being {tuple(of_q)}; "
            f"got {tuple(of_k)}"
        )
    if of_v[:3] != of_k[:3]:
        raise ValueError(
            f"media_attention: v must have k's batch, heads and length {tuple(of_k[:3])}; got {tuple(of_v)}"
        )


def _check_media(q: Tensor, k: Tensor, tokens_per_media: int | None, media_len: Tensor | None) -> tuple[int, int]:
    """The number of media and of tokens in each."""
    length = k.shape[2]
    tokens = length if tokens_per_media is None else tokens_per_media
    check_integer("media_attention", "tokens_per_media", tokens)
    if tokens < 1 or length % tokens:
        raise ValueError(f"media_attention: tokens_per_media must divide the {length} keys; got {tokens}")
    if media_len is not None:
        _check_integers("media_len", media_len, (q.shape[0], length // tokens), "one per medium", q)
    return length // tokens, tokens


def _check_integers(name: str, tensor: Tensor, shape: tuple[int, int], what: str, q: Tensor) -> None:
    check_integers("media_attention", name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"media_attention: {name} must be {tuple(shape)}, {what}; got {tuple(tensor.shape)}")
    _check_device(name, tensor, q)


def _as_int32(index: Tensor) -> Tensor:
    """What is beyond int32 becomes its nearest number, of which `_check_values` raises."""
    if index.dtype in (torch.int64, torch.uint32):
        index = index.long().clamp(-MOST - 1, MOST)
    return index.int().contiguous()


def _check_key_bias(key_bias: Tensor, q: Tensor, k: Tensor) -> None:
    check_tensor("media_attention", "key_bias", key_bias)
    if not key_bias.is_floating_point():
        raise TypeError(f"media_attention: key_bias must be floating point; got {key_bias.dtype}")
    shape = (q.shape[0], k.shape[2])
    if key_bias.shape != shape:
        raise ValueError(f"media_attention: key_bias must be {shape}, one per key; got {tuple(key_bias.shape)}")
    _check_device("key_bias", key_bias, q)
    if torch.is_grad_enabled() and key_bias.requires_grad:
        raise ValueError("media_attention: key_bias has no gradient; got one that requires it, detach it")


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"media_attention: {name} must be on q's device {q.device}; got {tensor.device}")


def _check_values(k: Tensor, media: Media) -> None:
    """Raises for media that are not there; for CPU tensors only, where looking costs no synchronisation."""
    if k.device.type != "cpu":
        return
    num_media = k.shape[2] // media.tokens_per_media
    if media.lo is not None and int(media.lo.max()) == MOST:
        raise ValueError(f"media_attention: media_lo must be less than {MOST}; got that or more")
    if media.hi is not None and (most := int(media.hi.max())) > num_media:
        raise ValueError(f"media_attention: media_hi must be at most {num_media}, the number of media; got {most}")
    if media.len is not None and (most := int(media.len.max())) > media.tokens_per_media:
        raise ValueError(
            f"media_attention: media_len must be at most tokens_per_media {media.tokens_per_media}; got {most}"
        )


def _visible(q: Tensor, k: Tensor, media: Media) -> Tensor:
    """(B, Lq, Lk) bool."""
    key = torch.arange(k.shape[2], device=k.device)
    medium = key // media.tokens_per_media + 1
    visible = torch.ones(q.shape[0], q.shape[2], k.shape[2], dtype=torch.bool, device=k.device)
    if media.lo is not None:
        visible &= media.lo[:, :, None] <= medium
    if media.hi is not None:
        visible &= medium <= media.hi[:, :, None]
    if media.len is not None:
        visible &= (key % media.tokens_per_media < media.len.repeat_interleave(media.tokens_per_media, 1))[:, None]
    return visible


def _new(like: Tensor, dim: int) -> Tensor:
    """(B, H, L, dim), of like's B, H, L and dtype, with the heads side by side in memory."""
    batch, heads, length, _ = like.shape
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def reference_forward(q: Tensor, k: Tensor, v: Tensor, media: Media) -> tuple[Tensor, Tensor]:
    kf, vf = _grouped(k), _grouped(v)
    out = _new(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    for rows in _row_chunks(q, k):
        scores = _scores(q[:, :, rows], k, kf, media.of_rows(rows))
        part = scores.logsumexp(-1)
        weights = _weights(scores, part)
        out[:, :, rows] = (weights @ vf).flatten(1, 2).to(q.dtype)
        lse[:, :, rows] = part.flatten(1, 2)
    return out, lse


def reference_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    media: Media,
    q_grad: bool,
    kv_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kf, vf = _grouped(k), _grouped(v)
    dq = _new(q, q.shape[3]) if q_grad else q.new_empty(0)
    dk, dv = (torch.zeros_like(t[:, :, 0]) for t in (kf, vf)) if kv_grad else (q.new_empty(0), q.new_empty(0))
    for rows in _row_chunks(q, k):
        scores = _scores(q[:, :, rows], k, kf, media.of_rows(rows))
        qf, grad, outf, part = (_split_heads(t[:, :, rows], k.shape[1]) for t in (q, grad_out, out, lse[..., None]))
        weights = _weights(scores, part[..., 0])
        delta = (grad * outf).sum(-1, keepdim=True)
        d_scores = weights * (grad @ vf.transpose(-1, -2) - delta) * media.scale
        if q_grad:
            dq[:, :, rows] = (d_scores @ kf).flatten(1, 2).to(q.dtype)
        if kv_grad:
            dk += (d_scores.transpose(-1, -2) @ qf).sum(2)
            dv += (weights.transpose(-1, -2) @ grad).sum(2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _grouped(t: Tensor) -> Tensor:
    """Keys or values as float32 (B, Hkv, 1, Lk, d), to be multiplied with a group of query heads."""
    return t.float()[:, :, None]


def _split_heads(t: Tensor, kv_heads: int) -> Tensor:
    """(B, H, L, d) as float32 (B, Hkv, H / Hkv, L, d)."""
    return t.float().unflatten(1, (kv_heads, -1))


def _row_chunks(q: Tensor, k: Tensor) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2]))
    return [slice(start, min(start + step, q.shape[2])) for start in range(0, q.shape[2], step)]


def _scores(q: Tensor, k: Tensor, kf: Tensor, media: Media) -> Tensor:
    """float32 (B, Hkv, H / Hkv, rows, Lk), -inf where a row does not see a key."""
    visible = _visible(q, k, media)
    if media.empty_all:
        visible |= ~visible.any(-1, keepdim=True)
    scores = _split_heads(q, k.shape[1]) @ kf.transpose(-1, -2) * media.scale
    if media.key_bias is not None:
        scores += media.key_bias[:, None, None, None]
    return scores.masked_fill_(~visible[:, None, None], -math.inf)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 in rows that see nothing."""
    return torch.exp(scores - torch.where(lse == -math.inf, 0, lse)[..., None])


def _cuda_unsupported(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> str | None:
    if max(q.shape[3], v.shape[3]) > MAX_CUDA_DIM:
        return f"heads are larger than {MAX_CUDA_DIM}: {q.shape[3]} and {v.shape[3]}"
    return cuda_unsupported(q)


IMPLS = {
    "cpu": Impl.cpu("media_attention"),
    "triton": Impl.triton("media_attention"),
    "cuda": Impl.cuda("media_attention", unsupported=_cuda_unsupported),
    "torch": Impl(reference_forward, reference_backward),
}


def _side_by_side(t: Tensor) -> Tensor:
    """(B, H, L, d) with the heads side by side in memory; a copy only where they are not."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    media = Media(*given)
    _check_values(k, media)
    with without_autocast():
        out, lse = choose("media_attention", IMPLS, q, k, v).forward(q, k, v, media)
    return _side_by_side(out), lse


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *given, q_grad, kv_grad = args
    with without_autocast():
        impl = choose("media_attention", IMPLS, q, k, v)
        gradients = impl.backward(grad_out, q, k, v, out, lse, Media(*given), q_grad, kv_grad)
    return tuple(_side_by_side(t) if t.dim() == 4 else t for t in gradients)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _new(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    q_grad, kv_grad = args[-2:]
    wanted = ((q, q_grad), (k, kv_grad), (v, kv_grad))
    return tuple(_new(t, t.shape[3]) if flag else t.new_empty(0) for t, flag in wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.options = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: Tensor, _: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    gradients = _backward_op(grad_out, *ctx.saved_tensors, *ctx.options, wanted[0], wanted[1] or wanted[2])
    return (*(g if w else None for g, w in zip(gradients, wanted, strict=True)), *[None] * 7)


_MEDIA = (
    "Tensor? media_lo, Tensor? media_hi, Tensor? media_len, Tensor? key_bias, SymInt tokens_per_media, float scale,"
    " bool empty_all"
)
_forward_op = define(
    "media_attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {_MEDIA}) -> (Tensor out, Tensor lse)",
    _forward,
    _fake_forward,
    _setup_context,
    _autograd,
)
_backward_op = define(
    "media_attention_backward",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_MEDIA}, bool q_grad, bool kv_grad)"
    " -> (Tensor q_grad, Tensor k_grad, Tensor v_grad)",
    _backward,
    _fake_backward,
)
