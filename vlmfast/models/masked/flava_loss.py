"""FLAVA's terms over the global batch, from what one pass over a batch gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from vlmfast import distributed
from vlmfast.models.gathered import Shards, mean_over_ranks
from vlmfast.nn import ClipLoss
from vlmfast.ops import info_nce, linear_cross_entropy

NOT_MASKED = -100


@dataclass
class FLAVAOutput(ModelOutput):
    """What `FLAVAModel` returns; what a batch has not is None.

    Attributes:
        loss (): float32, when `return_loss`.
        image_features, text_features (B, D): unit-norm, float32, of pairs with nothing hidden.
        logit_scale (): the log-parameter, of pairs.
        match_loss, is_match (B,): float32, each pair's cross-entropy of itm, and 1 where the text is its image's.
        masked_image_loss, num_masked_patches (B,): float32, each row's summed cross-entropy, and number of hidden ones.
        masked_text_loss, num_masked_tokens (B,): the same of words.
    """

    loss: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    logit_scale: Tensor | None = None
    match_loss: Tensor | None = None
    is_match: Tensor | None = None
    masked_image_loss: Tensor | None = None
    num_masked_patches: Tensor | None = None
    masked_text_loss: Tensor | None = None
    num_masked_tokens: Tensor | None = None


def loss_terms(
    image_features: Tensor | None = None,
    text_features: Tensor | None = None,
    logit_scale: Tensor | None = None,
    match_loss: Tensor | None = None,
    is_match: Tensor | None = None,
    masked_image_loss: Tensor | None = None,
    num_masked_patches: Tensor | None = None,
    masked_text_loss: Tensor | None = None,
    num_masked_tokens: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms that the batch has, of those at the top of flava.py, by name, each () float32.

    Their means over processes are those of one process with the whole batch, and so are their gradients after
    DDP's mean.

    Args:
        Fields of `FLAVAOutput`, this process's part of the batch.
    """
    terms: dict[str, Tensor] = {}
    pairs = image_features is not None
    kept = None
    if is_match is not None and match_loss is not None:
        terms["itm"] = match_loss.sum() / mean_over_ranks(torch.ones_like(match_loss).sum())
        matches = is_match.detach()
        kept = torch.where(mean_over_ranks(matches.sum()) == 0, 1, matches)
    for name, summed, count in (
        ("mmm_image" if pairs else "mim", masked_image_loss, num_masked_patches),
        ("mmm_text" if pairs else "mlm", masked_text_loss, num_masked_tokens),
    ):
        if summed is not None and count is not None:
            weight = torch.ones_like(count) if kept is None else kept
            total = mean_over_ranks((count.detach() * weight).sum())
            terms[name] = (summed * weight).sum() / torch.where(total == 0, 1, total)
    if image_features is not None and text_features is not None and logit_scale is not None:
        terms["global_contrastive"] = contrast(image_features, text_features, logit_scale.float().exp(), kept)
    return terms


def masked_loss(kind: str, head: Any, states: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """Summed cross-entropy and number of the labelled positions of each row, (B,) float32, as FLAVAOutput names them.

    Args:
        kind: "image" or "text".
        head: a FlavaMaskedPredictionHead; no logits are made.
        states (B, L, W), labels (B, L): -100 where nothing is to be predicted.
    """
    assert labels is not None
    chosen = labels != NOT_MASKED
    each = linear_cross_entropy(
        head.transform(states[chosen]), head.decoder.weight, labels[chosen], bias=head.decoder.bias, reduction="none"
    )
    count = "num_masked_patches" if kind == "image" else "num_masked_tokens"
    return {
        f"masked_{kind}_loss": torch.zeros_like(chosen, dtype=each.dtype).masked_scatter(chosen, each).sum(1),
        count: chosen.sum(1).float(),
    }


def contrast(image: Tensor, text: Tensor, scale: Tensor, kept: Tensor | None) -> Tensor:
    """Symmetric InfoNCE over all processes; pairs with kept 0 have no loss and stay negatives of the others."""
    rank, world_size = distributed.rank_and_world_size()
    if kept is None:
        loss: Tensor = ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)(image, text, scale)
        return loss
    if world_size == 1:
        return info_nce(image, text, scale, row_mask=kept.bool())
    shards = Shards("FLAVAModel", image, text)
    each = [
        info_nce(
            own, shards.gather(other), scale, label_offset=shards.offset, bidirectional=False, row_mask=kept.bool()
        )
        for own, other in ((image, text), (text, image))
    ]
    return torch.stack(each).mean() * (kept.sum() / mean_over_ranks(kept.sum()))
