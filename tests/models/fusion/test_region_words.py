"""DyHead's parts, region-word logits, ATSS and the losses, against equations that are written out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import run_processes
from torch import Tensor

pytest.importorskip("torchvision")

from vlmfast.models.fusion.dyhead import DeformConvNorm, DyHeadBlock, DyReLU
from vlmfast.models.fusion.region_words import LIMIT, Matched, RegionWordHead, assign, centerness, grid, losses, match


def levels() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 16, *size, dtype=torch.float64) for size in ((6, 7), (3, 4), (2, 2))]


def noisy(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module.double()


def test_a_deformable_convolution_reads_where_its_offsets_point() -> None:
    """Without offsets it is a convolution; one pixel down everywhere is that of the map moved up."""
    x, layer = torch.randn(1, 16, 7, 7), DeformConvNorm(16)
    one = torch.ones(1, 9, 7, 7)
    plain = layer.norm(F.conv2d(x, layer.conv.weight, padding=1))
    torch.testing.assert_close(layer(x, torch.zeros(1, 18, 7, 7), one), plain, rtol=1e-4, atol=1e-5)
    down = torch.zeros(1, 18, 7, 7)
    down[:, 0::2] = 1  # y before x
    moved = F.conv2d(x.roll(-1, 2), layer.conv.weight, padding=1)
    found = layer.conv(x, down, one)
    torch.testing.assert_close(found[..., 1:5, 1:6], moved[..., 1:5, 1:6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.conv(x, down, one / 2), found / 2, rtol=1e-4, atol=1e-5)


def test_dynamic_relu_is_the_formula() -> None:
    layer, x = noisy(DyReLU(16)), levels()[0]
    lines = (layer.fc(x.mean((2, 3))) + 3).clamp(0, 6) / 6
    a1, b1, a2, b2 = lines.chunk(4, 1)
    expected = torch.stack(
        [
            torch.stack(
                [
                    torch.maximum(
                        x[i, c] * 2 * a1[i, c] + b1[i, c] - 0.5, x[i, c] * (2 * a2[i, c] - 1) + b2[i, c] - 0.5
                    )
                    for c in range(16)
                ]
            )
            for i in range(2)
        ]
    )
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    torch.testing.assert_close(layer(x), x.relu())


def test_a_block_of_dyhead_is_the_formula() -> None:
    """Of the middle level: its own map, the finer one at stride 2, and the coarser one enlarged."""
    block, maps = noisy(DyHeadBlock(16)), levels()
    found = block(maps)
    assert [y.shape for y in found] == [x.shape for x in maps]
    both = block.offset(maps[1])
    offsets, strengths = both[:, :18], 1 / (1 + (-both[:, 18:]).exp())
    large = F.interpolate(maps[2], maps[1].shape[2:], mode="bilinear", align_corners=True)
    read = [
        block.own(maps[1], offsets, strengths),
        block.finer(maps[0], offsets, strengths),
        block.coarser(large, offsets, strengths),
    ]
    total = torch.zeros_like(maps[1])
    for y in read:
        level = (y.mean((2, 3)) @ block.scale.weight.T + block.scale.bias).clamp(min=0)
        total += ((level + 3).clamp(0, 6) / 6)[..., None, None] * y
    torch.testing.assert_close(found[1], block.task(total / 3))
    assert len(block(maps[:1])) == 1


def test_logits_of_places_and_words_are_the_formula() -> None:
    head = noisy(RegionWordHead(16, 12, 1, 3, 4.0))
    places, words = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 3, 12, dtype=torch.float64)
    found = head.word_logits(places, words)
    weight, bias = head.word_projection.weight, head.word_projection.bias
    for image, place, word in ((0, 0, 0), (1, 4, 2), (0, 3, 1)):
        e = words[image, word] / words[image, word].norm()
        dot = (places[image, place] * (weight @ e / 2 + bias)).sum()
        expected = dot / math.exp(head.log_scale.item()) + e @ head.bias_lang + head.bias0
        torch.testing.assert_close(found[image, place, word].double(), expected.squeeze(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        head.bias0.fill_(1e9)
    assert head.word_logits(places, words).max() == LIMIT
    fresh = RegionWordHead(16, 12, 1, 3, 4.0)
    assert fresh.bias0.sigmoid().item() == pytest.approx(0.01)


def test_boxes_of_the_head_begin_at_their_anchors() -> None:
    """Squares of side scale * stride around the middle of each place, rows first."""
    head = RegionWordHead(16, 12, 1, 2, 3.0)
    with torch.no_grad():
        head.deltas.weight.zero_()
        head.deltas.bias.copy_(torch.tensor([1.0, 0, 5 * math.log(2), 0]))
        head.level_scale[1] = 0
    found = head([torch.randn(1, 16, 4, 6), torch.randn(1, 16, 2, 3)], torch.randn(1, 5, 12), 8)
    assert found.counts == [24, 6]
    assert found.anchors[7].tolist() == [12 - 12, 12 - 12, 12 + 12, 12 + 12]  # place (1, 1)
    assert found.anchors[24 + 5].tolist() == [40 - 24, 24 - 24, 40 + 24, 24 + 24]
    assert found.logits.shape == (1, 30, 5)
    # A tenth of the width to the right, twice as wide.
    torch.testing.assert_close(found.boxes[0, 7], torch.tensor([14.4 - 24, 0, 14.4 + 24, 24]))
    torch.testing.assert_close(found.boxes[0, 24:], found.anchors[24:])


def by_hand(anchors: list[list[float]], counts: list[int], boxes: list[list[float]], candidates: int = 9) -> list[int]:
    """ATSS as its paper's algorithm 1, with loops."""

    def iou(a: list[float], b: list[float]) -> float:
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        shared = max(w, 0) * max(h, 0)
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

    def middle(a: list[float]) -> tuple[float, float]:
        return (a[0] + a[2]) / 2, (a[1] + a[3]) / 2

    best: dict[int, tuple[float, int]] = {}
    for number, box in enumerate(boxes):
        considered, first = [], 0
        for count in counts:
            own = sorted(range(first, first + count), key=lambda a: math.dist(middle(anchors[a]), middle(box)))
            considered += own[:candidates]
            first += count
        overlaps = [iou(anchors[a], box) for a in considered]
        mean = sum(overlaps) / len(overlaps)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in overlaps) / (len(overlaps) - 1))
        for a, overlap in zip(considered, overlaps, strict=True):
            x, y = middle(anchors[a])
            if overlap >= mean + deviation and box[0] < x < box[2] and box[1] < y < box[3]:
                best[a] = max(best.get(a, (-1.0, -1)), (overlap, number))
    return [best.get(a, (0.0, -1))[1] for a in range(len(anchors))]


