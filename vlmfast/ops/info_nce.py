"""Symmetric InfoNCE: reference, backends, registration and public function.

With dot_ij = <image_i, text_j> (the cosine of unit-norm features) and logit_ij = scale * dot_ij, row i's positive is
column i + label_offset. Every backend returns from forward, for backward (all float32):

- loss ();
- row_stats (2, n): a shift u_i and the sum Z_i of 2^(logit_ij log2(e) - u_i) over columns j;
- col_stats (2, M), or (2, 0) when not bidirectional: the same over rows, for every column;
- shift (): when finite, it is every u and kept holds 2^(logit log2(e) - shift); when infinite, kept holds dot;
- kept (n, M), or (0, 0) when backward is to recompute it.

Backward: G_ij = w_row p_row_ij + w_col p_col_ij - 1[j = i + label_offset], weights 1/2 and 1/2 (1 and 0 when not
bidirectional; p_col is 0 in columns that are nobody's positive), then d_image = grad scale / n * G text, d_text = grad
scale / n * G^T image, d_scale = grad / n * sum_ij G_ij dot_ij.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.ops import _dispatch
from vlmfast.ops._dispatch import CORE_MISSING, Impl, choose, core, define, never, no_second_derivative

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

STORE_BUDGET_BYTES = 1 << 30
"""With recompute=None the exponentials are kept for backward when their n * M float32 values fit in this many bytes."""

CHUNK_ELEMENTS = 1 << 24
"""The torch backend computes at most this many logits at a time when they are not kept."""


def reference(
    image: Tensor, text: Tensor, scale: Tensor, *, label_offset: int = 0, bidirectional: bool = True
) -> Tensor:
    """The definition of info_nce, every intermediate in memory. Any floating dtype; float64 is the tests' oracle."""
    n = image.shape[0]
    labels = torch.arange(n, device=image.device) + label_offset
    logits = scale * image @ text.T
    loss = F.cross_entropy(logits, labels)
    if bidirectional:
        loss_text = F.cross_entropy(logits.T[label_offset : label_offset + n], labels - label_offset)
        loss = (loss + loss_text) / 2
    return loss


def info_nce(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    *,
    label_offset: int = 0,
    bidirectional: bool = True,
    recompute: bool | None = None,
) -> Tensor:
    """Symmetric InfoNCE loss without materialising the (n, N) logits.

    Equals, for n = N and label_offset = 0::

        logits = scale * image @ text.T
        (F.cross_entropy(logits, arange(N)) + F.cross_entropy(logits.T, arange(N))) / 2

    Args:
        image (n, D): unit-norm image features; float32, float16 or bfloat16. Other norms are right too, but slower.
        text (N, D): unit-norm text features of image's dtype; row i + label_offset belongs to image i.
        scale (): inverse temperature, the exponential of logit_scale; a tensor of any floating dtype on image's device,
            or a float.
        label_offset: column of image 0's positive, when text holds more than the images' own rows.
        bidirectional: average the image-to-text and the text-to-image loss; the latter goes over the columns that are
            some image's positive. False leaves the image-to-text loss alone.
        recompute: False keeps (n, N) float32 exponentials for backward, True computes the logits again in tiles, in
            O(N*D) memory; None keeps them when they fit in STORE_BUDGET_BYTES.
    Returns:
        loss (): float32.
    Raises:
        TypeError: a dtype is not supported, or image and text differ in it.
        ValueError: shapes or devices disagree, or the batch is empty; the message names the argument.
        RuntimeError: a second derivative is asked for, or the backend named by VLMFAST_BACKEND cannot run.
    Memory: O(N*D) recomputed, O(n*N) kept. FLOPs, forward and backward: 8*n*N*D recomputed, 6*n*N*D kept; a side
    without gradient saves 2*n*N*D. Repeatable bit for bit for a given number of threads.
    Source: Radford et al. 2021, figure 3; van den Oord et al. 2018, equation 4.
    """
    if not isinstance(scale, Tensor):
        scale = torch.tensor(scale, dtype=torch.float32, device=image.device)
    _check(image, text, scale, label_offset)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (image, text, scale))
    if recompute is None:
        recompute = image.shape[0] * text.shape[0] * 4 > STORE_BUDGET_BYTES
    keep = needs_grad and not recompute
    loss: Tensor = _forward_op(image, text, scale.reshape(()), label_offset, bidirectional, keep)[0]
    return loss


