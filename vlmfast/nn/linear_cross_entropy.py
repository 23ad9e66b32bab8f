"""The loss of language models without the logits: a head that gives its loss, and one function for what models need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmfast.nn._sizes import check_integer, check_integers, check_real
from vlmfast.nn._stem import reason_to_call
from vlmfast.ops import linear_cross_entropy
from vlmfast.ops._arguments import INTEGERS
from vlmfast.ops.linear_cross_entropy import REDUCTIONS

Head = nn.Module | Tensor


class LinearCrossEntropy(nn.Linear):
    """An `nn.Linear` onto a vocabulary that gives the cross-entropy of its logits instead of the logits.

    Parameters are those of `nn.Linear`; a weight tied to an embedding is assigned as usual.

    Args:
        in_features: D.
        vocab_size: V.
        bias: whether logits have one.
        ignore_index, label_smoothing, reduction: as in `vlmfast.ops.linear_cross_entropy`.
    Raises:
        TypeError: in_features, vocab_size or ignore_index is no integer, or label_smoothing no number.
        ValueError: in_features or vocab_size is less than 1, label_smoothing outside of [0, 1], reduction none of
            those.
    """

    def __init__(
        self,
        in_features: int,
        vocab_size: int,
        bias: bool = False,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = "LinearCrossEntropy"
        check_integers(name, in_features=in_features, vocab_size=vocab_size)
        check_integer(name, "ignore_index", ignore_index, least=None)
        check_real(name, "label_smoothing", label_smoothing, "in [0, 1]", lambda x: 0 <= x <= 1)
        if reduction not in REDUCTIONS:
            raise ValueError(f"{name}: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
        super().__init__(in_features, vocab_size, bias, device, dtype)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss, or without labels the logits.

        Args:
            hidden (..., D): float32, float16 or bfloat16.
            labels (...): integers in [0, V), or ignore_index.
        Returns:
            loss (), float32, or of labels' shape with reduction="none"; logits (..., V) without labels.
        Raises:
            ValueError: labels are not of hidden's shape without D; and as `vlmfast.ops.linear_cross_entropy`.
        """
        if labels is None:
            return super().forward(hidden)
        _check_labels("LinearCrossEntropy", hidden, labels)
        loss = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            self.weight,
            labels.reshape(-1),
            bias=self.bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )
        return loss.view(labels.shape) if self.reduction == "none" else loss


def language_model_loss(
    hidden: Tensor | Sequence[Tensor],
    lm_head: Head | Sequence[Head],
    labels: Tensor | Sequence[Tensor],
    *,
    shift: bool = True,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    num_items_in_batch: Tensor | int | None = None,
    recompute: bool | None = None,
) -> Tensor:
    """Cross-entropy of the words that a language model predicts, without the logits.

    Three forms:

    - one hidden, one lm_head, one labels: equals, with shift,
      F.cross_entropy(lm_head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten());
    - several hidden and as many lm_head, one labels: the logits are the sum of lm_head[k](hidden[k]), and one product
      over all their dims computes them;
    - several hidden, one lm_head, as many labels: a loss of each, by one product with the shared weight, which gets one
      gradient. They may differ in shape.

    Args:
        hidden (..., L, D): the last hidden states; float32, float16 or bfloat16.
        lm_head: a module with weight (V, D) and perhaps bias (V,), as nn.Linear or a tied nn.Embedding, which is not
            called; or the weight itself. An nn.Linear with hooks, or another module with a forward of its own, such as
            one with an adapter, is called on the rows that are predicted, and logits of these are made.
        labels (..., L): integers in [0, V), or ignore_index, whose rows cost nothing.
        shift: position t predicts labels[..., t + 1]; False: labels[..., t], as where the labels are shifted already.
        ignore_index, label_smoothing, recompute: as in `vlmfast.ops.linear_cross_entropy`.
        num_items_in_batch: what sums of losses are divided by; None: how many labels are predicted. With gradient
            accumulation, as transformers does it, the number of those in all accumulated batches.
    Returns:
        loss (), float32, or (k,) of k hidden that share lm_head; 0 where nothing is predicted.
    Raises:
        ValueError: labels are not of hidden's shape without D, or sequences differ in length; and as
            `vlmfast.ops.linear_cross_entropy`.
        TypeError: lm_head has no weight, or sequences come without a counterpart.
    """
    op = "language_model_loss"
    heads_of_one = list(lm_head) if isinstance(lm_head, Sequence) else [lm_head]
    called = any(map(_must_be_called, heads_of_one))
    if isinstance(lm_head, Sequence):
        states = _sequence(op, "hidden", hidden, "lm_head", lm_head)
        heads = [_weight_and_bias(op, head) for head in lm_head]
        state = torch.cat(list(states), -1)
        weight = torch.cat([head[0] for head in heads], 1)
        biases = [head[1] for head in heads if head[1] is not None]
        bias = torch.stack(biases).sum(0) if biases else None
        parts, targets = [state], [labels]
    else:
        weight, bias = _weight_and_bias(op, lm_head)
        if isinstance(hidden, Tensor):
            parts, targets = [hidden], [labels]
        else:
            parts, targets = list(hidden), list(_sequence(op, "labels", labels, "hidden", hidden))
    flat = []
    for part, target in zip(parts, targets, strict=True):
        if not isinstance(target, Tensor):
            raise TypeError(f"{op}: labels must be a tensor for one hidden; got {type(target).__name__}")
        _check_labels(op, part, target)
        if target.dtype in INTEGERS:  # small integers hold no ignore_index
            target = target.long()
        following = F.pad(target[..., 1:], (0, 1), value=ignore_index) if shift and target.shape[-1] else target
        flat.append(following.reshape(-1))
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    every, wanted = torch.cat(rows) if len(rows) > 1 else rows[0], torch.cat(flat)
    if called:
        each = _by_calling(heads_of_one, every, wanted, ignore_index, label_smoothing)
    else:
        each = linear_cross_entropy(
            every,
            weight,
            wanted,
            bias=bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",
            recompute=recompute,
        )
    losses = [
        loss.sum() / _count(target, ignore_index, num_items_in_batch)
        for loss, target in zip(each.split([len(part) for part in flat]), flat, strict=True)
    ]
    return losses[0] if isinstance(hidden, Tensor) or isinstance(lm_head, Sequence) else torch.stack(losses)


