"""What models are scored on, one task a file. A line here is all that registers one."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from vlmfast.tasks.scores import Scores
from vlmfast.tasks.task import Task

__all__ = ["TASKS", "Scores", "Task", "default_task", "evaluator", "task_class"]

TASKS = {
    "retrieval": "vlmfast.tasks.retrieval:Retrieval",
    "zero_shot": "vlmfast.tasks.zero_shot:ZeroShotClassification",
    "captioning": "vlmfast.tasks.captioning:Captioning",
    "vqa": "vlmfast.tasks.vqa:VQA",
    "hateful": "vlmfast.tasks.hateful:Hateful",
    "reasoning": "vlmfast.tasks.reasoning:Reasoning",
    "grounding": "vlmfast.tasks.grounding:Grounding",
    "detection": "vlmfast.tasks.detection:Detection",
}
"""By name: "module:Class"."""


def task_class(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        ValueError: there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}; got {name!r}")
    module, _, attribute = TASKS[name].partition(":")
    found: type[Task] = getattr(import_module(module), attribute)
    return found


def default_task(model_class: Any) -> str:
    """The first of the tasks of a class of models.

    Raises:
        ValueError: it has none.
    """
    names = getattr(model_class, "tasks", ())
    if not names:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, as {model_class.__name__} names none of its own")
    return str(names[0])


def evaluator(
    task: Task | str, source: Any, tokenizer: Any, model_options: Any, **arguments: Any
) -> Callable[[Any], dict[str, float]]:
    """A function of a model that gives its scores on `source` by name, for `PretrainingTrainer(evaluator=...)`.

    The blind score is left out, as it takes as long as the score itself.

    Args:
        task: a task, or a name in TASKS.
        source, tokenizer, model_options, arguments: as of `Task.evaluate`; the source is opened now, and once.
    """
    chosen = task_class(task)() if isinstance(task, str) else task
    dataset = chosen.open(source)
    settings = {"blind": False, "progress": False, **arguments}

    def scores(model: Any) -> dict[str, float]:
        return chosen.evaluate(model, dataset, tokenizer, model_options, **settings).metrics

    return scores
