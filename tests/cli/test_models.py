"""vlmfast train for each model: trained, saved and evaluated from the command line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from command_line import PAIRS, assert_same_run, command, logged, run, run_on_two, write_pairs
from safetensors.torch import load_file

from vlmfast.cli import main
from vlmfast.data import load_tokenizer
from vlmfast.models import MODELS, model_class, model_type


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
    folder = trained(command(data, tmp_path, "--max-steps=3", "--save-steps=3", model="declip"))
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
    options = ["--declip-weights=paper", "--config-overrides=image_ssl_weight=0"]
    options += [f"--synonyms={synonyms}", "--max-steps=3"]
    folder = trained(command(data, tmp_path / "run", *options, model="declip"))
    config = json.loads((folder / "config.json").read_text())
    assert (config["clip_weight"], config["multi_view_weight"], config["image_ssl_weight"]) == (0.4, 0.2, 0)
    assert set(logged(folder, 3)) == {1, 2, 3}
    without = [option for option in options if "synonyms" not in option]
    plain = trained(command(data, tmp_path / "plain", *without, model="declip"))
    assert logged(plain, 3) != logged(folder, 3)


def test_lit_locks_its_tower_and_reads_the_cache(data: Path, towers: list[str], tmp_path: Path) -> None:
    """One process and two with half the batch each; the tower's own weights and normalisation are in the checkpoint."""
    features = f"--cache-features={tmp_path / 'features'}"
    lit = {"model": "lit", "towers": towers}
    one = trained(command(data, tmp_path / "one", features, **lit))
    assert (tmp_path / "features" / "000000.npy").exists()
    before = transformers.ViTModel.from_pretrained(towers[0].partition("=")[2]).state_dict()
    after = load_file(one / "model.safetensors")
    kept = {name: value for name, value in before.items() if not name.startswith("pooler.")}
    assert kept
    assert all(torch.equal(after[f"vision_model.{name}"], value) for name, value in kept.items())
    assert json.loads((one / "config.json").read_text())["image_mean"] == [0.5, 0.4, 0.3]
    assert evaluated(one, data)["num_pairs"] == PAIRS

    of_two = ["--per-device-train-batch-size=4", "--ddp-backend=gloo", "--dataloader-num-workers=0"]
    run_on_two(command(data, tmp_path / "two", f"{features}-of-two", *of_two, **lit))
    assert logged(tmp_path / "two") == pytest.approx(logged(one), rel=1e-4)

    again = command(data, tmp_path / "again", features, **lit)
    assert_same_run(trained(again), one)  # reads what the first run wrote


def test_a_pretrained_tower_that_is_trained_is_resumed(data: Path, towers: list[str], tmp_path: Path) -> None:
    """transformers writes a ViT's weights by older names, which its Trainer does not find when it resumes."""
    options = ["--max-steps=4", "--save-steps=2", "--learning-rate=0.01", "--warmup-steps=0"]
    whole = trained(command(data, tmp_path / "whole", *options, towers=towers))
    part = tmp_path / "part"
    part.mkdir()
    (whole / "checkpoint-2").rename(part / "checkpoint-2")
    shutil.copy(whole / "run.json", part)
    trained(command(data, part, *options, "--resume", towers=towers))
    assert logged(part, 4) == logged(whole, 4)
    weights = load_file(whole / "model.safetensors")
    before = load_file(Path(towers[0].partition("=")[2]) / "model.safetensors")["layernorm.weight"]
    assert not torch.equal(weights["vision_model.layernorm.weight"], before)
    assert all(torch.equal(value, weights[key]) for key, value in load_file(part / "model.safetensors").items())
    assert evaluated(whole, data)["num_pairs"] == PAIRS


def test_lit_with_a_text_tower_from_scratch(data: Path, towers: list[str], tmp_path: Path) -> None:
    """The paper's Lu: of the two towers that LU has, the image's alone."""
    folder = trained(command(data, tmp_path, "--max-steps=3", model="lit", towers=towers[:1]))
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["hidden_size"] == 64
    assert config["vision_config"]["hidden_size"] == config["projection_dim"] == 32
    before = load_file(Path(towers[0].partition("=")[2]) / "model.safetensors")["layernorm.weight"]
    assert torch.equal(load_file(folder / "model.safetensors")["vision_model.layernorm.weight"], before)
    assert logged(folder, 3)[3] != logged(folder, 3)[1]


def test_clip_takes_pretrained_towers(data: Path, towers: list[str], tmp_path: Path) -> None:
    folder = trained(command(data, tmp_path, "--max-steps=3", "--learning-rate=0", towers=towers))
    for name, option in zip(("vision_model", "text_model"), towers, strict=True):
        before = transformers.AutoModel.from_pretrained(option.partition("=")[2]).state_dict()
        after = load_file(folder / "model.safetensors")
        kept = [key for key in before if f"{name}.{key}" in after]
        assert len(kept) >= len(before) - 2  # the text tower's pooler
        assert all(torch.equal(after[f"{name}.{key}"], before[key]) for key in kept)
    assert model_type(str(folder)) == "clip"