def _check(image: Tensor, text: Tensor, scale: Tensor, label_offset: int) -> None:
    for name, features in (("image", image), ("text", text)):
        if features.dim() != 2 or 0 in features.shape:
            raise ValueError(f"info_nce: {name} must be (batch, dim) and not empty; got {tuple(features.shape)}")
        if features.dtype not in DTYPES:
            raise TypeError(f"info_nce: {name} must be float32, float16 or bfloat16; got {features.dtype}")
    if image.dtype != text.dtype:
        raise TypeError(f"info_nce: text must have image's dtype {image.dtype}; got {text.dtype}")
    if image.shape[1] != text.shape[1]:
        raise ValueError(f"info_nce: text must have image's dim {image.shape[1]}; got {tuple(text.shape)}")
    if not scale.is_floating_point():
        raise TypeError(f"info_nce: scale must be floating point; got {scale.dtype}")
    if scale.numel() != 1:
        raise ValueError(f"info_nce: scale must have one element; got {tuple(scale.shape)}")
    for name, tensor in (("text", text), ("scale", scale)):
        if tensor.device != image.device:
            raise ValueError(f"info_nce: {name} must be on image's device {image.device}; got {tensor.device}")
    if label_offset < 0 or label_offset + image.shape[0] > text.shape[0]:
        raise ValueError(
            f"info_nce: label_offset must be at least 0 and leave text a row for each of the {image.shape[0]} images; "
            f"got label_offset {label_offset} with {text.shape[0]} rows of text"
        )


