import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vlmfast.data import EpochSampler, ImageTextDataset, Sample, eval_transform, train_transform
from vlmfast.data import dataset as dataset_module


@pytest.fixture
def faulty(write_tar, png, tmp_path):
    """Paths of two shards: 24 pairs, of which 8 are good and 16 are faulty in eight ways; the second is cut short."""
    jpeg = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(jpeg, "JPEG")
    members = {}
    for n in range(0, 24, 3):
        members |= {f"{n}.png": png(n, (20, 16)), f"{n}.txt": f"caption {n}".encode()}
    members |= {"1.png": png(1)[:60], "1.txt": b"truncated image"}
    members |= {"2.jpg": jpeg.getvalue()[:400], "2.txt": b"truncated image"}
    members |= {"4.webp": b"<html>not found</html>", "4.txt": b"no image at all"}
    members |= {"5.png": b"", "5.txt": b"no bytes"}
    members |= {"7.png": png(7), "7.txt": b""}
    members |= {"8.png": png(8), "8.txt": b" \n\t "}
    members |= {"10.png": png(10), "10.json": b'{"caption": "  "}'}
    members |= {"11.png": png(11)}
    members |= {"13.png": png(13), "13.json": b'{"title": "x"}'}
    members |= {"14.png": png(14), "14.json": b'{"caption": "x"'}
    members |= {"16.png": png(16), "16.json": b'{"caption": null}'}
    members |= {"17.png": png(17), "17.json": b'["caption"]'}
    members |= {"19.png": png(19), "19.json": b'{"caption": ["x"]}'}
    members |= {"20.png": png(20), "20.txt": b"caf\xe9"}
    members |= {"22.png": png(22), "22.json": b'{"caption": "\\ud83d"}'}
    members |= {"23.png": png(23), "23.json": b"[" * 100000}
    paths = [write_tar(f"s{n}.tar", dict(list(members.items())[n * 24 : n * 24 + 24])) for n in range(2)]
    with open(paths[1], "r+b") as file:
        file.truncate(len(file.read().rstrip(b"\0")))
    return paths


EXPECTED = {"corrupt image": 4, "empty caption": 3, "missing caption": 9, "truncated shard": 1}


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (2, "spawn")])
def test_faults_are_skipped_and_counted_once_wherever_they_are_read(faulty, workers, context):
    dataset = ImageTextDataset(faulty, transform=train_transform(12, flip=0.5), seed=5)
    assert len(dataset) == 24
    assert dataset[0] is not None  # opens the first shard before workers fork
    assert dataset.skipped() == {"truncated shard": 1}
    sampler = EpochSampler(len(dataset), seed=5)
    loader = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=4,
        collate_fn=list,
        num_workers=workers,
        multiprocessing_context=context,
        persistent_workers=workers > 0,
    )
    for epoch in range(2):
        sampler.set_epoch(epoch)
        samples = [sample for batch in loader for sample in batch]
        assert dataset.skipped() == EXPECTED
        alone = ImageTextDataset(faulty, transform=train_transform(12, flip=0.5), seed=5)
        for position, sample in zip(sampler, samples, strict=True):
            expected = alone[position]
            assert (sample is None) == (expected is None)
            if sample is not None:
                assert torch.equal(sample.image, expected.image)
                assert (sample.key, sample.caption) == (expected.key, expected.caption)
        assert sum(sample is not None for sample in samples) == 8


def test_counts_serialise_and_belong_to_one_dataset(faulty):
    dataset = ImageTextDataset(faulty, transform=eval_transform(12))
    for index in range(len(dataset)):
        dataset[index]
    assert json.loads(json.dumps(dataset.skipped())) == EXPECTED
    assert ImageTextDataset(faulty, transform=eval_transform(12)).skipped() == {"truncated shard": 1}


@pytest.fixture
def dataset(write_tar, png):
    members = {}
    for n in range(6):
        members |= {f"{n}.png": png(n, (40, 32)), f"{n}.txt": f"caption {n}".encode()}
    return ImageTextDataset(write_tar("a.tar", members), transform=train_transform(16), seed=1)


def test_augmentation_is_a_function_of_seed_epoch_and_index(dataset):
    first = dataset[0, 2].image
    assert torch.equal(first, dataset[2].image)  # epoch 0
    dataset[4, 5], dataset[1]
    assert torch.equal(first, dataset[0, 2].image)
    assert not torch.equal(first, dataset[1, 2].image)
    other = pickle.loads(pickle.dumps(dataset))
    other.seed = 2
    assert not torch.equal(first, other[0, 2].image)


