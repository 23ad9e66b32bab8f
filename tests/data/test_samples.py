"""Records, several captions, required fields, interleaved documents, features beside or in the place of images."""

import dataclasses
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vlmfast.data import (
    Collator,
    EpochSampler,
    ImageTextDataset,
    eval_transform,
    load_tokenizer,
    pad_features,
    train_transform,
)
from vlmfast.data.dataset import DRAWS, IMAGE_PLACE, SAMPLED, SKIPPED
from vlmfast.data.images import MAX_PIXELS
from vlmfast.data.records import FIELDS, IMAGE_EXTENSIONS

RECORD = {"caption": "a cat", "category": "animal", "question": "what?", "answers": ["cat"] * 10, "label": 0,
          "objects": [{"box": [0, 0, 4, 4], "name": "cat"}], "extra": {"deep": [1, None]}}  # fmt: skip


def open_dataset(source, **options):
    return ImageTextDataset(source, **{"transform": eval_transform(8), **options})


def as_source(kind, members, tmp_path, write_tar):
    """The same files as a shard or as a folder."""
    if kind == "shard":
        return write_tar("a.tar", members)
    for name, data in members.items():
        (tmp_path / name).write_bytes(data)
    return str(tmp_path)


@pytest.mark.parametrize("kind", ["shard", "folder"])
def test_the_record_is_the_whole_json_and_a_txt_wins_the_caption(kind, tmp_path, write_tar, png):
    structured = json.dumps(RECORD).encode()
    members = {"0.png": png(0), "0.json": structured, "1.png": png(1), "1.txt": b"plain"}
    members |= {"2.png": png(2), "2.txt": b"both", "2.json": structured}
    dataset = open_dataset(as_source(kind, members, tmp_path, write_tar))
    samples = [dataset[n] for n in range(3)]
    assert [sample.record for sample in samples] == [RECORD, {}, RECORD]
    assert [sample.caption for sample in samples] == ["a cat", "plain", "both"]
    assert [sample.category for sample in samples] == ["animal", None, "animal"]
    assert [dataset.record(n) for n in range(3)] == [RECORD, {}, RECORD]
    assert all(sample.features is None and sample.images == [] for sample in samples)


def test_the_record_of_a_table_is_its_other_columns(tmp_path, png):
    (tmp_path / "a.png").write_bytes(png(0))
    rows = 'path,caption,category,answers,label,question\na.png,x,c,"[""yes"", ""no""]",1,[why?]\na.png,y,,,,\n'
    (tmp_path / "a.csv").write_text(rows)
    dataset = open_dataset(tmp_path / "a.csv")
    assert dataset[0].record == {"category": "c", "answers": ["yes", "no"], "label": 1, "question": "[why?]"}
    assert (dataset[1].record, dataset[1].caption) == ({}, "y")


def test_a_table_needs_no_caption_where_none_is_required(tmp_path, png):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "a.tsv").write_text("path\tquestion\na.png\twhy?\na.png\t\n")
    dataset = open_dataset(tmp_path / "a.tsv", requires=["question"])
    assert [dataset[0].caption, dataset[0].record["question"], dataset[1]] == ["", "why?", None]
    assert dataset.skipped() == {"missing question": 1}


def test_training_draws_one_of_several_captions(write_tar, png):
    record = {"captions": ["one", " two ", "", 3, "three"]}
    members = {"0.png": png(0), "0.json": json.dumps(record).encode()}
    dataset = open_dataset(write_tar("a.tar", members))
    drawn = [dataset[epoch, 0].caption for epoch in range(40)]
    assert set(drawn) == {"one", "two", "three"}
    assert drawn == [dataset[epoch, 0].caption for epoch in range(40)]
    assert [dataset[0].caption, dataset.metadata(0)[1]] == ["one", "one"]
    other = open_dataset(write_tar("a.tar", members), seed=1)
    assert drawn != [other[epoch, 0].caption for epoch in range(40)]


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("caption", "a cat", [None, "", " ", 3, "\ud83d"]),
        ("category", "animal", [None, "", " ", [], "\ud83d"]),
        ("question", "what?", [None, "", " ", ["what?"], 7, "\ud83d"]),
        ("answers", ["yes"], [None, [], "yes", {}]),
        ("label", 0, [None, "", "1", True, [0]]),
        ("objects", [{}], [None, [], "cat", {"a": 1}]),
        ("own", 0, [None, "", [], {}]),
        ("own", False, [None]),
    ],
)
def test_a_required_field_that_is_missing_empty_or_of_another_type_is_counted(write_tar, png, field, good, bad):
    records = [{"caption": "c", field: good}, {"x": 1}, *({"x": 1, field: value} for value in bad)]
    members = {}
    for n, record in enumerate(records):
        members |= {f"{n}.png": png(n), f"{n}.json": json.dumps(record).encode()}
    dataset = open_dataset(write_tar("a.tar", members), requires=(field,))
    assert [dataset[n] is not None for n in range(len(records))] == [True] + [False] * (1 + len(bad))
    counted = dataset.skipped()
    assert counted[f"missing {field}"] + counted[f"empty {field}"] == 1 + len(bad) == sum(counted.values())
    assert pickle.loads(pickle.dumps(dataset))[0].record[field] == good


