"""A loss or a gradient that is not finite stops the run before it reaches weights or checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from scenarios import Line, make_trainer
from torch import Tensor, nn
from transformers.utils import ModelOutput

from vlmfast.training import divergence
from vlmfast.training.divergence import SKIPPED_IN_A_ROW, StopOnDivergence


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, loss: Tensor, value: float) -> Tensor:
        ctx.value = value
        return loss.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.value, None


class Diverging(Line):
    """Its loss or its gradient is `value` from the given forward pass on."""

    def __init__(self, what: str, at: int, value: float) -> None:
        super().__init__()
        self.what, self.at, self.value = what, at, value

    def forward(self, numbers: Tensor) -> ModelOutput:
        loss = super().forward(numbers).loss
        if self.steps >= self.at:
            loss = loss * self.value if self.what == "loss" else _BadGradient.apply(loss, self.value)
        return ModelOutput(loss=loss)


def trainer_of(folder: Path, model: nn.Module, **options: object):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 9, "learning_rate": 1e-3, **options}
    return make_trainer(folder, model=model, dataloader_num_workers=0, lr_scheduler_type="constant", **settings)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_one_stops_the_run(tmp_path: Path, what: str, value: float, max_grad_norm: float) -> None:
    model = Diverging(what, 6, value)
    trainer = trainer_of(tmp_path, model, max_grad_norm=max_grad_norm)
    with pytest.raises(FloatingPointError) as raised:
        trainer.train()
    message = str(raised.value)
    assert "step 6 has loss" in message
    assert "learning rate 0.001" in message
    assert f"last good checkpoint is {tmp_path / 'checkpoint-4'}" in message
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for step in (2, 4):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert all(weight.isfinite().all() for weight in saved.values())
    assert not (tmp_path / "checkpoint-6").exists()


def test_the_second_of_two_accumulated_batches_counts(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Diverging("loss", 4, float("nan")), gradient_accumulation_steps=2)
    with pytest.raises(FloatingPointError, match=r"step 2 has loss nan.*no checkpoint was saved before it"):
        trainer.train()


def test_weights_that_went_wrong_in_the_last_update_are_not_saved(tmp_path: Path) -> None:
    class Spoiling(Line):
        def after_optimizer_step(self) -> None:
            if self.steps == 4:
                with torch.no_grad():
                    self.layer.weight.fill_(float("nan"))

    trainer = trainer_of(tmp_path, Spoiling())
    with pytest.raises(FloatingPointError, match=r"after step 4 .*layer.weight.*checkpoint-2"):
        trainer.train()
    assert not (tmp_path / "checkpoint-4").exists()
    with pytest.raises(FloatingPointError, match="are not saved"):
        trainer.save_model()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_loss_is_logged_as_it_is(tmp_path: Path) -> None:
    assert trainer_of(tmp_path, Line()).args.logging_nan_inf_filter is False


def step(stop: StopOnDivergence, norm: float) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    stop.loss(torch.tensor(1.0))
    stop.norm(torch.tensor(norm))
    stop.on_pre_optimizer_step(
        SimpleNamespace(output_dir="nowhere"),
        SimpleNamespace(global_step=7),
        None,
        optimizer=torch.optim.SGD([parameter], lr=0.25),
    )


def test_a_float16_scaler_may_skip_some_in_a_row() -> None:
    stop = StopOnDivergence(scaled=True)
    for _ in range(3):
        for _ in range(SKIPPED_IN_A_ROW - 1):
            step(stop, float("inf"))
        step(stop, 1.0)
    for _ in range(SKIPPED_IN_A_ROW - 1):
        step(stop, float("inf"))
    with pytest.raises(FloatingPointError, match=rf"norm inf, and not finite {SKIPPED_IN_A_ROW} steps in a row.* 0.25"):
        step(stop, float("inf"))
    assert 2.0**16 / 2**divergence.SKIPPED_IN_A_ROW < 1
