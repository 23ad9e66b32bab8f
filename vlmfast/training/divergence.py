"""A run that has diverged stops, before what is no number reaches the weights or a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from vlmfast.training.checkpoints import last_checkpoint
from vlmfast.training.fsdp import total_norm, whole_tensor

SKIPPED_IN_A_ROW = 20
"""Steps that a float16 scaler may skip before the run counts as diverged: halved so often, its first factor of 65,536
is below 1."""


class StopOnDivergence(TrainerCallback):
    """Raises before the optimizer's step when the loss or the norm of the gradients is not finite.

    The trainer tells the losses of a step by `loss` and the norm, which it has for clipping, by `norm`. One look at
    the device per step, where transformers' own filter takes two.

    Args:
        scaled: whether a float16 scaler skips such steps by design; SKIPPED_IN_A_ROW of them are then needed.
    """

    def __init__(self, *, scaled: bool) -> None:
        self.scaled = scaled
        self.in_a_row = 0
        self._loss: Tensor | None = None
        self._norm: Tensor | None = None

    def loss(self, value: Tensor) -> None:
        """Of one of the batches that a step accumulates, already divided by their number."""
        self._loss = value.detach() if self._loss is None else self._loss + value.detach()

    def norm(self, value: Any) -> None:
        self._norm = whole_tensor(torch.as_tensor(value).detach())

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        loss, norm = self._loss, self._norm
        self._loss = self._norm = None
        if norm is None:  # not clipped
            norm = total_norm(p.grad for p in model.parameters() if p.grad is not None)
        if loss is None or bool(loss.isfinite() & norm.isfinite().to(loss.device)):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if self.in_a_row < (SKIPPED_IN_A_ROW if self.scaled else 1):
            return
        rate = float(optimizer.param_groups[0]["lr"])
        times = f", and not finite {self.in_a_row} steps in a row," if self.scaled else ""
        raise FloatingPointError(
            f"the run has diverged: step {state.global_step + 1} has loss {loss.item():g} and gradient norm"
            f" {norm.item():g}{times} at learning rate {rate:g}; {advice(args.output_dir)}"
        )


def advice(output_dir: str) -> str:
    """Where to go on from."""
    good = last_checkpoint(output_dir)
    if good is None:
        return "no checkpoint was saved before it. A lower --learning-rate or more --warmup-steps may help"
    return (
        f"the last good checkpoint is {good}. --resume would diverge again; a new run may start from its weights by"
        " --pretrained, with a lower --learning-rate"
    )
