"""InfoNCE and its variants: reference, backends, registration and public function.

With dot_ij = <image_i, text_j> (the cosine of unit-norm features), logit_ij = scale * dot_ij, x_ij = logit_ij log2(e).
The positives of row i are column i + label_offset, or the columns of its group.

A backend's tile_forward returns, all float32:

- row_stats (3, n): a shift u_i; the sum of 2^(x_ij - u_i) over columns j, without the positive unless there are groups;
  the sum of dot_ij over positives;
- col_stats (3, N), or (3, 0) when columns are not asked for: the same down each column, over all rows;
- shift (): when finite, it is every u and kept holds 2^(x - shift); when infinite, kept holds dot;
- kept (n, N), or (0, 0) when backward is to recompute it. On a CPU it lies in memory in panels of PANEL columns, each
  (n, PANEL) row by row: the tiles of "cpu" are then in one piece.

`normalise` turns those O(N) numbers into the loss and into what backward reads: for each row and column a shift u, a
factor f and a target t, the same on every backend. Backward's tile is::

    G_ij = f_row_i 2^(x_ij - u_row_i) + f_col_j 2^(x_ij - u_col_j) - [j positive for i] (t_row_i + t_col_j)

its first two terms left out at the positive unless there are groups: there t is the weighted 1 - p, exact however
close p is to 1. Then d_image = unit * scale * G text, d_text = unit * scale * G^T image, d_scale = unit * sum_ij G_ij
dot_ij.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.ops import _pairs
from vlmfast.ops._arguments import check_flag, check_integer, check_number
from vlmfast.ops._define import define, without_autocast
from vlmfast.ops._dispatch import Impl, choose, cpu_function, cuda_function, triton_function
from vlmfast.ops._info_nce_halves import InfoNceImpl, Side, each_side, in_halves
from vlmfast.ops._info_nce_torch import normalise_side, reference_backward, reference_forward
from vlmfast.ops._pairs import Groups

STORE_BUDGET_BYTES = 1 << 30
"""With recompute=None the exponentials are kept for backward when their n * N float32 values fit in this many bytes."""


def reference(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    label_offset: int = 0,
    bidirectional: bool = True,
    label_smoothing: float = 0.0,
    exclude_positive: bool = False,
    groups: Groups | None = None,
    row_mask: Tensor | None = None,
) -> Tensor:
    """The definition of info_nce, every intermediate in memory. Any floating dtype; float64 is the tests' oracle."""
    logits = scale * image @ text.T
    positive = _pairs.positives(image, text, label_offset, groups)
    active = positive if row_mask is None else positive & row_mask[:, None]

    def one_way(logits: Tensor, positive: Tensor, has_loss: Tensor) -> Tensor:
        if exclude_positive:
            each = logits.masked_fill(positive, -math.inf).logsumexp(1) - (logits * positive).sum(1)
        else:
            target = positive.to(logits.dtype) / positive.sum(1, keepdim=True).clamp(min=1)
            each = F.cross_entropy(logits, target, label_smoothing=label_smoothing, reduction="none")
        return each.where(has_loss, 0).sum() / has_loss.sum().clamp(min=1)

    loss = one_way(logits, positive, active.any(1))
    if bidirectional:
        loss = (loss + one_way(logits.T, positive.T, active.any(0))) / 2
    return loss


