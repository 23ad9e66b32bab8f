"""Trainer callbacks: progress bar, order of the data, the model's own hook."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

UNSHOWN = ("epoch", "grad_norm", "learning_rate", "num_input_tokens_seen", "samples_per_second")
"""Of what is logged with the loss, what the bar has no room for."""


class Progress(TrainerCallback):
    """One bar over all steps with the loss, the model's metrics and samples per second; scores are printed above it."""

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
            shown = {name: f"{value:.4g}" for name, value in logs.items() if name not in UNSHOWN}
            if "samples_per_second" in logs:
                shown["samples/s"] = f"{logs['samples_per_second']:.0f}"
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
        if self.trainer.sampler is not None:  # a stream has no epochs
            self.trainer.sampler.set_epoch(int(state.epoch or 0))


class ModelHooks(TrainerCallback):
    """Calls the model's after_optimizer_step, where it has one."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        hook = getattr(model, "after_optimizer_step", None)
        if hook is not None:
            hook()
