"""examples/captioning.py, in this process, with a tiny language model and tower in the place of the real ones."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from command_line import write_shards
from prefix_models import llama, write_language_model, write_tower

from vlmfast.cli import main
from vlmfast.data import load_tokenizer


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "captioning.py"
    spec = spec_from_file_location("captioning", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_systems_are_trained_and_scored_side_by_side_and_not_twice(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[str] = []

    def vlmfast(*arguments: str) -> None:
        commands.append(" ".join(arguments[:2]))
        quick = ["--device=cpu"] if arguments[0] == "eval" else ["--disable-tqdm=true", "--bf16=false"]
        given = [a.replace("workers=1", "workers=0") for a in arguments if not a.startswith(("--report=", "--bf16"))]
        assert main([*given, *quick]) == 0

    tokenizer = load_tokenizer()
    language = write_language_model(tmp_path / "lm", llama(vocab_size=len(tokenizer), num_hidden_layers=10))
    tokenizer.save_pretrained(language)
    tower = write_tower(tmp_path / "clip")
    monkeypatch.setattr(example, "vlmfast", vlmfast)
    monkeypatch.setattr(example, "PAIRS", write_shards(tmp_path / "pairs", "train-0.tar", "val-0.tar"))
    out = tmp_path / "out"
    arguments = [
        f"--vision-tower={tower}", f"--language-model={language}", "--steps=1", "--samples=5", f"--output-dir={out}",
        "--systems", "clipcap", "flamingo",
    ]  # fmt: skip
    example.main(arguments)
    assert [c.split()[0] for c in commands] == ["train", "eval"] * 2
    rows = json.loads((out / "captioning.json").read_text())
    assert list(rows) == ["clipcap", "flamingo"]
    for name, found in rows.items():
        scores = json.loads((out / "captioning" / name / "scores.json").read_text())
        assert scores["num_samples"] == 5
        assert {row: found[row] for row in ("model", "blind", "nearest")} == {
            row: scores["scores"][row] for row in ("model", "blind", "nearest")
        }
        assert found["nearest"]["CIDEr"] > 1  # the very images are in the training data
    printed = capsys.readouterr().out
    assert printed.count("flamingo  CIDEr: model") == 2
    example.main(arguments)
    assert len(commands) == 4
    with pytest.raises(SystemExit):
        example.main([*arguments, "--task=vqa"])  # clipcap answers no questions
    with pytest.raises(SystemExit):
        example.main(["--vision-tower=nowhere"])
    assert "`make demo` trains one" in capsys.readouterr().err
