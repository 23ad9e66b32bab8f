"""Shards as streams: pipes, a server on the loopback address, faults, order, and going on after a stop."""

from __future__ import annotations

import gc
import os
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmfast.data import ImageTextDataset, StreamingDataset, StreamLoader, eval_transform
from vlmfast.data.stream_shards import shard_urls
from vlmfast.data.streaming import Stream

SHARDS, EACH = 5, 6


@pytest.fixture
def shards(write_tar: Callable[..., str], png: Callable[..., bytes]) -> list[str]:
    """Tar files of EACH samples, whose captions are their keys."""
    return [
        write_tar(
            f"{n}.tar",
            {
                f"{n}{k}.{kind}": png(10 * n + k) if kind == "png" else f"{n}{k}".encode()
                for k in range(EACH)
                for kind in ("png", "txt")
            },
        )
        for n in range(SHARDS)
    ]


class Server:
    """Files of a folder by HTTP; `faults[name]` is a list of what happens at its next requests: a status, or a length.

    Attributes:
        requests: names, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.faults: dict[str, list[str]] = {}
        self.requests: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                server.requests.append(name)
                data = (folder / name).read_bytes()
                kind, _, number = (server.faults[name].pop(0) if server.faults.get(name) else "").partition(" ")
                if kind == "status":
                    self.send_error(int(number))
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: int(number)] if kind == "cut" else data)

            def log_message(self, *args: object) -> None:
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}"
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.httpd.shutdown()
    made.httpd.server_close()


def stream(source: object, **options: object) -> StreamingDataset:
    return StreamingDataset(source, **{"transform": None, "wait": 0.01, "attempts": 3, **options})  # type: ignore[arg-type]


def keys(dataset: StreamingDataset, count: int, number: int = 0, streams: int = 1) -> list[str]:
    return [sample.key for sample in islice(Stream(dataset, number, streams), count)]


def cut(path: str) -> int:
    """The length of a shard without the second half of its samples and what follows."""
    with tarfile.open(path) as tar:
        return tar.getmembers()[EACH].offset


EVERY = sorted(f"{n}{k}" for n in range(SHARDS) for k in range(EACH))


@pytest.mark.parametrize("kind", ["pipe", "http", "glob", "braces", "list"])
def test_every_source_gives_every_sample_once_a_round(
    kind: str, shards: list[str], tmp_path: Path, server: Server
) -> None:
    last = SHARDS - 1
    source = {
        "pipe": f"pipe:cat {tmp_path}/{{0..{last}}}.tar",
        "http": f"{server.url}/{{0..{last}}}.tar",
        "glob": f"{tmp_path}/*.tar",
        "braces": f"{tmp_path}/{{0..{last}}}.tar",
        "list": shards,
    }[kind]
    dataset = stream(source)
    assert len(dataset.urls) == SHARDS
    first, second = keys(dataset, 2 * len(EVERY))[: len(EVERY)], keys(dataset, 2 * len(EVERY))[len(EVERY) :]
    assert sorted(first) == sorted(second) == EVERY
    assert first != second
    assert first != EVERY


def test_thousands_of_shards_are_named_in_braces() -> None:
    assert len(shard_urls("pipe:aws s3 cp s3://bucket/{00000..12344}.tar -")) == 12345
    assert shard_urls("pipe:cat a::http://127.0.0.1/{b,c}.tar") == [
        "pipe:cat a",
        "http://127.0.0.1/b.tar",
        "http://127.0.0.1/c.tar",
    ]


def test_samples_are_those_of_the_index(write_tar: Callable[..., str], png: Callable[..., bytes]) -> None:
    path = write_tar(
        "mixed.tar",
        {
            "a.jpg": png(1), "a.json": b'{"caption": "red", "label": 3}', "b.png": png(2), "b.txt": b"caption",
            "22.05.png": png(3), "22.05.txt": b"dots", "doc.json": b'{"text": "<image> and <image>", "caption": "x"}',
            "doc.0.png": png(4), "doc.1.png": png(5), "lone.txt": b"no image", "bad.png": b"no", "bad.txt": b"damaged",
            "a.png": png(6), "a.txt": b"again", "two.png": png(7), "two.jpg": png(8), "two.txt": b"two images",
            "none.png": png(9), "__meta__.txt": b"x", "readme.md": b"x",
        },
    )  # fmt: skip
    indexed = ImageTextDataset(path, transform=eval_transform(8), requires=("caption",))
    expected = [sample for k in range(len(indexed)) if (sample := indexed[k]) is not None]
    dataset = stream(f"pipe:cat {path}", transform=eval_transform(8), buffer=1)
    one = Stream(dataset, 0, 1)
    *found, again = islice(one, len(expected) + 1)
    assert again.key == found[0].key
    assert [sample.key for sample in found] == [sample.key for sample in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a.caption, a.record, len(a.images)) == (b.caption, b.record, len(b.images))
        assert torch.equal(a.image, b.image)
        assert all(map(torch.equal, a.images, b.images))
    assert one.report()[0] == dict(indexed.skipped())


@pytest.mark.parametrize(("streams", "buffer"), [(2, 1000), (5, 4)])
def test_streams_share_each_round(shards: list[str], streams: int, buffer: int) -> None:
    dataset = stream(shards, buffer=buffer)
    share = [list(range(SHARDS))[number::streams] for number in range(streams)]
    parts = [keys(dataset, EACH * len(own), number, streams) for number, own in enumerate(share)]
    assert sorted(key for part in parts for key in part) == EVERY


def test_the_buffer_mixes_shards_and_no_rounds(shards: list[str]) -> None:
    apart = keys(stream(shards, buffer=EACH), len(EVERY))
    blocks = [apart[k : k + EACH] for k in range(0, len(EVERY), EACH)]
    assert all(len({key[0] for key in block}) == 1 for block in blocks)
    assert any(block != sorted(block) for block in blocks)
    assert [block[0][0] for block in blocks] != [str(n) for n in range(SHARDS)]
    mixed = keys(stream(shards), len(EVERY))
    assert len({key[0] for key in mixed[:EACH]}) > 1
    assert keys(stream(shards, seed=1), len(EVERY)) != mixed == keys(stream(shards), len(EVERY))


def test_a_shard_cut_short_gives_what_is_whole_and_is_counted(shards: list[str], tmp_path: Path) -> None:
    """Where `cat` gives the half of it, there is no failure but the missing end."""
    os.truncate(shards[1], cut(shards[1]))
    for source, tries in ((shards, "one attempt"), (f"pipe:cat {tmp_path}/{{0..{SHARDS - 1}}}.tar", "3 attempts")):
        one = Stream(stream(source, buffer=1), 0, 1)  # which reads no further than it gives
        found = [sample.key for sample in islice(one, len(EVERY) - EACH // 2)]
        assert sorted(found) == sorted(set(EVERY) - {"13", "14", "15"})
        faults, notes = one.report()
        assert faults == {"broken shard": 1}
        assert len(notes) == 1
        assert all(word in notes[0] for word in ("1.tar", "cut short", tries, "3 are used"))


def test_a_connection_that_is_cut_is_opened_again(shards: list[str], server: Server) -> None:
    """The first three samples came the first time; each sample comes once."""
    server.faults = {"0.tar": [f"cut {cut(shards[0])}"], "1.tar": ["cut 100", "cut 0"]}
    one = Stream(stream(f"{server.url}/{{0..{SHARDS - 1}}}.tar"), 0, 1)
    assert sorted(sample.key for sample in islice(one, len(EVERY))) == EVERY
    assert one.report() == ({}, [])
    assert [server.requests[: SHARDS + 3].count(name) for name in ("0.tar", "1.tar", "2.tar")] == [2, 3, 1]


def test_a_connection_that_stays_broken_is_given_up_and_counted(shards: list[str], server: Server) -> None:
    server.faults = {"0.tar": [f"cut {cut(shards[0])}"] * 3, "1.tar": ["status 500"] * 3, "2.tar": ["status 404"] * 3}
    # webdataset's own curl would try a 500 thirty times, two seconds apart.
    one = Stream(stream(f"pipe:curl --silent --fail {server.url}/{{0..{SHARDS - 1}}}.tar", buffer=1), 0, 1)
    found = [sample.key for sample in islice(one, 3 + 2 * EACH)]
    assert sorted(found) == sorted([*EVERY[:3], *EVERY[3 * EACH :]])
    faults, notes = one.report()
    assert faults == {"broken shard": 3}
    assert sum("exit code 22" in note for note in notes) == 2
    assert [server.requests[: SHARDS + 6].count(f"{n}.tar") for n in range(SHARDS)] == [3, 3, 3, 1, 1]


def test_a_server_in_trouble_is_asked_again(shards: list[str], server: Server) -> None:
    """By curl itself, as webdataset starts it."""
    server.faults = {"3.tar": ["status 500"]}
    one = Stream(stream(f"{server.url}/3.tar"), 0, 1)
    assert sorted(sample.key for sample in islice(one, EACH)) == [f"3{k}" for k in range(EACH)]
    assert one.report() == ({}, [])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pipe:exit 3", "10 shards in a row gave no sample.*exit code 3"),
        ("pipe:gzip -c {folder}/0.tar", "10 shards in a row.*gzip-compressed"),
        ("pipe:echo no tar; head -c 600 /dev/zero", "10 shards in a row.*cut short|no tar archive"),
    ],
)
def test_a_source_that_gives_nothing_ends_the_run(source: str, message: str, shards: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        keys(stream(source.replace("{folder}", str(tmp_path)), attempts=1), 1)


def test_samples_that_all_lack_what_is_needed_end_the_run(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmfast.data.streaming.UNUSABLE", 40)
    with pytest.raises(ValueError, match=r"40 samples in a row cannot be used.*missing label"):
        keys(stream(shards, requires=("caption", "label")), 1)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("s3://bucket/0.tar", ValueError, "pipe:aws s3 cp s3://bucket/0.tar -"),
        ("ftp2://host/0.tar", ValueError, "source: nothing opens 'ftp2://host/0.tar'; expected one of .*https"),
        ("/nowhere/{0..3}.tar", FileNotFoundError, "source: '/nowhere/0.tar' is no file"),
        ("pipe:cat ${UNKNOWN_HERE}/0.tar", ValueError, "source: .*WDS_NAME"),
        (".", ValueError, "source: '.' is no file; only tar shards"),
    ],
)
def test_a_source_that_nothing_opens_is_refused(source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        stream(source)


def test_arguments_are_checked(shards: list[str]) -> None:
    for options, name in (({"buffer": 0}, "buffer"), ({"attempts": 0}, "attempts"), ({"keywords": 2}, "keywords")):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            stream(shards, **options)
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        stream(shards, rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"5 shards for 3 processes of 2 workers; expected .* these 6"):
        StreamLoader(stream(shards, world_size=3), 4, list, num_workers=2)
    dataset = stream(shards)
    for wrong in (len, lambda d: d[0]):
        with pytest.raises(TypeError, match="read as a stream"):
            wrong(dataset)
    with pytest.raises(ValueError, match="source: 'pipe:cat x' is a stream"):
        ImageTextDataset("pipe:cat x", transform=None)


def names(batch: list) -> list[tuple[str, int]]:
    """What is compared: the key and the seed of what is random about the sample."""
    return [(sample.key, sample.seed) for sample in batch]


def loader(shards: list[str], workers: int, **options: object) -> StreamLoader:
    return StreamLoader(stream(shards, **{"buffer": 8, **options}), 4, names, num_workers=workers, note=print)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_with_the_same_samples(shards: list[str], workers: int) -> None:
    """Wherever it stops: in a block, in a shard, in the second round. Batches that were prefetched are not lost."""
    whole = list(islice(loader(shards, workers), 21))
    assert len({key for batch in whole for key, _ in batch}) == len(EVERY)
    for stop in (0, 1, 2, 13) if workers == 0 else (1, 14):
        before = loader(shards, workers)
        batches = iter(before)
        assert list(islice(batches, stop)) == whole[:stop]
        state = before.state_dict()
        after = loader(shards, workers)
        after.load_state_dict(state)
        assert list(islice(after, len(whole) - stop)) == whole[stop:]
        assert after.state_dict() != state


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"keywords": 2.0}, ValueError, "keywords: expected a probability, got 2.0"),
        ({"requires": "caption"}, TypeError, "requires: expected a list or tuple of names of fields, got 'caption'"),
        ({"buffer": 0}, ValueError, "buffer: expected at least 1, got 0"),
        ({"attempts": 0}, ValueError, "attempts: expected at least 1, got 0"),
    ],
)
def test_wrong_options(shards: list[str], option: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StreamingDataset(shards, transform=None, **option)


def test_a_state_of_another_loader_is_refused(shards: list[str]) -> None:
    state = loader(shards, 0).state_dict()
    with pytest.raises(ValueError, match="state: workers was 1 and is 2"):
        loader(shards, 2).load_state_dict(state)
    with pytest.raises(ValueError, match="state: shards was 5 and is 4"):
        loader(shards[1:], 0).load_state_dict(state)
    with pytest.raises(ValueError, match="state: buffer was 8 and is 9"):
        loader(shards, 0, buffer=9).load_state_dict(state)


def test_workers_tell_what_they_skip(shards: list[str]) -> None:
    os.truncate(shards[2], 1500)
    notes: list[str] = []
    dataset = stream([*shards, shards[2]])
    made = StreamLoader(dataset, 4, names, num_workers=2, note=notes.append)
    list(islice(made, 6))
    assert dataset.skipped()["broken shard"] == len(notes) >= 1
    assert "2.tar: the archive is cut short" in notes[0]


def test_memory_and_files_stay_flat(shards: list[str], tmp_path: Path) -> None:
    """Round after round, a damaged shard among them; webdataset's issue 365."""
    os.truncate(shards[2], 1500)
    dataset = stream(f"pipe:cat {tmp_path}/{{0..{SHARDS - 1}}}.tar", attempts=1, buffer=7)
    one = Stream(dataset, 0, 1)
    samples = iter(one)

    def used() -> tuple[int, int]:
        gc.collect()
        return tracemalloc.get_traced_memory()[0], len(os.listdir("/proc/self/fd"))

    def read(rounds: int) -> None:
        for _ in islice(samples, rounds * len(EVERY)):
            pass
        one.report()

    read(2)
    tracemalloc.start()
    try:
        read(2)
        memory, files = used()
        read(20)
        later, files_later = used()
    finally:
        tracemalloc.stop()
    assert later - memory < 20_000  # one list entry of 32 bytes for each of the 500 samples would be 16 kB
    assert abs(files_later - files) <= 1