@pytest.mark.parametrize("seed", range(4))
def test_atss_is_the_algorithm_of_its_paper(seed: int) -> None:
    torch.manual_seed(seed)
    maps = [torch.zeros(1, 1, n, n) for n in (10, 5, 3)]
    anchors = torch.cat([grid(x, 8 * 2**k, 4.0) for k, x in enumerate(maps)]).double()
    corner = torch.rand(6, 2, dtype=torch.float64) * 50
    boxes = torch.cat([corner, corner + 8 + torch.rand(6, 2, dtype=torch.float64) * 40], 1)
    boxes[1] = boxes[0] + 3.0  # two that share anchors
    counts = [100, 25, 9]
    found = assign(anchors, counts, boxes)
    assert found.tolist() == by_hand(anchors.tolist(), counts, boxes.tolist())
    assert len(set(found.tolist())) > 3
    assert assign(anchors, counts, boxes[:0]).eq(-1).all()


def example() -> tuple[list[Matched], list[Tensor]]:
    torch.manual_seed(3)
    leaves = [torch.randn(2, 6, 4, dtype=torch.float64), torch.rand(2, 2, 2, dtype=torch.float64), torch.randn(2, 2)]
    for leaf in leaves:
        leaf.requires_grad_()
    images = []
    for k in range(2):
        words = torch.zeros(6, 4, dtype=torch.float64)
        words[1, 0] = words[3, 2] = 1
        corner = leaves[1][k] * 10
        boxes = torch.cat([corner, corner + 12], 1)
        goals = torch.tensor([[3.0, 2, 13, 19], [0, 0, 11, 8]], dtype=torch.float64)
        tokens = torch.tensor([True, True, True, k == 0])
        centred = torch.tensor([0.9, 0.3 + k / 10], dtype=torch.float64)
        count = 2 - k  # the second image has one place with a box
        own = (boxes[:count], goals[:count], leaves[2][k, :count].double(), centred[:count])
        images.append(Matched(leaves[0][k], words, tokens, *own))
    return images, leaves


