"""From what a detector says of places and words to boxes for phrases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

LEAST = 0.05
"""The score of a phrase from which on a place is a candidate, before centerness."""
CANDIDATES, FOUND, OVERLAP = 1000, 100, 0.6


def of_phrases(logits: Tensor, spans: Tensor) -> Tensor:
    """The mean probability (B, A, P) of each phrase's words, 0 of none, from logits (B, A, L) and spans (B, P, L)."""
    share = spans.float() / spans.sum(2, keepdim=True).clamp(min=1)
    return logits.sigmoid() @ share.transpose(1, 2)


def candidates(
    scores: Tensor, centerness: Tensor, boxes: Tensor, numbers: Sequence[int], size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (N, 4) within the image, scores (N,) and labels (N,) of the places that are good enough, best first.

    Args:
        scores (A, P or more): of each place for P phrases.
        centerness (A,): logits.
        boxes (A, 4): pixels.
        numbers: labels of the P phrases.
        size: height and width of the image.
    """
    own = scores[:, : len(numbers)]
    kept = own > LEAST
    own = torch.where(kept, (own * centerness.sigmoid()[:, None]).sqrt(), -1.0)
    chosen = own.flatten().topk(min(CANDIDATES, int(kept.sum()))).indices
    places, phrases = chosen // own.shape[1], chosen % own.shape[1]
    labels = torch.tensor(numbers, device=boxes.device)[phrases]
    return clip_boxes_to_image(boxes[places], size), own[places, phrases], labels


def best(found: Sequence[tuple[Tensor, Tensor, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Of the candidates for all phrases those that NMS leaves for each."""
    if not found:
        return {
            "boxes": torch.zeros(0, 4, device=device),
            "scores": torch.zeros(0, device=device),
            "labels": torch.zeros(0, dtype=torch.int64, device=device),
        }
    boxes, scores, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    kept = batched_nms(boxes, scores, labels, OVERLAP)[:FOUND]
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}