def _must_be_called(head: Head) -> bool:
    """Whether the weight and bias of a head do not say all that it does."""
    if isinstance(head, Tensor | nn.Embedding | LinearCrossEntropy):
        return False
    return type(head).forward is not nn.Linear.forward or reason_to_call(head) is not None


def _by_calling(
    heads: Sequence[Head], rows: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float
) -> Tensor:
    """The loss of each row, float32 (N,), with the logits of the rows that are predicted.

    Args:
        rows (N, D): beside each other, of several heads.
    """
    predicted = (labels != ignore_index).nonzero().squeeze(1)
    widths = [_weight_and_bias("language_model_loss", head)[0].shape[1] for head in heads]
    logits: Tensor | int = 0
    for head, part in zip(heads, rows[predicted].split(widths, dim=1), strict=True):
        if isinstance(head, nn.Module) and not isinstance(head, nn.Embedding | LinearCrossEntropy):
            logits = logits + head(part)
        else:
            logits = logits + F.linear(part, *_weight_and_bias("language_model_loss", head))
    assert isinstance(logits, Tensor)
    losses = F.cross_entropy(logits.float(), labels[predicted], reduction="none", label_smoothing=label_smoothing)
    return losses.new_zeros(len(labels)).index_copy(0, predicted, losses)


def _count(labels: Tensor, ignore_index: int, given: Tensor | int | None) -> Tensor | int:
    if given is None:
        return (labels != ignore_index).sum().clamp(min=1)
    return given.to(labels.device) if isinstance(given, Tensor) else given


def _weight_and_bias(op: str, head: Head) -> tuple[Tensor, Tensor | None]:
    weight = head if isinstance(head, Tensor) else getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: lm_head must be a weight or a module that has one; got {type(head).__name__}")
    return weight, None if isinstance(head, Tensor) else getattr(head, "bias", None)


def _sequence(
    op: str, name: str, given: Tensor | Sequence[Tensor], other: str, others: Sequence[object]
) -> Sequence[Tensor]:
    """`given` where it is a sequence as long as the argument `other`."""
    if isinstance(given, Tensor):
        raise TypeError(f"{op}: {name} must be a sequence as {other} is; got a tensor")
    if len(given) != len(others) or not given:
        raise ValueError(f"{op}: {name} must be as many as {other}, at least one; got {len(given)} and {len(others)}")
    return given


def _check_labels(name: str, hidden: Tensor, labels: Tensor) -> None:
    if hidden.dim() < 2 or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name}: labels must be {tuple(hidden.shape[:-1])}, one for each row of hidden; got {tuple(labels.shape)}"
        )
