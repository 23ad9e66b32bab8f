"""vlmfast train --model for each model: trained, saved and evaluated from the command line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from command_line import PAIRS, assert_same_run, command, logged, run, write_pairs
from safetensors.torch import load_file

from vlmfast.cli import main
from vlmfast.cli.models import MODELS, model_class, model_type
from vlmfast.data import load_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a pretrained image tower, which says how its pixels are normalised, and a text tower."""
    folder, tokenizer = tmp_path_factory.mktemp("towers"), load_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder / "vit")
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # two processes draw other numbers
    config = transformers.BertConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=0, max_position_embeddings=40)
    transformers.BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    return [f"--vision-tower={folder / 'vit'}", f"--text-tower={folder / 'bert'}"]


def trained(arguments: list[str]) -> Path:
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    return Path(arguments[arguments.index("--output-dir") + 1])


def evaluated(checkpoint: Path, data: Path) -> dict:
    scores = checkpoint / "scores.json"
    done = run([
        sys.executable, "-m", "vlmfast", "eval", "--checkpoint", str(checkpoint), "--data", str(data),
        "--output", str(scores), "--device=cpu", "--num-workers=0",
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(scores.read_text())


def test_every_model_is_known_by_its_model_type() -> None:
    assert {name: model_class(name).config_class.model_type for name in MODELS} == {name: name for name in MODELS}


def test_declip_sees_two_views_of_each_pair(data: Path, tmp_path: Path) -> None:
    """In chunks."""
    folder = trained(command(data, tmp_path, "--model=declip", "--max-steps=3", "--save-steps=3"))
    assert set(logged(folder, 3)) == {1, 2, 3}
    weights = load_file(folder / "model.safetensors")
    assert weights["bank.pushed"] == 3 * 2 * 8
    assert weights["projector.1.num_batches_tracked"] == 3 * 2
    assert json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"] == len(load_tokenizer()) + 1
    assert evaluated(folder, data)["num_pairs"] == PAIRS


def test_declip_with_its_preset_and_synonyms(data: Path, tmp_path: Path) -> None:
    """The paper's weights but for one; captions are rewritten with synonyms of a file."""
    synonyms = tmp_path / "synonyms.json"
    synonyms.write_text(json.dumps({"square": ["box"]}))
    options = ["--model=declip", "--declip-weights=paper", "--config-overrides=image_ssl_weight=0"]
    options += [f"--synonyms={synonyms}", "--max-steps=3"]
    folder = trained(command(data, tmp_path / "run", *options))
    config = json.loads((folder / "config.json").read_text())
    assert (config["clip_weight"], config["multi_view_weight"], config["image_ssl_weight"]) == (0.4, 0.2, 0)
    assert set(logged(folder, 3)) == {1, 2, 3}
    plain = trained(command(data, tmp_path / "plain", *(option for option in options if "synonyms" not in option)))
    assert logged(plain, 3) != logged(folder, 3)


@pytest.mark.parametrize("name", ["cloob", "align", "siglip"])
def test_trains_resumes_and_is_evaluated(name: str, data: Path, tmp_path: Path) -> None:
    """In chunks; stopped after the first checkpoint, the second run gives what the first would have given."""
    options = [f"--model={name}", "--vision-layers=3", "--max-steps=6"]
    whole = trained(command(data, tmp_path / "whole", *options))
    assert set(logged(whole, 6)) == {1, 2, 3, 4, 5, 6}
    part = tmp_path / "part"
    part.mkdir()
    (whole / "checkpoint-3").rename(part / "checkpoint-3")
    shutil.copy(whole / "run.json", part)
    resumed = trained(command(data, part, *options, "--resume"))
    assert logged(resumed, 6) == logged(whole, 6)
    weights = load_file(whole / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in load_file(resumed / "model.safetensors").items())
    assert model_type(str(whole)) == name
    assert evaluated(whole, data)["num_pairs"] == PAIRS


def test_lit_locks_its_tower_and_reads_the_cache(data: Path, towers: list[str], tmp_path: Path) -> None:
    """One process and two with half the batch each; the tower's own weights and normalisation are in the checkpoint."""
    options = ["--model=lit", *towers, f"--cache-locked-features={tmp_path / 'features'}"]
    one = trained(command(data, tmp_path / "one", *options))
    assert (tmp_path / "features" / "000000.npy").exists()
    before = load_file(Path(towers[0].partition("=")[2]) / "model.safetensors")
    after = load_file(one / "model.safetensors")
    kept = {name: value for name, value in before.items() if not name.startswith("pooler.")}
    assert kept
    assert all(torch.equal(after[f"vision_model.{name}"], value) for name, value in kept.items())
    assert json.loads((one / "config.json").read_text())["image_mean"] == [0.5, 0.4, 0.3]
    assert evaluated(one, data)["num_pairs"] == PAIRS

    halves = command(data, tmp_path / "two", *options, "--per-device-train-batch-size=4", "--ddp-backend=gloo")
    halves[halves.index(f"--cache-locked-features={tmp_path / 'features'}")] += "-of-two"
    two = trained([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *halves[1:]])
    assert logged(two) == pytest.approx(logged(one), rel=1e-4)

    again = command(data, tmp_path / "again", *options)
    assert_same_run(trained(again), one)  # reads what the first run wrote


def test_lit_with_a_text_tower_from_scratch(data: Path, towers: list[str], tmp_path: Path) -> None:
    """The paper's Lu: of the two towers that LU has, the image's alone."""
    folder = trained(command(data, tmp_path, "--model=lit", towers[0], "--max-steps=3"))
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["hidden_size"] == 64
    assert config["vision_config"]["hidden_size"] == config["projection_dim"] == 32
    before = load_file(Path(towers[0].partition("=")[2]) / "model.safetensors")["layernorm.weight"]
    assert torch.equal(load_file(folder / "model.safetensors")["vision_model.layernorm.weight"], before)
    assert logged(folder, 3)[3] != logged(folder, 3)[1]


def test_clip_takes_pretrained_towers(data: Path, towers: list[str], tmp_path: Path) -> None:
    folder = trained(command(data, tmp_path, *towers, "--max-steps=3", "--learning-rate=0"))
    for name, option in zip(("vision_model", "text_model"), towers, strict=True):
        before = load_file(Path(option.partition("=")[2]) / "model.safetensors")
        after = load_file(folder / "model.safetensors")
        kept = [key for key in before if f"{name}.{key}" in after]
        assert len(kept) >= len(before) - 2  # the text tower's pooler
        assert all(torch.equal(after[f"{name}.{key}"], before[key]) for key in kept)
    assert model_type(str(folder)) == "clip"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model=lit"], "--model lit needs the --vision-tower that it locks"),
        (["--cache-locked-features=x"], "--cache-locked-features needs a locked tower, --model lit; got clip"),
        (["--config=x.json", "--vision-tower=x"], "--config and --vision-tower and --text-tower exclude each other"),
        (["--vision-tower=./nowhere"], "./nowhere is not the folder of a checkpoint"),
        (["--model=declip", "--jitter=0.1"], "--jitter: DeCLIP's views have their own"),
        (["--synonyms=x.json"], "--synonyms needs --model declip, which rewrites captions; got clip"),
    ],
)
def test_what_cannot_be_is_refused(
    data: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program = [sys.executable, "-m", "vlmfast"]
    assert (arguments := command(data, tmp_path, *options))[:3] == program
    assert main(arguments[3:]) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_a_checkpoint_of_something_else_is_refused(
    towers: list[str], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--checkpoint", towers[1].partition("=")[2], "--data", str(data)]) == 1
    assert "got model_type 'bert'" in capsys.readouterr().err
