"""vlmfast eval, in this process, on a small CLIP."""

import json
from pathlib import Path

import pytest
from command_line import write_pairs
from toys import COLOURS, joint_model, word_tokenizer, write_records

from vlmfast.cli.arguments import UsageError
from vlmfast.cli.evaluate import run
from vlmfast.data import load_tokenizer
from vlmfast.tasks.vqa import VQA


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    from vlmfast.models.contrastive.clip import CLIPConfig, CLIPModel

    folder, tokenizer = tmp_path_factory.mktemp("clip"), load_tokenizer()
    sizes = {"image_size": 16, "patch_size": 8, "vision_width": 64, "vision_layers": 1, "text_width": 64}
    config = CLIPConfig.small(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id, max_length=12, text_layers=1, embed_dim=32, **sizes,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_pairs(tmp_path_factory.mktemp("pairs"), 8)
    for index, path in enumerate(sorted(folder.glob("*.txt"))):
        record = {"caption": path.read_text(), "category": ("odd", "even")[index % 2]}
        path.with_suffix(".json").write_text(json.dumps(record))
        path.unlink()
    return str(folder)


def test_the_task_is_the_models_first_or_the_one_that_is_named(
    checkpoint: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", checkpoint, "--data", data, "--device=cpu", "--num-workers=0"]
    first, named = tmp_path / "new" / "first.json", tmp_path / "named.json"
    assert run([*arguments, f"--output={first}"]) == 0
    assert "image -> text" in capsys.readouterr().out
    assert run([*arguments, "--task=zero_shot", f"--output={named}"]) == 0
    assert "retrieval" not in capsys.readouterr().out
    retrieval, zero_shot = (json.loads(path.read_text()) for path in (first, named))
    assert (retrieval["num_pairs"], retrieval["arguments"]["max_length"]) == (8, 12)
    assert retrieval["arguments"]["checkpoint"] == checkpoint
    assert zero_shot["zero_shot"]["classes"] == ["even", "odd"]
    assert zero_shot["zero_shot"] == retrieval["zero_shot"]


def test_bad_arguments(checkpoint: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"task: expected one of retrieval, .*; got 'sorting'"):
        run(["--checkpoint", checkpoint, "--data", data, "--task=sorting"])
    with pytest.raises(ValueError, match="--image-size 32 has no effect"):
        run(["--checkpoint", checkpoint, "--data", data, "--device=cpu", "--image-size=32"])
    with pytest.raises(UsageError, match="unrecognized arguments: --fast"):
        run(["--checkpoint", checkpoint, "--data", data, "--fast"])
    assert run(["--help"]) == 0
    assert "--beams" not in capsys.readouterr().out
    assert run(["--help", "--task=captioning"]) == 0
    assert "--beams" in capsys.readouterr().out


def test_a_fine_tuned_checkpoint_names_its_task_and_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [(colour, {"question": "what colour is this ?", "answers": [colour]}) for colour in COLOURS]
    data = write_records(tmp_path / "data.tar", *asked)
    made = VQA().trainable(joint_model(True), data, word_tokenizer(), None)
    made.model.save_pretrained(tmp_path / "run")
    word_tokenizer().save_pretrained(tmp_path / "run")
    scores = tmp_path / "scores.json"
    arguments = ["--checkpoint", str(tmp_path / "run"), "--data", data, "--device=cpu", "--num-workers=0"]
    assert run([*arguments, "--image-size=8", f"--output={scores}"]) == 0
    assert "vqa" in capsys.readouterr().out
    record = json.loads(scores.read_text())
    assert record["form"] == "head"
    assert record["scores"]["majority"] == {"accuracy": 1 / 6}
    with pytest.raises(ValueError, match="--image-size is needed"):
        run(arguments)