def test_nothing_need_be_required(write_tar, png):
    members = {"0.png": png(0), "1.png": png(1), "1.json": b"{}", "2.png": png(2), "2.json": b"{", "3.png": png(3)[:40]}
    dataset = open_dataset(write_tar("a.tar", members), requires=())
    assert [dataset[n] and dataset[n].caption for n in range(4)] == ["", "", None, None]
    assert dataset.skipped() == {"corrupt record": 1, "corrupt image": 1}


@pytest.mark.parametrize("requires", ["caption", [3], None])
def test_requires_is_a_sequence_of_names(requires):
    with pytest.raises(TypeError, match="requires"):
        open_dataset("unused", requires=requires)


@pytest.mark.parametrize("kind", ["shard", "folder"])
def test_numbered_images_of_a_document(kind, tmp_path, write_tar, png):
    text = "first <image> then <image> and <image>"
    members = {"0.json": json.dumps({"text": text}).encode(), "0.10.png": png(3), "0.0.png": png(1), "0.2.png": png(2)}
    members |= {"1.png": png(4), "1.json": b'{"text": "no place"}', "1.0.png": png(5)}
    members |= {"2.0.png": png(6), "2.json": b'{"text": "<image> <image>"}'}
    members |= {"3.0.png": png(7), "3.1.png": png(8)[:40], "3.json": b'{"caption": "no text"}'}
    dataset = open_dataset(as_source(kind, members, tmp_path, write_tar), requires=())
    order = [dataset._pairs.key(n) for n in range(len(dataset))]
    document, plain = dataset[order.index("0")], dataset[order.index("1")]
    pictures = [open_dataset(write_tar("b.tar", {"k.png": png(n), "k.txt": b"x"}))[0].image for n in (1, 2, 3, 4)]
    assert len(document.images) == 3
    assert all(torch.equal(a, b) for a, b in zip(document.images, pictures, strict=False))
    assert torch.equal(document.image, pictures[0])
    assert document.record["text"] == text
    assert plain.images == []
    assert torch.equal(plain.image, pictures[3])
    assert [dataset[order.index(key)] for key in "23"] == [None, None]
    assert {name: count for name, count in dataset.skipped().items() if name != "missing caption"} == {
        "images unlike places": 1, "corrupt image": 1
    }  # fmt: skip


@pytest.fixture
def pairs(write_tar, png):
    members = {}
    for n in range(4):
        members |= {f"{n}.png": png(n), f"{n}.txt": b"caption"}
    return write_tar("pairs.tar", members)


def test_features_beside_and_in_the_place_of_the_image(pairs):
    regions = [{"boxes": torch.ones(n, 4), "whole": torch.full((3,), float(n))} for n in range(1, 4)]
    dataset = open_dataset(pairs)
    dataset.features = [*regions, None]
    beside = [dataset[n] for n in range(4)]
    assert [sample.features for sample in beside[:3]] == regions
    assert beside[3] is None
    assert beside[0].image.shape == (8, 8, 3)
    dataset.transform = None
    assert [dataset[n].image for n in range(3)] == [None] * 3
    assert [dataset[n].features for n in range(3)] == regions
    dataset.features = [torch.tensor([float(n)]) for n in range(4)]
    assert [dataset[n].image.item() for n in range(4)] == [0, 1, 2, 3]
    assert dataset[0].features is None


def test_the_collator_stacks_features_by_name_and_pads_where_asked(pairs):
    dataset = open_dataset(pairs)
    dataset.features = [{"whole": torch.full((3,), float(n)), "rows": torch.full((n, 2), 1.0)} for n in range(4)]
    samples = [dataset[n] for n in range(4)]
    collator = Collator(load_tokenizer(), max_length=8)
    with pytest.raises(ValueError, match=r"features: expected 'rows' of one shape, got .*; see pad_features"):
        collator(samples)
    rows, mask = pad_features(samples, "rows")
    assert (rows.shape, mask.shape) == ((4, 3, 2), (4, 3))
    assert mask.sum(1).tolist() == [0, 1, 2, 3]
    assert torch.equal(rows, mask[..., None].expand(-1, -1, 2).float())
    for sample in samples:
        del sample.features["rows"]
    batch = collator(samples)
    assert set(batch) == {"whole", "pixel_values", "input_ids", "attention_mask"}
    assert batch["whole"][:, 0].tolist() == [0, 1, 2, 3]
    dataset.transform = None
    with pytest.raises(ValueError, match=r"features: expected 'other' of sample '0', got \['whole'\]"):
        pad_features([dataset[0]], "other")
    assert "pixel_values" not in Collator(load_tokenizer(), max_length=8)([dataset[1]])


