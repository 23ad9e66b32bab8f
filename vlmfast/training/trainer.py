"""transformers' Trainer and what contrastive pretraining adds: GradCache, order of the data, clamped temperature."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from vlmfast.data import EpochSampler
from vlmfast.training import grad_cache
from vlmfast.training.callbacks import ModelHooks, Progress, SetEpoch
from vlmfast.training.signals import StopOnSignal
from vlmfast.training.workers import end_workers, guard_workers


@dataclass
class PretrainingArguments(TrainingArguments):
    """transformers' TrainingArguments, with defaults of contrastive pretraining and the size of a GradCache chunk."""

    cache_chunk: int | None = field(
        default=None,
        metadata={
            "help": "Pairs per pass through the towers (GradCache): large batches in the memory of this many pairs."
        },
    )
    resume: bool = field(
        default=False,
        metadata={"help": "Go on from the last checkpoint in output_dir; from the start if there is none."},
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.2, metadata={"help": "Not applied to gains, biases and logit_scale."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Beta2 of AdamW."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Epsilon of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up; below 1, a share of all steps."})
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps; below 1, a share of all steps."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "How many checkpoints to keep."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leave out the last, smaller batch of an epoch."}
    )
    dataloader_num_workers: int = field(default=2, metadata={"help": "Processes that decode and augment."})
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "The collator makes the batch; leave it False."}
    )

    def __post_init__(self) -> None:
        if self.use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            # transformers would, without the timeout
            timeout = timedelta(seconds=float(self.ddp_timeout))
            dist.init_process_group(self.ddp_backend or "gloo", timeout=timeout)
        super().__post_init__()
        if self.cache_chunk is not None and self.cache_chunk < 1:
            raise ValueError(f"cache_chunk must be at least 1; got {self.cache_chunk}")
        if self.fsdp:
            raise ValueError(
                f"fsdp must be unset; got {self.fsdp!r}: FSDP takes no scalar parameters, and logit_scale is one. Large"
                " batches fit with cache_chunk; a loop of your own can leave logit_scale out, as the page on large"
                " batches shows"
            )


class PretrainingTrainer(Trainer):
    """Trains any model whose forward returns an output with `loss`.

    With `cache_chunk` the model must also offer `model(**batch, return_loss=False)`, an output of named features, and
    `model.loss(**features)`. `model.shared_features`, where it exists, names features that do not depend on the batch;
    0-dim ones need not be named. `model.after_optimizer_step()` is called after each optimizer step where it exists.

    Args:
        evaluator: the model to named scores, for eval_strategy; logged as eval_<name>.
        Others as transformers.Trainer.
    """

    args: PretrainingArguments

    def __init__(
        self, *args: Any, evaluator: Callable[[nn.Module], dict[str, float]] | None = None, **kwargs: Any
    ) -> None:
        # Trainer insists on an eval_dataset where there is an eval_strategy; the evaluator has its own.
        if evaluator is not None:
            kwargs.setdefault("eval_dataset", [])
        super().__init__(*args, **kwargs)
        self.evaluator = evaluator
        self.sampler: EpochSampler | None = None
        self._last_log: tuple[int, float] | None = None
        for default in (ProgressCallback, PrinterCallback):
            self.remove_callback(default)
        self.stop = StopOnSignal()
        for callback in (Progress(), SetEpoch(self), ModelHooks(), self.stop):
            self.add_callback(callback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' train; whatever ends it, the data workers are gone afterwards."""
        with self.stop:
            try:
                return super().train(*args, **kwargs)
            finally:
                end_workers()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but gains, biases and logit_scale, which have fewer than two dimensions (Radford et al. 2021, 2.5)."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.sampler = EpochSampler(len(dataset), seed=seed)
        return self.sampler

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader: DataLoader[Any] = super().get_train_dataloader()
        guard_workers(getattr(loader, "base_dataloader", loader))  # accelerate's has what starts the workers inside
        return loader

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self.args.cache_chunk is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        unwrapped = self.accelerator.unwrap_model(model)

        def encode(chunk: grad_cache.Batch) -> grad_cache.Features:
            with self.compute_loss_context_manager():
                output = model(**chunk, return_loss=False)
            return {name: value for name, value in output.items() if isinstance(value, Tensor)}

        return grad_cache.forward_backward(
            encode,
            lambda features: unwrapped.loss(**features) / self.current_gradient_accumulation_steps,
            self._prepare_inputs(inputs),
            self.args.cache_chunk,
            shared=getattr(unwrapped, "shared_features", ()),
            backward=self.accelerator.backward,
            no_sync=functools.partial(self.accelerator.no_sync, model=model),
        )

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        if self.evaluator is None:
            scores: dict[str, float] = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            return scores
        scores = self.evaluator(self.accelerator.unwrap_model(self.model))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            if self._last_log is not None:
                steps, since = self.state.global_step - self._last_log[0], self._last_log[1]
                logs["pairs_per_second"] = steps * self.get_total_train_batch_size(self.args) / (now - since)
            self._last_log = (self.state.global_step, now)
            model = self.accelerator.unwrap_model(self.model)
            temperature, logit_scale = (getattr(model, name, None) for name in ("temperature", "logit_scale"))
            if isinstance(temperature, Tensor):
                logs["temperature"] = temperature.item()
            elif isinstance(logit_scale, Tensor):
                logs["temperature"] = (-logit_scale.detach().float()).exp().item()
        super().log(logs, start_time)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint-<step> folder in output_dir, or None.

    Trainer writes trainer_state.json last, so a folder in which it is missing or cut short is one that a killed run
    left behind.
    """
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and _is_json(folder / "trainer_state.json"):
            found.append((int(step), folder))
    return max(found)[1] if found else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
