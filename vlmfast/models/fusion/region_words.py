"""Which places of a dense detector learn which box (ATSS), what they learn of each word, and the losses.

Source: Zhang et al. 2020, "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample
Selection" (1912.02424); Dou et al. 2022 (FIBER, 2206.07643), fine stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from vlmfast.models.fusion.dyhead import DyHeadBlock
from vlmfast.models.gathered import mean_count, mean_over_ranks

ALPHA, GAMMA = 0.25, 2.0
BOX_WEIGHT = 2.0
PRIOR = 0.01
"""Probability of a word at each place before training."""
LIMIT = 5e4
CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))


class Dense(NamedTuple):
    """What the head says of each of A places.

    Attributes:
        logits (B, A, L): of each word, float32.
        boxes (B, A, 4): pixels, float32.
        centerness (B, A): logits, float32.
        anchors (A, 4): the squares that the boxes were moved from.
        counts: places of each level, in order.
    """

    logits: Tensor
    boxes: Tensor
    centerness: Tensor
    anchors: Tensor
    counts: list[int]


class RegionWordHead(nn.Module):
    """DyHead over the levels, and of each place a box, its centerness, and a logit for each word::

        S = (o . (W e / 2 + b)) / exp(s) + e . b_lang + b_0        o (C,) of the place, e the unit-norm word

    Args:
        channels: C, of the levels.
        text_width: of words' states.
        blocks: of DyHead.
        levels: how many.
        anchor_scale: side of the one square anchor at each place, in strides of its level.
    """

    def __init__(self, channels: int, text_width: int, blocks: int, levels: int, anchor_scale: float) -> None:
        super().__init__()
        self.anchor_scale = anchor_scale
        self.tower = nn.ModuleList([DyHeadBlock(channels) for _ in range(blocks)])
        self.deltas = nn.Conv2d(channels, 4, 1)
        self.centerness = nn.Conv2d(channels, 1, 1)
        self.level_scale = nn.Parameter(torch.ones(levels))
        self.word_projection = nn.Linear(text_width, channels)
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.bias_lang = nn.Parameter(torch.zeros(text_width))
        self.bias0 = nn.Parameter(torch.full((1,), prior_logit()))

    def forward(self, levels: Sequence[Tensor], words: Tensor, stride: int) -> Dense:
        """Levels (B, C, H_l, W_l), words (B, L, D), and the pixels between two places of the first level."""
        for block in self.tower:
            levels = block(levels)
        anchors = torch.cat([grid(x, stride * 2**k, self.anchor_scale) for k, x in enumerate(levels)])
        deltas = torch.cat([_flat(self.deltas(x) * self.level_scale[k]) for k, x in enumerate(levels)], 1).float()
        centerness = torch.cat([_flat(self.centerness(x)) for x in levels], 1).float().squeeze(2)
        boxes = CODER.decode_single(deltas.flatten(0, 1), anchors.repeat(len(deltas), 1)).view(deltas.shape)
        logits = self.word_logits(torch.cat([_flat(x) for x in levels], 1), words)
        return Dense(logits, boxes, centerness, anchors, [x.shape[2] * x.shape[3] for x in levels])

    def word_logits(self, places: Tensor, words: Tensor) -> Tensor:
        """(B, A, L) float32 of places (B, A, C) and words (B, L, D)."""
        unit = F.normalize(words, dim=-1)
        dots = places @ self.word_projection(unit / 2).transpose(1, 2)
        logits = dots / self.log_scale.exp() + (unit @ self.bias_lang)[:, None] + self.bias0
        return logits.float().clamp(-LIMIT, LIMIT)


def prior_logit() -> float:
    """What b_0 begins with."""
    return -math.log((1 - PRIOR) / PRIOR)


def grid(level: Tensor, stride: int, scale: float) -> Tensor:
    """Squares (H * W, 4) of side `scale * stride` around the middle of each place of a map (B, C, H, W); pixels."""
    y, x = (
        (torch.arange(n, device=level.device, dtype=torch.float32) + 0.5) * stride
        for n in (level.shape[2], level.shape[3])
    )
    centres = torch.cartesian_prod(y, x).flip(1)
    return torch.cat([centres - scale * stride / 2, centres + scale * stride / 2], 1)


def assign(anchors: Tensor, counts: Sequence[int], boxes: Tensor, candidates: int = 9) -> Tensor:
    """ATSS: the true box that each anchor learns, int64 (A,), -1 for none.

    Of each box the `candidates` anchors of every level whose centres are nearest to its own are considered. Those
    learn it whose IoU with it is at least the mean plus the deviation of all considered ones, and whose centre lies in
    it. An anchor of several boxes learns the one of the largest IoU.

    Args:
        anchors (A, 4), boxes (G, 4): pixels.
        counts: anchors of each level, in order.
    """
    if not len(boxes):
        return anchors.new_full((len(anchors),), -1, dtype=torch.int64)
    centres, goals = ((b[:, :2] + b[:, 2:]) / 2 for b in (anchors, boxes))
    distances = (centres[:, None] - goals).square().sum(2)
    chosen, first = [], 0
    for own in distances.split(list(counts)):
        chosen.append(own.topk(min(candidates, len(own)), dim=0, largest=False).indices + first)
        first += len(own)
    picked = torch.cat(chosen)  # (K, G)
    overlaps = box_iou(anchors, boxes)
    of_picked = overlaps.gather(0, picked)
    enough = of_picked.mean(0)
    if len(picked) > 1:
        enough = enough + of_picked.std(0)
    place = centres[picked]
    inside = ((place > boxes[:, :2]) & (place < boxes[:, 2:])).all(2)
    taken = torch.where((of_picked >= enough) & inside, of_picked, -1.0)
    best, which = torch.full_like(overlaps, -1.0).scatter(0, picked, taken).max(1)
    return torch.where(best < 0, -1, which)


def centerness(anchors: Tensor, boxes: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) (N,) of the distances of anchors' centres to boxes' sides."""
    middle = (anchors[:, :2] + anchors[:, 2:]) / 2
    near, far = middle - boxes[:, :2], boxes[:, 2:] - middle
    ratios = torch.minimum(near, far) / torch.maximum(near, far)
    return ratios.clamp(min=0).prod(1).sqrt()