def info_nce(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    *,
    label_offset: int = 0,
    bidirectional: bool = True,
    label_smoothing: float = 0.0,
    exclude_positive: bool = False,
    groups: Groups | None = None,
    row_mask: Tensor | None = None,
    recompute: bool | None = None,
) -> Tensor:
    """Symmetric InfoNCE loss without materialising the (n, N) logits.

    Equals, for n = N and no options::

        logits = scale * image @ text.T
        (F.cross_entropy(logits, arange(N)) + F.cross_entropy(logits.T, arange(N))) / 2

    Args:
        image (n, D): unit-norm image features; float32, float16 or bfloat16. Other norms are right too, but slower;
            on accelerators entries must be within float16's range, 6e-8 to 65504, unless products are in float32.
        text (N, D): unit-norm text features of image's dtype; row i + label_offset belongs to image i.
        scale (): inverse temperature, the exponential of logit_scale; a tensor of any floating dtype on image's device,
            or a float.
        label_offset: column of image 0's positive, when text holds more than the images' own rows.
        bidirectional: average the image-to-text and the text-to-image loss; the latter goes over the columns that are
            some image's positive. False leaves the image-to-text loss alone.
        label_smoothing: in [0, 1]; the target becomes (1 - label_smoothing) on the positive plus label_smoothing spread
            evenly over all, as in F.cross_entropy (ALIGN).
        exclude_positive: leave the positive out of the denominators: InfoLOOB (CLOOB divides the result by scale).
        groups (row_ids (n,), col_ids (N,)): integers; text j is a positive of image i where their ids are equal, and
            the target is spread evenly over the positives. Rows and columns without one have no loss; n may exceed N.
        row_mask (n,): bool; where False, the pair has no loss in either direction, while its image and text stay
            negatives of the others. If all are False the loss is 0.
        recompute: False keeps (n, N) float32 exponentials for backward, True computes the logits again in tiles, in
            O(N*D) memory; None keeps them on a CPU when they fit in STORE_BUDGET_BYTES.
    Returns:
        loss (): float32, the mean over the rows (and columns) that have one.
    Raises:
        TypeError: an argument is not of the type above, a tensor is sparse, nested or quantised, a dtype is not
            supported, or image and text differ in it.
        ValueError: shapes or devices disagree, the batch is empty, an option is out of range or makes no sense beside
            another (exclude_positive with label_smoothing; groups with label_offset, label_smoothing, exclude_positive
            or row_mask); the message names the argument.
        RuntimeError: a second derivative is asked for, or the backend named by VLMFAST_BACKEND cannot run.
    Memory: O(N*D) recomputed, O(n*N) kept; on a GPU up to 134 MB of the logits' gradient besides, 268 MB in float32.
    On a CPU the buffers of the last call, up to 1 GB each, are held for the next one: vlmfast.release_memory().
    FLOPs, forward and backward: 8*n*N*D recomputed, 6*n*N*D kept; a side without gradient saves 2*n*N*D. On a GPU,
    bfloat16 and float16 features are multiplied as float16 with float32 sums, and float32 ones too where torch may use
    TF32, torch.backends.cuda.matmul.fp32_precision being "tf32", which is not its default; else as pairs of float16.
    On a CPU features of 16 bits are multiplied as bfloat16 or int16 where that is faster: docs/numerics.md.
    Repeatable bit for bit for a given number of threads.
    Source: Radford et al. 2021, figure 3; van den Oord et al. 2018, equation 4; Jia et al. 2021 (label smoothing);
    Fuerst et al. 2022, equation 2 (InfoLOOB).
    """
    n, texts = _pairs.check_features("info_nce", image, text)
    scale = _pairs.scalar("info_nce", "scale", scale, image)
    _check_types(label_offset, bidirectional, label_smoothing, exclude_positive, recompute)
    if groups is None:
        _pairs.check_label_offset("info_nce", label_offset, n, texts)
    if groups is not None or row_mask is not None or label_smoothing or exclude_positive:
        _check_options(image, text, label_offset, bidirectional, label_smoothing, exclude_positive, groups, row_mask)
    codes = _pairs.group_codes("info_nce", groups, image, text) if groups is not None else (None, None)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (image, text, scale))
    if recompute is None:  # an accelerator computes a dot product sooner than it reads what it kept
        recompute = image.device.type != "cpu" or n * texts * 4 > STORE_BUDGET_BYTES
    keep = needs_grad and not recompute
    loss: Tensor = _forward_op(
        image, text, scale, row_mask, *codes, label_offset, bidirectional, exclude_positive, keep
    )[0]
    if label_smoothing:
        loss = loss + label_smoothing * _smoothing(image, text, scale, label_offset, bidirectional, row_mask)
    return loss


def _check_types(
    label_offset: int, bidirectional: bool, label_smoothing: float, exclude_positive: bool, recompute: bool | None
) -> None:
    check_integer("info_nce", "label_offset", label_offset)
    check_flag("info_nce", "bidirectional", bidirectional)
    check_number("info_nce", "label_smoothing", label_smoothing)
    check_flag("info_nce", "exclude_positive", exclude_positive)
    if recompute is not None:
        check_flag("info_nce", "recompute", recompute)


def _check_options(
    image: Tensor,
    text: Tensor,
    label_offset: int,
    bidirectional: bool,
    label_smoothing: float,
    exclude_positive: bool,
    groups: Groups | None,
    row_mask: Tensor | None,
) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"info_nce: label_smoothing must be in [0, 1]; got {label_smoothing}")
    if row_mask is not None:
        _pairs.check_row_mask("info_nce", row_mask, image)
    together = {
        "label_offset": label_offset != 0,
        "label_smoothing": label_smoothing > 0,
        "exclude_positive": exclude_positive,
        "row_mask": row_mask is not None,
    }
    if groups is not None and any(together.values()):
        names = ", ".join(name for name, given in together.items() if given)
        raise ValueError(
            f"info_nce: groups cannot be combined with {names}; an image left out by an id of its own has no loss"
        )
    if exclude_positive and label_smoothing:
        raise ValueError("info_nce: exclude_positive cannot be combined with label_smoothing")
    if exclude_positive and (text.shape[0] == 1 or (bidirectional and image.shape[0] == 1)):
        raise ValueError(
            f"info_nce: exclude_positive needs a negative for every positive; got {image.shape[0]} images and "
            f"{text.shape[0]} texts"
        )