def reference_forward(
    image: Tensor, text: Tensor, scale: Tensor, label_offset: int, bidirectional: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, y = image.float(), text.float()
    n, m = x.shape[0], y.shape[0]
    scale2 = scale.float() * math.log2(math.e)
    row_stats = x.new_empty(2, n)
    columns = m if bidirectional else 0
    col_stats = torch.cat([x.new_full((1, columns), -math.inf), x.new_zeros(1, columns)])
    kept = x.new_empty((n, m) if keep else (0, 0))
    positive = x.new_empty(n)
    for rows in _row_chunks(n, m):
        dot = torch.mm(x[rows], y.T, out=kept[rows]) if keep else x[rows] @ y.T
        labels = torch.arange(rows.start, rows.stop, device=x.device) + label_offset
        logits = dot * scale2
        positive[rows] = logits.gather(1, labels[:, None])[:, 0]
        row_stats[0, rows] = logits.amax(1).round()
        row_stats[1, rows] = torch.exp2(logits - row_stats[0, rows, None]).sum(1)
        if bidirectional:
            top = torch.maximum(col_stats[0], logits.amax(0).round())
            col_stats[1] = col_stats[1] * torch.exp2(col_stats[0] - top) + torch.exp2(logits - top).sum(0)
            col_stats[0] = top
    lse = row_stats[0] - positive + row_stats[1].log2()
    if bidirectional:
        own = col_stats[:, label_offset : label_offset + n]
        lse = (lse + (own[0] - positive + own[1].log2())) / 2
    return lse.mean() * math.log(2), row_stats, col_stats, x.new_full((), math.inf), kept


def reference_backward(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    shift: Tensor,
    kept: Tensor,
    label_offset: int,
    bidirectional: bool,
    image_grad: bool,
    text_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, y = image.float(), text.float()
    n, m = x.shape[0], y.shape[0]
    scale2 = scale.float() * math.log2(math.e)
    weight = 0.5 if bidirectional else 1.0
    own = slice(label_offset, label_offset + n)
    # The scale's gradient is read off a feature gradient, so one of the two is always accumulated.
    image_sum = image_grad or not text_grad
    d_image, d_text = torch.zeros_like(x if image_sum else x[:0]), torch.zeros_like(y if text_grad else y[:0])
    for rows in _row_chunks(n, m):
        if kept.numel():  # dot products, or another backend's exponentials
            logits = torch.where(shift.isinf(), kept[rows] * scale2, kept[rows].log2() + shift)
        else:
            logits = (x[rows] @ y.T) * scale2
        g = weight * torch.exp2(logits - row_stats[0, rows, None]) / row_stats[1, rows, None]
        if bidirectional:
            g[:, own] += weight * torch.exp2(logits[:, own] - col_stats[0, own]) / col_stats[1, own]
        labels = torch.arange(rows.start, rows.stop, device=x.device) + label_offset
        g.scatter_add_(1, labels[:, None], g.new_full((len(labels), 1), -1.0))
        if image_sum:
            torch.mm(g, y, out=d_image[rows])
        if text_grad:
            d_text.addmm_(g.T, x[rows])
    d_scale = (d_image * x).sum() if image_sum else (d_text * y).sum()
    unit = grad.float() / n
    factor = unit * scale.float()
    return (
        (d_image * factor).to(image.dtype) if image_grad else image.new_empty(0),
        (d_text * factor).to(text.dtype) if text_grad else text.new_empty(0),
        (d_scale * unit).to(scale.dtype),
    )


def _row_chunks(n: int, m: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // m)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _cpu_unsupported(image: Tensor, *args: Any) -> str | None:
    if CORE_MISSING:
        return CORE_MISSING
    if image.device.type != "cpu":
        return f"image is on {image.device.type}"
    return None


IMPLS = {
    "cpu": Impl(
        lambda *args: core.info_nce_forward(*args), lambda *args: core.info_nce_backward(*args), _cpu_unsupported
    ),
    "torch": Impl(reference_forward, reference_backward, never),
}


def _forward(image: Tensor, *args: Any) -> Any:
    with torch.autocast(image.device.type, enabled=False):
        return choose("info_nce", IMPLS, image).forward(image, *args)


def _backward(grad: Tensor, image: Tensor, *args: Any) -> Any:
    with torch.autocast(image.device.type, enabled=False):
        return choose("info_nce", IMPLS, image).backward(grad, image, *args)


def _fake_forward(
    image: Tensor, text: Tensor, scale: Tensor, label_offset: int, bidirectional: bool, keep: bool
) -> tuple[Tensor, ...]:
    n, m = image.shape[0], text.shape[0]
    new = image.new_empty
    columns = m if bidirectional else 0
    shapes: list[tuple[int, ...]] = [(), (2, n), (2, columns), (), (n, m) if keep else (0, 0)]
    return tuple(new(shape, dtype=torch.float32) for shape in shapes)


def _fake_backward(
    grad: Tensor, image: Tensor, text: Tensor, scale: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    image_grad, text_grad = args[-2:]
    return (
        image.new_empty(image.shape if image_grad else (0,)),
        text.new_empty(text.shape if text_grad else (0,)),
        scale.new_empty(()),
    )


_SAVED = "Tensor row_stats, Tensor col_stats, Tensor shift, Tensor kept"
_forward_op = define(
    "info_nce_forward",
    "(Tensor image, Tensor text, Tensor scale, SymInt label_offset, bool bidirectional, bool keep)"
    f" -> (Tensor loss, {_SAVED})",
    _forward,
    _fake_forward,
)
_backward_op = define(
    "info_nce_backward",
    f"(Tensor grad, Tensor image, Tensor text, Tensor scale, {_SAVED}, SymInt label_offset, bool bidirectional,"
    " bool image_grad, bool text_grad) -> (Tensor image_grad, Tensor text_grad, Tensor scale_grad)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, scale, ctx.label_offset, ctx.bidirectional, _ = inputs
    ctx.save_for_backward(image, text, scale, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    gradients = _backward_op(grad, *ctx.saved_tensors, ctx.label_offset, ctx.bidirectional, wanted[0], wanted[1])
    return (*(g if w else None for g, w in zip(gradients, wanted, strict=False)), None, None, None)


torch.library.register_autograd(
    "vlmfast::info_nce_forward", _autograd, setup_context=_setup_context, lib=_dispatch.LIBRARY
)
no_second_derivative("info_nce_backward")
