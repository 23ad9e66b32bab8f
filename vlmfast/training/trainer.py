"""transformers' Trainer and what pretraining adds: GradCache, order of the data, what a model's methods ask for."""

from __future__ import annotations

import functools
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from vlmfast.data import EpochSampler, StreamingDataset, StreamLoader
from vlmfast.distributed import rank_and_world_size
from vlmfast.training import checkpoints, fsdp, grad_cache
from vlmfast.training.attention import short_attention_in_float32
from vlmfast.training.callbacks import ModelHooks, Progress, SetEpoch
from vlmfast.training.divergence import StopOnDivergence, advice
from vlmfast.training.signals import StopOnSignal
from vlmfast.training.streams import save_place, stream_loader
from vlmfast.training.workers import end_workers, fate_of_workers, guard_workers


@dataclass
class PretrainingArguments(TrainingArguments):
    """transformers' TrainingArguments and the size of a GradCache chunk; a model's `training_defaults` are its own."""

    cache_chunk: int | None = field(
        default=None,
        metadata={
            "help": "Samples per pass through the model (GradCache): large batches in the memory of this many samples."
        },
    )
    train_samples: int | None = field(
        default=None,
        metadata={"help": "Samples to train on in all, in place of epochs; a stream has none. The last step is whole."},
    )
    resume: bool = field(
        default=False,
        metadata={"help": "Go on from the last checkpoint in output_dir; from the start if there is none."},
    )
    resume_incomplete: bool = field(
        default=False,
        metadata={
            "help": "With --resume, go on also from a checkpoint without optimizer, schedule or random state: what it"
            " lacks starts anew, and the run is another than one that was never stopped."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave it False: a loss that is not finite stops the run."}
    )
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
        _check_numbers(self)
        super().__post_init__()
        if self.cache_chunk is not None and self.cache_chunk < 1:
            raise ValueError(f"cache_chunk must be at least 1; got {self.cache_chunk}")
        if self.train_samples is not None:
            own: Any = self
            steps = -(-self.train_samples // (own.train_batch_size * own.world_size * own.gradient_accumulation_steps))
            if own.max_steps not in (-1, steps):
                raise ValueError(
                    f"train_samples: {self.train_samples} make {steps} steps; max_steps is {own.max_steps}"
                )
            own.max_steps = steps


AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "train_samples": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
    "save_total_limit": 1,
    "seed": 0,
    "data_seed": 0,
    "ddp_timeout": 1,
}
"""Numbers that would end in a traceback, or in nothing, far from where they were given."""


def _check_numbers(args: Any) -> None:
    for name, least in AT_LEAST.items():
        value = getattr(args, name, None)
        if value is not None and not value >= least:  # NaN too
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if args.dataloader_prefetch_factor is not None and not args.dataloader_num_workers:
        raise ValueError(f"dataloader_prefetch_factor: needs dataloader_num_workers, got {args.dataloader_num_workers}")


class PretrainingTrainer(Trainer):
    """Trains any model whose forward returns an output with `loss`, and does what its methods say, where it has them.

    - `loss(**features)`, for `cache_chunk`: of the whole batch's features, which are what `model(**batch,
      return_loss=False)` returns. `shared_features` names those that do not depend on the batch; 0-dim ones need not be
      named.
    - `parameter_groups(lr, weight_decay)`: groups of the optimizer, each with `params` and what of `lr` and
      `weight_decay` is its own. Elsewhere parameters of two and more dimensions decay. Frozen ones are in no group.
    - `after_optimizer_step()`: called after each.
    - `metrics()`: name -> float, logged beside the loss.

    Args:
        evaluator: the model to named scores, for eval_strategy; logged as eval_<name>.
        Others as transformers.Trainer.
    Raises:
        ValueError: cache_chunk is set and the model has no such `loss`, or fsdp and `fsdp.check` refuses the model.
    """

    args: PretrainingArguments
    optimizer: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *others: Any,
        evaluator: Callable[[nn.Module], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        # Trainer insists on an eval_dataset where there is an eval_strategy; the evaluator has its own.
        if evaluator is not None:
            kwargs.setdefault("eval_dataset", [])
        _check(model, args)
        super().__init__(model, args, *others, **kwargs)
        self._whole: list[nn.Parameter] = []
        if self.is_fsdp_enabled:
            self._whole = fsdp.leave_out(self.model, self.accelerator.state.fsdp_plugin, self.args.device)
        self.evaluator = evaluator
        self.sampler: Any = None
        self._stream: StreamLoader | None = None
        if isinstance(self.train_dataset, StreamingDataset):
            self.args.ignore_data_skip = True  # the stream goes on where it was by itself
        self._last_log: tuple[int, float] | None = None
        for default in (ProgressCallback, PrinterCallback):
            self.remove_callback(default)
        self.stop = StopOnSignal()
        self.divergence = StopOnDivergence(scaled=getattr(self.accelerator, "scaler", None) is not None)
        for callback in (Progress(), SetEpoch(self), ModelHooks(), self.stop, self.divergence):
            self.add_callback(callback)
        self._resumed_from: str | None = None
        clip = self.accelerator.clip_grad_norm_

        def clip_and_tell(*given: Any, **options: Any) -> Any:
            norm = clip(*given, **options)
            self.divergence.norm(norm)
            return norm

        self.accelerator.clip_grad_norm_ = clip_and_tell

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """transformers' train; whatever ends it, the data workers are gone afterwards.

        A checkpoint of the run's last step is loaded, and nothing is trained.

        Raises:
            ChildProcessError: a data worker was killed or has crashed.
            FloatingPointError: the loss, the gradients or the weights are not finite.
        """
        if resume_from_checkpoint is True:
            newest = checkpoints.last_checkpoint(self.args.output_dir)
            if newest is None:
                raise ValueError(f"resume_from_checkpoint: {self.args.output_dir} has no complete checkpoint")
            resume_from_checkpoint = str(newest)
        self._resumed_from = resume_from_checkpoint or None
        if self._resumed_from is not None and checkpoints.is_over(self._resumed_from, self.args):
            self._load_from_checkpoint(self._resumed_from)
            self.state = TrainerState.load_from_json(str(Path(self._resumed_from) / checkpoints.STATE))
            return TrainOutput(self.state.global_step, math.nan, {})
        with self.stop:
            try:
                return super().train(resume_from_checkpoint=self._resumed_from, **kwargs)
            except (OSError, EOFError, RuntimeError) as error:  # what reading from a dead worker may raise
                fate = fate_of_workers(wait=1.0)
                if fate is None:
                    raise
                raise ChildProcessError(fate) from error
            finally:
                end_workers()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            fsdp.set_up(self.accelerator, self.args)
            self.is_fsdp_enabled = True

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        model = self.accelerator.unwrap_model(self.model)
        if self.optimizer is None and hasattr(model, "parameter_groups"):
            groups = model.parameter_groups(self.args.learning_rate, self.args.weight_decay)
            _check_groups(model, groups)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **options)
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        fsdp.split_groups(optimizer, self._whole)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        resumed = self._resumed_from is not None and self.state.global_step > 0
        if resumed and not Path(str(self._resumed_from), "scheduler.pt").exists():  # it starts where the run goes on
            scheduler.last_epoch = self.state.global_step - 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the optimizer's own steps were before
                scheduler.step()
        return scheduler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """transformers' save_model.

        Raises:
            FloatingPointError: the weights are not finite.
        """
        if bad := checkpoints.not_finite(self.model):
            raise FloatingPointError(
                f"the run has diverged: after step {self.state.global_step} parameters hold NaN or infinity"
                f" ({', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}), which are not saved;"
                f" {advice(str(self.args.output_dir))}"
            )
        super().save_model(output_dir, _internal_call=_internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None, *args: Any, **kwargs: Any) -> None:
        """transformers' own; older checkpoints are removed once this one is on the disk with all that it holds."""
        output_dir = Path(self._get_output_dir(trial))
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.unseal(folder)
        if self._stream is not None:  # before trainer_state.json, with which a folder is a checkpoint
            save_place(folder, self._stream)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial, *args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        if rank_and_world_size()[1] > 1:
            dist.barrier()  # every rank has saved its random state
        if self.args.should_save:
            checkpoints.seal(folder)
            checkpoints.keep_newest(output_dir, limit, self.state.best_model_checkpoint)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but gains, biases and scalars, which have fewer than two dimensions."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As Trainer's, the weights by the names that they have in the model.

        transformers writes those of many towers (ViT, Swin, DINOv2) by the names of older versions, which
        from_pretrained knows, but a Trainer that resumes does not.
        """
        model: Any = self.accelerator.unwrap_model(self.model)
        if "save_original_format" not in signature(PreTrainedModel.save_pretrained).parameters or not isinstance(
            model, PreTrainedModel
        ):
            super()._save(output_dir, state_dict)
            return
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            del model.save_pretrained

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As Trainer's, but weights of a checkpoint that have no place in the model end the run: others would be new.

        Raises:
            ValueError: there are such weights.
        """
        if load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint has weights that {type(self.model).__name__} has no place for, as of another version: "
                f"{sorted(load_result.unexpected_keys)[:5]}"
            )
        super()._issue_warnings_after_load(load_result)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if hasattr(dataset, "sampler"):
            self.sampler = dataset.sampler(self.args.train_batch_size * self.args.world_size, seed)
        else:
            self.sampler = EpochSampler(len(dataset), seed=seed)
        return self.sampler

    def get_train_dataloader(self) -> Any:
        """transformers' own, or the `StreamLoader` of a `StreamingDataset`."""
        if isinstance(self.train_dataset, StreamingDataset):
            self._stream = stream_loader(self.train_dataset, self.data_collator, self.args, self._resumed_from)
            return self._stream
        loader: DataLoader[Any] = super().get_train_dataloader()
        guard_workers(getattr(loader, "base_dataloader", loader))  # accelerate's has what starts the workers inside
        return loader

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        with short_attention_in_float32() if self.args.device.type == "cpu" else nullcontext():
            if self.args.cache_chunk is None:
                loss = super().training_step(model, inputs, num_items_in_batch)
            else:
                loss = self._cached_step(model, inputs, self.args.cache_chunk)
        fsdp.average(self._whole)
        self.divergence.loss(loss)
        return loss

    def _cached_step(self, model: nn.Module, inputs: dict[str, Any], chunk_size: int) -> Tensor:
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
            chunk_size,
            shared=getattr(unwrapped, "shared_features", ()),
            backward=self.accelerator.backward,
            no_sync=functools.partial(self.accelerator.no_sync, model=model),
        )

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        if self.evaluator is None:
            scores: dict[str, float] = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            return scores
        model = self.accelerator.unwrap_model(self.model)
        with fsdp.gathered_by_tasks(model) if self.is_fsdp_enabled else nullcontext():
            scores = self.evaluator(model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            if self._last_log is not None:
                steps, since = self.state.global_step - self._last_log[0], self._last_log[1]
                logs["samples_per_second"] = steps * self.get_total_train_batch_size(self.args) / (now - since)
            self._last_log = (self.state.global_step, now)
            if self._stream is not None and (skipped := self._stream.dataset.skipped()):
                broken = skipped.pop("broken shard", 0)
                logs.update(skipped_samples=skipped.total(), broken_shards=broken)
            model = self.accelerator.unwrap_model(self.model)
            if hasattr(model, "metrics"):
                logs.update(model.metrics())
        super().log(logs, start_time)


def _check(model: Any, args: Any) -> None:
    name = type(model).__name__
    if getattr(args, "cache_chunk", None) is not None and not callable(getattr(model, "loss", None)):
        raise ValueError(
            f"cache_chunk {args.cache_chunk}: {name} has no loss(**features), as its loss does not need the whole batch"
            " at once; gradient_accumulation_steps gives a large batch in the memory of a small one"
        )
    if getattr(args, "fsdp", None) and isinstance(model, nn.Module):
        fsdp.check(model, args)


def _check_groups(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Every parameter that is trained is in one group, and no other is in any."""
    counts = Counter(id(parameter) for group in groups for parameter in group["params"])
    wrong = [
        f"{name} in {counts[id(parameter)]}"
        for name, parameter in model.named_parameters()
        if counts[id(parameter)] != int(parameter.requires_grad)
    ]
    if wrong:
        raise ValueError(
            f"{type(model).__name__}.parameter_groups: expected parameters that are trained in one group each, frozen"
            f" ones in none; got {', '.join(wrong[:3])}"
        )
