"""SigLIP's pairwise sigmoid loss: reference, backends, registration and public function.

With dot_ij = <image_i, text_j>, logit_ij = scale * dot_ij + bias, the positives of row i column i + label_offset or the
columns of its group, and unit-norm features in mind. The loss needs no normaliser, so one pass over the tiles gives the
loss and all gradients, which are saved and only scaled in backward. A backend's forward returns, all float32, sums that
are not yet divided by n:

- loss (): sum_ij softplus(-z_ij logit_ij), z = 1 for a positive and -1 for others;
- image_grad (n, D) = scale * G text and text_grad (N, D) = scale * G^T image, (0, D) where not asked for, with
  G_ij = -z_ij sigmoid(-z_ij logit_ij);
- scale_grad () = sum_ij G_ij dot_ij and bias_grad () = sum_ij G_ij.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.ops import _pairs
from vlmfast.ops._arguments import check_integer
from vlmfast.ops._define import define, without_autocast
from vlmfast.ops._dispatch import Impl, choose
from vlmfast.ops._pairs import Groups

CHUNK_ELEMENTS = 1 << 24
"""The torch backend computes at most this many logits at a time."""


def reference(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    label_offset: int = 0,
    groups: Groups | None = None,
) -> Tensor:
    """The definition of sigmoid_loss, every intermediate in memory. Any floating dtype; float64 is the oracle."""
    logits = scale * image @ text.T + bias
    positive = _pairs.positives(image, text, label_offset, groups)
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum() / image.shape[0]


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    label_offset: int = 0,
    groups: Groups | None = None,
) -> Tensor:
    """Pairwise sigmoid loss without materialising the (n, N) logits.

    Equals, for n = N and no groups::

        logits = scale * image @ text.T + bias
        -F.logsigmoid((2 * eye(N) - 1) * logits).sum() / N

    Args:
        image (n, D): unit-norm image features; float32, float16 or bfloat16.
        text (N, D): unit-norm text features of image's dtype; row i + label_offset belongs to image i.
        scale (): inverse temperature, the exponential of logit_scale; a tensor of any floating dtype on image's device,
            or a float.
        bias (): added to every logit; likewise.
        label_offset: column of image 0's positive, when text holds more than the images' own rows. May be negative or
            beyond text: rows whose positive is not in text have none, as in the blocks of a batch that is spread over
            processes.
        groups (row_ids (n,), col_ids (N,)): integers; text j is a positive of image i where their ids are equal.
            label_offset must be 0.
    Returns:
        loss (): float32, the sum over all pairs divided by n.
    Raises:
        TypeError: an argument is not of the type above, a tensor is sparse, nested or quantised, a dtype is not
            supported, or image and text differ in it.
        ValueError: shapes or devices disagree, the batch is empty, or groups come with a label_offset; the message
            names the argument.
        RuntimeError: a second derivative is asked for, or the backend named by VLMFAST_BACKEND cannot run.
    Memory: O((n + N)*D); on a GPU up to 134 MB of the logits' gradient besides, 268 MB in float32. FLOPs, forward and
    backward: 6*n*N*D, all in forward; a side without gradient saves 2*n*N*D. Products and buffers are info_nce's.
    Repeatable bit for bit for a given number of threads.
    Source: Zhai et al. 2023, algorithm 1.
    """
    _pairs.check_features("sigmoid_loss", image, text)
    scale = _pairs.scalar("sigmoid_loss", "scale", scale, image)
    bias = _pairs.scalar("sigmoid_loss", "bias", bias, image)
    check_integer("sigmoid_loss", "label_offset", label_offset)
    if groups is not None and label_offset:
        raise ValueError(f"sigmoid_loss: groups cannot be combined with label_offset; got {label_offset}")
    codes = _pairs.group_codes("sigmoid_loss", groups, image, text) if groups is not None else (None, None)
    grads = [torch.is_grad_enabled() and t.requires_grad for t in (image, text)]
    loss: Tensor = _forward_op(image, text, scale, bias, *codes, label_offset, *grads)[0]
    return loss


def reference_forward(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_codes: Tensor | None,
    col_codes: Tensor | None,
    label_offset: int,
    image_grad: bool,
    text_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, y, s, b = image.float(), text.float(), scale.float(), bias.float()
    d_image, d_text = torch.zeros_like(x if image_grad else x[:0]), torch.zeros_like(y if text_grad else y[:0])
    loss, d_scale, d_bias = (x.new_zeros((), dtype=torch.float64) for _ in range(3))
    step = max(1, CHUNK_ELEMENTS // y.shape[0])
    for start in range(0, x.shape[0], step):
        part = x[start : start + step]
        if row_codes is None or col_codes is None:
            positive = _pairs.positives(part, y, label_offset + start, None)
        else:
            positive = row_codes[start : start + step, None] == col_codes
        dot = part @ y.T
        logits = dot * s + b
        signed = torch.where(positive, -logits, logits)
        loss += F.softplus(signed).sum(dtype=torch.float64)
        g = torch.where(positive, -1, 1) * signed.sigmoid()
        d_scale += (g * dot).sum(dtype=torch.float64)
        d_bias += g.sum(dtype=torch.float64)
        if image_grad:
            d_image[start : start + step] = s * (g @ y)
        if text_grad:
            d_text.addmm_(g.T, s * part)
    return loss.float(), d_image, d_text, d_scale.float(), d_bias.float()


def reference_backward(
    grad: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *gradients: Tensor
) -> tuple[Tensor, ...]:
    """The saved gradients of image, text, scale and bias, scaled and in their inputs' dtypes."""
    unit = grad.float() / image.shape[0]
    return tuple((g * unit).to(t.dtype) for g, t in zip(gradients, (image, text, scale, bias), strict=True))


