"""vlmfast train."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmfast import data
from vlmfast.cli.arguments import UsageError, parse, split, value_of
from vlmfast.models import MODELS, model_class
from vlmfast.tasks import TASKS, default_task, evaluator, task_class

SHOWN = (
    "output_dir",
    "resume",
    "per_device_train_batch_size",
    "cache_chunk",
    "num_train_epochs",
    "train_samples",
    "max_steps",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "bf16",
    "dataloader_num_workers",
    "eval_strategy",
    "eval_steps",
    "save_steps",
    "logging_steps",
    "seed",
    "report_to",
    "use_cpu",
)
"""Of the Trainer's options, those that --help shows."""
RENAMED = {"--cache-locked-features": "--cache-features"}


@dataclass
class DataArguments:
    """The samples, and what is done with them before training."""

    data: str = field(
        default="",
        metadata={
            "help": "Samples: a glob of webdataset .tar shards, a .csv or .tsv, a folder (docs/data.md), or a stream:"
            " 'pipe:COMMAND' or a URL, with lists in braces (docs/streaming.md)."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read shards on a local disk as a stream too, in order and without an index."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Of a stream, samples that each data worker shuffles at a time."}
    )
    task: str | None = field(
        default=None, metadata={"help": f"Fine-tune for a task instead of pretraining: {', '.join(TASKS)}."}
    )
    features: str | None = field(
        default=None,
        metadata={
            "help": "Regions of the images: a folder, as a detector writes it, or 'objects', the boxes of records."
        },
    )
    val_data: str | None = field(default=None, metadata={"help": "Samples to evaluate on, for --eval-strategy."})
    val_features: str | None = field(default=None, metadata={"help": "As --features, of --val-data."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Name or folder of a transformers tokenizer; by default the model's own."}
    )
    keywords: float = field(
        default=0.0, metadata={"help": "Probability that keywords of a sample's record stand for its caption."}
    )
    cache_features: str | None = field(
        default=None,
        metadata={"help": "A folder for what frozen parts give, computed once; images are then not augmented."},
    )

    def __post_init__(self) -> None:
        if not self.data:
            raise UsageError("--data is needed: shards, a table or a folder of samples")
        if not 0 <= self.keywords <= 1:
            raise UsageError(f"--keywords: expected a probability, got {self.keywords}")
        self._check_streams()
        if self.task and (self.keywords or self.cache_features):
            raise UsageError(f"--keywords and --cache-features have no effect beside --task {self.task}")
        if self.features and self.cache_features:
            raise UsageError("--features and --cache-features exclude each other")
        if self.val_features and not self.val_data:
            raise UsageError("--val-features has no effect without --val-data")

    @property
    def is_stream(self) -> bool:
        """Whether --data is read in order, without an index."""
        return self.streaming or data.is_stream(self.data)

    def _check_streams(self) -> None:
        if self.shuffle_buffer < 1:
            raise UsageError(f"--shuffle-buffer: expected at least 1, got {self.shuffle_buffer}")
        if data.is_stream(self.val_data):
            raise UsageError(f"--val-data {self.val_data}: expected files on a local disk, which can be read by index")
        for name in ("task", "features", "cache_features"):
            if self.is_stream and getattr(self, name) is not None:
                raise UsageError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} reads samples by index; expected --data on a "
                    f"local disk and no --streaming, got {self.data}"
                )


