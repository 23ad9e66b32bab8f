"""Trainer callbacks: progress bar, order of the data, the model's own hook, and signals that ask for a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from torch import distributed as dist
from tqdm.auto import tqdm
from transformers import TrainerCallback


class Progress(TrainerCallback):
    """One bar over all steps with loss, temperature and pairs per second; scores are printed above it."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if self.bar is not None and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}"}
            if "temperature" in logs:
                shown["temperature"] = f"{logs['temperature']:.4f}"
            if "pairs_per_second" in logs:
                shown["pairs/s"] = f"{logs['pairs_per_second']:.0f}"
            self.bar.set_postfix(shown)
        elif state.is_world_process_zero and any(name.startswith("eval_") for name in logs):
            scores = ", ".join(
                f"{name.removeprefix('eval_')} {value:.3f}" for name, value in logs.items() if name != "epoch"
            )
            tqdm.write(f"step {state.global_step}: {scores}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


class SetEpoch(TrainerCallback):
    """Tells the sampler which epoch it is, also in the epoch that a resumed run starts in the middle of."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.sampler.set_epoch(int(state.epoch or 0))


class ModelHooks(TrainerCallback):
    """Calls the model's after_optimizer_step, where it has one."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        hook = getattr(model, "after_optimizer_step", None)
        if hook is not None:
            hook()


class StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM finish the step, save a checkpoint and stop; a second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.process = os.getpid()
        self.previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.received, self.process = None, os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a data worker that inherited the handler: its batches are still wanted
            return
        self.received = number
        tqdm.write(f"{signal.Signals(number).name}: saving a checkpoint at the end of this step, then stopping")
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stop = self.received is not None
        if dist.is_available() and dist.is_initialized():  # all ranks stop after the same step, or none does
            flag = torch.tensor(int(stop), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            stop = bool(flag)
        if stop:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()
