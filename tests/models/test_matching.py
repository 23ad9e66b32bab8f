"""Wrong pairs: how they are drawn, what is never drawn, and the loss over them."""

from __future__ import annotations

import pytest
import torch
from processes import run_processes
from torch import Tensor
from torch.nn import functional as F

from vlmfast.models.gathered import Shards
from vlmfast.models.matching import (
    NOT_COUNTED,
    caption_codes,
    draw_negatives,
    hard_pairs,
    matching_loss,
    unlike,
)


def test_negatives_come_as_often_as_the_softmax_says() -> None:
    scores = torch.tensor([0.3, 2.0, -1.0, 0.9, 5.0])
    allowed = torch.tensor([True, True, True, True, False])
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    drawn = draw_negatives(scores.expand(20_000, -1), allowed.expand(20_000, -1), uniform)
    found = drawn.bincount(minlength=5) / 20_000
    expected = torch.cat([scores[:4].softmax(0), torch.zeros(1)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_what_is_not_allowed_is_never_drawn(uniform: float) -> None:
    """Not even where the scores say that nothing else has a chance; a row that allows nothing gives -1."""
    scores = torch.tensor([[500.0, -500, 500, -900], [1.0, 1, 1, 1], [0.0, 0, 90, 0]])
    allowed = torch.tensor([[False, True, False, False], [False] * 4, [False, True, False, True]])
    drawn = draw_negatives(scores, allowed, torch.full((3,), uniform)).tolist()
    assert drawn[:2] == [1, -1]
    assert drawn[2] == (1 if uniform < 0.5 else 3)


def test_captions_are_equal_by_their_tokens_alone() -> None:
    ids = torch.tensor([[2, 5, 6, 0], [2, 5, 6, 9], [2, 5, 6, 0], [2, 5, 6, 0], [2, 5, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    codes = caption_codes(ids, mask)
    assert len(set(codes.tolist())) == 3
    assert codes[0] == codes[1] == codes[2]  # what stands in the padding does not count, a zero that is a token does
    images = torch.tensor([7, 8, 9, 8, 7])
    allowed = unlike(1, 2, codes, images)
    assert allowed.tolist() == [[False, False, False, False, True], [False, False, False, True, True]]


def test_the_loss_is_over_the_pairs_that_count() -> None:
    labels = hard_pairs(torch.tensor([1, -1]), torch.tensor([-1, 0]))
    assert labels.tolist() == [1, 1, 0, NOT_COUNTED, NOT_COUNTED, 0]
    logits = torch.randn(6, 2, dtype=torch.float64)
    kept = logits[[0, 1, 2, 5]]
    expected = -(kept.log_softmax(1)[range(4), [1, 1, 0, 0]]).mean()
    torch.testing.assert_close(matching_loss(logits, labels), expected.float())
    nothing = matching_loss(logits.requires_grad_(), torch.full((6,), NOT_COUNTED))
    assert nothing == 0


IDS = [[2, 5, 6], [2, 7, 0], [2, 5, 6], [2, 8, 9], [2, 4, 0]]
MASK = [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0]]


def negatives(rank: int, sizes: list[int], features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one process: what it draws for its rows, its share of the loss, and the captions that it drew."""
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    ids, mask = torch.tensor(IDS)[own], torch.tensor(MASK)[own]
    longest = int(mask.sum(1).max())  # processes pad to lengths of their own
    ids, mask = ids[:, :longest], mask[:, :longest]
    shards = Shards("test", features[own])
    all_ids, all_mask = shards.rows(ids), shards.rows(mask)
    allowed = unlike(shards.offset, len(ids), caption_codes(all_ids, all_mask))
    scores = features[own] @ shards.gather(features[own]).T
    uniform = torch.tensor([0.1, 0.9, 0.4, 0.6, 0.2])[own]
    drawn = draw_negatives(scores, allowed, uniform)
    logits = torch.stack([features[own, 0], (features[own] * features[drawn]).sum(1)], 1)
    return drawn, matching_loss(logits, torch.zeros_like(drawn)), all_ids[drawn] * all_mask[drawn]


def several(rank: int, world_size: int, features: Tensor) -> None:
    sizes = [2, 3]
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    drawn, loss, captions = negatives(rank, sizes, features)
    # What one process gives, whose gathering has nothing to gather.
    scores = features @ features.T
    allowed = unlike(0, 5, caption_codes(torch.tensor(IDS), torch.tensor(MASK)))
    expected = draw_negatives(scores, allowed, torch.tensor([0.1, 0.9, 0.4, 0.6, 0.2]))
    assert drawn.tolist() == expected[own].tolist()
    assert captions.tolist() == torch.tensor(IDS)[expected][own].tolist()
    logits = torch.stack([features[:, 0], (features * features[expected]).sum(1)], 1)
    torch.distributed.all_reduce(loss)
    torch.testing.assert_close(loss / world_size, F.cross_entropy(logits, torch.zeros(5, dtype=torch.long)))


def test_two_processes_draw_what_one_does() -> None:
    torch.manual_seed(0)
    run_processes(several, 2, torch.randn(5, 4))