def test_two_indices_of_one_image_are_augmented_apart(write_tar, png):
    same = png(0, (40, 32))
    path = write_tar("a.tar", {"0.png": same, "0.txt": b"x", "1.png": same, "1.txt": b"x"})
    dataset = ImageTextDataset(path, transform=train_transform(16))
    assert not torch.equal(dataset[0].image, dataset[1].image)


def test_a_sample_is_what_was_written(write_tar, png):
    path = write_tar("a.tar", {"k.png": png(3), "k.json": b'{"caption": "a", "category": "b"}'})
    sample = ImageTextDataset(path, transform=eval_transform(8))[0]
    assert isinstance(sample, Sample)
    assert (sample.caption, sample.key, sample.category) == ("a", "k", "b")
    np.testing.assert_array_equal(sample.image, np.asarray(Image.open(io.BytesIO(png(3)))))


def test_any_callable_is_a_transform(write_tar, png):
    path = write_tar("a.tar", {"k.png": png(3), "k.txt": b"x"})
    dataset = ImageTextDataset(path, transform=lambda image, generator: torch.tensor(np.array(image)[:2]))
    assert dataset[0].image.shape == (2, 8, 3)


def test_an_error_of_the_transform_is_not_taken_for_a_corrupt_image(write_tar, png):
    def broken(image, generator):
        raise ValueError("a bug")

    path = write_tar("a.tar", {"k.png": png(3), "k.txt": b"x"})
    with pytest.raises(ValueError, match="a bug"):
        ImageTextDataset(path, transform=broken)[0]


def test_pickling_a_dataset_in_use(dataset):
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy) == 6
    assert all(torch.equal(copy[n].image, dataset[n].image) for n in range(6))
    assert copy.metadata(5) == ("5", "caption 5", None)


