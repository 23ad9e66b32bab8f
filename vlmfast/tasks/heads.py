"""A model with a head over its `joint_features`, for tasks that are classified: what fine-tuning trains and saves.

    made = task_class("vqa")(task_options).trainable(model, "train/*.tar", tokenizer, model_options)
    Trainer(model=made.model, train_dataset=made.dataset, data_collator=made.collator, ...)
    made.model.save_pretrained("runs/vqa")     # and TaskModel.from_pretrained("runs/vqa") has model and head

The checkpoint holds the whole model, and in its config which class it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from vlmfast.tasks.batches import Collate, evaluating, place


class TaskConfig(PreTrainedConfig):
    """Which task, which model, and what the head decides between.

    Args:
        task: name in TASKS.
        model: "module:Class" of the model.
        model_config: the model's config, as a dict.
        width: D of its pooled features.
        outputs: names of what the head scores: answers, labels, or one name for the score of a choice.
    """

    model_type = "vlmfast_task"

    def __init__(
        self,
        task: str = "",
        model: str = "",
        model_config: dict[str, Any] | None = None,
        width: int = 1,
        outputs: Sequence[str] = ("score",),
        **kwargs: Any,
    ) -> None:
        self.task = task
        self.model = model
        self.model_config = model_config or {}
        self.width = width
        self.outputs = list(outputs)
        super().__init__(**kwargs)


@dataclass
class TaskOutput(ModelOutput):
    """`loss`, where there are labels, and `logits` (B, outputs)."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class TaskModel(PreTrainedModel):
    """`model`, and a head of two layers over what `joint_features` pools: Linear(D, 2D), GELU, LayerNorm, Linear.

    The loss follows from the labels. Soft ones, float (B, A), give binary cross-entropy, summed over the A outputs and
    averaged over the batch. Labels int64 (B,) give cross-entropy between the outputs; of a head with one output,
    between the choices of each sample, which stand one after the other in the batch.
    Source: the head of Anderson et al. 2018 as ViLBERT (1908.02265) and LXMERT (1908.07490) have it.
    """

    config_class = TaskConfig
    base_model_prefix = "wrapped"  # never a prefix of names: the checkpoint is of both parts
    accepts_loss_kwargs = False  # forward's keyword arguments are the batch, to which Trainer is to add nothing
    config: TaskConfig
    tasks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: TaskConfig, model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if model is None:
            cls = _model_class(config.model)
            model = cls(cls.config_class.from_dict(config.model_config))
        else:
            for module in model.modules():
                module._is_hf_initialized = True  # so that post_init leaves it as it is
        self.model = model
        for name in ("parameter_groups", "after_optimizer_step", "metrics"):
            if hasattr(model, name):  # so that whoever asks finds what the model has, and nothing else
                setattr(self, name, getattr(self, f"_{name}", None) or getattr(model, name))
        width = config.width
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width), nn.Linear(2 * width, len(config.outputs))
        )
        self.post_init()

    @classmethod
    def around(
        cls, model: Any, task: str, outputs: Sequence[str], batch: dict[str, Any], device: Any = None
    ) -> TaskModel:
        """The model with a new head, whose width is seen on a batch.

        Args:
            batch: of the model's collator, on the CPU.
        Raises:
            TypeError: the model has no `joint_features`.
        """
        if not callable(getattr(model, "joint_features", None)):
            raise TypeError(f"task {task}: expected a model with joint_features; {type(model).__name__} lacks it")
        where = place(model, device)
        with evaluating(model):
            pooled = model.joint_features(
                **{k: v.to(where) if isinstance(v, Tensor) else v for k, v in batch.items()}
            ).pooled
        kind = type(model)
        config = TaskConfig(
            task=task,
            model=f"{kind.__module__}:{kind.__qualname__}",
            model_config=model.config.to_dict(),
            width=pooled.shape[-1],
            outputs=outputs,
        )
        return cls(config, model).to(where)

    def logits(self, **batch: Any) -> Tensor:
        """(B, outputs)."""
        pooled: Tensor = self.model.joint_features(**batch).pooled
        found: Tensor = self.head(pooled)
        return found

    def forward(self, labels: Tensor | None = None, **batch: Any) -> TaskOutput:
        logits = self.logits(**batch)
        if labels is None:
            return TaskOutput(logits=logits)
        if labels.is_floating_point():
            loss = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum") / len(labels)
        else:
            loss = F.cross_entropy(logits.float().view(len(labels), -1), labels)
        return TaskOutput(loss=loss, logits=logits)

    @property
    def Options(self) -> Any:  # noqa: N802  # as the contract spells it
        """The model's own."""
        return self.model.Options

    def transform(self, options: Any, *, train: bool) -> Any:
        return self.model.transform(options, train=train)

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Any:
        return self.model.collator(options, tokenizer, train=train)

    def question_collator(self, options: Any, tokenizer: Any) -> Any:
        return question_collator(self.model, options, tokenizer)

    def _parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The model's own, and the head's."""
        decayed = [parameter for parameter in self.head.parameters() if parameter.dim() >= 2]
        others = [parameter for parameter in self.head.parameters() if parameter.dim() < 2]
        return [
            *self.model.parameter_groups(lr, weight_decay),
            {"params": decayed, "lr": lr, "weight_decay": weight_decay},
            {"params": others, "lr": lr, "weight_decay": 0.0},
        ]


def _model_class(place: str) -> Any:
    """The class at "module:Class": vlmfast's, or one that is imported already, as a checkpoint's word runs no code.

    Raises:
        ValueError: there is none, or it has no `joint_features`.
    """
    module, _, name = place.partition(":")
    if not module.startswith("vlmfast.models.") and module not in sys.modules:
        raise ValueError(
            f"the model is {place}, which is not vlmfast's; import it first (vlmfast eval --model {place})"
        )
    found = getattr(import_module(module), name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and hasattr(found, "joint_features")):
        raise ValueError(f"the model is {place}; expected a model of transformers with joint_features")
    return found


def question_collator(model: Any, options: Any, tokenizer: Any) -> Collate:
    """What makes batches of questions: the model's own `question_collator`, or else its `collator`."""
    own = getattr(model, "question_collator", None)
    found: Collate = own(options, tokenizer) if own else model.collator(options, tokenizer, train=False)
    return found


class Labelled:
    """A collator that adds `labels`, of a function of the samples that are in the batch."""

    def __init__(self, collator: Collate, labels: Callable[[Sequence[Any]], Tensor]) -> None:
        self.collator = collator
        self.labels = labels

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        kept = [sample for sample in samples if sample is not None]
        return {**self.collator(kept), "labels": self.labels(kept)}


def first_of(dataset: Any) -> Any:
    """The first sample that can be read.

    Raises:
        ValueError: there is none.
    """
    for index in range(len(dataset)):
        if (sample := dataset[index]) is not None:
            return sample
    raise ValueError(f"source: no sample of {len(dataset)} could be used; {dict(dataset.skipped())}")
