"""Anchors, boxes, NMS, pooling, labels, losses, selection and batches, each against its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou

from vlmfast.data import Sample
from vlmfast.models.detection import regions, rois, rpn
from vlmfast.models.detection.batches import DetectionCollator, Sizes, groups, named_objects, pad
from vlmfast.models.detection.regions import Scored, Selection


def random_boxes(count: int, side: float = 100, least: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    corner = torch.rand(count, 2, dtype=dtype) * (side - least)
    return torch.cat([corner, corner + least + torch.rand(count, 2, dtype=dtype) * (side - least - corner)], dim=1)


class TestBoxes:
    def test_encode_then_decode_is_the_identity(self) -> None:
        torch.manual_seed(0)
        boxes, others = random_boxes(500), random_boxes(500, least=4)
        for coder in (rois.CODER, rpn.RPN(4, [8], [1.0], 9, (9, 9)).box_coder):
            decoded = coder.decode_single(coder.encode_single(boxes, others), others)
            assert (decoded - boxes).abs().max() < 1e-4

    def test_the_definition(self) -> None:
        box, anchor = torch.tensor([[12.0, 20, 32, 80]]), torch.tensor([[10.0, 10, 50, 90]])
        goal = rois.CODER.encode_single(box, anchor)[0].tolist()
        expected = [10 * (22 - 30) / 40, 10 * (50 - 50) / 80, 5 * math.log(20 / 40), 5 * math.log(60 / 80)]
        assert goal == pytest.approx(expected, rel=1e-6)

    def test_growth_is_bounded(self) -> None:
        anchor = torch.tensor([[0.0, 0, 16, 16]])
        wide = rois.CODER.decode_single(torch.tensor([[0.0, 0, 1e6, 1e6]]), anchor)[0]
        assert (wide[2:] - wide[:2]).tolist() == pytest.approx([16 * 62.5] * 2, rel=1e-5)


def greedy(boxes: Tensor, scores: Tensor, limit: float) -> list[int]:
    """NMS in O(n^2): from the best, of equals the first, drop what overlaps a kept one by more than the limit."""
    kept: list[int] = []
    iou = box_iou(boxes, boxes).tolist()
    for place in sorted(range(len(boxes)), key=lambda place: (-float(scores[place]), place)):
        if all(iou[place][other] <= limit for other in kept):
            kept.append(place)
    return kept


@pytest.mark.parametrize(
    ("count", "classes"), [(1, 1), (40, 1), (30, 3), (60, 30)]
)  # the last: torchvision's other way
def test_nms_is_the_greedy_one(count: int, classes: int) -> None:
    """Boxes with corners on a grid and scores from few values: ties, and overlaps of one half exactly."""
    torch.manual_seed(count)
    corner = torch.randint(0, 6, (count, classes, 2)) * 2.0
    boxes = torch.cat([corner, corner + torch.randint(1, 4, (count, classes, 2)) * 4.0], dim=2)
    probabilities = torch.randint(1, 9, (count, classes + 1)) / 64
    # exactly one half of the first box is the second one; as good, both stay
    boxes[0, 0] = torch.tensor([50.0, 50, 60, 60])
    boxes[-1, 0] = torch.tensor([50.0, 50, 60, 55])
    found = regions.detections(Scored(boxes, probabilities, torch.zeros(count, 4)))
    expected = {
        (label, *boxes[place, label].tolist(), float(probabilities[place, label]))
        for label in range(classes)
        for place in greedy(boxes[:, label].double(), probabilities[:, label], 0.5)
        if probabilities[place, label] > 0.05
    }
    best = sorted(expected, key=lambda one: -one[-1])
    got = [
        (label, *box, score)
        for label, box, score in zip(*(found[name].tolist() for name in ("labels", "boxes", "scores")), strict=True)
    ]
    assert [one[-1] for one in got] == [one[-1] for one in best[:100]]
    assert set(got) <= expected
    if len(expected) <= 100:
        assert set(got) == expected


def test_classes_do_not_drop_one_another_however_many_there_are() -> None:
    """Class 1,599 of boxes near 1,333 is moved to about 2 million, where float32 counts in eighths."""
    boxes = torch.zeros(2, 1600, 4)
    boxes[:, 1599] = torch.tensor([[1300.0, 700, 1300.5, 700.3], [1300.0, 700, 1300.25, 700.3]])  # IoU 0.5
    probabilities = torch.zeros(2, 1601)
    probabilities[:, 1599] = torch.tensor([0.5, 0.4])
    assert len(regions.detections(Scored(boxes, probabilities, torch.zeros(2, 3)))["labels"]) == 2


@pytest.mark.parametrize("op", ["pool", "align"])
def test_the_whole_map_in_one_bin(op: str) -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 5, 7)
    pooled = rois.pool(maps, [torch.tensor([[0.0, 0, 56, 40]])] * 2, 1, 8, op)
    expected = maps.amax(dim=(2, 3)) if op == "pool" else maps.mean(dim=(2, 3))
    assert torch.allclose(pooled[:, :, 0, 0], expected, atol=1e-6)


class TestAnchorLabels:
    def anchors(self) -> Tensor:
        made = AnchorGenerator(((12, 24),), ((0.5, 1.0, 2.0),))
        return made.grid_anchors([[12, 12]], [[torch.tensor(8), torch.tensor(8)]])[0]

    def test_the_paper_s_rules(self) -> None:
        torch.manual_seed(1)
        anchors, boxes = self.anchors(), random_boxes(6, 96, 12)
        boxes = torch.cat([boxes, torch.tensor([[0.0, 26, 6, 38], [0, 50, 6, 62]])])  # across the border is best
        labels, truth = rpn.label_anchors(anchors, boxes, (96, 96))
        iou = box_iou(boxes, anchors)
        inside = (anchors[:, 0] >= 0) & (anchors[:, 1] >= 0) & (anchors[:, 2] <= 96) & (anchors[:, 3] <= 96)
        assert 0 < inside.sum() < len(anchors)
        assert (iou[6:] > (iou * inside)[6:].amax(dim=1, keepdim=True)).any(dim=1).all()
        best = {int(column) for row in iou * inside for column in (row == row.max()).nonzero()}
        for place in range(len(anchors)):
            most = float(iou[:, place].max())
            if not inside[place]:
                expected = -1
            elif most >= 0.7 or place in best:
                expected = 1
            else:
                expected = 0 if most < 0.3 else -1
            assert labels[place] == expected, place
        positive = labels == 1
        assert torch.equal(truth[positive], boxes[iou[:, positive].argmax(dim=0)])

    def test_each_true_box_has_a_positive_anchor(self) -> None:
        """Also one that no anchor overlaps by 0.7, and one that only anchors across the border touch."""
        anchors = self.anchors()
        boxes = torch.tensor([[10.0, 10, 90, 14], [40, 40, 43, 43], [0, 0, 2.0, 2]])
        assert box_iou(boxes, anchors).max() < 0.7
        inside = (anchors.amin(dim=1) >= 0) & (anchors.amax(dim=1) <= 96)
        assert box_iou(boxes[2:], anchors[inside]).max() == 0
        for box in boxes:
            labels, truth = rpn.label_anchors(anchors, box[None], (96, 96))
            assert (labels == 1).any()
            assert (labels == 1).sum() < 20  # of 864; not all that it does not touch
            assert torch.equal(truth[labels == 1][0], box)

    def test_nothing_there_and_anchors_that_never_fit(self) -> None:
        labels, _ = rpn.label_anchors(self.anchors(), torch.zeros(0, 4), (96, 96))
        assert set(labels.tolist()) == {-1.0, 0.0}
        labels, _ = rpn.label_anchors(self.anchors(), torch.tensor([[1.0, 1, 7, 7]]), (8, 8))
        assert (labels == 1).any()
        far = torch.tensor([[0.0, 0, 4, 4], [10, 10, 14, 14]])
        labels, _ = rpn.label_anchors(far, torch.tensor([[6.0, 6, 7, 7]]), (96, 96))  # that no anchor touches
        assert labels.tolist() == [0, 0]


def test_losses_of_the_proposal_network_are_equation_1() -> None:
    torch.manual_seed(0)
    logits, deltas, goals = (
        torch.randn(*shape, dtype=torch.float64) * 2 for shape in ((2, 20), (2, 20, 4), (2, 20, 4))
    )
    positive, negative = torch.zeros(2, 20, dtype=torch.bool), torch.zeros(2, 20, dtype=torch.bool)
    positive[0, :3], negative[0, 5:9], positive[1, 4], negative[1, 10:20] = True, True, True, True
    goals[0, 15] = math.inf  # an anchor that is not drawn, of an image without true boxes
    found = rpn.rpn_losses(logits, deltas, goals, positive, negative, places=6)
    objectness, box = 0.0, 0.0
    for image in range(2):
        drawn = [k for k in range(20) if positive[image, k] or negative[image, k]]
        for k in drawn:
            p = 1 / (1 + math.exp(-float(logits[image, k])))
            objectness -= math.log(p if positive[image, k] else 1 - p) / len(drawn)
            if positive[image, k]:
                for difference in (deltas[image, k] - goals[image, k]).abs().tolist():
                    box += 10 / 6 * (difference**2 / 2 if difference < 1 else difference - 0.5)
    assert float(found["objectness"]) == pytest.approx(objectness, rel=1e-12)
    assert float(found["proposal_box"]) == pytest.approx(box, rel=1e-12)


def test_proposals_are_torchvisions() -> None:
    torch.manual_seed(0)
    own = rpn.RPN(6, [16, 32], [0.5, 1.0, 2.0], 50, (20, 10)).eval()
    for weight in own.head.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    settings = {"fg_iou_thresh": 0.7, "bg_iou_thresh": 0.3, "batch_size_per_image": 9, "positive_fraction": 0.5}
    other = RegionProposalNetwork(
        own.anchor_generator, own.head, **settings, pre_nms_top_n={"training": 50, "testing": 50},
        post_nms_top_n={"training": 20, "testing": 10}, nms_thresh=0.7,
    ).eval()  # fmt: skip
    maps = torch.randn(2, 6, 8, 8)
    images = rpn.image_list(torch.zeros(2, 3, 64, 64), [(64, 64), (60, 57)])
    with torch.no_grad():
        expected, _ = other(images, {"0": maps})
        found, losses = own(images, maps)
    assert not losses
    assert len(found) == 2
    assert all(torch.equal(a, b) and len(a) == 10 for a, b in zip(found, expected, strict=True))


def test_losses_of_regions() -> None:
    torch.manual_seed(0)
    logits, deltas, goals = (torch.randn(*s, dtype=torch.float64) * 2 for s in ((5, 4), (5, 3, 4), (5, 4)))
    labels = torch.tensor([0, 3, 2, 3, 1])
    goals[1] = math.nan  # background has none
    found = rois.roi_losses(logits, deltas, labels, goals)
    box = 0.0
    for k in (0, 2, 4):
        for difference in (deltas[k, labels[k]] - goals[k]).abs().tolist():
            box += (difference**2 / 2 if difference < 1 else difference - 0.5) / 5
    assert float(found["boxes"]) == pytest.approx(box, rel=1e-12)
    entropy = -sum(float(row.log_softmax(0)[label]) for row, label in zip(logits, labels, strict=True)) / 5
    assert float(found["classes"]) == pytest.approx(entropy, rel=1e-12)
    theirs, _ = fastrcnn_loss(
        logits.roll(1, dims=1), torch.zeros(5, 16, dtype=torch.float64), [(labels + 1) % 4], [torch.zeros(5, 4)]
    )  # background first
    assert float(found["classes"]) == pytest.approx(float(theirs), rel=1e-12)


def test_attributes_are_a_mean_over_all_that_are_said() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    said = torch.tensor([[1, 3], [-1, -1], [0, -1]])
    expected = -(logits[0].log_softmax(0)[[1, 3]].sum() + logits[2].log_softmax(0)[0]) / 3
    found = rois.attribute_loss(logits, said)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(found, logits)
    assert (gradient[1] == 0).all()
    assert float(rois.attribute_loss(logits, torch.full((3, 2), -1)).detach()) == 0
    assert float(rois.attribute_loss(logits[:0], said[:0]).detach()) == 0


class TestDraw:
    def target(self) -> dict[str, Tensor]:
        boxes = torch.tensor([[10.0, 10, 40, 40], [50, 50, 90, 90]])
        return {"boxes": boxes, "labels": torch.tensor([2, 0]), "attributes": torch.tensor([[1, -1], [0, 2]])}

    def test_a_quarter_objects_with_their_goals(self) -> None:
        torch.manual_seed(0)
        target = self.target()
        near = (target["boxes"].repeat(30, 1) + torch.randn(60, 4) * 3).clamp(0, 100)
        proposals = torch.cat([near, random_boxes(100, 100, 5)])
        drawn = rois.draw(proposals, target, 3, 40)
        iou = box_iou(drawn.boxes, target["boxes"])
        objects = drawn.labels < 3
        assert len(drawn.labels) == 40
        assert objects.sum() == 10
        assert (rois.draw(proposals, target, 3, 40, 0.5).labels < 3).sum() == 20
        assert torch.equal(objects, iou.amax(dim=1) >= 0.5)
        which = iou.argmax(dim=1)[objects]
        assert torch.equal(drawn.labels[objects], target["labels"][which])
        assert torch.equal(drawn.attributes[objects], target["attributes"][which])
        decoded = rois.CODER.decode_single(drawn.goals[objects], drawn.boxes[objects])
        assert torch.allclose(decoded, target["boxes"][which], atol=1e-3)

    def test_true_boxes_are_drawn_where_no_proposal_is_near(self) -> None:
        drawn = rois.draw(torch.tensor([[0.0, 0, 5, 5]]), self.target(), 3, 40)
        assert sorted(drawn.labels.tolist()) == [0, 2, 3]

    def test_an_image_without_objects(self) -> None:
        target = {name: value[:0] for name, value in self.target().items()}
        drawn = rois.draw(random_boxes(7), target, 3, 40)
        assert drawn.labels.tolist() == [3] * 7
        assert drawn.attributes.shape == (7, 2)


class TestSelect:
    def scored(self, count: int = 40, classes: int = 5, seed: int = 0) -> Scored:
        torch.manual_seed(seed)
        boxes = random_boxes(count, least=20)[:, None] + torch.randn(count, classes, 4)
        return Scored(boxes, (3 * torch.randn(count, classes + 1)).softmax(dim=1), torch.randn(count, 6))

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize(
        "selection", [Selection(), Selection(36, 36), Selection(1, 5, 0.9), Selection(1, 100, 0.5)]
    )
    def test_nms_in_each_class_then_the_most_probable_that_is_left(self, selection: Selection, seed: int) -> None:
        scored = self.scored(seed=seed)
        left: dict[int, tuple[float, int]] = {}
        for label in range(5):
            candidates = [k for k in range(40) if scored.probabilities[k, label] > 0.01]
            for k in greedy(scored.boxes[candidates, label], scored.probabilities[candidates, label], 0.5):
                score = float(scored.probabilities[candidates[k], label])
                left[candidates[k]] = max(left.get(candidates[k], (0.0, -1)), (score, label))
        order = sorted(left, key=lambda k: -left[k][0])
        enough = sum(score >= selection.threshold for score, _ in left.values())
        count = min(max(enough, selection.least), selection.most)
        places, labels = regions.select(scored, selection)
        assert len(places) == count
        certain = min(count, len(order))
        assert places[:certain].tolist() == order[:certain]
        assert labels[:certain].tolist() == [left[k][1] for k in order[:certain]]
        rest = places[certain:].tolist()  # what every class has dropped, by its most probable class
        top = scored.probabilities[:, :-1].amax(dim=1)
        assert rest == sorted(set(range(40)) - set(order), key=lambda k: -float(top[k]))[: len(rest)]

    def test_there_are_regions_where_nothing_is_certain(self) -> None:
        scored = self.scored(count=30)
        sure = torch.zeros(30, 6)
        sure[:, 5] = 1  # all background
        places, labels = regions.select(Scored(scored.boxes, sure, scored.features), Selection())
        assert len(places) == len(labels) == 10
        places, _ = regions.select(self.scored(count=4), Selection(36, 36))
        assert sorted(places.tolist()) == [0, 1, 2, 3]

    def test_bounds_are_checked(self) -> None:
        for wrong in ((0, 5), (6, 5), (1, 5, 1.5)):
            with pytest.raises(ValueError, match="expected"):
                Selection(*wrong)


def sample(image: Tensor, *objects: dict[str, Any], seed: int = 0) -> Sample:
    return Sample(image, "", "key", None, seed, {"objects": list(objects)})


def painted(width: int, height: int, box: tuple[int, int, int, int]) -> Tensor:
    image = torch.zeros(height, width, 3, dtype=torch.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


class TestCollator:
    @pytest.mark.parametrize("flip", [0.0, 1.0])
    def test_boxes_move_with_the_pixels(self, flip: float) -> None:
        """The painted part of each image is where the box says, after resize, flip and padding."""
        box = (20, 10, 60, 30)
        samples = [
            sample(painted(w, h, box), {"box": list(box), "name": "a", "attributes": ["x", "y"]})
            for w, h in ((80, 40), (100, 200), (40, 40))
        ]
        batch = DetectionCollator(Sizes(80, 120), {"a": 4}, {"y": 7}, flip)(samples)
        assert batch["pixel_values"].dtype == torch.uint8
        assert batch["image_sizes"].tolist() == [[120, 60], [60, 120], [80, 80]]
        assert batch["pixel_values"].shape == (3, 120, 120, 3)
        assert batch["labels"].tolist() == [[4]] * 3
        assert batch["attributes"].tolist() == [[[7, -1]]] * 3 or batch["attributes"].tolist() == [[[7]]] * 3
        for image, (x1, y1, x2, y2), (w, h) in zip(
            batch["pixel_values"], batch["boxes"][:, 0].tolist(), batch["image_sizes"].tolist(), strict=True
        ):
            rows, columns = (image[..., 0] > 127).nonzero(as_tuple=True)
            seen = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
            assert [x1, y1, x2, y2] == pytest.approx(seen, abs=1)
            assert (image[h:] == 0).all()
            assert (image[:, w:] == 0).all()

    def test_the_flip_is_the_sample_s_own(self) -> None:
        image = painted(16, 16, (0, 0, 8, 16))
        collate = DetectionCollator(Sizes(16, 32), {"a": 0}, None, 0.5)
        turned = [bool(collate([sample(image, seed=seed)])["pixel_values"][0, 0, 15, 0]) for seed in range(200)]
        assert 70 < sum(turned) < 130
        together = collate([sample(image, seed=seed) for seed in range(200)])["pixel_values"]
        assert (together[:, 0, 15, 0] > 0).tolist() == turned

    def test_objects_that_are_none(self) -> None:
        image = torch.zeros(20, 20, 3, dtype=torch.uint8)
        kept = {"box": [-5, 2, 30, 12], "name": "a"}
        others: list[Any] = [
            {"box": [1, 1, 1.5, 9], "name": "a"}, {"box": [9, 9, 3, 3], "name": "a"}, {"box": [1, 1, 9, 9], "name": 3},
            {"box": [1, 1, 9, 9], "name": "b"},
            {"box": [1, 1, 9], "name": "a"}, {"box": [1, 1, 9, math.nan], "name": "a"}, {"box": [1, 1, 9, 9]}, "a",
            {"box": [1, 1, 9, 9], "name": "a", "crowd": True},
        ]  # fmt: skip
        collate = DetectionCollator(Sizes(20, 40), {"a": 0})
        batch = collate([sample(image, *others, kept), sample(image), None])
        assert batch["boxes"].tolist() == [[[0, 2, 20, 12]], [[0, 0, 0, 0]]]
        assert batch["labels"].tolist() == [[0], [-1]]
        assert named_objects({"objects": None}) == named_objects({}) == []

    def test_in_evaluation_there_are_images_alone(self) -> None:
        batch = DetectionCollator(Sizes(10, 20))([sample(torch.zeros(20, 20, 3, dtype=torch.uint8))])
        assert {name: tuple(value.shape) for name, value in batch.items()} == {
            "pixel_values": (1, 10, 10, 3),
            "image_sizes": (1, 2),
        }


def test_an_image_is_the_same_in_any_batch() -> None:
    torch.manual_seed(0)
    images = [torch.randint(256, (h, w, 3), dtype=torch.uint8) for h, w in ((16, 24), (17, 9), (24, 32), (9, 20))]
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    together = {
        place: (image, size)
        for group in groups(*pad(images), 16, mean, std, torch.float32)
        for place, image, size in zip(*group, strict=True)
    }
    assert len(together) == 4
    for place, image in enumerate(images):
        (alone,) = groups(*pad([image]), 16, mean, std, torch.float32)
        found, size = together[place]
        assert torch.equal(found, alone.images[0])
        assert size == alone.sizes[0] == tuple(image.shape[:2])
        assert found.shape[-2] % 16 == found.shape[-1] % 16 == 0
        h, w = size
        expected = (image.permute(2, 0, 1) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        assert torch.allclose(found, F.pad(expected, (0, found.shape[2] - w, 0, found.shape[1] - h)), atol=1e-6)
    with pytest.raises(ValueError, match="pixel_values: expected uint8"):
        groups(torch.zeros(1, 3, 8, 8), None, 16, mean, std, torch.float32)
