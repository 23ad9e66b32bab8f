"""What holds for every model of MODELS: trained, saved, loaded, resumed and scored, in this process."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from command_line import tiny, write_pairs
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from vlmfast.cli import main
from vlmfast.data import load_tokenizer
from vlmfast.models import MODELS, model_class
from vlmfast.models.contract import ImageTextOptions, JointFeatures, Pretrainable
from vlmfast.tasks import TASKS, task_class


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coloured squares; every field of a record that a task reads."""
    folder = write_pairs(tmp_path_factory.mktemp("pairs"), 24)
    for number, path in enumerate(sorted(folder.glob("*.txt"))):
        caption = path.read_text()
        colour = caption.split()[0]
        record = {
            "caption": caption,
            "category": colour,
            "question": "what colour is it?",
            "answers": [colour],
            "choices": ["red", colour, "blue"],
            "answer_index": 1,
            "rationale_choices": ["it is red", f"it is {colour}"],
            "rationale_index": 1,
            "text": "it is red",
            "label": number % 2,
            "objects": [
                {"box": [0, 0, 16, 16], "name": "square", "attributes": [colour], "confidence": 1.0},
                {"box": [0, 0, 8, 8], "name": "part", "attributes": [colour], "confidence": 0.5},
            ][: 1 + number % 2],
            "phrases": [{"span": [0, len(f"{colour} square")], "objects": [0]}],
        }
        path.with_suffix(".json").write_text(json.dumps(record))
        path.unlink()
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("text"), load_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(name: str, data: Path, folder: Path, tower: Path, *options: str) -> int:
    pretrained = name == "lit"  # the others start from nothing
    sizes = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in tiny(name, vision_layers=3, max_length=12).items()
        if not (pretrained and (key.startswith("vision_") or key in ("image_size", "patch_size")))
    ]
    needed = [f"--vision-tower={tower}"] if pretrained else []
    if hasattr(model_class(name), "loss"):
        needed.append("--cache-chunk=4")
    return main([
        "train", name, f"--data={data}", f"--output-dir={folder}", *sizes, *needed, "--per-device-train-batch-size=8",
        "--max-steps=2", "--save-steps=1", "--logging-steps=1", "--report-to=none", "--use-cpu",
        "--dataloader-num-workers=0", "--disable-tqdm=true", *options,
    ])  # fmt: skip


