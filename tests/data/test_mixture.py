"""Data sets in turn, and images or texts alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmfast.data import ImagesAlone, ImageTextDataset, Mixture, TextsAlone, eval_transform
from vlmfast.data.mixture import RoundRobinSampler


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(6):
        Image.new("RGB", (8, 8), (40 * k, 0, 0)).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(f"picture {k}")
    return tmp_path


@pytest.fixture
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "lines.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\n  two words \r\nnot \xff utf-8\n   \nlast")
    return path


def mixture(folder: Path, lines: Path) -> Mixture:
    pairs = ImageTextDataset(folder, transform=eval_transform(8), min_batch=1)
    return Mixture([pairs, ImagesAlone(folder, transform=eval_transform(8)), TextsAlone(lines)])


def test_lines_are_texts(lines: Path) -> None:
    texts = TextsAlone(lines)
    assert [sample and sample.caption for sample in (texts[k] for k in range(len(texts)))] == [
        "one", "two words", None, "last",
    ]  # fmt: skip
    assert texts[0].image is None
    assert texts.skipped() == Counter({"missing caption": 1})
    before = texts.fingerprint()
    lines.write_bytes(lines.read_bytes().replace(b"two", b"few"))
    assert TextsAlone(lines).fingerprint() != before
    assert ImageTextDataset(lines, transform=eval_transform(8))[0] is None  # a line has no image
    lines.write_text("\n \n")
    with pytest.raises(ValueError, match="has no lines"):
        TextsAlone(lines)


def test_images_alone_have_no_caption(folder: Path) -> None:
    sample = ImagesAlone(folder, transform=eval_transform(8))[3]
    assert sample is not None
    assert sample.caption == ""
    assert sample.image is not None


def test_every_batch_is_of_one_data_set_and_they_take_turns(folder: Path, lines: Path) -> None:
    data = mixture(folder, lines)
    order = list(data.sampler(2, seed=0))
    assert len(order) == len(data.sampler(2, seed=0)) == 3 * 6
    kinds = []
    for start in range(0, len(order), 2):
        samples = [sample for sample in data.__getitems__(order[start : start + 2]) if sample]
        kinds.append({(sample.image is not None, bool(sample.caption)) for sample in samples})
    assert [kind for kind in kinds if kind] == [{(True, True)}, {(True, False)}, {(False, True)}] * 3
    with pytest.raises(ValueError, match="positions: expected those of one data set"):
        data.__getitems__([order[0], order[2]])
    assert data.min_batch == 1
    assert data.skipped() == Counter({"missing caption": 1})
    assert len(data.fingerprint()) == 64
    assert Mixture(data.parts[:2]).fingerprint() != data.fingerprint()


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(epoch: int, seed: int = 0) -> list[tuple[int, int]]:
        sampler = RoundRobinSampler([10, 4, 25], 3, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1) == order(1)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=1)
    blocks = np.array(order(0)).reshape(3, 3, 3, 2)  # rounds, parts, batch
    first, second, third = (blocks[:, part, :, 1].ravel() for part in range(3))
    assert len(set(first)) == 9
    assert set(first) <= set(range(10))
    assert Counter(second.tolist()).most_common()[-1][1] >= 2  # 9 draws of 4: all, all, and one more
    assert set(second) == set(range(10, 14))
    assert len(set(third)) == 9
    assert set(third) <= set(range(14, 39))
    numbers = [blocks[:, 1, :, 0].ravel().tolist(), np.array(order(1)).reshape(3, 3, 3, 2)[:, 1, :, 0].ravel().tolist()]
    assert numbers == [[0] * 4 + [1] * 4 + [2], [3] * 4 + [4] * 4 + [5]]  # augmentation is drawn anew in each round


def test_two_processes_see_one_kind_in_a_step(folder: Path, lines: Path) -> None:
    """As accelerate shards batches: each process takes every other one."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    data = mixture(folder, lines)
    steps = [
        list(BatchSamplerShard(BatchSampler(data.sampler(4, seed=0), 2, drop_last=True), 2, rank)) for rank in range(2)
    ]
    for one, other in zip(*steps, strict=True):
        parts = {int(np.searchsorted(data.offsets, index, side="right")) for _, index in one + other}
        assert len(parts) == 1


@pytest.mark.parametrize(
    ("lengths", "batch", "seed", "message"),
    [
        ([3, 9], 4, 0, "lengths: expected one batch of 4 in the first part"),
        ([], 4, 0, "lengths"),
        ([4], 0, 0, "batch, seed"),
        ([4], 1, -1, "batch, seed"),
    ],
)
def test_wrong_numbers_are_named(lengths: list[int], batch: int, seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoundRobinSampler(lengths, batch, seed=seed)
    with pytest.raises(ValueError, match="parts: expected at least one"):
        Mixture([])


def test_parts_augment_by_round(folder: Path) -> None:
    from vlmfast.data import train_transform

    for k in range(6):
        pixels = np.random.default_rng(k).integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    images = ImagesAlone(folder, transform=train_transform(8))
    first, again, other = images[0, 2], images[0, 2], images[1, 2]
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, other.image)