def run(arguments: Sequence[str]) -> int:
    """Train, saving checkpoints; the final model, its tokenizer and run.json are in --output-dir.

    Returns 0, or 128 + the number of the signal that stopped the run after a checkpoint.
    """
    name, rest = _model_name(arguments)
    if name is None:
        print(f"usage: vlmfast train MODEL --data DATA --output-dir FOLDER [options]\n\nMODEL: {', '.join(MODELS)},")
        print("or package.module:Class for one of your own.")
        print("'vlmfast train MODEL --help' lists the options, 'vlmfast models' what each model is.")
        return 0
    from transformers import set_seed
    from transformers.utils import logging

    from vlmfast.training import PretrainingArguments, PretrainingTrainer
    from vlmfast.training.checkpoints import check_weights
    from vlmfast.training.run_folder import RunFolder

    cls = model_class(name)
    if cls.made_by != "train":
        raise UsageError(f"nothing of {name} is trained; 'vlmfast {cls.made_by}' makes a checkpoint of it")
    kinds: dict[str, Any] = {f"{name}: {cls.paper}": (cls.Options, {}), "data": (DataArguments, {})}
    task_name = value_of("--task", rest)
    if task_name is not None and dataclasses.fields(task_class(task_name).Options):
        kinds[f"task {task_name}"] = (task_class(task_name).Options, {})
    kinds["training"] = (PretrainingArguments, cls.training_defaults)
    parsed = parse(f"vlmfast train {name}", kinds, rest, shown=SHOWN)
    if parsed is None:
        return 0
    options, data_args, *task_options, args = parsed
    task = None if task_name is None else task_class(task_name)(*task_options)
    output_dir = Path(args.output_dir)
    options.check()
    if task is not None:
        options.refuse(options.pretraining, f"--task {task_name}")
    if data_args.features and not cls.reads_features:
        raise ValueError(f"--features {data_args.features}: {name} reads no features of regions")
    folder = RunFolder(args)

    logging.disable_progress_bar()
    set_seed(args.seed)
    tokenizer = _tokenizer(cls, options, data_args)
    model = cls.build(options, tokenizer)
    check_weights(model, f"--pretrained {options.pretrained}" if options.pretrained else name)
    if task is None:
        dataset, collator = _training_data(model, tokenizer, options, data_args, args)
    else:
        model, dataset, collator = task.trainable(
            model, data_args.data, tokenizer, options, features=data_args.features, seed=args.seed
        )
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and not data_args.is_stream and len(dataset) < batch:
        raise ValueError(f"--data has {len(dataset)} samples, fewer than one batch of {batch}")

    make_record, default = _record(name, cls, options, data_args, task_options, args, dataset)
    started = folder.start(make_record, default)
    if started.complete:
        if args.process_index == 0:
            print(f"the run in {output_dir} is complete")
        return 0

    trainer = PretrainingTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=tokenizer,
        evaluator=_evaluator(task or cls, tokenizer, options, data_args, args),
    )
    if trainer.is_world_process_zero():
        parameters = [p.numel() for p in model.parameters()]
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        kept = f", {frozen / 1e6:.1f}M of them frozen" if frozen else ""
        size = f"a stream of {len(dataset.urls)} shards" if data_args.is_stream else f"{len(dataset)} samples"
        print(f"{name}: {sum(parameters) / 1e6:.1f}M parameters{kept}, {size}, batch {batch}")
        for note in started.notes:
            print(note)
        if args.resume:
            where = started.checkpoint
            print(f"resuming from {where}" if where else f"no checkpoint in {output_dir}: starting from step 0")
    trainer.train(resume_from_checkpoint=None if started.checkpoint is None else str(started.checkpoint))
    skipped = ", ".join(f"{count} {reason}" for reason, count in dataset.skipped().items() if count)
    if trainer.is_world_process_zero():
        print(f"skipped: {skipped or 'nothing'}")
        if hasattr(dataset, "stand_ins") and (count := dataset.stand_ins()):
            print(f"{count} samples stood in for skipped ones, so that a batch has at least {dataset.min_batch}")

    received = trainer.stop.received
    if received is not None:
        signal_name = signal.Signals(received).name
        if trainer.is_world_process_zero():
            print(f"stopped by {signal_name} after step {trainer.state.global_step}; --resume goes on from there")
        return 128 + received
    trainer.save_model()
    folder.finish()
    if trainer.is_world_process_zero():
        print(f"model saved in {output_dir}")
    return 0


