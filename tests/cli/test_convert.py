"""vlmfast convert, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vlmfast.cli import main
from vlmfast.data import ImageTextDataset


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of an easy-VQA with three images, of which one is missing."""
    (tmp_path / "images").mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8), "teal").save(tmp_path / "images" / f"{number}.png")
    questions = [[f"is image {number} teal?", "yes", number] for number in range(3)]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    return [
        "convert", "easy-vqa", "--annotations", str(tmp_path / "questions.json"),
        "--images", str(tmp_path / "images"), "--output", str(tmp_path / "shards"), "--shard-size", "1",
    ]  # fmt: skip


def test_shards_and_what_was_skipped(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"2 samples in 2 shards in {tmp_path / 'shards'}" in printed
    assert "skipped: 1 missing image" in printed
    dataset = ImageTextDataset(str(tmp_path / "shards" / "*.tar"), transform=None, requires=("questions",))
    assert [dataset[index].record["questions"][0]["answers"] for index in range(len(dataset))] == [["yes"], ["yes"]]  # type: ignore[union-attr]


def test_errors_are_one_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments[1] = "coco-captions"
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("vlmfast convert: annotations: ")
    assert error.count("\n") == 1


def test_help_lists_the_formats(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    printed = capsys.readouterr().out
    assert "flickr30k-entities  final_flickr_*GT_*.json of MDETR; images: flickr30k-images" in printed
    with pytest.raises(SystemExit):
        main(["convert", "voc"])
    assert "invalid choice: 'voc'" in capsys.readouterr().err