IMPLS = {
    "cpu": Impl.cpu("sigmoid_loss", backward=reference_backward),
    "triton": Impl.triton("sigmoid_loss", backward=reference_backward),
    "cuda": Impl.cuda("sigmoid_loss", backward=reference_backward),
    "torch": Impl(reference_forward, reference_backward),
}


def tile_forward(image: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums and gradients from the backend that `choose` names; arguments of `reference_forward`."""
    with without_autocast():
        return choose("sigmoid_loss", IMPLS, image).forward(image, *args)


def _forward(image: Tensor, *args: Any) -> tuple[Tensor, ...]:
    loss, *gradients = tile_forward(image, *args)
    return (loss / image.shape[0], *gradients)


def _backward(grad: Tensor, image: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return choose("sigmoid_loss", IMPLS, image).backward(grad, image, *args)


def _fake_forward(image: Tensor, text: Tensor, *args: Any) -> tuple[Tensor, ...]:
    image_grad, text_grad = args[-2:]
    dim = image.shape[1]
    shapes = [(), (image.shape[0] if image_grad else 0, dim), (text.shape[0] if text_grad else 0, dim), (), ()]
    return tuple(image.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _fake_backward(
    grad: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *gradients: Tensor
) -> tuple[Tensor, ...]:
    inputs = (image, text, scale, bias)
    return tuple(g.new_empty(g.shape, dtype=t.dtype) for g, t in zip(gradients, inputs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    gradients = _backward_op(grad, *ctx.saved_tensors)
    wanted = ctx.needs_input_grad
    return (*(g if w else None for g, w in zip(gradients, wanted, strict=False)), *[None] * 5)


_INPUTS = "Tensor image, Tensor text, Tensor scale, Tensor bias"
_GRADIENTS = "Tensor image_grad, Tensor text_grad, Tensor scale_grad, Tensor bias_grad"
_forward_op = define(
    "sigmoid_loss_forward",
    f"({_INPUTS}, Tensor? row_codes, Tensor? col_codes, SymInt label_offset, bool wants_image_grad,"
    f" bool wants_text_grad) -> (Tensor loss, {_GRADIENTS})",
    _forward,
    _fake_forward,
    _setup_context,
    _autograd,
)
_backward_op = define(
    "sigmoid_loss_backward",
    f"(Tensor grad, {_INPUTS}, {_GRADIENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
