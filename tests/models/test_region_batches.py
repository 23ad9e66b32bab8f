"""Regions in batches: padding, places, what an image tower sees of a box, masking, and captions of other images."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from vlmfast.data import ImageTextDataset, RecordBoxes, Sample, load_tokenizer, open_features
from vlmfast.models.masked.lxmert import LXMERTModel, LXMERTOptions
from vlmfast.models.masked.visual_bert import VisualBERTModel, VisualBERTOptions
from vlmfast.models.region_batches import (
    ZEROED,
    RegionCollator,
    WholeImage,
    corners_and_area,
    generators_of,
    grid_boxes,
    mask_regions,
    mismatch,
    take_regions,
)
from vlmfast.models.region_tower import pool_boxes, small_resnet
from vlmfast.models.towers import tower_config


def sample(
    number: int, features: dict[str, Any] | None = None, size: tuple[int, int] = (20, 10), **more: Any
) -> Sample:
    image = torch.full((size[1], size[0], 3), number % 256, dtype=torch.uint8)
    return Sample(image, f"caption {number}", f"{number:02}", None, number, more, features)


def detected(rows: int, **more: Any) -> dict[str, Any]:
    boxes = torch.tensor([[2.0 * k, k, 2 * k + 4, k + 2] for k in range(rows)]).view(-1, 4)
    return {"boxes": boxes, "features": torch.arange(3.0 * rows).view(rows, 3) + 1, **more}


def test_ragged_regions_are_padded_and_their_boxes_are_shares_of_their_own_image() -> None:
    samples = [sample(0, detected(3)), sample(1, detected(1), size=(40, 20)), sample(2, detected(0))]
    batch = RegionCollator(None, 4, 36)(samples)
    assert batch["region_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(batch["region_boxes"][0, 1], torch.tensor([2 / 20, 1 / 10, 6 / 20, 3 / 10]))
    torch.testing.assert_close(batch["region_boxes"][1, 0], torch.tensor([0, 0, 4 / 40, 2 / 20]))
    assert batch["region_features"][0, 2].tolist() == [7, 8, 9]
    assert not batch["region_features"][1, 1:].any()
    assert not batch["region_boxes"][1, 1:].any()
    assert "pixel_values" not in batch
    assert RegionCollator(None, 4, 2)(samples)["region_mask"].sum(1).tolist() == [2, 1, 0]
    alone = RegionCollator(None, 4, 36)([sample(2, detected(0))])
    assert alone["region_features"].shape == (1, 1, 3)
    assert alone["region_mask"].tolist() == [[0]]


def test_a_detectors_word_on_the_images_size_is_taken() -> None:
    features = detected(1, image_size=torch.tensor([8, 4]))
    batch = RegionCollator(None, 4, 36)([Sample(None, "", "", None, 0, {}, features)])
    assert batch["region_boxes"][0, 0].tolist() == [0, 0, 0.5, 0.5]
    with pytest.raises(ValueError, match="expected 'image_size' of sample ''"):
        RegionCollator(None, 4, 36)([Sample(None, "", "", None, 0, {}, detected(1))])


def test_other_rows_are_cut_and_padded_alike() -> None:
    names = {"labels": torch.tensor([5, 6, 7]), "image_size": torch.tensor([20, 10])}
    samples = [sample(0, detected(3, **names)), sample(1, detected(1, labels=torch.tensor([8])))]
    collator = RegionCollator(None, 4, 2)
    labels = collator.labels(samples, "labels", -100)
    assert labels is not None
    assert labels.tolist() == [[5, 6], [8, -100]]
    assert collator.labels(samples, "attributes") is None


def test_a_grid_stands_for_regions_and_images_are_stretched() -> None:
    assert grid_boxes(2).tolist() == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    batch = RegionCollator(8, 2, 36)([sample(7), sample(9, {"boxes": torch.tensor([[0.0, 0, 10, 10]])})])
    assert batch["pixel_values"].shape == (2, 8, 8, 3)
    assert batch["pixel_values"][0].unique().tolist() == [7]
    assert batch["region_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["region_boxes"][1, 0].tolist() == [0, 0, 0.5, 1]


@pytest.mark.parametrize(
    ("side", "features", "says"),
    [
        (None, None, "expected 'boxes' and 'features' of sample '01'"),
        (None, {"boxes": torch.zeros(1, 4)}, "expected 'boxes' and 'features' of sample '01', got .'boxes'."),
        (8, detected(1), "got 'features' of width 3 too.*--region-dim"),
        (8, {"scores": torch.zeros(1)}, "expected 'boxes' of sample '01'"),
    ],
)
def test_features_of_another_kind_are_named(side: int | None, features: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RegionCollator(side, 2, 36)([sample(1, features)])


def test_the_area_is_of_the_whole_image() -> None:
    found = corners_and_area(torch.tensor([[0.25, 0.5, 0.75, 1.0], [0, 0, 0, 0]]))
    assert found.tolist() == [[0.25, 0.5, 0.75, 1, 0.25], [0, 0, 0, 0, 0]]


def test_a_box_is_seen_where_it_is() -> None:
    """The mean over a box of a map that is linear in x and y is its value at the box's centre."""
    y, x = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(8) + 0.5, indexing="ij")
    features = torch.stack([x / 8, y / 8])[None].double()
    boxes = torch.tensor([[[0.125, 0.25, 0.5, 0.875], [0.5, 0.5, 0.75, 0.625]]], dtype=torch.float64)
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    torch.testing.assert_close(pool_boxes(features, boxes), centres)