def logged(folder: Path) -> list[float]:
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_trained_resumed_loaded_and_scored(
    name: str, data: Path, tower: Path, text_tower: Path, tmp_path: Path
) -> None:
    """A model that is not trained is made by the command that it names."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    cls = model_class(name)
    trained = cls.made_by == "train"
    if trained:
        assert train(name, data, whole, tower) == 0
        part.mkdir()
        (whole / "checkpoint-1").rename(part / "checkpoint-1")
        shutil.copy(whole / "run.json", part)
        assert train(name, data, part, tower, "--resume") == 0
        assert logged(part) == logged(whole)
        weights = load_file(whole / "model.safetensors")
        assert all(torch.equal(value, weights[key]) for key, value in load_file(part / "model.safetensors").items())
    else:
        assert train(name, data, whole, tower) == 2
        towers = [f"--vision-tower={tower}", f"--text-tower={text_tower}"]
        assert main([cls.made_by, f"--data={data}", f"--output-dir={whole}", *towers, "--device=cpu"]) == 0

    loaded, report = cls.from_pretrained(whole, output_loading_info=True)
    assert not report["missing_keys"]
    assert not loaded.training
    frozen = {id(p) for module in loaded.frozen_parts() for p in module.parameters()}
    assert {id(p) for p in loaded.train().parameters() if not p.requires_grad} == frozen
    assert not any(module.training for module in loaded.frozen_parts())
    if trained:
        optimizer = torch.load(whole / "checkpoint-2" / "optimizer.pt", weights_only=True)
        in_optimizer = sum(len(group["params"]) for group in optimizer["param_groups"])
        assert in_optimizer == sum(p.requires_grad for p in loaded.parameters())
    assert all(isinstance(value, float) for value in (loaded.metrics() if hasattr(loaded, "metrics") else {}).values())

    for task in cls.tasks:
        scores, checkpoint = tmp_path / f"{task}.json", whole
        if not any(all(callable(getattr(cls, name, None)) for name in names) for names in task_class(task).methods):
            checkpoint = tmp_path / task  # of the model with a head
            assert main([
                "train", name, f"--task={task}", f"--pretrained={whole}", f"--data={data}",
                f"--output-dir={checkpoint}", "--per-device-train-batch-size=4", "--max-steps=1", "--report-to=none",
                "--use-cpu", "--max-length=12", "--dataloader-num-workers=0", "--disable-tqdm=true",
            ]) == 0  # fmt: skip
        code = main([
            "eval", f"--checkpoint={checkpoint}", f"--data={data}", f"--task={task}", f"--output={scores}",
            "--device=cpu", "--num-workers=0", *(["--max-length=12"] if hasattr(cls.Options(), "max_length") else []),
        ])  # fmt: skip
        assert code == 0
        assert json.loads(scores.read_text())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_says_what_it_is(name: str) -> None:
    cls = model_class(name)
    assert cls.config_class.model_type == name
    assert cls.strategy
    assert cls.paper
    assert set(cls.tasks) <= set(TASKS)
    for each in dataclasses.fields(cls.Options):
        assert each.metadata.get("help", "").strip(), each.name
    training = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    assert set(cls.training_defaults) <= training
    assert not {f.name for f in dataclasses.fields(cls.Options)} & training


class ToyConfig(PreTrainedConfig):
    model_type = "toy"

    def __init__(self, width: int = 8, vocab_size: int = 100, **kwargs: Any) -> None:
        self.width, self.vocab_size, self.max_position_embeddings = width, vocab_size, 32
        super().__init__(**kwargs)


@dataclasses.dataclass
class ToyOptions(ImageTextOptions):
    width: int = dataclasses.field(default=8, metadata={"help": "Of everything."})


@dataclasses.dataclass
class ToyOutput(ModelOutput):
    loss: Tensor | None = None


class ToyModel(Pretrainable, PreTrainedModel):
    """Colours of an image's middle beside the mean of the words; a frozen layer between."""

    config_class = ToyConfig
    Options = ToyOptions
    strategy, paper, tasks = "contrastive", "nobody", ("retrieval",)
    training_defaults = {"learning_rate": 0.125}  # noqa: RUF012

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.colours = nn.Linear(3, config.width)
        self.still = nn.Sequential(nn.Linear(config.width, config.width), nn.Dropout(0.5))
        self.freeze()
        self.post_init()

    @classmethod
    def create(cls, options: ToyOptions, tokenizer: Any, **overrides: Any) -> ToyModel:
        return cls(ToyConfig(**{"width": options.width, "vocab_size": len(tokenizer), **overrides}))

    def frozen_parts(self) -> tuple[nn.Module, ...]:
        return (self.still,)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return nn.functional.normalize(self.colours(pixel_values[:, 4, 4].float() / 255), dim=-1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pooled = (self.words(input_ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(self.still(pooled), dim=-1)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> ToyOutput:
        logits = 8 * self.get_image_features(pixel_values) @ self.get_text_features(input_ids, attention_mask).T
        return ToyOutput(loss=nn.functional.cross_entropy(logits, torch.arange(len(logits))))

    def joint_features(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> JointFeatures:
        image, text = self.get_image_features(pixel_values), self.get_text_features(input_ids, attention_mask)
        return JointFeatures(torch.cat([image, image * text], dim=1), text[:, None], image[:, None])

    def metrics(self) -> dict[str, float]:
        return {"width": float(self.config.width)}


def test_a_model_of_ones_own_needs_no_edit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = ModuleType("someones.models")
    package.Toy = ToyModel
    monkeypatch.setitem(sys.modules, "someones.models", package)
    out, scores = tmp_path / "out", tmp_path / "scores.json"
    common = [f"--data={data}", f"--output-dir={out}", "--image-size=16", "--max-length=12", "--use-cpu"]
    assert main([
        "train", "someones.models:Toy", *common, "--width=16", "--per-device-train-batch-size=8", "--max-steps=30",
        "--report-to=none", "--dataloader-num-workers=0", "--disable-tqdm=true", "--save-steps=30",
        f"--val-data={data}", "--eval-strategy=steps", "--eval-steps=30", "--logging-steps=5",
    ]) == 0  # fmt: skip
    history = json.loads((out / "checkpoint-30" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    assert all(entry["width"] == 16 for entry in history if "loss" in entry)
    assert max(entry["learning_rate"] for entry in history if "loss" in entry) > 0.01
    assert any("eval_text_to_image_R@1" in entry for entry in history)
    torch.manual_seed(0)
    assert not ToyModel.from_pretrained(out).still.training
    assert main([
        "eval", "--model=someones.models:Toy", f"--checkpoint={out}", f"--data={data}", "--image-size=16",
        f"--output={scores}", "--device=cpu", "--num-workers=0",
    ]) == 0  # fmt: skip
    tuned, answers = tmp_path / "tuned", tmp_path / "answers.json"
    assert main([
        "train", "someones.models:Toy", "--task=vqa", f"--pretrained={out}", f"--data={data}", f"--output-dir={tuned}",
        "--per-device-train-batch-size=8", "--max-steps=60", "--learning-rate=0.05", "--report-to=none", "--use-cpu",
        "--dataloader-num-workers=0", "--disable-tqdm=true", "--crop-scale=1", "--image-size=16", "--num-answers=9",
    ]) == 0  # fmt: skip
    assert main([
        "eval", "--model=someones.models:Toy", f"--checkpoint={tuned}", f"--data={data}", "--image-size=16",
        f"--output={answers}", "--device=cpu", "--num-workers=0",
    ]) == 0  # fmt: skip
    rows = json.loads(answers.read_text())["scores"]
    assert rows["model"]["accuracy"] > 0.9
    assert rows["blind"]["accuracy"] < 0.5
    capsys.readouterr()
    assert main(["train", "someones.models:Toy", *common, "--embed-dim=3"]) == 2
    assert "--embed-dim" in capsys.readouterr().err
    assert main(["train", "someones.models:Toy", "--task=vqa", *common, "--keywords=0.5"]) == 2
    assert "--keywords and --cache-features have no effect beside --task vqa" in capsys.readouterr().err


def test_special_tokens_make_room(tmp_path: Path) -> None:
    """A token that the model needs and a pretrained part does not know."""
    tokenizer = load_tokenizer()
    before = len(tokenizer)

    class Masked(ToyModel):
        special_tokens = {"mask_token": "<|mask|>"}  # noqa: RUF012

        def get_input_embeddings(self) -> nn.Module:
            return self.words

        def set_input_embeddings(self, value: nn.Module) -> None:
            self.words = value

    Masked.build(ToyOptions(), tokenizer).save_pretrained(tmp_path)
    tokenizer.add_special_tokens(Masked.special_tokens)
    model = Masked.build(ToyOptions(pretrained=str(tmp_path)), tokenizer)
    assert model.vocabulary == model.words.num_embeddings == before + 1
    tokenizer.add_tokens(["<|more|>"])
    with pytest.raises(ValueError, match=f"--tokenizer has {before + 2} tokens, more than the {before} of the text"):
        Masked.build(ToyOptions(pretrained=str(tmp_path)), tokenizer)