def test_relative_paths_survive_a_change_of_folder(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = ImageTextDataset("a.tar", transform=eval_transform(8))
    monkeypatch.chdir("/")
    assert relative[0].caption == "caption 0"


def test_metadata_does_not_decode(faulty):
    dataset = ImageTextDataset(faulty, transform=eval_transform(8))
    captions = {dataset.metadata(n)[0]: dataset.metadata(n)[1] for n in range(24)}
    assert captions["4"] == "no image at all"
    assert captions["7"] is None
    assert captions["11"] is None
    assert dataset.skipped() == {"truncated shard": 1}


@pytest.mark.parametrize("index", [-1, 6])
def test_an_index_out_of_range_raises(dataset, index):
    with pytest.raises(IndexError, match=f"index: expected 0 to 5, got {index}"):
        dataset[index]
    with pytest.raises(IndexError, match=f"index: expected 0 to 5, got {index}"):
        dataset.metadata(index)


def test_a_negative_seed_is_refused(dataset):
    with pytest.raises(ValueError, match="seed: expected at least 0, got -1"):
        ImageTextDataset(".", transform=eval_transform(8), seed=-1)


def test_keywords_stand_for_the_caption_as_often_as_asked(write_tar, png):
    members = {}
    for n in range(200):
        record = {"caption": f"caption {n}", "keywords": ["red", " round ", "", 7, "fruit"] if n % 2 else "red"}
        members |= {f"{n}.png": png(n), f"{n}.json": json.dumps(record).encode()}
    path = write_tar("k.tar", members)

    def captions(keywords, epoch=0):
        dataset = ImageTextDataset(path, transform=train_transform(8), keywords=keywords)
        return [dataset[epoch, n].caption for n in range(200)]

    plain, always, half = captions(0.0), captions(1.0), captions(0.5)
    assert plain == [f"caption {n}" for n in range(200)]
    assert always[::2] == plain[::2]  # what is no list of words is none
    assert {frozenset(text.split()) for text in always[1::2]} == {
        frozenset(words) for words in ({"red"}, {"round"}, {"fruit"}, {"red", "round"}, {"red", "fruit"},
                                       {"round", "fruit"}, {"red", "round", "fruit"})
    }  # fmt: skip
    assert len(set(always[1::2])) > 7  # orders differ
    assert 30 < sum(a != b for a, b in zip(plain, half, strict=True)) < 70
    assert captions(0.5) == half != captions(0.5, epoch=1)
    dataset = ImageTextDataset(path, transform=train_transform(8), keywords=1.0)
    image = ImageTextDataset(path, transform=train_transform(8))[0, 1].image
    assert torch.equal(dataset[0, 1].image, image)  # the augmentation stays what it was


@pytest.mark.parametrize("keywords", [-0.1, 1.5])
def test_keywords_is_a_probability(write_tar, png, keywords):
    with pytest.raises(ValueError, match="keywords: expected a probability"):
        ImageTextDataset(write_tar("a.tar", {}), transform=train_transform(8), keywords=keywords)


def test_the_image_fingerprint_is_of_keys_and_images(write_tar, png, tmp_path):
    members = {f"{n}.{kind}": png(n) if kind == "png" else b"x" for n in range(3) for kind in ("png", "txt")}

    def fingerprint(**changes):
        return ImageTextDataset(
            write_tar("a.tar", {**members, **changes}), transform=eval_transform(8)
        ).image_fingerprint()

    same = fingerprint()
    assert fingerprint(**{"1.txt": b"another caption"}) == same
    assert fingerprint(**{"1.png": png(7)}) != same
    assert fingerprint(**{"1.png": png(1) + b"\0"}) != same
    renamed = {name.replace("2.", "4."): data for name, data in members.items()}
    assert ImageTextDataset(write_tar("b.tar", renamed), transform=eval_transform(8)).image_fingerprint() != same
    for name, data in members.items():
        (tmp_path / name).write_bytes(data)
    assert ImageTextDataset(str(tmp_path), transform=eval_transform(8)).image_fingerprint() == same
    (tmp_path / "pairs.csv").write_text("path,caption\n0.png,x\n1.png,x\n2.png,x\n")
    table = ImageTextDataset(str(tmp_path / "pairs.csv"), transform=eval_transform(8))
    assert (
        table.image_fingerprint()
        == ImageTextDataset(str(tmp_path / "pairs.csv"), transform=eval_transform(4)).image_fingerprint()
    )
    (tmp_path / "1.png").write_bytes(png(5))
    assert table.image_fingerprint() != same


def test_the_fingerprint_is_of_names_sizes_and_contents(write_tar, png, tmp_path):
    members = [{f"{n}.png": png(n), f"{n}.txt": b"x", f"{n}.json": b'{"label": 1}'} for n in range(3)]
    paths = [write_tar(f"s{n}.tar", shard) for n, shard in enumerate(members)]

    def fingerprint(paths):
        return ImageTextDataset(paths, transform=eval_transform(8)).fingerprint()

    same = fingerprint(paths)
    assert fingerprint(paths) == same
    assert fingerprint(paths[:2]) != same
    assert fingerprint([paths[1], paths[0], paths[2]]) != same
    for name, data in (("1.txt", b"y"), ("1.json", b'{"label": 2}'), ("1.png", png(1)[:-1] + b"?")):
        write_tar("s1.tar", {**members[1], name: data})
        assert fingerprint(paths) != same, name
    write_tar("s1.tar", members[1])
    assert fingerprint(paths) == same
    (tmp_path / "elsewhere").mkdir()
    moved = [str((tmp_path / f"s{n}.tar").rename(tmp_path / "elsewhere" / f"s{n}.tar")) for n in range(3)]
    assert fingerprint(moved) == same
    (tmp_path / "elsewhere" / "s2.tar").rename(tmp_path / "elsewhere" / "t2.tar")
    assert fingerprint([*moved[:2], tmp_path / "elsewhere" / "t2.tar"]) != same


def test_the_fingerprint_reads_a_sample_of_every_shard_however_few_it_reads(write_tar, png, monkeypatch):
    monkeypatch.setattr(dataset_module, "SAMPLED", 2)
    members = [{f"{n}.png": png(0), f"{n}.txt": b"x", f"z{n}.png": png(0), f"z{n}.txt": b"x"} for n in range(6)]
    paths = [write_tar(f"s{n}.tar", shard) for n, shard in enumerate(members)]
    dataset = ImageTextDataset(paths, transform=eval_transform(8))
    read = []
    image = dataset._pairs.image
    dataset._pairs.image = lambda index: (read.append(index), image(index))[1]
    same = dataset.fingerprint()
    assert read == [0, 2, 4, 6, 8, 10]
    for n in range(6):
        write_tar(f"s{n}.tar", {**members[n], f"{n}.txt": b"y"})  # of the same size
        assert ImageTextDataset(paths, transform=eval_transform(8)).fingerprint() != same
        write_tar(f"s{n}.tar", members[n])
