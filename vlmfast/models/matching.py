"""Image-text matching: which wrong pairs a model sees, and the loss of a classifier that tells pairs apart.

A wrong partner is drawn from the softmax of similarities, so that pairs that look right come often (hard negatives), or
from equal scores, so that all are as likely. It is never the true partner, nor that of a pair with the same caption.

Draws are functions of uniform numbers that belong to the samples, so that a resumed run repeats them, and so do several
processes whose batch is that of one.

Source: Li et al. 2021 (ALBEF, 2107.07651), section 3.2, for hard negatives in the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.models.gathered import mean_over_ranks

NOT_COUNTED = -100
"""Label of a pair without loss: there was no wrong partner to draw."""


def draw_negatives(scores: Tensor, allowed: Tensor, uniform: Tensor) -> Tensor:
    """A column for each row, drawn from the softmax of the row's scores over the columns that are allowed.

    Args:
        scores (n, N): floating point, logits of the draw; no gradient flows.
        allowed (n, N): bool.
        uniform (n,): in [0, 1), one number a draw.
    Returns:
        (n,) int64, -1 in rows that allow nothing.
    Raises:
        ValueError: shapes disagree.
    """
    if scores.ndim != 2 or allowed.shape != scores.shape or uniform.shape != scores.shape[:1]:
        raise ValueError(
            f"draw_negatives: expected scores (n, N), allowed (n, N) and uniform (n,), got {tuple(scores.shape)}, "
            f"{tuple(allowed.shape)} and {tuple(uniform.shape)}"
        )
    possible = allowed.any(1, keepdim=True)
    logits = scores.detach().double().masked_fill(~allowed, -torch.inf)
    sums = torch.where(possible, logits, 0).softmax(1).cumsum(1)
    # The first column whose sum is above the number has a probability that is not 0, hence is allowed.
    drawn = (sums <= uniform.double()[:, None] * sums[:, -1:]).sum(1)
    return torch.where(possible[:, 0], drawn, -1)


def caption_codes(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(N,) int64, equal for equal captions and for no others; what is padding does not count.

    Args:
        input_ids, attention_mask (N, L): padded on the right; no mask: nothing is padding.
    """
    read = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -1)
    codes: Tensor = read.unique(dim=0, return_inverse=True)[1]
    return codes


def unlike(offset: int, rows: int, *codes: Tensor) -> Tensor:
    """Which of N pairs may be a wrong partner of each of the n own ones, bool (n, N): those of which all codes differ.

    Args:
        offset, rows: the own pairs are rows `offset` to `offset + rows` of the N.
        codes (N,): int64, such as `caption_codes` and the numbers of images.
    """
    own = [code[offset : offset + rows, None] != code for code in codes]
    return torch.stack(own).all(0)


def matching_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy () float32 over the pairs of all processes that count.

    Its mean over processes is that of one process with the whole batch, and so are gradients after DDP's mean.

    Args:
        logits (m, 2): of not matching and matching.
        labels (m,): 1, 0, or NOT_COUNTED.
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=NOT_COUNTED, reduction="sum")
    count = mean_over_ranks((labels != NOT_COUNTED).sum().float())
    return total / torch.where(count == 0, 1, count)


def hard_pairs(image_negatives: Tensor, text_negatives: Tensor) -> Tensor:
    """Labels (3 n,) of n true pairs, n texts with a wrong image, and n images with a wrong text.

    Args:
        image_negatives, text_negatives (n,): of `draw_negatives`.
    """
    drawn = torch.cat([image_negatives, text_negatives])
    true = torch.ones_like(image_negatives)
    return torch.cat([true, torch.where(drawn < 0, NOT_COUNTED, 0)])
