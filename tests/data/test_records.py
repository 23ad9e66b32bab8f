"""Text that no tokenizer takes, or that says nothing, in any field."""

import json

import pytest

from vlmfast.data import Collator, ImageTextDataset, eval_transform, load_tokenizer
from vlmfast.data.records import parse_record, parse_text

SPELT = '"\\ud83d"'
SURROGATES = [SPELT, '"half \\uD83D an emoji"', '"\\ude00\\ud83d"', '"\\udfff"']


@pytest.mark.parametrize("value", SURROGATES)
@pytest.mark.parametrize("name", ["caption", "category", "question", "text", "own"])
def test_a_string_with_a_lone_surrogate_is_left_out(name, value):
    record = parse_record(f'{{"other": "x", "{name}": {value}}}'.encode())
    assert record == {"other": "x"}
    text = parse_text(None, f'{{"other": "x", "{name}": {value}}}'.encode())
    assert (text.caption, text.category, text.record) == (None, None, {"other": "x"})


@pytest.mark.parametrize("name", ["captions", "keywords", "answers", "choices"])
def test_in_a_list_it_is_replaced_so_that_the_others_keep_their_places(name):
    record = parse_record(f'{{"{name}": ["a", {SPELT}, "c"], "answer_index": 2}}'.encode())
    assert record == {name: ["a", "\ufffd", "c"], "answer_index": 2}


def test_and_at_any_depth_and_in_names():
    data = b'{"objects": [{"name": "\\ud83d", "box": [0, 1.5, 2, 3], "attributes": ["\\udc00x"]}], "\\ud800": null}'
    assert parse_record(data) == {
        "objects": [{"name": "\ufffd", "box": [0, 1.5, 2, 3], "attributes": ["\ufffdx"]}],
        "\ufffd": None,
    }


@pytest.mark.parametrize("text", ["a \\ud83d\\ude00 b", "a \\\\ud83d b", "caf\\u00e9", "\\ufffd"])
def test_what_only_looks_like_one_stays(text):
    data = f'{{"caption": "{text}"}}'.encode()
    assert parse_text(None, data).caption == json.loads(data)["caption"]


def test_an_encoded_surrogate_is_no_text():
    assert parse_text(None, b'{"caption": "\xed\xa0\xbd"}') == parse_text(None, b"\xff\xff")
    assert parse_text(b"\xed\xa0\xbd", None).caption is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_in_any_of_its_encodings(encoding):
    assert parse_text(None, '{"caption": " é "}'.encode(encoding)).caption == "é"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"3", b"null", b'"x"', b"\xff", b"[" * 100_000, b'{"a":' * 100_000]
)  # fmt: skip
def test_what_is_no_json_object_is_no_record(data):
    assert parse_record(data) is None
    assert parse_text(None, data).caption is None
    both = parse_text(b"plain", data)
    assert (both.caption, both.record) == ("plain", None)


@pytest.mark.parametrize(("value", "expected"), [
    ("cat", "cat"), (" cat ", "cat"), (3, "3"), (1.5, "1.5"), ("", None), (" \t", None), (None, None), ([], None),
    (["cat"], None), ({}, None),
])  # fmt: skip
def test_categories(value, expected):
    assert parse_text(None, json.dumps({"caption": "x", "category": value}).encode()).category == expected


@pytest.mark.parametrize("value", [None, "one", {"a": "b"}, [], ["", " "], [3, None, ["x"]]])
def test_lists_without_strings(value):
    text = parse_text(None, json.dumps({"captions": value, "keywords": value}).encode())
    assert (text.caption, text.captions, text.keywords) == (None, (), ())


@pytest.mark.parametrize("source", ["folder", "table", "shard"])
def test_names_of_files_that_are_not_utf8_can_be_written(source, tmp_path, png, write_tar):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    if source == "shard":
        path = write_tar("a.tar", {f"{name}.png": png(0), f"{name}.txt": b"x"})
    else:
        (tmp_path / f"{name}.png").write_bytes(png(0))
        (tmp_path / f"{name}.txt").write_text("x")
        (tmp_path / "t.csv").write_text("path,caption\nlink.png,x\n")
        (tmp_path / "link.png").symlink_to(f"{name}.png")
        path = tmp_path / "t.csv" if source == "table" else tmp_path
    dataset = ImageTextDataset(path, transform=eval_transform(8))
    sample = dataset[0]
    sample.key.encode()
    assert sample.key == dataset.metadata(0)[0] == ("link.png" if source == "table" else "caf\\xe9")
    assert len(dataset.fingerprint()) == len(dataset.image_fingerprint()) == 64


def test_a_tokenizer_takes_every_caption_that_is_left(write_tar, png):
    members = {}
    for n, value in enumerate([*SURROGATES, '"\\u0000"', '"\\ufeff"', '"\\u202e"', '"' + "x" * 100_000 + '"']):
        members |= {f"{n}.png": png(n), f"{n}.json": f'{{"caption": {value}, "captions": [{value}, "y"]}}'.encode()}
    dataset = ImageTextDataset(write_tar("a.tar", members), transform=eval_transform(8))
    samples = [dataset[epoch, n] for n in range(len(dataset)) for epoch in range(3)]
    batch = Collator(load_tokenizer(), max_length=8)(samples)
    assert len(batch["input_ids"]) == 3 * len(dataset)
