"""A model with a head, as a trainer and a checkpoint have it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from toys import COLOURS, WORDS, Jointly, JointlyConfig, joint_model, word_tokenizer, write_records

from vlmfast.models.checkpoints import load
from vlmfast.models.contrastive import CLIPModel
from vlmfast.tasks.heads import TaskModel
from vlmfast.tasks.vqa import VQA
from vlmfast.training import PretrainingArguments, PretrainingTrainer


class Tied(Jointly):
    """Has a frozen part, a weight that two layers share, and learning rates of its own."""

    _tied_weights_keys = {"words.weight": "table.weight"}  # noqa: RUF012  # as transformers has it

    def __init__(self, config: JointlyConfig) -> None:
        super(Jointly, self).__init__(config)
        self.table = torch.nn.Embedding(len(COLOURS) + len(WORDS), 16)
        self.words = torch.nn.Linear(16, len(COLOURS) + len(WORDS), bias=False)
        self.frozen = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
        self.post_init()
        self.freeze()

    def frozen_parts(self) -> Any:
        return (self.frozen,)

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": [self.table.weight], "lr": 5 * lr, "weight_decay": weight_decay}]


@pytest.fixture
def source(tmp_path: Path) -> str:
    asked = [(colour, {"question": "what colour is this ?", "answers": [colour]}) for colour in COLOURS]
    return write_records(tmp_path / "data.tar", *asked)


def test_a_trainer_trains_saves_and_resumes_it(source: str, tmp_path: Path) -> None:
    def run(folder: Path, steps: int, resume: str | None = None) -> TaskModel:
        torch.manual_seed(0)
        made = VQA().trainable(joint_model(True), source, word_tokenizer(), None)
        args = PretrainingArguments(
            output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=4, report_to=[],
            dataloader_num_workers=0, use_cpu=True, learning_rate=0.01, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = PretrainingTrainer(
            model=made.model, args=args, train_dataset=made.dataset, data_collator=made.collator
        )
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        return made.model

    whole = run(tmp_path / "whole", 4)
    resumed = run(tmp_path / "part", 4, str(tmp_path / "whole" / "checkpoint-2"))
    loaded = TaskModel.from_pretrained(tmp_path / "whole")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
        assert torch.equal(weight, loaded.state_dict()[name]), name
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (config["model_type"], config["task"], config["model"]) == ("vlmfast_task", "vqa", "toys:Jointly")
    assert config["outputs"] == sorted(COLOURS)


def test_what_the_model_has_of_its_own_stays(source: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied(JointlyConfig(tie_word_embeddings=True))
    assert model.words.weight is model.table.weight
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    made = VQA().trainable(model, source, word_tokenizer(), None).model
    assert all(torch.equal(weight, weights[name]) for name, weight in made.model.state_dict().items())
    made.train()
    assert made.model.training
    assert not made.model.frozen[1].training
    assert not any(parameter.requires_grad for parameter in made.model.frozen.parameters())

    groups = made.parameter_groups(0.1, 0.01)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.5, 0.01), (0.1, 0.01), (0.1, 0.0)]
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in made.parameters() if parameter.requires_grad}
    assert not hasattr(VQA().trainable(joint_model(True), source, word_tokenizer(), None).model, "parameter_groups")

    made.save_pretrained(tmp_path / "run")
    loaded = TaskModel.from_pretrained(tmp_path / "run")
    assert loaded.model.words.weight is loaded.model.table.weight
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in made.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.model.frozen.parameters())


@pytest.mark.parametrize("kind", [Jointly, Tied])
def test_what_was_fine_tuned_for_one_task_is_where_another_begins(kind: Any, source: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = VQA().trainable(kind(JointlyConfig(tie_word_embeddings=True)), source, word_tokenizer(), None).model
    made.save_pretrained(tmp_path)
    weights = made.model.state_dict()
    for overrides in ({}, {"note": 3}):
        found = load(kind, str(tmp_path), **overrides)
        assert {name: getattr(found.config, name) for name in overrides} == overrides
        assert found.state_dict().keys() == weights.keys()
        assert all(torch.equal(weight, weights[name]) for name, weight in found.state_dict().items())
    whole = load(TaskModel, str(tmp_path)).state_dict()
    assert all(torch.equal(weight, whole[name]) for name, weight in made.state_dict().items())
    with pytest.raises(ValueError, match=r"expected a checkpoint of a CLIPModel"):
        load(CLIPModel, str(tmp_path))


def test_losses_are_those_of_the_labels() -> None:
    """In float64, written out."""
    torch.manual_seed(0)
    batch = {
        "pixel_values": torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8),
        "input_ids": torch.randint(2, len(WORDS), (4, 3)),
        "attention_mask": torch.ones(4, 3, dtype=torch.int64),
    }
    for outputs, labels in (
        ("abc", torch.rand(4, 3)),
        ("abc", torch.tensor([0, 2, 1, 1])),
        ("a", torch.tensor([1, 0])),
    ):
        made = TaskModel.around(joint_model(True), "vqa", outputs, batch).eval()
        logits = made.logits(**batch).double()
        if labels.is_floating_point():
            p = logits.sigmoid()
            expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).sum(dim=1).mean()
        else:  # of one output, the first two rows are the choices of one sample
            chances = logits.view(len(labels), -1).softmax(dim=1)
            expected = -chances[torch.arange(len(labels)), labels].log().mean()
        torch.testing.assert_close(made(**batch, labels=labels).loss.double(), expected, rtol=1e-5, atol=0)
    assert made(**batch).loss is None


def test_a_model_without_joint_features_is_refused() -> None:
    with pytest.raises(TypeError, match="task hateful: expected a model with joint_features; ViTModel lacks it"):
        TaskModel.around(transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=0)), "hateful", ("0", "1"), {})
