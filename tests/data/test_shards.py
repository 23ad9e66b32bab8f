import errno
import gc
import gzip
import io
import os
import re
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import webdataset

from vlmfast.data import ImageTextDataset, eval_transform, records, shards


def open_dataset(source):
    return ImageTextDataset(source, transform=eval_transform(8))


def keys_and_captions(dataset):
    return [dataset.metadata(index)[:2] for index in range(len(dataset))]


def read_with_webdataset(paths):
    pairs = []
    for sample in webdataset.WebDataset(paths, shardshuffle=False):
        image = next((sample[e] for e in records.IMAGE_EXTENSIONS if e in sample), None)
        if image is not None:
            pairs.append((sample["__key__"], image, sample["txt"].decode() if "txt" in sample else None))
    return pairs


def test_shards_of_webdataset_writers_read_as_webdataset_reads_them(tmp_path, png):
    with webdataset.ShardWriter(f"{tmp_path}/train-%04d.tar", maxcount=3, verbose=0) as writer:
        for n in range(7):
            writer.write({"__key__": f"folder/{n:05d}", "png": png(n), "txt": f"caption {n} é"})
    with webdataset.TarWriter(f"{tmp_path}/train-last.tar") as writer:
        writer.write({"__key__": "k" * 150, "png": png(7), "txt": "a key longer than a tar header's field"})
    paths = sorted(str(path) for path in tmp_path.glob("*.tar"))
    assert len(paths) == 4
    dataset = open_dataset(f"{tmp_path}/train-*.tar")
    expected = read_with_webdataset(paths)
    assert len(dataset) == len(expected) == 8
    assert [(key, caption) for key, _, caption in expected] == keys_and_captions(dataset)
    assert [dataset._pairs.image(n) for n in range(8)] == [image for _, image, _ in expected]


def test_grouping_by_key_follows_webdataset(write_tar, png):
    path = write_tar(
        "a.tar",
        {
            "d.x/001.png": png(1),
            "d.x/001.txt": b"folder with a dot",
            "./002.PNG": png(2),
            "./002.Txt": b"upper case",
            "003.seg.png": png(30),
            "003.jpg": png(3),
            "003.cls": b"7",
            "003.txt": b"other members in between",
            "__meta__/9.png": png(9),
            "__meta__/9.txt": b"metadata",
            ".hidden.png": png(9),
            "004.png": png(4),
        },
    )
    expected = [(key, caption) for key, _, caption in read_with_webdataset([path])]
    assert expected == keys_and_captions(open_dataset(path))
    assert [key for key, _ in expected] == ["d.x/001", "./002", "003", "004"]


def test_json_captions_and_categories(write_tar, png):
    path = write_tar(
        "a.tar",
        {
            "0.png": png(0),
            "0.json": b'{"caption": " a red fox ", "category": "animal"}',
            "1.png": png(1),
            "1.json": b'{"caption": "a number as category", "category": 3}',
            "2.png": png(2),
            "2.json": b'{"caption": "from json"}',
            "2.txt": b"\xef\xbb\xbffrom txt\r\n",
        },
    )
    dataset = open_dataset(path)
    assert [dataset.metadata(n) for n in range(3)] == [
        ("0", "a red fox", "animal"),
        ("1", "a number as category", "3"),
        ("2", "from txt", None),
    ]
    assert dataset[0].category == "animal"
    assert dataset[0].caption == "a red fox"


def test_a_caption_file_without_an_image_is_counted(write_tar, png):
    dataset = open_dataset(
        write_tar("a.tar", {"0.txt": b"no image", "1.png": png(1), "1.txt": b"one", "info.cls": b""})
    )
    assert len(dataset) == 1
    assert dataset.skipped() == {"missing image": 1}


@pytest.fixture
def whole(write_tar, png) -> Path:
    members = {}
    for n in range(3):
        members |= {f"{n}.png": png(n), f"{n}.txt": f"caption {n}".encode()}
    return Path(write_tar("whole.tar", members))


def test_a_whole_shard_counts_no_fault(whole):
    dataset = open_dataset(whole)
    assert len(dataset) == 3
    assert dataset.skipped() == {}


