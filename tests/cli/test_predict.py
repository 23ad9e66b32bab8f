"""vlmfast predict: whatever a checkpoint can do with images, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import tiny
from PIL import Image
from toys import COLOURS

from vlmfast.cli import main
from vlmfast.data import load_tokenizer
from vlmfast.models import model_class
from vlmfast.tasks.heads import TaskModel


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    names = []
    for colour in ("red", "blue"):
        path = tmp_path / f"{colour}.png"
        Image.new("RGB", (24, 16), COLOURS[colour]).save(path)
        names.append(str(path))
    return names


def saved(folder: Path, name: str, sizes: dict[str, Any] | None = None, **head: Any) -> str:
    """A checkpoint of a new model, or of one with a head."""
    torch.manual_seed(0)
    tokenizer, cls = load_tokenizer(), model_class(name)
    tokenizer.add_special_tokens(
        {key: token for key, token in cls.special_tokens.items() if getattr(tokenizer, key) is None}
    )
    options = cls.Options(**{**tiny(name), **(sizes or {})})
    model = cls.build(options, tokenizer)
    if head:
        sample = _sample(model.transform(options, train=False))
        model = TaskModel.around(
            model, head["task"], head["outputs"], model.collator(options, tokenizer, train=False)([sample])
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _sample(transform: Any) -> Any:
    import numpy as np

    from vlmfast.data import Sample

    return Sample(transform(Image.new("RGB", (16, 16)), np.random.default_rng(0)), "a text", "0", None)


def predicted(tmp_path: Path, *arguments: str) -> list[list[dict[str, Any]]]:
    output = tmp_path / "out.json"
    assert main(["predict", *arguments, f"--output={output}", "--device=cpu"]) == 0
    return [each["predictions"] for each in json.loads(output.read_text())]


def test_images_beside_texts(tmp_path: Path, images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, report = saved(tmp_path / "clip", "clip"), tmp_path / "report.png"
    texts = ["a red square", "a blue square", "a dog"]
    found = predicted(tmp_path, folder, *images, "--text", *texts, f"--report={report}")
    assert Image.open(report).width > 500
    assert images[1] in capsys.readouterr().out
    model, tokenizer = model_class("clip").from_pretrained(folder), load_tokenizer()
    given = tokenizer(texts, padding=True, return_tensors="pt")
    for name, ((one,)) in zip(images, found, strict=True):
        pixels = model.transform(model.Options(pretrained=folder), train=False)(Image.open(name), None)[None]
        with torch.no_grad():
            features = model.get_text_features(given["input_ids"], given["attention_mask"])
            want = (model.get_image_features(pixels) @ features.T)[0]
        assert one["kind"] == "similarity"
        assert one["lines"] == [texts[place] for place in want.argsort(descending=True).tolist()]
        assert one["scores"] == pytest.approx(want.sort(descending=True).values.tolist(), abs=1e-5)
    ((one,),) = predicted(tmp_path, folder, images[0], "--text", *texts)
    assert one["lines"] == found[0][0]["lines"]
    assert one["scores"] == pytest.approx(found[0][0]["scores"], abs=1e-5)
    assert main(["predict", folder, *images, "--device=cpu"]) == 2
    assert "--text is needed: CLIPModel compares images with texts" in capsys.readouterr().err


def test_generated_text(tmp_path: Path, images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "virtex", "virtex")
    found = predicted(tmp_path, folder, *images, "--max-new-tokens=3")
    assert [[one["kind"] for one in each] for each in found] == [["generated"], ["generated"]]
    assert main(["predict", folder, *images, "--text", "a", "b", "--device=cpu"]) == 2
    assert "--text: expected one text, got 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "outputs", "texts"),
    [
        ("vqa", ["red", "blue", "dog"], ["what colour is it?"]),
        ("hateful", ["0", "1"], ["a text"]),
        ("reasoning", ["score"], ["what is it?", "a dog", "a cat"]),
    ],
)
def test_heads_and_matches(
    tmp_path: Path, images: list[str], task: str, outputs: list[str], texts: list[str], capsys: Any
) -> None:
    folder = saved(tmp_path / "head", "lxmert", task=task, outputs=outputs)
    found = predicted(tmp_path, folder, *images, "--text", *texts)
    said = {"vqa": outputs, "hateful": ["label 0", "label 1"], "reasoning": texts[1:]}[task]
    for (one,) in found:
        assert sorted(one["lines"]) == sorted(said)
        assert one["scores"] == sorted(one["scores"], reverse=True)
        if task != "vqa":
            assert sum(one["scores"]) == pytest.approx(1, abs=1e-5)
    if task != "hateful":
        assert main(["predict", folder, *images, "--device=cpu"]) == 2
        assert "--text" in capsys.readouterr().err


def test_a_model_that_matches(tmp_path: Path, images: list[str]) -> None:
    folder = saved(tmp_path / "lxmert", "lxmert")
    ((one,),) = predicted(tmp_path, folder, images[0], "--text", "a dog", "a cat")
    assert one["kind"] == "match"
    assert all(0 <= score <= 1 for score in one["scores"])


def test_a_checkpoint_without_the_part_for_a_match(tmp_path: Path, images: list[str], capsys: Any) -> None:
    sizes = {"image_size": 32, "swin_width": 32, "swin_depths": "1,1", "width": 64, "layers": 2, "fused_layers": 1}
    folder = saved(tmp_path / "fiber", "fiber", {**sizes, "objective": "contrast"})
    ((one,),) = predicted(tmp_path, folder, images[0], "--text", "a dog", "a cat")
    assert one["kind"] == "similarity"
    assert "left out: objective contrast: has no matching" in capsys.readouterr().err


def test_what_cannot_be_is_one_line(tmp_path: Path, images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "runs"]) == 2
    assert "expected CHECKPOINT and one IMAGE or more before the options, got ['runs']" in capsys.readouterr().err
    assert main(["predict", "--help"]) == 0
    folder = saved(tmp_path / "clip", "clip")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    assert main(["predict", folder, str(broken), "--text=a"]) == 1
    assert "broken.png: corrupt image" in capsys.readouterr().err
    assert main(["predict", folder, "no/such.png", "--text=a"]) == 1
    assert "no/such.png: there is no such file" in capsys.readouterr().err
