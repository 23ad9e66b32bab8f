"""examples/contrastive_family.py: its commands are ones that the command line takes; nothing is trained here."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from vlmfast.cli.arguments import parse
from vlmfast.cli.train import DataArguments
from vlmfast.models import MODELS, model_class
from vlmfast.training import PretrainingArguments

SIDES = ("image_to_text", "text_to_image")
FAMILY = {name for name in MODELS if model_class(name).strategy == "contrastive"}


@pytest.fixture
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "contrastive_family.py"
    spec = spec_from_file_location("contrastive_family", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_model_is_trained_with_one_budget(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained = {}

    def vlmfast(command: str, *options: str) -> None:
        if command == "train":
            name, *rest = options
            model = model_class(name)
            training = (PretrainingArguments, model.training_defaults)
            trained[name] = parse(
                name, {"model": (model.Options, {}), "data": (DataArguments, {}), "training": training}, rest
            )
            return
        given = dict(option.split("=", 1) for option in options)
        scores = {side: {"R@1": 0.25, "R@5": 0.5, "R@10": 0.75} for side in SIDES} | {"zero_shot": {"top-1": 0.125}}
        Path(given["--output"]).parent.mkdir(exist_ok=True)
        Path(given["--output"]).write_text(json.dumps(scores))

    monkeypatch.setattr(example, "vlmfast", vlmfast)
    example.main(["--epochs=3", f"--output-dir={tmp_path}", "--", "--warmup-steps=7"])
    assert set(trained) == FAMILY
    budgets = {
        (t.num_train_epochs, t.per_device_train_batch_size, t.warmup_steps, m.image_size, m.max_length)
        for m, _, t in trained.values()
    }
    assert budgets == {(3, 512, 7, 48, 16)}
    assert trained["lit"][0].vision_tower == str(tmp_path / "clip")
    assert trained["siglip"][2].learning_rate < trained["clip"][2].learning_rate
    rows = json.loads((tmp_path / "family.json").read_text())
    assert set(rows) == FAMILY
    assert rows["lit"]["text to image R@10"] == 75
    assert rows["lit"]["zero-shot"] == 12.5


def test_lit_needs_the_tower_of_clip(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(["--models", "lit"])
    assert "name both" in capsys.readouterr().err
