"""vlmfast eval, in this process, on a small CLIP."""

import json
from pathlib import Path

import pytest
from command_line import write_pairs

from vlmfast.cli.evaluate import run
from vlmfast.data import load_tokenizer


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
    with pytest.raises(SystemExit) as exit:
        run(["--checkpoint", checkpoint, "--data", data, "--fast"])
    assert exit.value.code == 2
    with pytest.raises(SystemExit):
        run(["--help"])
    assert "--checkpoint" in capsys.readouterr().out
