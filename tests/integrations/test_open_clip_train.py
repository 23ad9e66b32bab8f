"""open_clip's own training loop, unchanged, with our loss and with a patched model."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patch_models import MODELS, padded_ids
from torch import nn

import vlmfast
from vlmfast.nn import ClipLoss, SigLipLoss

train = pytest.importorskip("open_clip_train.train")

STEPS, BATCH = 4, 4


class Batches(list):
    num_batches, num_samples = STEPS, STEPS * BATCH


def options(accum_freq: int) -> SimpleNamespace:
    return SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=accum_freq, skip_scheduler=True, horovod=False,
        grad_clip_norm=1.0, log_every_n_steps=1, rank=0, local_rank=0, world_size=1, batch_size=BATCH, wandb=False,
        log_local=False, save_logs=False, distributed=False,
    )  # fmt: skip


class Log:
    """Of the losses, in place of tensorboard's writer."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if name == "train/loss":
            self.losses.append(value)


def epoch(
    model: nn.Module, loss: Any, batches: Batches, accum_freq: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    loader = SimpleNamespace(dataloader=batches, set_epoch=lambda epoch: None)
    optimizer, log = torch.optim.SGD(model.parameters(), lr=0.05), Log()
    train.train_one_epoch(
        model, {"train": loader}, loss, 0, optimizer, None, None, None, options(accum_freq), tb_writer=log
    )
    return log.losses, model.state_dict()


@pytest.mark.parametrize("accum_freq", [1, 2])
@pytest.mark.parametrize(
    ("name", "ours"), [("open_clip", ClipLoss), ("open_clip siglip", SigLipLoss), ("coca", None)], ids=str
)
def test_one_epoch(name: str, ours: type[nn.Module] | None, accum_freq: int) -> None:
    if name == "coca" and accum_freq > 1:
        pytest.skip("open_clip's loop does not accumulate CoCa's labels as its loss takes them")
    both, _ = MODELS[name].make()
    batches = Batches((torch.randn(BATCH, 3, 32, 32), padded_ids()) for _ in range(STEPS))
    original = copy.deepcopy(both)
    expected, parameters = epoch(original.model, original.loss, batches, accum_freq)
    assert len(expected) == STEPS // accum_freq
    vlmfast.patch(both)
    if ours is not None:
        both.loss = ours()
    found, trained = epoch(both.model, both.loss, batches, accum_freq)
    assert found == pytest.approx(expected, rel=1e-4)
    for key, value in trained.items():
        torch.testing.assert_close(value, parameters[key], rtol=1e-3, atol=1e-5)
