from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from command_line import TINY, tiny, write_pairs
from scenarios import Line
from scenarios import make_trainer as toy_trainer
from torch import nn
from transformers import TrainerCallback

from vlmfast.data import Collator, ImageTextDataset, load_tokenizer, train_transform
from vlmfast.models.contrastive.align import ALIGNConfig, ALIGNModel
from vlmfast.models.contrastive.clip import CLIPConfig, CLIPModel
from vlmfast.nn import _stem
from vlmfast.ops import patch_embed
from vlmfast.training import PretrainingArguments, PretrainingTrainer, last_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def make_trainer(data: Path, output_dir: Path, **options: object) -> PretrainingTrainer:
    settings = {"per_device_train_batch_size": 8, "max_steps": 8, "logging_steps": 1, "save_strategy": "no"}
    options = {**CLIPModel.training_defaults, **settings, **options}
    arguments = PretrainingArguments(
        output_dir=str(output_dir), report_to=[], use_cpu=True, disable_tqdm=True, dataloader_num_workers=0, **options
    )
    torch.manual_seed(arguments.seed)
    tokenizer = load_tokenizer()
    config = CLIPConfig.small(
        vocab_size=len(tokenizer), eos_token_id=1, bos_token_id=2, pad_token_id=0, embed_dim=32, **TINY
    )
    config.text_config.attention_dropout = 0.2  # so that the order of random numbers matters
    return PretrainingTrainer(
        model=CLIPModel(config),
        args=arguments,
        train_dataset=ImageTextDataset(str(data), transform=train_transform(16), seed=arguments.seed),
        data_collator=Collator(tokenizer, max_length=16),
    )


def losses(trainer: PretrainingTrainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_cached_training_follows_the_plain_curve(data: Path, tmp_path: Path) -> None:
    def run(chunk: int | None) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
        trainer = make_trainer(data, tmp_path, cache_chunk=chunk, learning_rate=1e-3)
        trainer.model.text_model.config.attention_dropout = 0.0
        for module in trainer.model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        trainer.train()
        return losses(trainer), trainer.model.state_dict()

    plain, plain_weights = run(None)
    cached, cached_weights = run(3)
    assert list(plain) == list(range(1, 9))
    assert plain == pytest.approx(cached, rel=1e-3)
    for name, weight in plain_weights.items():
        torch.testing.assert_close(cached_weights[name], weight, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("cache_chunk", [None, 3])
@pytest.mark.parametrize("stop_at", [3, 5, 7])  # an epoch has 5 steps: in its middle, at its end, in the next
def test_resumed_run_equals_an_uninterrupted_one(
    data: Path, tmp_path: Path, stop_at: int, cache_chunk: int | None
) -> None:
    whole = make_trainer(data, tmp_path / "whole", cache_chunk=cache_chunk)
    whole.train()

    options = {"save_strategy": "steps", "save_steps": stop_at, "cache_chunk": cache_chunk}
    first = make_trainer(data, tmp_path / "part", **options)
    first.add_callback(_StopAt(stop_at))
    first.train()
    checkpoint = last_checkpoint(tmp_path / "part")
    assert checkpoint.name == f"checkpoint-{stop_at}"
    second = make_trainer(data, tmp_path / "part", **options)
    second.train(resume_from_checkpoint=str(checkpoint))

    expected = losses(whole)
    assert losses(second) == expected
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], weight), name


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_every_epoch_has_its_own_order_and_augmentation(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path, max_steps=10)
    seen: list[torch.Tensor] = []
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, n=None: (
        seen.append(inputs["pixel_values"].clone()),
        step(model, inputs, n),
    )[1]
    trainer.train()
    first, second = torch.cat(seen[:5]), torch.cat(seen[5:])
    assert not torch.equal(first, second)
    assert trainer.sampler is not None


def test_no_decay_on_gains_biases_and_logit_scale(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path)
    trainer.create_optimizer()
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.dim() >= 2), name
    assert id(trainer.model.logit_scale) not in decayed
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(
        list(trainer.model.parameters())
    )


