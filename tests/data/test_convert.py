"""Each published format to records and shards."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from published import PUBLISHED, Png, Published, draw, lines, vcr, vqav2, write

from vlmfast.data import ImageTextDataset
from vlmfast.data.convert import FORMATS, convert
from vlmfast.data.convert import shards as shards_module


def read(folder: Path) -> dict[str, tuple[str, bytes, dict[str, Any]]]:
    """Key -> (extension, image, record), over the shards in a folder."""
    found: dict[str, list[Any]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                found.setdefault(key, []).extend(
                    (json.loads(content),) if extension == "json" else (extension, content)
                )
    return {key: (parts[0], parts[1], parts[2]) for key, parts in found.items()}


@pytest.fixture(params=list(PUBLISHED))
def format(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def many(tmp_path: Path, png: Png) -> Published:
    """Seven memes."""
    rows = [
        {"id": number, "img": f"img/{number}.png", "label": number % 2, "text": f"t{number}"} for number in range(7)
    ]
    images = draw(tmp_path / "memes", png, *(row["img"] for row in rows))
    records = {f"{row['id']:012d}": {"text": row["text"], "label": row["label"]} for row in rows}
    return Published([write(tmp_path / "memes" / "train.jsonl", lines(*rows))], images, records, ())


class TestFormats:
    def test_all_are_tried(self) -> None:
        assert list(PUBLISHED) == list(FORMATS)

    def test_records_are_in_the_schema_and_images_as_they_were(self, format: str, tmp_path: Path, png: Png) -> None:
        published = PUBLISHED[format](tmp_path, png)
        done = convert(format, published.files, published.images, tmp_path / "shards")
        found = read(tmp_path / "shards")
        assert {key: record for key, (_, _, record) in found.items()} == published.records
        originals = {path.read_bytes() for path in published.images.rglob("*.*g") if path.suffix in (".jpg", ".png")}
        assert all(extension == "png" and image in originals for extension, image, _ in found.values())
        assert (done.samples, done.skipped) == (len(published.records), {})
        assert done.shards == [tmp_path / "shards" / "shard-00000.tar"]

    def test_the_dataset_reads_them(self, format: str, tmp_path: Path, png: Png) -> None:
        published = PUBLISHED[format](tmp_path, png)
        done = convert(format, published.files, published.images, tmp_path / "shards")
        dataset = ImageTextDataset([str(path) for path in done.shards], transform=None, requires=published.needs)
        samples = [dataset[index] for index in range(len(dataset))]
        assert {sample.key: sample.record for sample in samples if sample} == published.records
        assert not dataset.skipped()

    def test_other_formats_files_are_refused(self, format: str, tmp_path: Path, png: Png) -> None:
        # MDETR's files are COCO's with more in them.
        read_too = ("refcoco", "flickr30k-entities") if format == "coco-instances" else ()
        for other in PUBLISHED.keys() - {format, *read_too}:
            published = PUBLISHED[other](tmp_path / other, png)
            with pytest.raises(ValueError, match=r"^annotations: .*expected"):
                convert(format, published.files[:1], published.images, tmp_path / "shards")
        assert not list((tmp_path / "shards").glob("*.tar"))

    def test_a_file_that_is_no_json_is_refused(self, format: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^annotations: .*notes.txt is no"):
            convert(format, [write(tmp_path / "notes.txt", "not JSON")], tmp_path, tmp_path / "shards")

    def test_a_test_split_has_no_answers(self, tmp_path: Path, png: Png) -> None:
        published = vqav2(tmp_path, png)
        convert("vqav2", published.files[:1], published.images, tmp_path / "vqa")
        assert all(
            entry.keys() == {"question", "id"} for *_, r in read(tmp_path / "vqa").values() for entry in r["questions"]
        )
        memes = write(tmp_path / "test.jsonl", lines({"id": 1, "img": "img/1.png", "text": "so"}))
        convert("hateful-memes", [memes], draw(tmp_path, png, "img/1.png"), tmp_path / "memes")
        assert read(tmp_path / "memes")["000000000001"][2] == {"text": "so"}
        published = vcr(tmp_path, png)
        row = json.loads(published.files[0].read_text())
        del row["answer_label"], row["rationale_label"]
        convert("vcr", [write(tmp_path / "test.jsonl", lines(row))], published.images, tmp_path / "vcr")
        record = read(tmp_path / "vcr")["train-0"][2]
        assert record.keys() == {"question", "choices", "rationale_choices", "objects"}

    def test_answers_of_another_split_are_refused(self, tmp_path: Path, png: Png) -> None:
        published = vqav2(tmp_path, png)
        answers = json.loads(published.files[1].read_text())
        for row in answers["annotations"]:
            row["question_id"] += 1_000_000_000
        write(published.files[1], answers)
        with pytest.raises(ValueError, match="no answer is of a question that is there"):
            convert("vqav2", published.files, published.images, tmp_path / "shards")

    def test_vcr_s_boxes_are_missing_or_others(self, tmp_path: Path, png: Png) -> None:
        published = vcr(tmp_path, png)
        row = json.loads(published.files[0].read_text())
        few = {"boxes": [[0, 0, 1, 1, 0.5]]}
        names = {"none.json": None, "few.json": few, "list.json": [], "short.json": {"boxes": [[0, 0, 1, 1]]}}
        rows = [row]
        for number, (name, content) in enumerate(names.items()):
            rows.append({**row, "annot_id": f"train-{number + 1}", "metadata_fn": name})
            if content is not None:
                write(published.images / name, content)
        done = convert("vcr", [write(tmp_path / "v.jsonl", lines(*rows))], published.images, tmp_path / "shards")
        assert done.samples == 1
        assert done.skipped == {"missing boxes": 1, "boxes of other objects": 1, "damaged boxes": 2}


class TestImages:
    def test_those_that_cannot_be_used_are_skipped_and_counted(self, many: Published, tmp_path: Path, png: Png) -> None:
        names = sorted((many.images / "img").iterdir())
        names[0].unlink()
        names[1].write_bytes(png(1)[:100])
        names[2].write_bytes(b"GIF89a")
        names[3].write_bytes(b"")
        done = convert("hateful-memes", many.files, many.images, tmp_path / "shards", shard_size=3)
        assert done.skipped == {"missing image": 1, "damaged image": 3}
        assert done.samples == 3
        assert list(read(tmp_path / "shards")) == list(many.records)[4:]
        # The first shard would be empty.
        assert [path.name for path in done.shards] == ["shard-00001.tar", "shard-00002.tar"]

    def test_those_of_too_many_pixels_are_a_reason_of_their_own(
        self, many: Published, tmp_path: Path, png: Png, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (many.images / "img" / "5.png").write_bytes(png(5, (9, 8)))
        monkeypatch.setattr("vlmfast.data.images.MAX_PIXELS", 64)
        done = convert("hateful-memes", many.files, many.images, tmp_path / "shards")
        assert (done.samples, done.skipped) == (6, {"image of too many pixels": 1})

    def test_none_at_all_is_an_error_that_says_where_they_were_looked_for(
        self, many: Published, tmp_path: Path
    ) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(
            ValueError, match=r"images: none of 7 items could be used \(7 missing image\); .*empty/img/0"
        ):
            convert("hateful-memes", many.files, tmp_path / "empty", tmp_path / "shards")

    @pytest.mark.parametrize("absolute", [False, True])
    def test_names_do_not_lead_out_of_the_folder(self, absolute: bool, tmp_path: Path, png: Png) -> None:
        draw(tmp_path, png, "secret.png", "images/a.png")
        name = str(tmp_path / "secret.png") if absolute else "../secret.png"
        image = {"id": 1, "file_name": name}
        content = {"images": [image], "annotations": [{"image_id": 1, "caption": "x"}]}
        with pytest.raises(ValueError, match="1 missing image"):
            convert("coco-captions", [write(tmp_path / "c.json", content)], tmp_path / "images", tmp_path / "shards")


class TestShards:
    def test_size_and_names(self, many: Published, tmp_path: Path) -> None:
        done = convert("hateful-memes", many.files, many.images, tmp_path / "shards", shard_size=3)
        assert [path.name for path in done.shards] == [f"shard-{number:05d}.tar" for number in range(3)]
        assert {key: record for key, (_, _, record) in read(tmp_path / "shards").items()} == many.records
        assert len(ImageTextDataset(str(done.shards[0]), transform=None, requires=())) == 3

    def test_a_run_that_was_stopped_leaves_whole_shards_and_goes_on(
        self, many: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, stopped = tmp_path / "whole", tmp_path / "stopped"
        convert("hateful-memes", many.files, many.images, whole, shard_size=2)
        decode, calls = shards_module.decode_image, 0

        def stop_at_the_fourth(data: bytes, min_side: int | None = None) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise KeyboardInterrupt
            return decode(data, min_side)

        monkeypatch.setattr(shards_module, "decode_image", stop_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            convert("hateful-memes", many.files, many.images, stopped, shard_size=2)
        first = stopped / "shard-00000.tar"
        assert list(stopped.glob("*.tar")) == [first]
        before = first.stat().st_mtime_ns
        done = convert("hateful-memes", many.files, many.images, stopped, shard_size=2)
        assert first.stat().st_mtime_ns == before
        assert calls == 4 + 5
        assert (done.samples, len(done.shards)) == (7, 4)
        assert {path.name: path.read_bytes() for path in stopped.glob("*")} == {
            path.name: path.read_bytes() for path in whole.glob("*")
        }

    def test_a_second_run_counts_what_the_first_skipped(self, many: Published, tmp_path: Path) -> None:
        (many.images / "img" / "3.png").unlink()
        runs = [convert("hateful-memes", many.files, many.images, tmp_path / "shards", shard_size=2) for _ in range(2)]
        assert runs[0] == runs[1]
        assert runs[1].skipped == {"missing image": 1}

    def test_other_contents_of_the_output_are_refused(self, many: Published, tmp_path: Path) -> None:
        output = tmp_path / "shards"
        convert("hateful-memes", many.files, many.images, output, shard_size=2)
        with pytest.raises(ValueError, match=r"output: .* another value of shard_size"):
            convert("hateful-memes", many.files, many.images, output, shard_size=3)
        other = write(tmp_path / "other.jsonl", lines({"id": 1, "img": "img/1.png", "text": "x"}))
        with pytest.raises(ValueError, match=r"output: .* another value of annotations"):
            convert("hateful-memes", [other], many.images, output, shard_size=2)
        (output / "shard-00001.tar").unlink()
        with pytest.raises(ValueError, match=r"output: .* lacks shard-00001.tar"):
            convert("hateful-memes", many.files, many.images, output, shard_size=2)
        (output / "convert.json").write_text("{")
        with pytest.raises(ValueError, match=r"output: .*convert.json is damaged"):
            convert("hateful-memes", many.files, many.images, output, shard_size=2)
        (output / "convert.json").unlink()
        with pytest.raises(ValueError, match=r"output: .* tar files of another origin"):
            convert("hateful-memes", many.files, many.images, output, shard_size=2)


class TestArguments:
    def test_are_named_where_they_are_wrong(self, many: Published, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"format: expected one of coco-captions, .*; got 'voc'"):
            convert("voc", many.files, many.images, tmp_path / "shards")
        with pytest.raises(ValueError, match="shard_size: expected at least 1, got 0"):
            convert("hateful-memes", many.files, many.images, tmp_path / "shards", shard_size=0)
        with pytest.raises(FileNotFoundError, match=r"annotations: there is no file .*nothing.jsonl"):
            convert("hateful-memes", [tmp_path / "nothing.jsonl"], many.images, tmp_path / "shards")
        with pytest.raises(FileNotFoundError, match=r"images: .*nothing is no folder"):
            convert("hateful-memes", many.files, tmp_path / "nothing", tmp_path / "shards")
        with pytest.raises(ValueError, match=r"annotations: expected train.jsonl, .*; got 2 files"):
            convert("hateful-memes", [*many.files, *many.files], many.images, tmp_path / "shards")

    def test_two_samples_of_one_id_are_refused(self, tmp_path: Path) -> None:
        row = {"id": 5, "img": "img/5.png", "text": "x"}
        file = write(tmp_path / "train.jsonl", lines(row, row))
        with pytest.raises(ValueError, match=r"annotations: .* two images or samples of one id"):
            convert("hateful-memes", [file], tmp_path, tmp_path / "shards")

    def test_an_entry_of_the_wrong_type_is_an_error_of_the_file(self, tmp_path: Path) -> None:
        content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": 7}]}
        with pytest.raises(ValueError, match=r"annotations: .*c.json: an entry is not as captions_\*.json has it"):
            convert("coco-captions", [write(tmp_path / "c.json", content)], tmp_path, tmp_path / "shards")