def _model_name(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """MODEL, None when only help is asked for, and what follows; --model NAME of earlier versions goes on working."""
    rest = [RENAMED.get(option, option) + equals + value for option, equals, value in map(split, arguments)]
    if rest and not rest[0].startswith("-"):
        return rest[0], rest[1:]
    if (name := value_of("--model", rest)) is not None:
        print(f"vlmfast train: --model {name} is now the first argument: vlmfast train {name} ...", file=sys.stderr)
        place = next(k for k, argument in enumerate(rest) if split(argument)[0] == "--model")
        return name, rest[:place] + rest[place + (1 if "=" in rest[place] else 2) :]
    if {"-h", "--help", "--help-all"} & set(rest) or not rest:
        return None, rest
    first = next(iter(MODELS))
    print(f"vlmfast train: no MODEL named, so {first}: vlmfast train {first} ...", file=sys.stderr)
    return first, rest


def _tokenizer(cls: Any, options: Any, data_args: DataArguments) -> Any:
    """The tokenizer, with the special tokens that the model needs; None for a model that reads no text."""
    from vlmfast.models.checkpoints import find_tokenizer

    if not cls.reads_text:
        if data_args.tokenizer:
            raise ValueError(f"--tokenizer {data_args.tokenizer} has no effect: {cls.__name__} reads no text")
        return None
    source = options.tokenizer_source()
    tokenizer = find_tokenizer(data_args.tokenizer or source)
    missing = {name: token for name, token in cls.special_tokens.items() if getattr(tokenizer, name) is None}
    if missing:
        tokenizer.add_special_tokens(missing)
    if cls.extra_tokens:
        tokenizer.add_tokens(list(cls.extra_tokens), special_tokens=True)
    return tokenizer


def _training_data(model: Any, tokenizer: Any, options: Any, data_args: DataArguments, args: Any) -> tuple[Any, Any]:
    """The dataset, and what makes batches of it; with --cache-features what frozen parts give, in the images' place."""
    if data_args.is_stream:
        return _streamed_data(model, tokenizer, options, data_args, args)
    folder = data_args.cache_features
    if folder is not None and not hasattr(model, "frozen_features"):
        raise ValueError(
            f"--cache-features {folder}: {type(model).__name__} has no frozen part whose features it reads"
        )
    dataset = data.ImageTextDataset(
        data_args.data,
        transform=model.transform(options, train=folder is None),
        keywords=data_args.keywords,
        seed=args.seed,
        requires=model.requires,
        min_batch=min(2, args.train_batch_size),  # a contrastive loss tells a pair from another
    )
    if data_args.features is not None:
        dataset.features = data.open_features(
            data_args.features, dataset, rank=args.process_index, world_size=args.world_size
        )
    if folder is not None:
        options.refuse(("crop_scale", "flip", "jitter"), f"--cache-features {folder}: images are not augmented")
        model.to(args.device)
        dataset.features = data.cache_features(
            folder,
            dataset,
            lambda pixels: model.frozen_features(pixel_values=pixels.to(args.device)),
            model.frozen_fingerprint(),
            num_workers=args.dataloader_num_workers,
            rank=args.process_index,
            world_size=args.world_size,
            progress=lambda done, blocks: print(f"frozen features: {done} of {blocks} blocks", flush=True),
        )
        dataset.transform = None
        args.distributed_state.wait_for_everyone()
    if hasattr(model, "training_data"):
        dataset = model.training_data(options, dataset, tokenizer)
    return dataset, model.collator(options, tokenizer, train=True)


def _streamed_data(model: Any, tokenizer: Any, options: Any, data_args: DataArguments, args: Any) -> tuple[Any, Any]:
    """As `_training_data`, of a stream."""
    if args.max_steps < 1:
        raise UsageError(f"--train-samples is needed: --data {data_args.data} is a stream, which has no epochs")
    dataset = data.StreamingDataset(
        data_args.data,
        transform=model.transform(options, train=True),
        keywords=data_args.keywords,
        seed=args.seed,
        requires=model.requires,
        buffer=data_args.shuffle_buffer,
        rank=args.process_index,
        world_size=args.world_size,
    )
    dataset.check_streams(args.dataloader_num_workers)
    if hasattr(model, "training_data"):
        model.training_data(options, dataset, tokenizer)  # a TypeError where it needs samples by index
    return dataset, model.collator(options, tokenizer, train=True)


def _evaluator(task: Any, tokenizer: Any, options: Any, data_args: DataArguments, args: Any) -> Any:
    if data_args.val_data is None:
        if args.eval_strategy != "no":
            raise ValueError("--eval-strategy needs --val-data")
        return None
    chosen = default_task(task) if isinstance(task, type) else task
    return evaluator(
        chosen, data_args.val_data, tokenizer, options, device=args.device, features=data_args.val_features
    )


def _record(
    name: str, cls: Any, options: Any, data_args: DataArguments, task_options: Sequence[Any], args: Any, dataset: Any
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """What makes the record of what decides the course of the run, and the defaults of what an older one lacks."""
    from vlmfast.training import record

    def make() -> record.Record:
        return {
            "model": {"model": name, **record.plain(options)},
            "data": {
                **record.plain(data_args, leave_out=("val_data", "val_features")),
                "fingerprint": dataset.fingerprint(),
            },
            "task": {key: value for each in task_options for key, value in record.plain(each).items()},
            "training": record.training_part(args),
        }

    return make, {
        "model": record.defaults(type(options)),
        "data": record.defaults(DataArguments),
        "task": {key: value for each in task_options for key, value in record.defaults(type(each)).items()},
        "training": record.defaults(type(args), **cls.training_defaults),
    }