@pytest.mark.parametrize(
    ("model", "options", "message", "code"),
    [
        ("lit", [], "lit needs the --vision-tower that it locks", 1),
        ("clip", ["--cache-features=x"], "--cache-features x: CLIPModel has no frozen part whose features it reads", 1),
        ("clip", ["--config=x.json", "--vision-tower=x"], "--vision-tower x has no effect beside --config", 1),
        ("clip", ["--config=x.json", "--pretrained=x"], "--pretrained and --config exclude each other", 1),
        ("clip", ["--pretrained=x", "--patch-size=4"], "--patch-size 4 has no effect beside --pretrained", 1),
        ("clip", ["--vision-tower=x", "--patch-size=4"], "--patch-size 4 has no effect beside --vision-tower x", 1),
        ("clip", ["--text-tower=x", "--text-layers=4"], "--text-layers 4 has no effect beside --text-tower x", 1),
        ("clip", ["--vision-tower=./nowhere"], "./nowhere is not the folder of a checkpoint", 1),
        ("declip", ["--jitter=0.1"], "--jitter: the two views have their own", 1),
        ("clip", ["--synonyms=x.json"], "unrecognized arguments: --synonyms=x.json", 2),
        ("siglip", ["--embed-dim=64"], "unrecognized arguments: --embed-dim=64", 2),
        ("align", ["--embed-dim=64"], "unrecognized arguments: --embed-dim=64", 2),
        ("clip", ["--patchsize=4"], "unrecognized arguments: --patchsize=4; did you mean --patch-size?", 2),
        ("clip", ["--patch-size=0"], "--patch-size: expected at least 1, got 0", 1),
        ("clip", ["--embed-dim=-4"], "--embed-dim: expected at least 1, got -4", 1),
        ("clip", ["--flip=2"], "--flip: expected a number from 0 to 1, got 2.0", 1),
        ("clip", ["--max-length=many"], "argument --max_length/--max-length: invalid int value: 'many'", 2),
        ("clip", ["--gradient-accumulation-steps=0"], "gradient_accumulation_steps: expected at least 1, got 0", 1),
        ("clip", ["--per-device-train-batch-size=0"], "per_device_train_batch_size: expected at least 1, got 0", 1),
        ("clip", ["--dataloader-prefetch-factor=0"], "dataloader_prefetch_factor: expected at least 1, got 0", 1),
        ("clip", ["--learning-rate=nan"], "learning_rate: expected at least 0, got nan", 1),
        ("clip", ["--seed=-1"], "seed: expected at least 0, got -1", 1),
        ("clip", ["--task=knitting"], "task: expected one of retrieval, ", 1),
        ("clip", ["--task"], "argument --task: expected one argument", 2),
        ("clip", ["--task", "--use-cpu"], "argument --task: expected one argument", 2),
        ("clip", ["--task=vqa", "--task", "knitting"], "got 'knitting'", 1),
        ("clip", ["--keywords=2"], "--keywords: expected a probability, got 2.0", 2),
        ("clap", [], "MODEL must be one of clip, ", 1),
        ("nowhere:Model", [], "MODEL: no module named 'nowhere', of 'nowhere:Model'", 1),
        ("json:JSONDecoder", [], "MODEL: expected a class that extends Pretrainable, got json:JSONDecoder", 1),
    ],
)
def test_what_cannot_be_is_refused(
    data: Path,
    tmp_path: Path,
    model: str,
    options: list[str],
    message: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["train", model, "--data", str(data), "--output-dir", str(tmp_path / "out"), "--use-cpu", *options]
    assert main(arguments) == code
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / "run.json").exists()


def test_data_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "clip", "--output-dir", "out"]) == 2
    assert "--data is needed" in capsys.readouterr().err


def test_the_help_of_an_option_that_is_on_says_what_turns_it_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--task", "captioning", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Turns --java off." in text
    assert text.count("The Penn Treebank tokenizer") == 1


def test_the_help_of_a_model_is_of_that_model_alone(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for name in (name for name in MODELS if model_class(name).made_by == "train"):
        fields = dataclasses.fields(model_class(name).Options)
        assert main(["train", name, "--help"]) == 0
        text = capsys.readouterr().out
        shown[name] = {word for word in text.split() if word.startswith("--")}
        assert {f"--{field.name.replace('_', '-')}" for field in fields} <= shown[name]
        assert len(text.splitlines()) <= 80
        assert text.index("--pretrained") < text.index("--val-data") < text.index("--output-dir")
    assert "--declip-weights" in shown["declip"]
    assert not any("--declip-weights" in flags for name, flags in shown.items() if name != "declip")
    assert main(["train", "clip", "--help-all"]) == 0
    assert "--adam-beta2" in capsys.readouterr().out
    assert not any("--adam-beta2" in flags for flags in shown.values())


def test_the_name_of_earlier_versions_goes_on_working(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, name in ((["--model", "lit"], "lit"), (["--model=lit"], "lit"), (["--vision-tower=./x"], "clip")):
        assert main(["train", *arguments, "--data", str(data), "--output-dir", str(tmp_path / "out")]) == 1
        assert f"vlmfast train {name} ..." in capsys.readouterr().err


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in MODELS:
        cls = model_class(name)
        assert sum(line.split()[:1] == [name] and cls.paper in line and cls.strategy in line for line in lines) == 1


def test_a_checkpoint_of_something_else_is_refused(
    towers: list[str], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--checkpoint", towers[1].partition("=")[2], "--data", str(data)]) == 1
    assert "got model_type 'bert'" in capsys.readouterr().err