def test_losses_are_the_formulas() -> None:
    """Padding's words count nothing, however sure the model is of them."""
    images, _ = example()
    focal = 0.0
    for image in images:
        for place in range(6):
            for word in range(4):
                if image.tokens[word]:
                    p = 1 / (1 + math.exp(-image.logits[place, word].item()))
                    if image.words[place, word]:
                        focal -= 0.25 * (1 - p) ** 2 * math.log(p)
                    else:
                        focal -= 0.75 * p**2 * math.log(1 - p)
    giou = weight = entropy = 0.0
    for image in images:
        for a, b, logit, c in zip(
            image.boxes.tolist(), image.goals.tolist(), image.centerness.tolist(), image.centred.tolist(), strict=True
        ):
            shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
            hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
            giou += c * (1 - shared / union + (hull - union) / hull)
            weight += c
            p = 1 / (1 + math.exp(-logit))
            entropy -= c * math.log(p) + (1 - c) * math.log(1 - p)
    found = {name: value.item() for name, value in losses(images).items()}
    assert found == pytest.approx({"words": focal / 3, "boxes": 2 * giou / weight, "centerness": entropy / 3}, rel=1e-6)


def test_without_boxes_only_words_have_a_loss() -> None:
    head = RegionWordHead(16, 12, 1, 2, 3.0)
    found = head([torch.randn(1, 16, 4, 6), torch.randn(1, 16, 2, 3)], torch.randn(1, 5, 12), 8)
    tokens = torch.ones(5, dtype=torch.bool)
    nothing = match(found, 0, torch.zeros(0, 4), torch.zeros(0, 5, dtype=torch.bool), tokens)
    parts = losses([nothing])
    assert parts["words"] > 0
    assert parts["boxes"] == parts["centerness"] == 0
    torch.stack(list(parts.values())).sum().backward()
    assert not [name for name, p in head.named_parameters() if p.grad is None]
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_centerness_is_one_in_the_middle() -> None:
    anchors = torch.tensor([[4.0, 4, 6, 6], [1, 4, 3, 6], [1, 1, 3, 3]])
    box = torch.tensor([[0.0, 0, 10, 10]]).expand(3, 4)
    torch.testing.assert_close(centerness(anchors, box), torch.tensor([1.0, math.sqrt(1 / 4), 1 / 4]))


def _own_part(rank: int, world_size: int, folder: str) -> None:
    images, leaves = example()
    parts = losses(images[rank : rank + 1])
    torch.stack(list(parts.values())).sum().backward()
    total = torch.stack([*parts.values()]).detach()
    torch.distributed.all_reduce(total)
    grads = torch.cat([leaf.grad.flatten() for leaf in leaves])
    torch.distributed.all_reduce(grads)
    whole = torch.load(f"{folder}/whole.pt")
    torch.testing.assert_close(total / world_size, whole["parts"])
    torch.testing.assert_close(grads / world_size, whole["grads"])


def test_two_processes_have_the_loss_of_one(tmp_path: Path) -> None:
    """One image each, with two places and with one."""
    images, leaves = example()
    parts = losses(images)
    torch.stack(list(parts.values())).sum().backward()
    whole = {
        "parts": torch.stack([*parts.values()]).detach(),
        "grads": torch.cat([leaf.grad.flatten() for leaf in leaves]),
    }
    torch.save(whole, tmp_path / "whole.pt")
    run_processes(_own_part, 2, str(tmp_path))
