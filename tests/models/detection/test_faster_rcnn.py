"""Faster R-CNN whole: its loss, its regions in any batch and any mode, its backbone, and what it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops import roi_align as torchvision_roi_align

from vlmfast.data import ImageTextDataset
from vlmfast.models.contract import Pretrainable
from vlmfast.models.detection import FasterRCNNConfig, FasterRCNNModel, FasterRCNNOptions
from vlmfast.models.detection.backbone import Backbone
from vlmfast.models.detection.batches import pad
from vlmfast.models.detection.rpn import image_list
from vlmfast.models.detection.torchvision_regions import TorchvisionRegions
from vlmfast.tasks.detection import Detection

COLOURS = {"red": (220, 30, 30), "green": (20, 160, 60), "blue": (30, 60, 220)}
TINY: dict[str, Any] = {
    "backbone": "small", "backbone_width": 4, "stride": 8, "frozen_norm": False, "frozen_stages": 0, "image_size": 32,
    "longer_size": 64, "anchor_sizes": [8, 16], "candidates": 50, "train_proposals": 30, "proposals": 20, "roi_size": 3,
    "roi_op": "align", "roi_batch": 16, "attributes": ["big", "small"], "id2label": dict(enumerate(COLOURS)),
}  # fmt: skip


def tiny(seed: int = 0, **settings: Any) -> FasterRCNNModel:
    """With running statistics and heads that are not those of a new model, so that nothing cancels."""
    torch.manual_seed(seed)
    model = FasterRCNNModel(FasterRCNNConfig(**{**TINY, **settings}))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, nn.Linear) or module in (model.rpn.head.cls_logits, model.rpn.head.bbox_pred):
            nn.init.normal_(module.weight, std=0.2)
    return model


def noise(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (h, w, 3), dtype=torch.uint8, generator=generator) for w, h in sizes]


SIZES = [(32, 32), (48, 32), (90, 41), (20, 60), (32, 32)]


def batch(seed: int = 0, sizes: list[tuple[int, int]] = SIZES) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    images, image_sizes = pad([image[:32, :48] for image in noise(*sizes)])
    labels = torch.tensor([[0, 1], [2, -1], [1, 1], [-1, -1], [0, 2]])[: len(sizes)]
    boxes = torch.tensor([[2.0, 3, 14, 18], [9, 10, 19, 28]]).repeat(len(sizes), 1, 1)
    attributes = torch.tensor([[0, 1], [-1, -1]]).repeat(len(sizes), 1, 1)
    return {
        "pixel_values": images, "image_sizes": image_sizes, "boxes": boxes, "labels": labels, "attributes": attributes,
    }  # fmt: skip


class Parent(Pretrainable, nn.Module):
    """A model that reads a detector."""

    def __init__(self, detector: FasterRCNNModel) -> None:
        super().__init__()
        self.detector, self.dropout = detector, nn.Dropout(0.5)
        self.freeze()

    def frozen_parts(self) -> tuple[nn.Module, ...]:
        return (self.detector,)


def equal(a: dict[str, list[Tensor]], b: dict[str, list[Tensor]], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name, values in a.items():
        for one, other in zip(values, b[name], strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one.float(), other.float(), rtol=0, atol=tolerance), name


class TestRegions:
    def test_their_names_shapes_and_pixels(self) -> None:
        images = noise((90, 41), (32, 32))
        found = tiny().regions(images, least=3, most=7, threshold=0.4)
        for k, (w, h) in enumerate(((90, 41), (32, 32))):
            one = {name: values[k] for name, values in found.items()}
            count = len(one["boxes"])
            assert 3 <= count <= 7
            assert one["features"].shape == (count, 32 * 4)
            assert one["probabilities"].shape == (count, 4)
            assert torch.allclose(one["probabilities"].sum(dim=1), torch.ones(count))
            assert {one[name].dtype for name in ("labels", "attributes", "image_size")} == {torch.int64}
            assert torch.equal(one["scores"], one["probabilities"][torch.arange(count), one["labels"]])
            assert one["labels"].max() < 3
            assert one["attributes"].max() < 2
            assert ((one["attribute_scores"] > 0) & (one["attribute_scores"] <= 1)).all()
            assert one["image_size"].tolist() == [w, h]
            assert (one["boxes"] >= 0).all()
            assert (one["boxes"] <= torch.tensor([w, h, w, h]) + 1e-3).all()
            assert (one["boxes"][:, 2:] >= one["boxes"][:, :2]).all()
        assert found["boxes"][0][:, 2].max() > 64  # pixels of the image, not of what the model sees

    def test_one_image_or_many_give_the_same(self) -> None:
        """Images of several sizes, in training mode too."""
        model = tiny().train()
        images = noise(*SIZES)
        together = model.regions(images)
        assert model.training
        assert model.backbone.bn1.training
        for k, image in enumerate(images):
            alone = model.regions([image])
            equal(alone, {name: values[k : k + 1] for name, values in together.items()}, 1e-4)

    def test_a_frozen_detector_is_the_same_in_both_modes_of_its_parent(self) -> None:
        parent = Parent(tiny())
        before = {name: value.clone() for name, value in parent.state_dict().items()}
        found = parent.eval().detector.regions(noise(*SIZES))
        equal(found, parent.train().detector.regions(noise(*SIZES)))
        assert parent.dropout.training
        assert not any(module.training for module in parent.detector.modules())
        assert not any(parameter.requires_grad for parameter in parent.parameters())
        assert all(torch.equal(value, before[name]) for name, value in parent.state_dict().items())

    def test_the_fingerprint_tells_what_decides_them(self) -> None:
        model = tiny()
        first = model.frozen_fingerprint()
        assert first == tiny().frozen_fingerprint()
        model.config.proposals = 7
        assert model.frozen_fingerprint() != first
        other = tiny()
        other.backbone.bn1.running_mean[0] += 1
        assert other.frozen_fingerprint() != first


def test_translation_by_one_stride_moves_proposals_by_exactly_the_stride() -> None:
    """An object on nothing, far from the border: what is proposed for each place, before it is clipped."""
    model = tiny(candidates=10**6).eval()
    stride = model.backbone.stride
    image = torch.zeros(1, 3, 256, 256)
    image[:, :, 120:136, 112:128] = torch.randn(3, 16, 16)
    found = []
    with torch.no_grad():
        for shift in (0, stride):
            moved = image.roll((shift, 2 * shift), dims=(2, 3))
            maps = model.backbone(moved)
            logits, deltas, anchors = model.rpn.predict(image_list(moved, [(256, 256)]), maps)
            boxes = model.rpn.box_coder.decode_single(deltas[0], anchors[0])
            grid = (*maps.shape[-2:], -1)
            found.append((logits[0].view(grid), boxes.view(*grid[:2], -1, 4)))
    (before, boxes), (after, others) = found
    rows, columns = slice(10, 21), slice(10, 21)
    moved_rows, moved_columns = slice(11, 22), slice(12, 23)
    assert (before[rows, columns] - before[0, 0]).abs().max() > 0.1  # the object is seen
    assert torch.equal(after[moved_rows, moved_columns], before[rows, columns])
    shift = torch.tensor([2.0, 1, 2, 1]) * stride
    assert torch.allclose(others[moved_rows, moved_columns], boxes[rows, columns] + shift, atol=1e-4)


class TestLoss:
    def test_is_the_sum_of_its_parts(self) -> None:
        output = tiny()(**batch())
        parts = output.objectness + output.proposal_box + output.classes + output.boxes + 0.5 * output.attributes
        assert torch.allclose(output.loss, parts)
        assert all(float(part.detach()) > 0 for part in output.to_tuple())

    def test_of_proposals_is_a_mean_over_images_of_whatever_size(self) -> None:
        """There are fewer than 256 anchors, so all are drawn, and nothing is random."""
        model, both = tiny().eval(), batch()
        with torch.no_grad():
            whole = model(**both)
            each = [model(**{name: value[k : k + 1] for name, value in both.items()}) for k in range(len(SIZES))]
        for name in ("objectness", "proposal_box"):
            mean = torch.stack([getattr(one, name) for one in each]).mean()
            assert torch.allclose(getattr(whole, name), mean, rtol=1e-4), name

    def test_everything_learns_from_every_batch(self) -> None:
        """DDP stops at a parameter without gradient: also where nothing, or no attribute, is in the batch."""
        nothing, plain = batch(), batch()
        nothing["labels"] = torch.full_like(nothing["labels"], -1)
        plain["attributes"] = torch.full_like(plain["attributes"], -1)
        for given in (batch(), plain, nothing):
            model = tiny()
            model(**given).loss.backward()
            assert [name for name, p in model.named_parameters() if p.grad is None] == []
            assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_no_gradient_passes_through_the_coordinates_of_proposals(self) -> None:
        model = tiny()
        output = model(**batch())
        (output.classes + output.boxes).backward()
        assert all(p.grad is None for p in model.rpn.parameters())
        assert model.backbone.conv1.weight.grad.abs().sum() > 0

    def test_autocast_leaves_boxes_exact(self) -> None:
        model = tiny(anchor_sizes=[257.0], longer_size=600).eval()
        for weight in model.rpn.head.bbox_pred.parameters():
            nn.init.zeros_(weight)
        images = torch.zeros(1, 3, 64, 64)
        with torch.no_grad(), torch.autocast("cpu"):
            _, deltas, anchors = model.rpn.predict(image_list(images, [(64, 64)]), model.backbone(images))
        decoded = model.rpn.box_coder.decode_single(deltas[0], anchors[0])
        assert torch.allclose(decoded, anchors[0], atol=1e-3)

    def test_a_training_batch_is_needed(self) -> None:
        with pytest.raises(ValueError, match="boxes, labels and attributes: expected"):
            tiny()(pixel_values=torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
        with pytest.raises(ValueError, match="phrases: expected None"):
            tiny().detect(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), ["a cat"])


def write_squares(folder: Path, count: int = 12) -> Path:
    """A coloured square, big or small, somewhere on grey; the files are of two sizes, and none is square."""
    generator = torch.Generator().manual_seed(0)
    for k in range(count):
        colour, scale = list(COLOURS)[k % 3], 1 + k % 2
        side, w, h = (10, 18)[k // 3 % 2] * scale, 48 * scale, 32 * scale
        x, y = (int(torch.randint(limit - side, (), generator=generator)) for limit in (w, h))
        image = Image.new("RGB", (w, h), (200, 200, 200))
        image.paste(COLOURS[colour], (x, y, x + side, y + side))
        image.save(folder / f"{k:03}.png")
        attribute = "small" if side == 10 * scale else "big"
        thing = {"box": [x, y, x + side, y + side], "name": colour, "attributes": [attribute]}
        (folder / f"{k:03}.json").write_text(json.dumps({"objects": [thing]}))
    return folder


def test_it_learns_to_find_and_name_and_the_task_scores_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = write_squares(tmp_path)
    settings = ["roi_batch=8", "roi_size=3"]
    options = FasterRCNNOptions(image_size=32, backbone_width=4, flip=0.0, config_overrides=settings)
    model = FasterRCNNModel.build(options, None)
    dataset = ImageTextDataset(str(data), transform=model.transform(options, train=True), requires=model.requires)
    model.training_data(options, dataset)
    assert model.config.names == sorted(COLOURS)
    assert model.config.attributes == ["big", "small"]
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    batch = model.collator(options, None, train=True)([dataset[0, k] for k in range(len(dataset))])
    for _ in range(50):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    scores = Detection().evaluate(model, str(data), None, options, batch_size=7, progress=False)
    assert scores.rows["model"]["mAP50"] > 0.25
    assert scores.rows["blind"]["mAP50"] < 0.1
    assert scores.rows["majority"]["mAP50"] < 0.1
    found = model.regions([dataset[k].image for k in range(len(dataset))])
    told = [model.config.attributes[int(attributes[0])] for attributes in found["attributes"]]
    truth = [dataset.record(k)["objects"][0]["attributes"][0] for k in range(len(dataset))]
    assert sum(a == b for a, b in zip(told, truth, strict=True)) >= 10


class TestNames:
    def prepared(self, tmp_path: Path, model: FasterRCNNModel, *objects: str, **options: Any) -> FasterRCNNModel:
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        found = [{"box": [0, 0, 4, 4], "name": name, "attributes": [f"{name}ish"]} for name in objects]
        (tmp_path / "a.json").write_text(json.dumps({"objects": found}))
        dataset = ImageTextDataset(str(tmp_path), transform=None, requires=("objects",))
        assert model.training_data(FasterRCNNOptions(**options), dataset) is dataset
        return model

    def test_the_most_frequent_are_classes_in_alphabetical_order(self, tmp_path: Path) -> None:
        new = FasterRCNNModel.build(FasterRCNNOptions(image_size=32, backbone_width=2), None)
        model = self.prepared(tmp_path, new, "c", "b", "c", "a", "b", "c", num_names=2, num_attributes=1)
        assert model.config.id2label == {0: "b", 1: "c"}
        assert model.config.attributes == ["cish"]
        assert model.class_score.out_features == 3
        assert model.box_deltas.out_features == 8
        assert model.attribute_score.out_features == 2

    def test_a_pretrained_detector_keeps_its_own(self, tmp_path: Path) -> None:
        model = tiny().eval()
        images, sizes = pad(noise((32, 32)))
        (scored,) = model._scored(images, sizes)
        extended = self.prepared(tmp_path, model, "blue", "amber")
        assert extended.config.names == [*COLOURS, "amber"]
        assert extended.config.attributes == ["big", "small", "amberish", "blueish"]
        nn.init.constant_(extended.class_score.bias[3:4], -1e4)
        (again,) = extended.eval()._scored(images, sizes)
        assert torch.allclose(again.probabilities[:, [0, 1, 2, 4]], scored.probabilities, atol=1e-6)
        assert torch.allclose(again.boxes[:, :3], scored.boxes, atol=1e-4)
        weights = extended.class_score.weight.clone()
        assert torch.equal(self.prepared(tmp_path, extended, "red").class_score.weight, weights)

    def test_there_must_be_some(self, tmp_path: Path) -> None:
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        (tmp_path / "a.json").write_text('{"objects": [{"name": "a"}]}')
        dataset = ImageTextDataset(str(tmp_path), transform=None, requires=())
        with pytest.raises(ValueError, match="no object of 1 samples has a name and a box"):
            tiny().training_data(FasterRCNNOptions(), dataset)


class TestBackbone:
    def test_the_layers_of_torchvision_and_a_feature_of_2048(self) -> None:
        with torch.device("meta"):
            large = Backbone("resnet101", 64, 16, True)
        assert (large.map_width, large.width) == (1024, 2048)
        threes = [m for m in large.layer4.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert len(threes) == 3
        assert {(m.stride, m.dilation, m.padding) for m in threes} == {((1, 1), (2, 2), (2, 2))}
        assert large.layer4[0].downsample[0].stride == (1, 1)

    def test_c4_is_torchvisions_and_res5_keeps_the_size(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        whole = models.resnet18().eval()
        save_file(whole.state_dict(), tmp_path / "resnet18.safetensors")
        torch.save(whole.state_dict(), tmp_path / "resnet18.pth")
        images = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            states = whole.maxpool(whole.relu(whole.bn1(whole.conv1(images))))
            expected = whole.layer3(whole.layer2(whole.layer1(states)))
            for file in ("resnet18.safetensors", "resnet18.pth"):
                options = FasterRCNNOptions(backbone="resnet18", backbone_weights=str(tmp_path / file))
                model = FasterRCNNModel.build(options, None)
                assert torch.allclose(model.backbone(images), expected, atol=1e-4)
        assert model.config.frozen_norm
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        frozen = {name.split(".")[1] for name, p in model.train().named_parameters() if not p.requires_grad}
        assert frozen == {"conv1", "layer1"}
        assert model.backbone.layer4(torch.zeros(2, 256, 7, 7)).shape == (2, 512, 7, 7)
        assert model.backbone.res5(torch.zeros(2, 256, 7, 7)).shape == (2, 512)

    def test_stride_8_is_a_map_of_twice_the_size(self) -> None:
        for stride in (8, 16):
            found = Backbone("small", 2, stride, False)(torch.zeros(1, 3, 64, 96))
            assert found.shape == (1, 32, 64 // stride, 96 // stride)

    def test_weights_of_something_else(self, tmp_path: Path) -> None:
        def build(file: str, name: str = "resnet18") -> None:
            FasterRCNNModel.build(FasterRCNNOptions(backbone=name, backbone_weights=str(tmp_path / file)), None)

        with pytest.raises(FileNotFoundError, match=r"--backbone-weights: no file .*none.pth"):
            build("none.pth")
        (tmp_path / "bad.pth").write_bytes(b"no weights")
        with pytest.raises(ValueError, match=r"--backbone-weights: .*bad.pth holds no weights"):
            build("bad.pth")
        torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "few.pth")
        with pytest.raises(ValueError, match=r"few.pth lacks .* weights, or has them of another shape"):
            build("few.pth")
        with pytest.raises(ValueError, match="backbone: expected small or one of"):
            FasterRCNNModel.build(FasterRCNNOptions(backbone="vgg16"), None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"roi_op": "warp"}, "roi_op: expected 'pool' or 'align'"),
        ({"stride": 32}, "stride: expected 8 or 16"),
        ({"longer_size": 9}, "longer_size: expected at least image_size"),
        ({"frozen_stages": 6}, "frozen_stages: expected 0 to 5"),
        ({"anchor_sizes": []}, "anchor_sizes: expected positive numbers"),
        ({"proposals": 0}, "proposals: expected a positive integer"),
    ],
)
def test_a_config_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**wrong)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backbone_weights": "x.pth"}, "--backbone-weights needs the --backbone"),
        ({"backbone": "resnet18", "backbone_width": 3}, "--backbone-width 3 has no effect beside --backbone resnet18"),
        ({"flip": 2.0}, "--flip: expected a probability"),
        ({"pretrained": "x", "anchor_sizes": [3]}, "--anchor-sizes .* has no effect beside --pretrained"),
    ],
)
def test_wrong_flags(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FasterRCNNModel.build(FasterRCNNOptions(**given), None)


class TestTorchvision:
    def detector(self) -> FasterRCNN:
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Conv2d(3, 8, 5, stride=8, padding=2), nn.ReLU())
        backbone.out_channels = 8
        detector = FasterRCNN(
            backbone, min_size=48, max_size=96, box_head=TwoMLPHead(8 * 9, 24), box_predictor=FastRCNNPredictor(24, 4),
            rpn_anchor_generator=AnchorGenerator(((12, 24),), ((0.5, 1.0, 2.0),)),
            box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2), rpn_post_nms_top_n_test=30,
            box_score_thresh=0.01, box_detections_per_img=10**6,
        )  # fmt: skip
        for module in (
            detector.rpn.head.cls_logits,
            detector.rpn.head.bbox_pred,
            *detector.roi_heads.box_predictor.children(),
        ):
            nn.init.normal_(module.weight, std=0.5)
        return detector.eval()

    def test_regions_are_its_detections_with_their_features(self) -> None:
        detector = self.detector()
        provider = TorchvisionRegions(detector)
        images = noise((50, 40), (64, 90), (50, 40))
        found = provider.train().regions(images)
        for k, image in enumerate(images):
            with torch.no_grad():
                (expected,) = detector([image.permute(2, 0, 1) / 255])
            one = {name: values[k] for name, values in found.items()}
            equal(provider.regions([image]), {name: [value] for name, value in one.items()})
            assert one["features"].shape[1:] == (24,)
            assert one["probabilities"].shape[1:] == (4,)
            detections = {
                (int(label), round(float(score), 5)): box
                for label, score, box in zip(expected["labels"], expected["scores"], expected["boxes"], strict=True)
            }
            left = [
                (box, detections[int(label) + 1, round(float(score), 5)])
                for label, score, box in zip(one["labels"], one["scores"], one["boxes"], strict=True)
                if (int(label) + 1, round(float(score), 5)) in detections
            ]
            assert len(left) >= 5  # the others were dropped in every class
            assert all(torch.allclose(box, other, atol=1e-3) for box, other in left)
            assert float(one["scores"][0]) == pytest.approx(float(expected["scores"].max()), abs=1e-6)

    def test_one_stage_has_none(self) -> None:
        backbone = nn.Conv2d(3, 8, 3, stride=8)
        backbone.out_channels = 8
        with pytest.raises(TypeError, match="expected one of torchvision with box features, got RetinaNet"):
            TorchvisionRegions(RetinaNet(backbone, 3, anchor_generator=AnchorGenerator(((12,),), ((1.0,),))))


def test_features_are_those_of_the_box_that_was_pooled() -> None:
    """res5 and a mean of torchvision's own RoIAlign of the map, for each proposal."""
    model = tiny().eval()
    images, sizes = pad(noise((32, 32)))
    with torch.no_grad():
        (scored,) = model._scored(images, sizes)
        (group,) = model._groups(images, sizes)
        maps = model.backbone(group.images)
        proposals, _ = model._propose(group.images, maps, group.sizes)
        rows = torch.cat([torch.zeros(len(proposals[0]), 1), proposals[0]], dim=1)
        pooled = torchvision_roi_align(maps, rows, 3, 1 / 8, aligned=True)
        expected = model.backbone.layer4(pooled).mean(dim=(2, 3))
    assert torch.allclose(scored.features, expected, atol=1e-5)