def test_logit_scale_is_clamped_after_each_step(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path, max_steps=2, learning_rate=1e3, warmup_steps=0, lr_scheduler_type="constant")
    with torch.no_grad():
        trainer.model.logit_scale.fill_(3.0)
    trainer.train()
    assert trainer.model.logit_scale.item() in (0.0, torch.tensor(math.log(100)).item())


def test_logs_carry_temperature_and_rate(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path, max_steps=3)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["temperature"] == pytest.approx(0.07, rel=0.05)
    assert all(entry["samples_per_second"] > 0 for entry in logs[1:])


def test_logs_carry_align_s_temperature_which_has_no_logarithm(data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    sizes = tiny("align", vision_layers=3)
    config = ALIGNConfig.small(vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0, **sizes)
    trainer = make_trainer(data, tmp_path, max_steps=2)
    trainer = PretrainingTrainer(
        model=ALIGNModel(config),
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["temperature"] == pytest.approx(0.07, rel=0.05)
    assert logs[-1]["temperature"] == trainer.model.temperature.item() != config.temperature_init_value


def test_pixels_reach_the_op_as_they_were_decoded(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, channels last: no pass over them, to normalise or to permute, comes before."""
    seen = []

    def spy(pixels: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        seen.append((pixels.dtype, pixels.permute(0, 2, 3, 1).is_contiguous(), options["mean"], options["std"]))
        return patch_embed(pixels, *args, **options)

    monkeypatch.setattr(_stem, "patch_embed", spy)
    trainer = make_trainer(data, tmp_path, max_steps=2)
    trainer.train()
    config = trainer.model.config
    assert seen == [(torch.uint8, True, tuple(config.image_mean), tuple(config.image_std))] * 2


def test_bad_chunk() -> None:
    with pytest.raises(ValueError, match="cache_chunk must be at least 1; got 0"):
        PretrainingArguments(output_dir="unused", cache_chunk=0, use_cpu=True)


def test_cache_chunk_is_refused_for_a_loss_of_single_samples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cache_chunk 2: Line has no loss\(\*\*features\)"):
        toy_trainer(tmp_path, cache_chunk=2)


class Grouped(Line):
    def __init__(self, names: tuple[tuple[str, ...], ...] = (("layer.weight",), ("layer.bias",))) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.names = names

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, object]]:
        own = dict(self.named_parameters())
        first, second = ([own[name] for name in names] for names in self.names)
        return [{"params": first, "lr": 5 * lr, "weight_decay": weight_decay}, {"params": second, "weight_decay": 0.0}]

    def metrics(self) -> dict[str, float]:
        return {"bias": self.layer.bias.item()}


def test_a_model_has_groups_and_metrics_of_its_own(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, model=Grouped(), learning_rate=0.1, weight_decay=0.3, lr_scheduler_type="constant")
    trainer.train()
    rates = [(group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups]
    assert rates == [(0.5, 0.3), (0.1, 0.0)]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["bias"] == trainer.model.layer.bias.item() != logs[0]["bias"]


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        ((("layer.weight",), ()), "layer.bias in 0"),
        ((("layer.weight", "layer.bias"), ("layer.bias",)), "layer.bias in 2"),
        ((("layer.weight", "layer.bias"), ("frozen.weight",)), "frozen.weight in 1"),
    ],
)
def test_groups_hold_what_is_trained_once(tmp_path: Path, names: tuple[tuple[str, ...], ...], wrong: str) -> None:
    with pytest.raises(ValueError, match=rf"Grouped.parameter_groups: .*{wrong}"):
        toy_trainer(tmp_path, model=Grouped(names)).create_optimizer()


def test_frozen_parameters_are_in_no_optimizer(tmp_path: Path) -> None:
    model = Line()
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    optimizer = toy_trainer(tmp_path, model=model).create_optimizer()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_a_hook_after_each_step_and_accumulated_batches(tmp_path: Path) -> None:
    calls = []
    model = Line()
    model.after_optimizer_step = lambda: calls.append(model.steps)
    toy_trainer(tmp_path, model=model, max_steps=3, gradient_accumulation_steps=2).train()
    assert calls == [2, 4, 6]