@pytest.mark.parametrize(
    ("member", "field", "extra", "pairs"),
    [
        ("2.png", "offset_data", 40, 2),
        ("2.txt", "offset", 0, 2),
        ("2.txt", "offset", 100, 2),
        ("2.txt", "offset_data", 4, 2),
        ("2.txt", "offset_data", 9, 3),  # the data is whole, its padding is not
        ("2.txt", "offset_data", 512, 3),  # only the end-of-archive blocks are gone
        ("1.txt", "offset_data", 0, 1),
        ("2.png", "offset", 0, 2),
    ],
)
def test_what_precedes_the_cut_of_a_truncated_shard_is_used(whole, tmp_path, member, field, extra, pairs):
    with tarfile.open(whole) as tar:
        cut = getattr(tar.getmember(member), field) + extra
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:cut])
    dataset = open_dataset(tmp_path / "cut.tar")
    assert keys_and_captions(dataset) == [(str(n), f"caption {n}") for n in range(pairs)]
    assert all(dataset[n] is not None for n in range(pairs))
    assert dataset.skipped() == {"truncated shard": 1}


@pytest.mark.parametrize("length", [0, 100, 600])
def test_a_shard_cut_before_its_first_pair_does_not_stop_the_others(whole, tmp_path, length):
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:length])
    dataset = open_dataset([tmp_path / "cut.tar", whole, tmp_path / "cut.tar"])
    assert len(dataset) == 3
    assert dataset.skipped() == {"truncated shard": 2}
    with pytest.raises(ValueError, match=r"source: .*cut\.tar.* holds no image-text pairs"):
        open_dataset(tmp_path / "cut.tar")


def test_a_damaged_header_ends_the_shard_and_is_counted(whole, tmp_path):
    data = bytearray(whole.read_bytes())
    with tarfile.open(whole) as tar:
        start = tar.getmember("1.png").offset
    data[start : start + 512] = b"\xff" * 512
    (tmp_path / "bad.tar").write_bytes(data)
    dataset = open_dataset(tmp_path / "bad.tar")
    assert keys_and_captions(dataset) == [("0", "caption 0")]
    assert dataset.skipped() == {"truncated shard": 1}


def test_a_compressed_shard_is_refused(whole, tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(whole.read_bytes()))
    with pytest.raises(ValueError, match=r"source: .*a\.tar\.gz is gzip-compressed; expected a plain \.tar"):
        open_dataset(tmp_path / "a.tar.gz")


def test_a_file_that_is_no_tar_is_refused(tmp_path):
    (tmp_path / "error.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(ValueError, match=r"source: .*error\.tar is no tar archive"):
        open_dataset(tmp_path / "error.tar")


def test_an_archive_without_pairs_is_refused(write_tar):
    with pytest.raises(ValueError, match=r"source: .* holds no image-text pairs; expected tar members key\.webp"):
        open_dataset(write_tar("a.tar", {"0.txt": b"text only"}))


@pytest.mark.parametrize("source", ["{}/none-*.tar", "{}/none.tar", "{}/none", "{}/whole.tar,{}/none.tar"])
def test_a_source_that_is_not_there_is_named(whole, tmp_path, source):
    with pytest.raises(FileNotFoundError, match=rf"source: '{re.escape(str(tmp_path))}/none.* matches nothing"):
        open_dataset(source.format(tmp_path, tmp_path))


def test_an_unreadable_shard_is_named(whole, monkeypatch):
    def refuse(path, *args, **options):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(records, "open", refuse, raising=False)  # root, who runs tests in containers, may read all
    with pytest.raises(PermissionError, match=r"source: cannot read .*whole\.tar \(Permission denied\)"):
        open_dataset(whole)


def test_a_folder_in_a_list_of_shards_is_named(whole, tmp_path):
    with pytest.raises(IsADirectoryError, match=f"source: cannot read {re.escape(str(tmp_path))} "):
        open_dataset([whole, tmp_path])


@pytest.mark.parametrize("source", [3, [3], None])
def test_a_source_of_another_type_is_refused(source):
    with pytest.raises(TypeError, match="source: expected a path or a sequence of paths"):
        open_dataset(source)


def test_comma_lists_globs_and_sequences_name_the_same_shards(write_tar, tmp_path, png):
    for n in range(3):
        write_tar(f"s{n}.tar", {f"{n}.png": png(n), f"{n}.txt": b"x"})
    sources = [
        f"{tmp_path}/s*.tar",
        f"{tmp_path}/s0.tar, {tmp_path}/s[12].tar",
        [tmp_path / "s0.tar", str(tmp_path / "s1.tar"), f"{tmp_path}/s2*"],
    ]
    assert [[key for key, _ in keys_and_captions(open_dataset(s))] for s in sources] == [["0", "1", "2"]] * 3


@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
def test_open_shards_are_bounded_and_closed_with_the_dataset(write_tar, tmp_path, png, monkeypatch):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("counts open files through /proc")

    def count_open():
        links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
        return sum(os.path.exists(link) and os.readlink(link).startswith(str(tmp_path)) for link in links)

    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 2)
    dataset = open_dataset([write_tar(f"s{n}.tar", {"k.png": png(n), "k.txt": b"x"}) for n in range(4)])
    assert count_open() == 0
    images = [dataset[n].image for n in (0, 1, 2, 3, 0, 2)]
    assert count_open() == 2
    assert (images[0] == images[4]).all()
    assert (images[0] != images[1]).any()
    del dataset
    assert count_open() == 0


