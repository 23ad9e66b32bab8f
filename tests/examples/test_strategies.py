"""examples/strategies.py, in this process, with runs of one step."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from command_line import write_shards

from vlmfast.cli import main
from vlmfast.cli.arguments import parse
from vlmfast.cli.train import DataArguments
from vlmfast.models import MODELS, model_class
from vlmfast.training import PretrainingArguments


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "strategies.py"
    spec = spec_from_file_location("strategies", path)
    module = module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "strategies", module)
    spec.loader.exec_module(module)
    return module


def test_every_system_has_a_run_and_a_strategy(example: ModuleType) -> None:
    assert {run.system for run in example.RUNS.values()} == set(MODELS)
    assert sorted(name for _, systems in example.STRATEGIES for name in systems) == sorted(MODELS)


def test_contrastive_systems_have_one_budget(example: ModuleType) -> None:
    budgets, rates = set(), {}
    for name in dict(example.STRATEGIES)["contrastive"]:
        model, words = model_class(name), example.RUNS[name].train.format(out="runs").split()
        training = (PretrainingArguments, model.training_defaults)
        options, _, found = parse(
            name,
            {"model": (model.Options, {}), "data": (DataArguments, {}), "training": training},
            ["--data=x.tar", "--output-dir=y", "--use-cpu", *words],
        )
        budgets.add((
            found.num_train_epochs, found.per_device_train_batch_size, found.weight_decay, found.warmup_steps,
            options.image_size, options.max_length,
        ))  # fmt: skip
        rates[name] = found.learning_rate
        assert options.vision_tower == ("runs/clip" if name == "lit" else None)
    (budget,) = budgets
    assert (*budget[:3], *budget[4:]) == (8, 512, 0.1, 48, 16)
    assert rates["siglip"] < rates["clip"]


def test_a_run_comes_after_what_it_needs(example: ModuleType) -> None:
    assert example.order(["clipcap"]) == ["clip", "magic", "language_model", "clipcap"]
    names = example.order(list(example.RUNS))
    assert set(names) == set(example.RUNS) | set(example.PREPARED)
    for name, run in example.RUNS.items():
        assert all(names.index(needed) < names.index(name) for needed in run.needs)


def test_runs_are_made_once_and_one_that_fails_stops_no_other(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[str] = []

    def vlmfast(log: Path, *arguments: str) -> float:
        commands.append(" ".join(arguments[:2]) if arguments[0] == "train" else arguments[0])
        quick = {"train": ["--disable-tqdm=true", "--dataloader-num-workers=0"], "eval": ["--num-workers=0"]}
        given = [a for a in arguments if not a.startswith("--report=")]
        if main([*given, *quick.get(arguments[0], [])]):
            raise SystemExit("ended with 2")
        return 0.5

    folder = write_shards(tmp_path / "data", "train-0.tar", "val-0.tar")
    small = "--image-size=16 --vision-width=64 --text-width=64 --vision-layers=1 --text-layers=1 --max-steps=1"
    small += " --per-device-train-batch-size=8 --max-length=8"
    runs = {
        "clip": example.Run("clip", "retrieval", "pairs", small),
        "mapl": example.Run("mapl", "captioning", "pairs", "--prefix-length=none"),
        "simvlm": example.Run("simvlm", "captioning", "pairs", small, "--no-java --max-new-tokens=4"),
    }
    monkeypatch.setattr(example, "vlmfast", vlmfast)
    monkeypatch.setattr(example, "RUNS", runs)
    monkeypatch.setattr(example, "paths", lambda out: {"pairs": (f"{folder}/train-0.tar", f"{folder}/val-0.tar")})
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"^failed: mapl$"):
        example.main([f"--output-dir={out}"])
    made = ["train clip", "eval", "train mapl", "train simvlm", "eval", "predict", "predict"]
    assert commands == made

    rows = {row["system"]: row for row in json.loads((out / "strategies.json").read_text())}
    assert list(rows) == ["clip", "simvlm"]
    captioning = json.loads((out / "simvlm" / "scores.json").read_text())["scores"]
    assert rows["simvlm"]["model"] == 100 * captioning["model"]["CIDEr"]
    assert rows["simvlm"]["blind"] == 100 * captioning["blind"]["CIDEr"]
    retrieval = json.loads((out / "clip" / "scores.json").read_text())
    assert rows["clip"]["chance"] == pytest.approx(100 * retrieval["image_to_text"]["chance"]["R@1"])
    assert rows["clip"]["trained"] > 0 == rows["clip"]["frozen"]
    assert (rows["clip"]["gigabytes"], rows["clip"]["minutes"] > 0) == (0.5, True)
    # What failed took its time all the same, which is added to that of the next try.
    spent = json.loads((out / "mapl" / "minutes.json").read_text())
    with pytest.raises(SystemExit, match=r"^failed: mapl$"):
        example.main([f"--output-dir={out}", "--runs", "mapl"])
    made.append(commands[-1])
    assert made[-1] == "train mapl"
    assert json.loads((out / "mapl" / "minutes.json").read_text()) > spent > 0
    assert "| prefix LM | `simvlm` | captioning, pairs | CIDEr | " in (out / "strategies.md").read_text()
    for picture in ("strategies.png", "gallery.png"):
        assert (out / picture).stat().st_size > 10_000
    capsys.readouterr()

    example.main([f"--output-dir={out}", "--runs", "simvlm"])  # done already, as are its words for the gallery
    assert commands == made
    assert "`simvlm`" in capsys.readouterr().out