def _smoothing(
    image: Tensor, text: Tensor, scale: Tensor, label_offset: int, bidirectional: bool, row_mask: Tensor | None
) -> Tensor:
    """What label smoothing adds per unit of it: the positive's logit minus the mean logit, averaged over the losses.

    The mean logit of a row is scale * <x_i, mean_j y_j>: nothing is O(n*N) here.
    """
    with torch.autocast(image.device.type, enabled=False):
        x, y = image.float(), text.float()
        own = y[label_offset : label_offset + x.shape[0]]
        each = (x * own).sum(1) - x @ y.mean(0)
        if bidirectional:
            each = (each + (x * own).sum(1) - own @ x.mean(0)) / 2
        if row_mask is None:
            return scale.float() * each.mean()
        return scale.float() * each.where(row_mask, 0).sum() / row_mask.sum().clamp(min=1)


_NORMALISE = each_side(normalise_side)

IMPLS = {
    "cpu": InfoNceImpl.cpu(
        "info_nce",
        tile_forward=cpu_function("info_nce_tile_forward"),
        normalise=each_side(cpu_function("info_nce_normalise")),
    ),
    "triton": in_halves(Impl.triton("info_nce"), triton_function("info_nce", "normalise")),
    "cuda": in_halves(Impl.cuda("info_nce", forward=cuda_function("info_nce_tile_forward")), _NORMALISE),
    "torch": in_halves(Impl(reference_forward, reference_backward), _NORMALISE),
}


def tile_forward(image: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first half of forward, from the backend that `choose` names; arguments of `reference_forward`."""
    with without_autocast():
        return choose("info_nce", IMPLS, image).tile_forward(image, *args)


def normalise(sides: Sequence[Side], scale: Tensor, exclude_positive: bool) -> tuple[Tensor, list[Tensor]]:
    """The second half: of `InfoNceImpl`."""
    return choose("info_nce", IMPLS, scale).normalise(sides, scale, exclude_positive)


def tile_backward(unit: Tensor, image: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text and scale; arguments of `reference_backward`."""
    with without_autocast():
        gradients: tuple[Tensor, Tensor, Tensor] = choose("info_nce", IMPLS, image).backward(unit, image, *args)
    return gradients


def _forward(image: Tensor, *args: Any) -> tuple[Tensor, ...]:
    with without_autocast():
        found: tuple[Tensor, ...] = choose("info_nce", IMPLS, image).forward(image, *args)
    return found


def _backward(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    rows: Tensor,
    cols: Tensor,
    shift: Tensor,
    kept: Tensor,
    unit: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return tile_backward(grad.float() * unit, image, text, scale, rows, cols, shift, kept, *args)


def _fake_forward(image: Tensor, text: Tensor, *args: Any) -> tuple[Tensor, ...]:
    n, m, keep = image.shape[0], text.shape[0], args[-1]
    shapes: list[tuple[int, ...]] = [(), (3, n), (3, m), (), (n, m) if keep else (0, 0), ()]
    return tuple(image.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _fake_backward(
    grad: Tensor, image: Tensor, text: Tensor, scale: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    image_grad, text_grad = args[-2:]
    return (
        image.new_empty(image.shape if image_grad else (0,)),
        text.new_empty(text.shape if text_grad else (0,)),
        scale.new_empty(()),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, text, scale, _, row_codes, col_codes, ctx.label_offset, *_ = inputs
    ctx.save_for_backward(image, text, scale, *output[1:], row_codes, col_codes)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    gradients = _backward_op(grad, *ctx.saved_tensors, ctx.label_offset, wanted[0], wanted[1])
    return (*(g if w else None for g, w in zip(gradients, wanted, strict=False)), *[None] * 7)


_SAVED = "Tensor rows, Tensor cols, Tensor shift, Tensor kept, Tensor unit"
_CODES = "Tensor? row_codes, Tensor? col_codes, SymInt label_offset"
_forward_op = define(
    "info_nce_forward",
    f"(Tensor image, Tensor text, Tensor scale, Tensor? row_mask, {_CODES}, bool bidirectional, bool exclude_positive,"
    f" bool keep) -> (Tensor loss, {_SAVED})",
    _forward,
    _fake_forward,
    _setup_context,
    _autograd,
)
_backward_op = define(
    "info_nce_backward",
    f"(Tensor grad, Tensor image, Tensor text, Tensor scale, {_SAVED}, {_CODES}, bool image_grad, bool text_grad)"
    " -> (Tensor image_grad, Tensor text_grad, Tensor scale_grad)",
    _backward,
    _fake_backward,
)
