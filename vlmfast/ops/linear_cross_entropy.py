"""Cross-entropy of a linear layer's logits: reference, backends, registration and public function.

With z_ij = <hidden_i, weight_j> + bias_j for row i and word j of the vocabulary, and x_ij = z_ij log2(e). Rows whose
label is ignore_index are dropped before a backend sees them; it gets hidden (n, D), weight (V, D), bias (V,) in float32
or None, and labels (n,), int64, all in [0, V). Its forward returns, all float32:

- stats (3, n): a shift u_i; the sum of 2^(x_ij - u_i) over all words but the label; the label's z;
- kept (kept_rows * V,): every z, for backward, or (0,) when backward is to compute them again. They lie in panels of
  PANEL rows, each (V, rows), one after the other; what follows the last panel is not written.

Its backward gets rows (4, n), float32: shift u, factor f, target t, offset o, and returns the gradients of hidden,
weight and bias from::

    G_ij = f_i 2^(x_ij - u_i) - o_i, and t_i where j is the label

The label's own entry is t_i, the weighted p - 1, exact however close p is to 1. Then d_hidden = G weight,
d_weight = G^T hidden, d_bias = sum_i G_i, each (0,) where it is not asked for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.ops._arguments import (
    DTYPES,
    INTEGERS,
    check_flag,
    check_integer,
    check_number,
    check_string,
    check_tensor,
)
from vlmfast.ops._define import define, without_autocast
from vlmfast.ops._dispatch import Impl, choose, triton_function

LOG2E = math.log2(math.e)
PANEL = 256  # kMostCols of csrc/tiles.h

STORE_BUDGET_BYTES = 1 << 30
"""With recompute=None the logits are kept for backward on a CPU when their n * V float32 values fit in this."""

CHUNK_ELEMENTS = 1 << 24
"""The torch backend computes at most this many logits at a time."""

REDUCTIONS = ("mean", "sum", "none")


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The definition of linear_cross_entropy, every intermediate in memory. Any floating dtype; float64 is the oracle.

    Unlike F.cross_entropy it keeps 1 - p of a label that is nearly certain.
    """
    labels = labels.long()
    rows = (labels != ignore_index).nonzero()[:, 0]
    logits = F.linear(hidden[rows], weight, bias)
    label = labels[rows, None]
    own = logits.gather(1, label)[:, 0]
    others = logits.scatter(1, label, -math.inf).logsumexp(1)
    each = own * 0 if weight.shape[0] == 1 else -F.logsigmoid(own - others)
    if label_smoothing:
        each = each + label_smoothing * (own - logits.mean(1))
    return _reduced(each.new_zeros(len(labels)).index_copy(0, rows, each), labels, ignore_index, reduction)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    recompute: bool | None = None,
) -> Tensor:
    """Cross-entropy of a language model's head without materialising the (n, V) logits.

    Equals::

        F.cross_entropy(
            F.linear(hidden, weight, bias).float(), labels,
            ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction,
        )

    but for a batch without labels, of which the mean is 0 and not NaN, as are its gradients.

    Args:
        hidden (n, D): float32, float16 or bfloat16; n may be 0.
        weight (V, D): of hidden's dtype, a row for each word. Under autocast both are taken in autocast's dtype.
        labels (n,): integers in [0, V), or ignore_index. Rows that have it cost nothing.
        bias (V,): floating point, added to the logits; -inf takes a word out.
        label_smoothing: share of the probability that is spread over all words, in [0, 1].
        reduction: "mean" over the rows that have a label, "sum", or "none".
        recompute: whether backward computes the logits again instead of keeping n * V of them in float32; None: where
            they are more than STORE_BUDGET_BYTES. On accelerators it always does.
    Returns:
        loss (), or (n,) with reduction="none", 0 for ignored rows: float32.
    Raises:
        TypeError: a dtype is not supported, or weight has another than hidden.
        ValueError: shapes or devices disagree, or an option is unknown; the message names the argument.
        IndexError: a label is neither in [0, V) nor ignore_index; the message names the first.
        RuntimeError: a second derivative is asked for, or the backend named by VLMFAST_BACKEND cannot run.
    Memory: O((n + V)*D), or O(n*V) where the logits are kept. FLOPs, forward and backward, n rows with labels:
    8*n*V*D, 6*n*V*D where they are kept; a frozen side saves 2*n*V*D. Repeatable bit for bit for a given number of
    threads. On accelerators the host waits for the labels, to drop rows and to check them.
    Source: Wijmans et al. 2024 (cut cross-entropy) for the idea; no gradient is filtered out here.
    """
    _check_types(hidden, weight, labels, bias, ignore_index, label_smoothing, reduction, recompute)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    _check(hidden, weight, labels, bias, label_smoothing, reduction)
    labels = labels.long()  # small integers cannot be compared with every ignore_index
    if recompute is None:
        recompute = hidden.shape[0] * weight.shape[0] * 4 > STORE_BUDGET_BYTES
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    keep = needs_grad and not recompute and device == "cpu"
    each: Tensor = _forward_op(hidden, weight, bias, labels, ignore_index, label_smoothing, keep)[0]
    return _reduced(each, labels, ignore_index, reduction)