class Matched(NamedTuple):
    """What the places of one image learn.

    Attributes:
        logits (A, L), words (A, L): the latter 1 where the place's phrase has the word.
        tokens (L,): bool, where there is a word.
        boxes, goals (N, 4): of the places that have a box, and the true ones.
        centerness, centred (N,): logits, and what they should tell.
    """

    logits: Tensor
    words: Tensor
    tokens: Tensor
    boxes: Tensor
    goals: Tensor
    centerness: Tensor
    centred: Tensor


def match(found: Dense, image: int, boxes: Tensor, words: Tensor, tokens: Tensor) -> Matched:
    """Image number `image` of `found` beside its true boxes (G, 4) and their words, bool (G, L)."""
    which = assign(found.anchors, found.counts, boxes)
    positive = which >= 0
    goals = boxes[which[positive]]
    wanted = torch.zeros_like(found.logits[image])
    wanted[positive] = words[which[positive]].to(wanted)
    return Matched(
        found.logits[image],
        wanted,
        tokens,
        found.boxes[image][positive],
        goals,
        found.centerness[image][positive],
        centerness(found.anchors[positive], goals),
    )


def losses(images: Sequence[Matched]) -> dict[str, Tensor]:
    """words, boxes (weighed) and centerness, each () float32::

        words = 1/N sum over places and words of focal(S, word)        N the places that have a box
        boxes = 2 / sum(c) * sum over these places of c * GIoU loss    c the true centerness
        centerness = 1/N sum over these places of BCE

    N and sum(c) are those of all processes, over their number: the mean of the losses is that of the global batch.
    """
    words = torch.stack(
        [
            sigmoid_focal_loss(one.logits[:, one.tokens], one.words[:, one.tokens], ALPHA, GAMMA, reduction="sum")
            for one in images
        ]
    ).sum()
    boxes, goals, said, centred = (
        torch.cat([getattr(one, name) for one in images]) for name in ("boxes", "goals", "centerness", "centred")
    )
    places = mean_count(torch.ones_like(centred))
    weight = mean_over_ranks(centred.sum())
    giou = generalized_box_iou_loss(boxes, goals, reduction="none")
    return {
        "words": words / places,
        "boxes": BOX_WEIGHT * (giou * centred).sum() / torch.where(weight == 0, 1, weight),
        "centerness": F.binary_cross_entropy_with_logits(said, centred, reduction="sum") / places,
    }


def _flat(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H * W, C)."""
    return x.flatten(2).transpose(1, 2)
