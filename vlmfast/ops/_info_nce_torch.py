"""The torch backend of info_nce: PyTorch ops, and what its other backends are tested against. Contract and equations:
vlmfast/ops/info_nce.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LOG2E = math.log2(math.e)

CHUNK_ELEMENTS = 1 << 24
"""The torch backend computes at most this many logits at a time when they are not kept."""


def reference_forward(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    row_codes: Tensor | None,
    col_codes: Tensor | None,
    label_offset: int,
    columns: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = image.float(), text.float()
    n, m = x.shape[0], y.shape[0]
    scale2 = scale.float() * LOG2E
    row_stats = x.new_zeros(3, n)
    col_stats = x.new_zeros(3, m if columns else 0)
    col_stats[0] = -math.inf
    kept = x.new_empty((n, m) if keep else (0, 0))
    for rows in _row_chunks(n, m):
        dot = torch.mm(x[rows], y.T, out=kept[rows]) if keep else x[rows] @ y.T
        positive, logits = _positive_and_logits(dot * scale2, rows, row_codes, col_codes, label_offset)
        row_stats[0, rows] = _top(logits, 1)
        row_stats[1, rows] = torch.exp2(logits - row_stats[0, rows, None]).sum(1)
        row_stats[2, rows] = dot.where(positive, 0).sum(1)
        if columns:
            top = torch.maximum(col_stats[0], _top(logits, 0))
            before = torch.where(col_stats[0] == -math.inf, 0, col_stats[1] * torch.exp2(col_stats[0] - top))
            col_stats[1] = before + torch.exp2(logits - top).sum(0)
            col_stats[0] = top
            col_stats[2] += dot.where(positive, 0).sum(0)
    return row_stats, col_stats, x.new_full((), math.inf), kept


def reference_backward(
    unit: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    rows: Tensor,
    cols: Tensor,
    shift: Tensor,
    kept: Tensor,
    row_codes: Tensor | None,
    col_codes: Tensor | None,
    label_offset: int,
    image_grad: bool,
    text_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, y = image.float(), text.float()
    n, m = x.shape[0], y.shape[0]
    scale2 = scale.float() * LOG2E
    # The scale's gradient is read off a feature gradient, so one of the two is always accumulated.
    image_sum = image_grad or not text_grad
    d_image, d_text = torch.zeros_like(x if image_sum else x[:0]), torch.zeros_like(y if text_grad else y[:0])
    for part in _row_chunks(n, m):
        if kept.numel():  # dot products, or another backend's exponentials
            logits = torch.where(shift.isinf(), kept[part] * scale2, kept[part].log2() + shift)
        else:
            logits = (x[part] @ y.T) * scale2
        positive, logits = _positive_and_logits(logits, part, row_codes, col_codes, label_offset)
        g = torch.exp2(logits - rows[0, part, None]) * rows[1, part, None]
        g += torch.where(cols[1] == 0, 0, torch.exp2(logits - cols[0]) * cols[1])
        g -= positive * (rows[2, part, None] + cols[2])
        if image_sum:
            torch.mm(g, y, out=d_image[part])
        if text_grad:
            d_text.addmm_(g.T, x[part])
    d_scale = (d_image * x).sum() if image_sum else (d_text * y).sum()
    factor = unit.float() * scale.float()
    return (
        (d_image * factor).to(image.dtype) if image_grad else image.new_empty(0),
        (d_text * factor).to(text.dtype) if text_grad else text.new_empty(0),
        (d_scale * unit.float()).to(scale.dtype),
    )


def _positive_and_logits(
    logits: Tensor, rows: slice, row_codes: Tensor | None, col_codes: Tensor | None, label_offset: int
) -> tuple[Tensor, Tensor]:
    """Which entries of these rows are positives, and the logits with -inf where a positive is not in the sums."""
    if row_codes is not None and col_codes is not None:
        return row_codes[rows, None] == col_codes, logits
    labels = torch.arange(rows.start, rows.stop, device=logits.device) + label_offset
    positive = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
    return positive, logits.masked_fill(positive, -math.inf)


def _top(logits: Tensor, dim: int) -> Tensor:
    """The largest logit, rounded; 0 where there are no negatives."""
    top = logits.amax(dim).round()
    return torch.where(top == -math.inf, 0, top)


def _row_chunks(n: int, m: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // m)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def normalise_side(
    stats: Tensor, weight: Tensor, count: Tensor | None, scale: Tensor, exclude_positive: bool
) -> tuple[Tensor, Tensor]:
    """`normalise` of vlmfast/ops/info_nce.py for one side: the sum of its losses; shift, factor and target."""
    shift, total, dot = stats.double()
    positive = dot * (scale.double() * LOG2E)
    log_total = total.log2() + shift
    if count is None:
        ratio = (log_total - positive) * math.log(2)  # of all negatives to the positive, natural logarithm
        loss = ratio if exclude_positive else F.softplus(ratio)
        negative = torch.ones_like(ratio) if exclude_positive else ratio.sigmoid()  # 1 - p of the positive
        factor = torch.where(total == 0, 0, weight * negative / total)
        target = weight * negative
    else:
        each = count.clamp(min=1)
        loss = (log_total - positive / each) * math.log(2)
        factor, target = weight / total, weight / each
    return torch.where(weight == 0, 0, weight * loss).sum(), torch.stack([shift, factor, target]).float()