def _check_types(
    hidden: Any,
    weight: Any,
    labels: Any,
    bias: Any,
    ignore_index: Any,
    label_smoothing: Any,
    reduction: Any,
    recompute: Any,
) -> None:
    op = "linear_cross_entropy"
    for name, value in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        check_tensor(op, name, value)
    if bias is not None:
        check_tensor(op, "bias", bias)
    check_integer(op, "ignore_index", ignore_index)
    check_number(op, "label_smoothing", label_smoothing)
    check_string(op, "reduction", reduction)
    if recompute is not None:
        check_flag(op, "recompute", recompute)


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, label_smoothing: float, reduction: str
) -> None:
    op = "linear_cross_entropy"
    if hidden.dim() != 2 or hidden.shape[1] == 0:
        raise ValueError(f"{op}: hidden must be (n, D), D not 0; got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{op}: weight must be (V, {hidden.shape[1]}), V not 0, as hidden is (n, {hidden.shape[1]}); "
            f"got {tuple(weight.shape)}"
        )
    if hidden.dtype not in DTYPES:
        raise TypeError(f"{op}: hidden must be float32, float16 or bfloat16; got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{op}: weight must have hidden's dtype {hidden.dtype}; got {weight.dtype}")
    if labels.dtype not in INTEGERS:
        raise TypeError(f"{op}: labels must be integers; got {labels.dtype}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"{op}: labels must be ({hidden.shape[0]},), one per row; got {tuple(labels.shape)}")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"{op}: bias must be floating point; got {bias.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be ({weight.shape[0]},), one per word; got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("labels", labels), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{op}: {name} must be on hidden's device {hidden.device}; got {tensor.device}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1]; got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")


def _reduced(each: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return each
    return each.sum() if reduction == "sum" else each.sum() / (labels != ignore_index).sum().clamp(min=1)


def reference_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, kept_rows: int
) -> tuple[Tensor, Tensor]:
    x = hidden.float()
    n, words = x.shape[0], weight.shape[0]
    shift, total, own = x.new_full((n,), -math.inf), x.new_zeros(n, dtype=torch.float64), x.new_zeros(n)
    kept = x.new_empty(kept_rows * words)
    for part in _word_chunks(n, words):
        logits = _logits(x, weight, bias, part)
        if kept_rows:
            for rows, panel in _panels(kept, n, words):
                panel[part] = logits[rows].T
        row, column = _labels_within(labels, part)
        own[row] = logits[row, column]
        logits[row, column] = -math.inf
        logits *= LOG2E
        top = torch.maximum(shift, logits.amax(1).round())
        base = torch.where(top == -math.inf, 0, top)
        total *= torch.where(shift == -math.inf, 0, torch.exp2(shift - base))
        total += logits.sub_(base[:, None]).exp2_().sum(1)
        shift = top
    return torch.stack([torch.where(shift == -math.inf, 0, shift), total.float(), own]), kept


def reference_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    kept: Tensor,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = hidden.float()
    n, words = x.shape[0], weight.shape[0]
    shift, factor, target, offset = rows[:, :, None]
    d_hidden = torch.zeros_like(x) if hidden_grad else x.new_empty(0)
    d_weight = torch.empty_like(weight) if weight_grad else weight.new_empty(0)
    d_bias = x.new_empty(words if bias_grad else 0)
    for part in _word_chunks(n, words):
        if kept.numel():
            g = torch.cat([panel[part].T for _, panel in _panels(kept, n, words)])
        else:
            g = _logits(x, weight, bias, part)
        g = g.mul_(LOG2E).sub_(shift).exp2_().mul_(factor).sub_(offset)
        row, column = _labels_within(labels, part)
        g[row, column] = target[row, 0]
        if hidden_grad:
            d_hidden.addmm_(g, weight[part].float())
        if weight_grad:
            d_weight[part] = g.T @ x
        if bias_grad:
            d_bias[part] = g.sum(0)
    return d_hidden.to(hidden.dtype), d_weight, d_bias


def _word_chunks(n: int, words: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // n)
    return [slice(start, min(start + step, words)) for start in range(0, words, step)]


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    logits = x @ weight[part].float().T
    return logits if bias is None else logits.add_(bias[part])


def _panels(kept: Tensor, n: int, words: int) -> list[tuple[slice, Tensor]]:
    """Rows, and their logits (V, rows) in what was kept."""
    starts = range(0, n, PANEL)
    rows = [slice(start, min(start + PANEL, n)) for start in starts]
    return [(part, kept[part.start * words : part.stop * words].view(words, -1)) for part in rows]


def _labels_within(labels: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """The rows whose label is among these words, and its place among them."""
    row = ((labels >= part.start) & (labels < part.stop)).nonzero()[:, 0]
    return row, labels[row] - part.start


def _triton_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, kept_rows: int) -> Any:
    """The kernels keep nothing; on CPU tensors, in the interpreter, another backend may be to read what was kept."""
    stats = triton_function("linear_cross_entropy", "forward")(hidden, weight, bias, labels)
    if kept_rows:
        return stats, reference_forward(hidden, weight, bias, labels, kept_rows)[1]
    return stats, hidden.new_empty(0, dtype=torch.float32)


IMPLS = {
    "cpu": Impl.cpu("linear_cross_entropy"),
    "triton": Impl.triton("linear_cross_entropy", forward=_triton_forward),
    "torch": Impl(reference_forward, reference_backward),
}


def _rows(labels: Tensor, ignore_index: int) -> tuple[Tensor | None, Tensor]:
    """Which rows have a label, None for all, and their labels."""
    rows = (labels != ignore_index).nonzero()[:, 0]
    return (None if len(rows) == len(labels) else rows), labels[rows].long()


def _check_range(chosen: Tensor, index: Tensor | None, ignore_index: int, words: int) -> None:
    """IndexError for the first of the labels that is no word."""
    wrong = ((chosen < 0) | (chosen >= words)).nonzero()[:, 0]
    if len(wrong):
        row = int(wrong[0] if index is None else index[wrong[0]])
        raise IndexError(
            f"linear_cross_entropy: labels must be in [0, {words}) or ignore_index {ignore_index}; "
            f"got {chosen[wrong[0]].item()} in row {row}"
        )


def normalise(stats: Tensor, mean: Tensor | None, label_smoothing: float, words: int) -> tuple[Tensor, Tensor]:
    """Of a forward's stats the losses (n,), and what backward reads of each row, for a gradient of 1, (4, n).

    Args:
        mean (n,): of each row's logits; only with label_smoothing.
    """
    shift, total, own = stats.double()
    ratio = (total.log2() + shift) / LOG2E - own  # of all others to the label, natural logarithm
    loss = -F.logsigmoid(-ratio)
    others = ratio.sigmoid()  # 1 - p of the label
    factor = torch.where(total == 0, 0, others / total)
    if mean is not None:
        loss = loss + label_smoothing * (own - mean)
    spread = label_smoothing / words
    rows = torch.stack([shift, factor, label_smoothing - spread - others, torch.full_like(shift, spread)])
    return loss.float(), rows.float()


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, words = hidden.shape[0], weight.shape[0]
    with without_autocast():
        index, chosen = _rows(labels, ignore_index)
        _check_range(chosen, index, ignore_index, words)
        x = hidden if index is None else hidden[index]
        if not len(chosen):
            return _fake_forward(hidden, weight, bias, labels, ignore_index, label_smoothing, keep)
        offsets = None if bias is None else bias.float()
        impl = choose("linear_cross_entropy", IMPLS, x)
        stats, kept = impl.forward(x, weight, offsets, chosen, n if keep else 0)
        mean = None
        if label_smoothing:
            mean = x.float() @ weight.mean(0, dtype=torch.float32)
            mean = mean if offsets is None else mean + offsets.mean()
        loss, rows = normalise(stats, mean, label_smoothing, words)
        if index is None:
            return loss, rows, kept
        all_rows = rows.new_zeros(4, n)
        all_rows[:, : len(chosen)] = rows
        return loss.new_zeros(n).index_copy_(0, index, loss), all_rows, kept


def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    kept: Tensor,
    ignore_index: int,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast():
        index, chosen = _rows(labels, ignore_index)  # forward has looked at their range
        x, unit = (hidden, grad.float()) if index is None else (hidden[index], grad.float()[index])
        offsets = None if bias is None else bias.float()
        if not len(chosen):
            d_hidden, d_weight, d_bias = _fake_backward(grad, hidden, weight, bias, hidden_grad, weight_grad, bias_grad)
            return d_hidden.zero_(), d_weight.zero_(), d_bias.zero_()
        of_row = rows[:, : len(chosen)] * torch.stack([torch.ones_like(unit), unit, unit, unit])
        wanted = hidden_grad, weight_grad, bias_grad
        impl = choose("linear_cross_entropy", IMPLS, x)
        d_hidden, d_weight, d_bias = impl.backward(x, weight, offsets, chosen, of_row, kept, *wanted)
        if hidden_grad and index is not None:
            d_hidden = torch.zeros_like(hidden).index_copy_(0, index, d_hidden)
        return d_hidden, d_weight, d_bias.to(_or_float(bias, x).dtype)


def _or_float(bias: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float32) if bias is None else bias


def _fake_forward(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, keep = hidden.shape[0], args[-1]
    shapes: list[tuple[int, ...]] = [(n,), (4, n), (n * weight.shape[0] if keep else 0,)]
    loss, rows, kept = (hidden.new_zeros(shape, dtype=torch.float32) for shape in shapes)
    return loss, rows, kept


def _fake_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    hidden_grad, weight_grad, bias_grad = args[-3:]
    offsets = _or_float(bias, hidden)
    return (
        torch.empty_like(hidden) if hidden_grad else hidden.new_empty(0),
        torch.empty_like(weight) if weight_grad else weight.new_empty(0),
        torch.empty_like(offsets) if bias_grad else offsets.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, ctx.ignore_index, *_ = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    gradients = _backward_op(grad, *ctx.saved_tensors, ctx.ignore_index, *wanted)
    return (*(g if w else None for g, w in zip(gradients, wanted, strict=True)), *[None] * 4)


_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
_forward_op = define(
    "linear_cross_entropy_forward",
    f"({_INPUTS}, int ignore_index, float label_smoothing, bool keep) -> (Tensor loss, Tensor rows, Tensor kept)",
    _forward,
    _fake_forward,
    _setup_context,
    _autograd,
)
_backward_op = define(
    "linear_cross_entropy_backward",
    f"(Tensor grad, {_INPUTS}, Tensor rows, Tensor kept, int ignore_index, bool hidden_grad, bool weight_grad,"
    " bool bias_grad) -> (Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad)",
    _backward,
    _fake_backward,
)