def test_a_shard_of_many_gigabytes_is_neither_read_nor_loaded(tmp_path, png):
    path = tmp_path / "large.tar"
    large = tarfile.TarInfo("0.bin")
    large.size = 5 << 30
    with open(path, "wb") as file:  # a hole in the file stands for the data
        file.write(large.tobuf())
        file.seek(large.size, os.SEEK_CUR)
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, data in {"1.png": png(1), "1.txt": b"behind five gigabytes"}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    tracemalloc.start()
    sample = open_dataset(path)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sample.caption == "behind five gigabytes"
    assert peak < 5 << 20


def test_the_index_is_compact(write_tar):
    pairs = 3000
    members = {f"{n // 2:06d}.{'png' if n % 2 else 'txt'}": b"x" for n in range(2 * pairs)}
    path = write_tar("a.tar", members)
    open_dataset(path)  # first-use caches are not the index's
    tracemalloc.start()
    dataset = open_dataset(path)
    gc.collect()  # of what the tarfile module leaves in cycles
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == pairs
    assert kept < 80 * pairs  # one Python object per pair would cost more
    assert peak < 800 * pairs  # no header of a member outlives the next


def test_a_shard_that_shrinks_after_indexing_raises(whole):
    dataset = open_dataset(whole)
    os.truncate(whole, 600)
    with pytest.raises(OSError, match=r"whole\.tar became shorter"):
        dataset[2]


@pytest.mark.parametrize("stem", ["22.05", "Mr. Smith", "a.", "v1.2.3", "d.x/22.05", "22.A"])
@pytest.mark.parametrize("text", ["txt", "json"])
def test_names_with_dots_are_those_of_pairs(write_tar, png, stem, text):
    content = b"x" if text == "txt" else b'{"caption": "x"}'
    path = write_tar("a.tar", {f"{stem}.png": png(0), f"{stem}.{text}": content, "z.png": png(1), "z.txt": b"z"})
    assert keys_and_captions(open_dataset(path)) == [(stem, "x"), ("z", "z")]


def test_names_that_share_what_is_before_the_first_dot(write_tar, png):
    members = {"22.png": png(0), "22.txt": b"plain"}
    for n, stem in enumerate(["22.05", "22.A", "22.a"], start=1):
        members |= {f"{stem}.png": png(n), f"{stem}.txt": stem.encode()}
    members |= {"22.seg.png": png(9), "22.cls": b"7"}
    expected = [("22", "plain"), ("22.05", "22.05"), ("22.A", "22.A"), ("22.a", "22.a")]
    dataset = open_dataset(write_tar("a.tar", members))
    assert keys_and_captions(dataset) == expected
    assert dataset.skipped() == {}
    assert len({dataset[n].image.sum().item() for n in range(4)}) == 4