def test_regions_are_masked_as_often_as_they_should_be() -> None:
    rows, columns = 400, 40
    mask = torch.ones(rows, columns, dtype=torch.int64)
    mask[::2, 30:] = 0
    samples = [sample(k) for k in range(rows)]
    masked, source = mask_regions(mask, generators_of(samples), probability=0.15, zeroed=0.8, replaced=0.1)
    own = torch.arange(rows * columns).view(rows, columns)
    count, chosen = int(mask.sum()), int(masked.sum())
    assert not masked[mask == 0].any()
    assert (source == own)[~masked].all()
    assert abs(chosen / count - 0.15) < 4 * (0.15 * 0.85 / count) ** 0.5
    zeroed, kept = (source == ZEROED) & masked, (source == own) & masked
    swapped = masked & ~zeroed & ~kept
    for found, share in ((zeroed, 0.8), (swapped, 0.1), (kept, 0.1)):
        assert abs(int(found.sum()) / chosen - share) < 4 * (share * (1 - share) / chosen) ** 0.5
    places = source[swapped]
    assert (mask.flatten()[places] == 1).all()
    assert (places // columns != swapped.nonzero()[:, 0]).all()
    assert len(places.unique()) > 0.9 * len(places)

    features = torch.rand(rows, columns, 2) + 1
    seen = take_regions(features, source)
    assert not seen[zeroed].any()
    assert torch.equal(seen[~zeroed & ~swapped], features[~zeroed & ~swapped])
    assert torch.equal(seen[swapped], features.flatten(0, 1)[places])


def test_what_is_masked_follows_from_the_samples_seed_alone() -> None:
    mask = torch.ones(6, 20, dtype=torch.int64)
    samples = [sample(k) for k in range(6)]
    first, _ = mask_regions(mask, generators_of(samples))
    again, _ = mask_regions(mask[2:], generators_of(samples[2:]))
    assert torch.equal(first[2:], again)
    assert not torch.equal(first[0], first[1])


def test_without_another_image_nothing_is_replaced() -> None:
    mask = torch.ones(1, 200, dtype=torch.int64)
    masked, source = mask_regions(mask, generators_of([sample(3)]), probability=1, zeroed=0, replaced=1)
    assert masked.all()
    assert torch.equal(source[0], torch.arange(200))
    with pytest.raises(ValueError, match="zeroed and replaced"):
        mask_regions(mask, generators_of([sample(3)]), zeroed=0.9, replaced=0.2)


def test_half_of_the_captions_are_another_images() -> None:
    samples = [sample(k) for k in range(2000)]
    texts, matched = mismatch(samples, generators_of(samples))
    own = torch.tensor([int(text == each.caption) for text, each in zip(texts, samples, strict=True)])
    assert torch.equal(matched, own)
    assert abs(float(own.float().mean()) - 0.5) < 4 * 0.5 / 2000**0.5
    drawn = Counter(text for text, mine in zip(texts, own, strict=True) if not mine)
    assert max(drawn.values()) < 8  # of a thousand draws among 2000
    assert mismatch(samples, generators_of(samples)).texts == texts


def test_a_mismatch_is_never_a_true_caption() -> None:
    """Neither one of the sample's captions nor the same sample's under another caption; alone, it stays."""
    same = [sample(0, captions=["caption 0", "caption 1"]), sample(1), sample(0)]
    texts, matched = mismatch(same, generators_of(same), probability=1.0)
    assert texts == ["caption 0", "caption 0", "caption 1"]
    assert matched.tolist() == [1, 0, 0]
    alone = mismatch([sample(5)], generators_of([sample(5)]), probability=1.0)
    assert alone.texts == ["caption 5"]
    assert alone.matched.tolist() == [1]


def test_the_objects_of_records_are_features(tmp_path: Path) -> None:
    records = [
        {"objects": [{"box": [1, 2, 3, 4], "name": "dog", "attributes": ["red", "big"], "confidence": 0.5}]},
        {"objects": [{"box": [0, 0, 5, 5], "name": "cat"}, {"name": "no box"}, {"box": [0, 1, 1, 2], "name": "dog"}]},
        {},
    ]
    for number, record in enumerate(records):
        Image.new("RGB", (6, 6)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.json").write_text(json.dumps({"caption": "x", **record}))
    dataset = ImageTextDataset(tmp_path, transform=WholeImage())
    dataset.features = open_features("objects", dataset)
    assert isinstance(dataset.features, RecordBoxes)
    assert dataset.features.names == ["cat", "dog"]
    first, second, third = (dataset[k].features for k in range(3))
    assert first["boxes"].tolist() == [[1, 2, 3, 4]]
    assert (first["labels"].tolist(), first["scores"].tolist()) == ([1], [0.5])
    assert (first["attributes"].tolist(), first["attribute_scores"].tolist()) == ([0], [1.0])
    assert second["labels"].tolist() == [0, 1]
    assert second["attribute_scores"].tolist() == [0.0, 0.0]
    assert third["boxes"].shape == (0, 4)
    assert dataset[0].image.shape == (6, 6, 3)
    batch = RegionCollator(6, 2, 36)([dataset[0], dataset[1], dataset[2]])
    assert batch["region_mask"].tolist() == [[1, 0], [1, 1], [0, 0]]
    assert np.allclose(batch["region_boxes"][0, 0], [1 / 6, 2 / 6, 3 / 6, 4 / 6])


def test_a_towers_weights_are_taken_and_stay(tmp_path: Path) -> None:
    """Of a ResNet of transformers, and of a checkpoint of a model that reads regions; another kind is refused."""
    words = load_tokenizer()
    words.add_special_tokens({"mask_token": "<|mask|>"})
    torch.manual_seed(3)
    resnet = transformers.ResNetModel(tower_config("", small_resnet(16), transformers.ResNetConfig))
    resnet.save_pretrained(tmp_path / "resnet")
    small = {"text_width": 64, "text_layers": 1}
    first = VisualBERTModel.build(VisualBERTOptions(vision_tower=str(tmp_path / "resnet"), **small), words)
    first.save_pretrained(tmp_path / "first")
    options = LXMERTOptions(vision_tower=str(tmp_path / "first"), region_layers=1, cross_layers=1, **small)
    second = LXMERTModel.build(options, words)
    expected = resnet.state_dict()
    for model in (first, second, VisualBERTModel.from_pretrained(tmp_path / "first")):
        model.train()
        found = model.region_tower.tower.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert not any(p.requires_grad for p in model.region_tower.parameters())
        assert not any(module.training for module in model.region_tower.modules())
        assert model.config.region_tower_frozen
    assert second.config.visual_feat_loss  # a frozen tower's features may be predicted
    own = VisualBERTModel.build(VisualBERTOptions(tower_width=16, **small), words).train()
    assert all(p.requires_grad for p in own.parameters())
    VisualBERTModel.build(VisualBERTOptions(region_dim=8, **small), words).save_pretrained(tmp_path / "features")
    with pytest.raises(ValueError, match=r"expected a model with an image tower, got .*features, which reads features"):
        VisualBERTModel.build(VisualBERTOptions(vision_tower=str(tmp_path / "features"), **small), words)
    with pytest.raises(ValueError, match="--tower-width 16 has no effect beside --vision-tower"):
        VisualBERTModel.build(VisualBERTOptions(vision_tower="x", tower_width=16), words)
