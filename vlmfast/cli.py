"""The command line: vlmfast train, vlmfast eval."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import vlmfast

COMMANDS = {
    "train": "Pretrain a model on image-text pairs.",
    "eval": "Retrieval and zero-shot scores of a checkpoint.",
}
MODELS = {"clip": ("vlmfast.models.contrastive.clip", "CLIPConfig", "CLIPModel")}


@dataclass
class ModelArguments:
    """The model: a pretrained checkpoint, a config file, or a small one from a few numbers."""

    model: str = field(default="clip", metadata={"help": "Which model.", "choices": list(MODELS)})
    pretrained: str | None = field(default=None, metadata={"help": "Name or folder of a checkpoint to start from."})
    config: str | None = field(default=None, metadata={"help": "A config.json, to train from scratch."})
    image_size: int = field(
        default=64, metadata={"help": "Side of the images, pixels; pretrained and config have their own."}
    )
    patch_size: int = field(default=8, metadata={"help": "Side of a patch, pixels."})
    vision_width: int = field(default=192, metadata={"help": "Width of the vision transformer, a multiple of 64."})
    vision_layers: int = field(default=4, metadata={"help": "Layers of the vision transformer."})
    text_width: int = field(default=192, metadata={"help": "Width of the text transformer, a multiple of 64."})
    text_layers: int = field(default=2, metadata={"help": "Layers of the text transformer."})
    embed_dim: int = field(default=256, metadata={"help": "Dimension of the features that are compared."})


@dataclass
class DataArguments:
    """The pairs, and how they are augmented."""

    data: str = field(
        default="",
        metadata={
            "help": "Training pairs: a glob of webdataset .tar shards, a .csv or .tsv of path and caption, or a folder."
        },
    )
    val_data: str | None = field(default=None, metadata={"help": "Pairs to evaluate on, for --eval-strategy."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Name or folder of a transformers tokenizer; by default the bundled one."}
    )
    max_length: int = field(default=32, metadata={"help": "Tokens of a caption at most, start and end included."})
    crop_scale: float = field(default=0.6, metadata={"help": "Least share of an image's area in a random crop."})
    flip: float = field(default=0.0, metadata={"help": "Probability of a left-right flip."})
    keywords: float = field(
        default=0.0, metadata={"help": "Probability that keywords of a pair's JSON stand for its caption."}
    )
    jitter: float = field(default=0.0, metadata={"help": "Strength of brightness, contrast and saturation jitter."})


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            "usage: vlmfast COMMAND [options]\n\n" + "\n".join(f"  {name:8}{text}" for name, text in COMMANDS.items())
        )
        print("\n'vlmfast COMMAND --help' lists the options.")
        return 0
    if arguments[0] == "--version":
        print(f"vlmfast {vlmfast.__version__}, torch {torch.__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    # Before workers are forked; they tokenize in parallel already.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if command not in COMMANDS:
        print(f"vlmfast: COMMAND must be one of {', '.join(COMMANDS)}; got {command!r}", file=sys.stderr)
        return 2
    try:
        return {"train": train, "eval": evaluate}[command](rest)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("vlmfast"):
            raise
        print(f"vlmfast {command}: {error.name} is not installed; pip install 'vlmfast[train]'", file=sys.stderr)
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("VLMFAST_TRACEBACK") == "1":
            raise
        print(f"vlmfast {command}: {error}", file=sys.stderr)
    return 1


def train(arguments: Sequence[str]) -> int:
    """Train, saving checkpoints; the final model, its tokenizer and run.json are in --output-dir.

    Returns 0, or 128 + the number of the signal that stopped the run after a checkpoint.
    """
    from transformers import HfArgumentParser, set_seed
    from transformers.utils import logging

    from vlmfast.data import Collator, ImageTextDataset, load_tokenizer, train_transform
    from vlmfast.training import PretrainingArguments, PretrainingTrainer, last_checkpoint
    from vlmfast.training.callbacks import StopOnSignal

    parser = HfArgumentParser((ModelArguments, DataArguments, PretrainingArguments), prog="vlmfast train")
    model_args, data_args, args = parser.parse_args_into_dataclasses(list(arguments))
    if not data_args.data:
        raise ValueError("--data is needed: shards, a table or a folder of image-text pairs")
    output_dir = Path(args.output_dir)
    checkpoint = last_checkpoint(output_dir) if output_dir.exists() else None
    record = _record(model_args, data_args, args)
    if args.resume and checkpoint:
        _check_same_run(output_dir / "run.json", record)
    elif checkpoint:
        raise ValueError(f"--output-dir {output_dir} holds {checkpoint.name} of an earlier run; pass --resume to go on")

    logging.disable_progress_bar()
    set_seed(args.seed)
    tokenizer = load_tokenizer(data_args.tokenizer)
    model = _build_model(model_args, tokenizer, data_args.max_length)
    image_size = _image_size(model, model_args.image_size)
    transform = train_transform(
        image_size, scale=(data_args.crop_scale, 1.0), flip=data_args.flip, jitter=data_args.jitter
    )
    dataset = ImageTextDataset(data_args.data, transform=transform, keywords=data_args.keywords, seed=args.seed)
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(dataset) < batch:
        raise ValueError(f"--data has {len(dataset)} pairs, fewer than one batch of {batch}")

    trainer = PretrainingTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=Collator(tokenizer, max_length=data_args.max_length),
        processing_class=tokenizer,
        evaluator=_evaluator(data_args, tokenizer, image_size, args),
    )
    if trainer.is_world_process_zero():
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "run.json").write_text(json.dumps(record, indent=2) + "\n")
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{model_args.model}: {parameters / 1e6:.1f}M parameters, {len(dataset)} pairs, batch {batch}")
        if args.resume:
            print(
                f"resuming from {checkpoint}" if checkpoint else f"no checkpoint in {output_dir}: starting from step 0"
            )
    trainer.train(resume_from_checkpoint=str(checkpoint) if args.resume and checkpoint else None)
    skipped = ", ".join(f"{count} {reason}" for reason, count in dataset.skipped().items() if count)
    if trainer.is_world_process_zero():
        print(f"skipped: {skipped or 'nothing'}")

    received = next(c.received for c in trainer.callback_handler.callbacks if isinstance(c, StopOnSignal))
    if received is not None:
        name = signal.Signals(received).name
        print(f"stopped by {name} after step {trainer.state.global_step}; --resume goes on from there")
        return 128 + received
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"model saved in {output_dir}")
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Scores as a table, as JSON with --output and as a picture with --report."""
    import argparse

    parser = argparse.ArgumentParser(prog="vlmfast eval", description=COMMANDS["eval"])
    parser.add_argument("--model", default="clip", choices=list(MODELS))
    parser.add_argument("--checkpoint", required=True, help="folder or name of a trained model")
    parser.add_argument("--data", required=True, help="shards, a table or a folder of image-text pairs")
    parser.add_argument("--tokenizer", help="folder or name; by default the checkpoint's own")
    parser.add_argument("--image-size", type=int, help="side of the images, where the checkpoint's config has none")
    parser.add_argument(
        "--max-length", type=int, help="tokens of a caption at most; by default what the model was made for"
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--num-workers", type=int, default=2, help="processes that decode images")
    parser.add_argument("--device", help="by default a GPU where there is one")
    parser.add_argument("--output", type=Path, help="write the scores to this JSON file")
    parser.add_argument("--report", type=Path, help="write queries and what they retrieve to this PNG file")
    options = parser.parse_args(arguments)

    from transformers.utils import logging

    from vlmfast.data import ImageTextDataset, eval_transform, load_tokenizer
    from vlmfast.evaluation import evaluate, write_report

    for path in (options.output, options.report):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    _, model_class = _model_classes(options.model)
    model = model_class.from_pretrained(_existing(options.checkpoint))
    tokenizer = load_tokenizer(options.tokenizer or options.checkpoint)
    dataset = ImageTextDataset(options.data, transform=eval_transform(_image_size(model, options.image_size)))
    scores = evaluate(
        model,
        dataset,
        tokenizer,
        max_length=options.max_length or model.config.text_config.max_position_embeddings,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        device=options.device,
    )
    scores.arguments.update(checkpoint=options.checkpoint, data=options.data)
    print(scores.table())
    if options.output:
        options.output.write_text(json.dumps(scores.to_dict(), indent=2) + "\n")
        print(f"scores: {options.output}")
    if options.report:
        write_report(options.report, scores, dataset)
        print(f"report: {options.report}")
    return 0


def _model_classes(name: str) -> tuple[Any, Any]:
    module, config, model = MODELS[name]
    loaded = import_module(module)
    return getattr(loaded, config), getattr(loaded, model)


def _image_size(model: Any, otherwise: int | None) -> int:
    """The vision tower's own image size; convolutional towers may have none in their config."""
    size = getattr(model.config.vision_config, "image_size", None) or otherwise
    if size is None:
        raise ValueError("--image-size is needed: the vision_config of this checkpoint has no image_size")
    return int(size)


def _existing(checkpoint: str) -> str:
    """What can only be a path is looked for here; owner/name may also be on a hub, where transformers looks."""
    path = Path(checkpoint)
    only_a_path = path.exists() or path.is_absolute() or checkpoint.startswith(".") or checkpoint.count("/") > 1
    if only_a_path and not (path / "config.json").exists():
        raise FileNotFoundError(f"{checkpoint} is not the folder of a checkpoint: it has no config.json")
    return checkpoint


def _build_model(model_args: ModelArguments, tokenizer: Any, max_length: int) -> Any:
    config_class, model_class = _model_classes(model_args.model)
    if model_args.pretrained and model_args.config:
        raise ValueError("--pretrained and --config exclude each other")
    if model_args.pretrained:
        return model_class.from_pretrained(_existing(model_args.pretrained))
    if model_args.config:
        return model_class(config_class.from_json_file(model_args.config))
    names = ("image_size", "patch_size", "vision_width", "vision_layers", "text_width", "text_layers", "embed_dim")
    config = config_class.small(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_length=max_length,
        **{name: getattr(model_args, name) for name in names},
    )
    return model_class(config)


def _evaluator(data_args: DataArguments, tokenizer: Any, image_size: int, args: Any) -> Any:
    if data_args.val_data is None:
        if args.eval_strategy != "no":
            raise ValueError("--eval-strategy needs --val-data")
        return None
    from vlmfast.data import ImageTextDataset, eval_transform
    from vlmfast.evaluation import evaluate

    dataset = ImageTextDataset(data_args.val_data, transform=eval_transform(image_size))

    def scores(model: Any) -> dict[str, float]:
        found = evaluate(model, dataset, tokenizer, max_length=data_args.max_length, device=args.device, progress=False)
        directions = {"image_to_text": found.image_to_text, "text_to_image": found.text_to_image}
        return {f"{name}_R@{k}": value for name, side in directions.items() for k, value in side.recall.items()}

    return scores


def _record(model_args: ModelArguments, data_args: DataArguments, args: Any) -> dict[str, Any]:
    """What decides the course of a run; a resumed run must agree with it."""
    names = (
        "seed num_train_epochs max_steps learning_rate weight_decay warmup_steps gradient_accumulation_steps bf16 fp16"
    )
    chosen = {name: getattr(args, name) for name in names.split()}
    chosen["lr_scheduler_type"] = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    chosen["global_batch_size"] = args.train_batch_size * args.world_size
    data = {name: value for name, value in vars(data_args).items() if name != "val_data"}
    return {"model": dict(vars(model_args)), "data": data, "training": chosen}


def _check_same_run(path: Path, record: dict[str, Any]) -> None:
    if not path.exists():
        return
    before = json.loads(path.read_text())
    changed = [
        f"{name} was {before.get(part, {}).get(name)!r} and is {value!r}"
        for part, values in record.items()
        for name, value in values.items()
        if before.get(part, {}).get(name) != value
    ]
    if changed:
        raise ValueError(f"--resume must repeat the arguments of the run in {path.parent}: {'; '.join(changed)}")