def test_halves_of_pairs_with_dots_are_counted(write_tar, png):
    members = {"22.05.png": png(0), "22.06.txt": b"x", "23.png": png(1), "23.txt": b"x"}
    dataset = open_dataset(write_tar("a.tar", members))
    assert [dataset[n] is None for n in range(2)] == [True, False]
    assert dataset.skipped() == {"missing image": 1, "missing caption": 1}


@pytest.mark.parametrize(
    ("names", "expected", "counts"),
    [
        (["a.png", "a.txt", "a.png", "a.txt"], ["a"], {"duplicate key": 1}),
        (["a.png", "a.png", "a.txt"], ["a"], {"duplicate key": 1}),
        (["a.png", "a.txt", "a.txt"], ["a"], {"duplicate key": 1}),
        (["a.png", "a.txt", "b.png", "b.txt", "a.png", "a.txt"], ["a", "b"], {"duplicate key": 1}),
        (["a.png", "a.txt"] + ["a.png", "a.txt"] * 3, ["a"], {"duplicate key": 3}),
        (["a.b.png", "a.b.txt", "c.png", "c.txt", "a.b.png", "a.b.txt"], ["a.b", "c"], {"duplicate key": 1}),
        (["a.png", "a.jpg", "a.txt"], ["a"], {"second image": 1}),
        (["a.PNG", "a.png", "a.txt"], ["a"], {"duplicate key": 1}),
    ],
)
def test_a_repeated_key_is_counted_and_the_first_is_used(tmp_path, png, names, expected, counts):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n, name in enumerate(names):
            data = png(n) if not name.endswith("txt") else b"%d" % n
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    dataset = open_dataset(tmp_path / "a.tar")
    assert [key for key, _ in keys_and_captions(dataset)] == expected
    assert dataset.skipped() == counts
    first = names.index(expected[0] + ".txt")
    assert dataset[0].caption == str(first)


def test_keys_may_repeat_in_another_shard(write_tar, png):
    paths = [write_tar(f"{n}.tar", {"0.png": png(n), "0.txt": b"x"}) for n in range(2)]
    dataset = open_dataset(paths)
    assert (len(dataset), dataset.skipped()) == (2, {})


def test_links_in_a_tar_are_no_images_and_what_they_leave_is_counted(tmp_path, png):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in {"a.png": png(0), "a.txt": b"x", "b.txt": b"y", "c.txt": b"z"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            if name in ("b.txt", "c.txt"):
                link = tarfile.TarInfo(name[0] + ".png")
                link.type, link.linkname = (tarfile.LNKTYPE if name[0] == "b" else tarfile.FIFOTYPE), "a.png"
                tar.addfile(link)
    dataset = open_dataset(tmp_path / "a.tar")
    assert (len(dataset), dataset.skipped()) == (1, {"missing image": 2})


@pytest.mark.parametrize(("bad", "reason"), [("1.png", "unreadable image"), ("1.txt", "missing caption")])
def test_what_the_disk_does_not_give_of_a_shard_is_counted(whole, monkeypatch, bad, reason):
    with tarfile.open(whole) as tar:
        start = tar.getmember(bad).offset_data
    dataset = open_dataset(whole)

    def broken(descriptor, size, offset, pread=os.pread):
        if offset == start:
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", broken)
    assert [dataset[n] is None for n in range(3)] == [False, True, False]
    assert dataset.skipped() == {reason: 1}


def test_a_shard_that_vanishes_before_it_is_read_is_named(whole):
    dataset = open_dataset(whole)
    whole.unlink()
    with pytest.raises(FileNotFoundError, match=r"whole\.tar"):
        dataset[0]


def test_a_disk_that_does_not_give_a_header_is_named(whole, monkeypatch):
    def broken(descriptor, size, offset):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(OSError, match=r"source: cannot read .*whole\.tar \(Input/output error\)"):
        open_dataset(whole)
