"""vlmfast eval."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfast.cli.arguments import UsageError, parse, value_of
from vlmfast.data import is_stream
from vlmfast.models import model_class, model_type
from vlmfast.tasks import TASKS, default_task, task_class

if TYPE_CHECKING:
    from vlmfast.models.contract import Options


@dataclass
class EvalArguments:
    """What `vlmfast eval` takes besides the flags of the task."""

    checkpoint: str = field(metadata={"help": "Folder or name of a trained model."})
    data: str = field(metadata={"help": "Shards, a table or a folder of samples to score the model on."})
    task: str | None = field(
        default=None, metadata={"help": f"{', '.join(TASKS)}; by default the first of the model's."}
    )
    model: str | None = field(
        default=None,
        metadata={"help": "Name of a model, or package.module:Class; by default what the checkpoint says that it is."},
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or name; by default the checkpoint's own."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images, where the checkpoint's config has none."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a text at most; by default what the model was made for."}
    )
    features: str | None = field(
        default=None,
        metadata={
            "help": "Regions of the images: a folder, as a detector writes it, or 'objects', the boxes of records."
        },
    )
    config_overrides: list[str] | None = field(
        default=None, metadata={"help": "Fields of the model's config as name=value, such as those of its decoding."}
    )
    batch_size: int = field(default=256, metadata={"help": "Samples per forward pass."})
    num_workers: int = field(default=2, metadata={"help": "Processes that decode images."})
    device: str | None = field(default=None, metadata={"help": "By default a GPU where there is one."})
    output: Path | None = field(default=None, metadata={"help": "Write the scores to this JSON file."})
    report: Path | None = field(default=None, metadata={"help": "Write a picture of what the model does to this PNG."})


def run(arguments: Sequence[str]) -> int:
    """Scores as a table, as JSON with --output and as a picture with --report."""
    import torch

    from vlmfast.models.checkpoints import find_tokenizer, load
    from vlmfast.models.contract import parse_overrides

    if is_stream(source := value_of("--data", arguments)):
        raise UsageError(f"--data {source}: expected files on a local disk, since samples are scored by index")

    # The task decides which flags there are, and the model which task it is.
    checkpoint = value_of("--checkpoint", arguments)
    name = value_of("--model", arguments)
    cls, own_task = checkpoint_class(name, checkpoint) if checkpoint else (None, next(iter(TASKS)))
    task_name = value_of("--task", arguments) or own_task or default_task(cls)
    task = task_class(task_name)
    groups: dict[str, Any] = {"the run": (EvalArguments, {})}
    if dataclasses.fields(task.Options):
        groups[f"task {task_name}"] = (task.Options, {})
    parsed = parse("vlmfast eval", groups, arguments)
    if parsed is None:
        return 0
    args, *chosen = parsed

    for path in (args.output, args.report):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    from transformers.utils import logging  # after the look for the checkpoint, which may end the command

    logging.disable_progress_bar()
    chosen_config = parse_overrides(getattr(cls, "config_class", None), args.config_overrides or ())
    model = load(cls, args.checkpoint, **chosen_config)
    scores = task(*chosen).evaluate(
        model,
        args.data,
        find_tokenizer(args.tokenizer or args.checkpoint) if getattr(cls, "reads_text", True) else None,
        model_options(model, args.checkpoint, image_size=args.image_size, max_length=args.max_length),
        features=args.features,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
    )
    scores.arguments.update(checkpoint=args.checkpoint, data=args.data, **chosen_config)
    print(scores.table())
    if args.output:
        args.output.write_text(json.dumps(scores.to_dict(), indent=2) + "\n")
        print(f"scores: {args.output}")
    if args.report:
        scores.report(args.report)
        print(f"report: {args.report}")
    return 0


def checkpoint_class(name: str | None, checkpoint: str) -> tuple[Any, str | None]:
    """The class of a checkpoint, and the task that it was fine-tuned for, None where it was for none."""
    from vlmfast.models.checkpoints import find, read_config
    from vlmfast.tasks.heads import TaskConfig, TaskModel

    named = model_class(name) if name else None
    found = read_config(find(checkpoint))
    if found.get("model_type") == TaskConfig.model_type:
        return TaskModel, found.get("task")
    return named or model_class(model_type(checkpoint, found)), None


def model_options(model: Any, checkpoint: str, **given: int | None) -> Options:
    """The model's own options, as they are for evaluation.

    Args:
        given: `image_size` and `max_length`, None where they were not given.
    """
    from vlmfast.models.contract import own_image_size
    from vlmfast.tasks.heads import TaskModel

    if isinstance(model, TaskModel):
        model = model.model
    options: Options = model.Options(pretrained=checkpoint)
    names = {f.name for f in dataclasses.fields(options)}
    chosen = {name: value for name, value in given.items() if value is not None}
    for name, value in chosen.items():
        if name not in names:
            raise ValueError(f"--{name.replace('_', '-')}: {type(model).__name__} has no such option")
        setattr(options, name, value)
    if "max_length" in names - chosen.keys():
        options.max_length = model.max_text_length  # type: ignore[attr-defined]
    if "image_size" in names - chosen.keys() and own_image_size(model.config) is None:
        raise ValueError("--image-size is needed: the config of this checkpoint has no image_size")
    object.__setattr__(options, "typed", frozenset(chosen))
    return options