class TestBatchesOfNothingUsable:
    """22 of 24 pairs are damaged."""

    @pytest.fixture
    def damaged(self, write_tar, png):
        members = {}
        for n in range(24):
            members |= {f"{n:02}.png": png(n) if n in (5, 17) else b"damaged", f"{n:02}.txt": f"caption {n}".encode()}
        return write_tar("damaged.tar", members)

    @staticmethod
    def batches(dataset, workers, epochs=(0, 1)):
        sampler = EpochSampler(len(dataset), seed=3)
        loader = DataLoader(dataset, sampler=sampler, batch_size=5, collate_fn=list, num_workers=workers)
        found = []
        for epoch in epochs:
            sampler.set_epoch(epoch)
            found += [[sample.caption for sample in batch if sample is not None] for batch in loader]
        return found

    def test_are_completed_the_same_way_by_any_number_of_workers_and_after_a_resume(self, damaged):
        dataset = open_dataset(damaged, min_batch=2)
        whole = self.batches(dataset, 0)
        assert [len(batch) for batch in whole] == [2] * 10
        assert all(len(set(batch)) == 2 for batch in whole)
        assert dataset.stand_ins() == 2
        assert dataset.skipped() == {"corrupt image": 22}
        assert self.batches(open_dataset(damaged, min_batch=2), 2) == whole
        assert self.batches(open_dataset(damaged, min_batch=2), 0, epochs=(1,)) == whole[5:]

    def test_stay_as_they_are_unless_asked_for_and_in_evaluation(self, damaged):
        assert sum(map(len, self.batches(open_dataset(damaged), 0, epochs=(0,)))) == 2
        dataset = open_dataset(damaged, min_batch=2)
        assert dataset.__getitems__([0, 1]) == [None, None]
        assert dataset.stand_ins() == 0

    def test_a_last_batch_of_one_gets_another(self, write_tar, png):
        members = {}
        for n in range(5):
            members |= {f"{n}.png": png(n), f"{n}.txt": f"caption {n}".encode()}
        batches = self.batches(open_dataset(write_tar("a.tar", members), min_batch=2), 0)
        assert [len(batch) for batch in batches] == [5, 5]
        sampled = open_dataset(write_tar("a.tar", members), min_batch=2).__getitems__([(0, 3)])
        assert len({sample.key for sample in sampled}) == 2

    @pytest.mark.parametrize(("usable", "expected"), [(1, 1), (2, 2)])
    def test_are_smaller_where_there_is_nothing_else(self, write_tar, png, usable, expected):
        members = {}
        for n in range(3):
            members |= {f"{n}.png": png(n) if n < usable else b"", f"{n}.txt": b"x"}
        dataset = open_dataset(write_tar("a.tar", members), min_batch=3)
        assert sum(sample is not None for sample in dataset.__getitems__([(0, 2)])) == expected

    def test_end_a_run_only_where_nothing_can_be_used(self, write_tar):
        members = {f"{n}.{kind}": b"x" for n in range(3) for kind in ("png", "txt")}
        dataset = open_dataset(write_tar("a.tar", members), min_batch=1)
        with pytest.raises(ValueError, match=r"neither the 1 samples of a batch nor 2 others can be used; .*image': 3"):
            dataset.__getitems__([(0, 1)])

    def test_min_batch_is_not_negative(self):
        with pytest.raises(ValueError, match="min_batch: expected at least 0, got -1"):
            open_dataset("unused", min_batch=-1)


def test_the_page_names_every_field_reason_and_the_limit_of_pixels():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    reasons = [*SKIPPED, "missing image", "second image", "duplicate key", "truncated shard", "link to a folder above"]
    for name in (*FIELDS, *reasons, *IMAGE_EXTENSIONS, IMAGE_PLACE, f"{MAX_PIXELS:,}", f"{SAMPLED:,}", f"{DRAWS:,}"):
        assert name in page, name


def test_a_jpeg_comes_at_the_fraction_that_its_own_crop_allows(write_tar):
    """Every crop of 880 pixels has 200 at half of the size; a quarter takes one of 800."""
    file = io.BytesIO()
    Image.effect_noise((880, 880), 50).convert("RGB").save(file, "JPEG")
    transform, sizes = train_transform(200), []

    @dataclasses.dataclass
    class Watched:
        min_side_of = staticmethod(transform.min_side_of)

        def __call__(self, image, generator):
            left, top, right, bottom = transform._crop(1, 1, *generator.random(8)[:4])
            sizes.append((image.width, min(right - left, bottom - top)))
            return torch.zeros(1)

    dataset = ImageTextDataset(write_tar("a.tar", {"0.jpg": file.getvalue(), "0.txt": b"x"}), transform=Watched())
    for epoch in range(40):
        dataset[epoch, 0]
    assert {width for width, _ in sizes} == {440, 220}
    assert all(width == (220 if side * 880 >= 800 else 440) for width, side in sizes)
