import io
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import tracemalloc

import numpy as np
import pytest
import torch

from vlmfast.data import (
    Collator,
    FeatureCache,
    ImageTextDataset,
    cache_features,
    eval_transform,
    load_tokenizer,
    open_features,
    train_transform,
)
from vlmfast.data import feature_cache as module

SIDE = 8


@pytest.fixture
def members(png):
    """Ten pairs; the image of number 3 and the caption of number 5 cannot be used."""
    members = {}
    for n in range(10):
        members |= {f"{n}.png": png(n), f"{n}.txt": f"caption {n}".encode()}
    members["3.png"] = members["3.png"][:50]
    members["5.txt"] = b" "
    return members


@pytest.fixture
def path(members, write_tar):
    return write_tar("pairs.tar", members)


def open_dataset(path, **options):
    return ImageTextDataset(path, transform=options.pop("transform", eval_transform(SIDE)), **options)


class Encoder:
    """The mean colour and the first pixel; counts the images that it was called with."""

    def __init__(self):
        self.images = 0

    def __call__(self, pixels):
        assert not torch.is_grad_enabled()
        assert pixels.dtype == torch.uint8
        self.images += len(pixels)
        return torch.cat([pixels.float().mean((1, 2)), pixels[:, 0, 0].float()], 1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", 4)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [3, 100])
def test_features_are_those_of_the_images(path, tmp_path, workers, batch_size):
    dataset, encode = open_dataset(path), Encoder()
    cache = cache_features(tmp_path / "c", dataset, encode, "m", batch_size=batch_size, num_workers=workers)
    assert encode.images == 9
    assert len(cache) == 10
    assert cache.missing() == []
    assert cache[3] is None
    for index in {*range(10)} - {3}:
        pixels = dataset.image(index, np.random.default_rng(0))
        with torch.no_grad():
            assert torch.equal(cache[index], encode(pixels[None])[0])
    with pytest.raises(IndexError, match="index: expected 0 to 9, got 10"):
        cache[10]


def test_a_dataset_with_features_gives_the_same_captions_seeds_and_skips(path, tmp_path):
    plain, cached = (open_dataset(path, keywords=0.5, seed=3) for _ in range(2))
    cached.features = cache_features(tmp_path / "c", cached, Encoder(), "m")
    cached = pickle.loads(pickle.dumps(cached))
    cached._pairs.image = None  # it is not read
    for epoch in range(2):
        for index in range(10):
            a, b = plain[epoch, index], cached[epoch, index]
            assert (a is None) == (b is None)
            if a is not None:
                assert (a.caption, a.key, a.category, a.seed) == (b.caption, b.key, b.category, b.seed)
                assert torch.equal(b.image, cached.features[index])
    assert plain.skipped() == cached.skipped() == {"corrupt image": 1, "empty caption": 1}
    tokenizer = load_tokenizer()
    batch = Collator(tokenizer, max_length=8, images="locked_features")([cached[0], cached[1]])
    assert set(batch) == {"locked_features", "input_ids", "attention_mask"}
    assert torch.equal(batch["locked_features"][1], cached.features[1])


def test_a_second_run_computes_nothing(path, tmp_path):
    cache_features(tmp_path / "c", open_dataset(path), Encoder(), "m")
    encode = Encoder()
    cache_features(tmp_path / "c", open_dataset(path), encode, "m")
    assert encode.images == 0


def test_an_interrupted_run_goes_on_where_it_stopped(path, tmp_path):
    whole = cache_features(tmp_path / "whole", open_dataset(path), Encoder(), "m")

    class Interrupted(Encoder):
        def __call__(self, pixels):
            if self.images == 6:
                raise KeyboardInterrupt
            return super().__call__(pixels)

    with pytest.raises(KeyboardInterrupt):
        cache_features(tmp_path / "c", open_dataset(path), Interrupted(), "m", batch_size=3)
    encode = Encoder()
    cache = cache_features(tmp_path / "c", open_dataset(path), encode, "m")
    assert encode.images == 6  # the blocks 4..7 and 8..9
    for index in {*range(10)} - {3}:
        assert torch.equal(cache[index], whole[index])


def test_killed_while_it_writes_a_block(path, tmp_path):
    """What a killed run leaves of a block under another name is no block."""
    program = f"""
        import os, signal, torch
        import numpy as np
        from vlmfast.data import ImageTextDataset, cache_features, eval_transform, feature_cache
        feature_cache.BLOCK_ROWS = 4
        save = np.save
        def save_half(file, array):
            save(file, array)
            if file.name.endswith("000001.part"):
                file.truncate(100)
                os.kill(os.getpid(), signal.SIGKILL)
        np.save = save_half
        dataset = ImageTextDataset({path!r}, transform=eval_transform({SIDE}))
        cache_features({str(tmp_path / "c")!r}, dataset, lambda pixels: pixels[:, 0, 0].float(), "m")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path / "c")) == ["000000.npy", "000001.part", "identity.json"]
    cache = cache_features(tmp_path / "c", open_dataset(path), lambda pixels: pixels[:, 0, 0].float(), "m")
    assert sorted(os.listdir(tmp_path / "c")) == ["000000.npy", "000001.npy", "000002.npy", "identity.json"]
    assert cache[4].shape == (3,)


def test_a_stale_cache_is_refused(path, tmp_path, members, write_tar, png):
    folder = tmp_path / "c"
    cache_features(folder, open_dataset(path), Encoder(), "m")
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    members["0.png"] = png(77)
    other_image = write_tar("other.tar", members)
    fewer = write_tar("fewer.tar", {name: data for name, data in members.items() if not name.startswith("9")})
    for dataset, model, changed in (
        (open_dataset(path), "another", "model was 'm' and is 'another'"),
        (open_dataset(path, transform=eval_transform(7)), "m", r"transform was .*image_size=8.* and is .*image_size=7"),
        (open_dataset(other_image), "m", "data was '[0-9a-f]*' and is"),
        (open_dataset(fewer), "m", "pairs was '10' and is '9'"),
    ):
        with pytest.raises(ValueError, match=f"{folder} holds features of something else; delete it .*{changed}"):
            cache_features(folder, dataset, Encoder(), model)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_a_folder_of_other_files_is_left_alone(path, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is no feature cache: it holds .* but no identity\.json"):
        cache_features(tmp_path, open_dataset(path), Encoder(), "m")


def test_captions_do_not_make_it_stale(path, tmp_path, members, write_tar):
    cache_features(tmp_path / "c", open_dataset(path), Encoder(), "m")
    changed = write_tar("captions.tar", {**members, "0.txt": b"another caption, and longer"})
    assert cache_features(tmp_path / "c", open_dataset(changed), Encoder(), "m")[0] is not None


def test_processes_share_the_blocks(path, tmp_path):
    encoders = [Encoder(), Encoder()]
    caches = [
        cache_features(tmp_path / "c", open_dataset(path), encode, "m", rank=rank, world_size=2)
        for rank, encode in enumerate(encoders)
    ]
    assert [encode.images for encode in encoders] == [5, 4]  # pairs 0..3 without 3 and 8..9; pairs 4..7
    assert all(cache[9] is not None for cache in caches)
    assert json.loads((tmp_path / "c" / "identity.json").read_text())["pairs"] == "10"


def test_a_share_alone_is_not_complete(path, tmp_path):
    cache = cache_features(tmp_path / "c", open_dataset(path), Encoder(), "m", rank=1, world_size=2)
    assert cache.missing() == [0, 2]
    with pytest.raises(ValueError, match=r"lacks .*000000\.npy: the cache is not complete"):
        cache[0]


def test_blocks_without_a_readable_image(write_tar, tmp_path, png):
    members = {}
    for n in range(6):
        members |= {f"{n}.png": png(n)[: 40 if n < 4 else None], f"{n}.txt": b"x"}
    cache = cache_features(tmp_path / "c", open_dataset(write_tar("a.tar", members)), Encoder(), "m")
    assert [cache[n] is None for n in range(6)] == [True] * 4 + [False] * 2


def test_random_transforms_are_refused(path, tmp_path):
    with pytest.raises(ValueError, match=r"dataset: expected a transform that is not random.*it draws random"):
        cache_features(tmp_path / "c", open_dataset(path, transform=train_transform(SIDE)), Encoder(), "m")


def test_features_must_be_finite(path, tmp_path):
    with pytest.raises(ValueError, match=r"encode: expected finite features, .* among pairs range\(0, 4\)"):
        cache_features(tmp_path / "c", open_dataset(path), lambda pixels: torch.full((len(pixels), 2), torch.inf), "m")


def test_rows_must_fit_the_block(tmp_path):
    cache = FeatureCache(tmp_path / "c", {"model": "m"}, 6)
    with pytest.raises(ValueError, match=r"features: expected 2 rows, got \(4, 5\)"):
        cache.write(1, torch.zeros(4, 5))


class Regions:
    """As a detector: another number of rows for each image, features in half precision, one vector of the whole."""

    def __init__(self):
        self.images = 0

    def __call__(self, pixels):
        self.images += len(pixels)
        counts = [int(image[0, 0, 0]) % 4 for image in pixels]
        return {
            "boxes": [torch.arange(count * 4).view(count, 4).float() for count in counts],
            "features": [
                image.half().view(-1)[: count * 5].view(count, 5) for image, count in zip(pixels, counts, strict=True)
            ],
            "whole": pixels.float().mean((1, 2)).bfloat16(),
            "count": torch.tensor(counts),
        }


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def expected_regions(dataset, index):
    encoded = Regions()(dataset.image(index, np.random.default_rng(0))[None])
    return {name: value[0].float() if name == "whole" else value[0] for name, value in encoded.items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dict_of_tensors_also_ragged_ones(path, tmp_path, workers):
    dataset = open_dataset(path)
    cache = cache_features(tmp_path / "c", dataset, Regions(), "m", batch_size=3, num_workers=workers)
    cache = pickle.loads(pickle.dumps(cache))
    assert cache[3] is None
    for index in {*range(10)} - {3}:
        assert equal(cache[index], expected_regions(dataset, index))
    assert {len(cache[index]["boxes"]) for index in {*range(10)} - {3}} > {0, 1}  # the case is a ragged one
    again = Regions()
    reopened = cache_features(tmp_path / "c", dataset, again, "m")
    assert again.images == 0
    assert equal(reopened[9], cache[9])
    reopened[9]["boxes"] += 1  # a copy, not the file
    assert equal(reopened[9], cache[9])


def test_features_of_a_dict_reach_the_samples(path, tmp_path):
    dataset = open_dataset(path)
    dataset.features = cache_features(tmp_path / "c", dataset, Regions(), "m")
    assert equal(dataset[0].features, expected_regions(dataset, 0))
    assert dataset[0].image.shape == (SIDE, SIDE, 3)
    assert [dataset[n] is None for n in range(10)] == [n in (3, 5) for n in range(10)]


def test_images_of_several_sizes_come_as_a_list(tmp_path, write_tar, png):
    members = {}
    for n in range(6):
        members |= {f"{n}.png": png(n, (8 + n % 2, 8)), f"{n}.txt": b"x"}
    seen = []

    def encode(pixels):
        seen.append(type(pixels))
        return {"size": torch.tensor([image.shape[1] for image in pixels])}

    dataset = open_dataset(write_tar("a.tar", members), transform=_as_it_is)
    cache = cache_features(tmp_path / "c", dataset, encode, "m", batch_size=3)
    assert [cache[n]["size"].item() for n in range(6)] == [8, 9, 8, 9, 8, 9]
    assert list in seen


def _as_it_is(image, generator):
    return torch.from_numpy(np.array(image))


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        ({"a": torch.zeros(1, 2)}, "encode: expected 4 rows of 'a', got 1"),
        (torch.zeros(3, 2), "encode: expected 4 rows of 'features', got 3"),
        ({"a": [torch.zeros(2, n) for n in range(4)]}, "features: expected 'a' to differ in its number of rows only"),
        (
            {"a": [torch.tensor(1), *[torch.zeros(2)] * 3]},
            "features: expected 'a' to differ in its number of rows only",
        ),
        ({"a": [torch.full((2,), torch.nan)] * 4}, r"encode: expected finite features, .* among pairs range\(0, 4\)"),
    ],
)
def test_what_encode_gives_must_fit(write_tar, png, tmp_path, encoded, message):
    members = {f"{n}.{kind}": png(n) if kind == "png" else b"x" for n in range(4) for kind in ("png", "txt")}
    with pytest.raises(ValueError, match=message):
        cache_features(tmp_path / "c", open_dataset(write_tar("a.tar", members)), lambda pixels: encoded, "m")


def test_items_of_a_block_have_the_same_names(tmp_path):
    cache = FeatureCache(tmp_path / "c", {"model": "m"}, 2)
    with pytest.raises(ValueError, match=r"features: expected \['a'\] in every sample, got others in some"):
        cache.write(0, [{"a": torch.zeros(1)}, {"b": torch.zeros(1)}])


def cut(data):
    return data[: len(data) // 2]


DAMAGE = {
    "cut": cut,
    "cut by a byte": lambda data: data[:-1],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "zeros at the end": lambda data: data[:-200] + bytes(200),
    "one bit": lambda data: data[:150] + bytes([data[150] ^ 1]) + data[151:],
    "one bit of the index": lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
    "longer": lambda data: data + b"x",
    "something else": lambda data: b"<html>404</html>" * 50,
    "a file of an earlier version": lambda data: _npy(np.zeros((4, 6), np.float32)),
}


def _npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("encoder", [Encoder, Regions])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_block_is_named_and_made_again(path, tmp_path, damage, encoder):
    whole = cache_features(tmp_path / "c", open_dataset(path), encoder(), "m")
    block = tmp_path / "c" / "000001.npy"
    data = block.read_bytes()
    block.write_bytes(DAMAGE[damage](data))
    encode = encoder()
    with pytest.warns(UserWarning, match=r"c/000001\.npy is damaged \(.+\); it is made again"):
        cache_features(tmp_path / "c", open_dataset(path), encode, "m")
    assert encode.images == 4
    assert block.read_bytes() == data
    assert whole.missing() == []


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "something else"])
def test_a_block_that_is_damaged_under_a_reader_is_named(path, tmp_path, damage):
    cache_features(tmp_path / "c", open_dataset(path), Encoder(), "m")
    block = tmp_path / "c" / "000001.npy"
    block.write_bytes(DAMAGE[damage](block.read_bytes()))
    identity = json.loads((tmp_path / "c" / "identity.json").read_text())
    identity = {name: value for name, value in identity.items() if name not in ("pairs", "rows per file")}
    cache = FeatureCache(tmp_path / "c", identity, 10)
    assert cache[0] is not None
    with pytest.raises(ValueError, match=r"c/000001\.npy is damaged \(.+\); cache_features makes it again"):
        cache[4]


@pytest.mark.parametrize("identity", ["", "{", "[]", '{"model": '])
def test_a_damaged_identity_is_named(path, tmp_path, identity):
    cache_features(tmp_path / "c", open_dataset(path), Encoder(), "m")
    (tmp_path / "c" / "identity.json").write_text(identity)
    with pytest.raises(ValueError, match=r"c/identity\.json is damaged \(.+\); delete .*c to have it made again"):
        cache_features(tmp_path / "c", open_dataset(path), Encoder(), "m")


def test_a_cache_is_opened_for_the_images_that_it_is_of(path, tmp_path, members, write_tar, png):
    made = cache_features(tmp_path / "c", open_dataset(path), Regions(), "a model that is not here")
    dataset = open_dataset(path, transform=train_transform(4))
    opened = open_features(tmp_path / "c", dataset)
    assert all(equal(opened[n], made[n]) for n in range(10) if n != 3)
    other = open_dataset(write_tar("other.tar", {**members, "0.png": png(77)}))
    with pytest.raises(ValueError, match=r"holds features of something else; .* Its data was"):
        open_features(tmp_path / "c", other)
    (tmp_path / "c" / "000002.npy").unlink()
    with pytest.raises(ValueError, match=r"c lacks .*000002\.npy: the cache is not complete"):
        open_features(tmp_path / "c", dataset)
    with pytest.raises(ValueError, match=r"is no feature cache: it holds no identity\.json"):
        open_features(tmp_path, dataset)
    assert not (tmp_path / "identity.json").exists()


def test_each_process_checks_its_share_of_the_files(path, tmp_path):
    cache_features(tmp_path / "c", open_dataset(path), Regions(), "m")
    block = tmp_path / "c" / "000001.npy"
    block.write_bytes(DAMAGE["one bit"](block.read_bytes()))
    dataset = open_dataset(path)
    assert open_features(tmp_path / "c", dataset, rank=0, world_size=2)[0] is not None
    with pytest.raises(ValueError, match=r"000001\.npy is damaged \(its checksum is wrong\)$"):
        open_features(tmp_path / "c", dataset, rank=1, world_size=2)


def test_a_long_row_does_not_cost_the_others_memory(tmp_path):
    """Rows are mapped: an item costs its own bytes."""
    cache = FeatureCache(tmp_path / "c", {"model": "m"}, 4)
    cache.write(0, [torch.zeros(4 << 20), torch.zeros(1), None, torch.ones(2)])
    tracemalloc.start()
    item = cache[3]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert item.tolist() == [1, 1]
    assert peak < 1 << 20


def test_a_file_may_hold_fewer_samples_and_what_could_not_be_read_is_told(path, tmp_path):
    dataset = open_dataset(path)
    cache = cache_features(tmp_path / "c", dataset, Encoder(), "m", block_rows=3)
    assert len(list((tmp_path / "c").glob("*.npy"))) == 4
    assert cache.unreadable() == [3]
    opened = open_features(tmp_path / "c", dataset)
    assert opened.block_rows == 3
    assert torch.equal(opened[9], cache[9])
    with pytest.raises(ValueError, match="rows per file was '3' and is '4'"):
        cache_features(tmp_path / "c", dataset, Encoder(), "m")
