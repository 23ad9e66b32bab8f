"""vlmfast train."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmfast.cli.models import ModelArguments, build_model, existing, image_size


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
    jitter: float = field(
        default=0.0,
        metadata={"help": "Strength of brightness, contrast and saturation jitter; DeCLIP's views have their own."},
    )
    synonyms: str | None = field(
        default=None,
        metadata={
            "help": "DeCLIP: a JSON file of words and lists of their synonyms, for its second view of a caption."
        },
    )
    cache_locked_features: str | None = field(
        default=None,
        metadata={
            "help": "LiT: a folder for the locked tower's features, computed once; images are then not augmented."
        },
    )


def run(arguments: Sequence[str]) -> int:
    """Train, saving checkpoints; the final model, its tokenizer and run.json are in --output-dir.

    Returns 0, or 128 + the number of the signal that stopped the run after a checkpoint.
    """
    from transformers import HfArgumentParser, set_seed
    from transformers.utils import logging

    from vlmfast.data import load_tokenizer
    from vlmfast.training import PretrainingArguments, PretrainingTrainer, last_checkpoint

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
    texts = model_args.text_tower or model_args.pretrained
    tokenizer = load_tokenizer(data_args.tokenizer or (texts and existing(texts)))
    if model_args.model == "declip" and tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    model = build_model(model_args, tokenizer, data_args.max_length)
    side = image_size(model, model_args.image_size)
    dataset, collator = _training_data(model_args.model, model, tokenizer, side, data_args, args)
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(dataset) < batch:
        raise ValueError(f"--data has {len(dataset)} pairs, fewer than one batch of {batch}")

    trainer = PretrainingTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=tokenizer,
        evaluator=_evaluator(data_args, tokenizer, side, args),
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

    received = trainer.stop.received
    if received is not None:
        name = signal.Signals(received).name
        if trainer.is_world_process_zero():
            print(f"stopped by {name} after step {trainer.state.global_step}; --resume goes on from there")
        return 128 + received
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"model saved in {output_dir}")
    return 0


def _training_data(
    name: str, model: Any, tokenizer: Any, side: int, data_args: DataArguments, args: Any
) -> tuple[Any, Any]:
    """The dataset, and what makes batches of it: pairs, two views of each for DeCLIP, or LiT's cached features."""
    from vlmfast import data

    def pairs(transform: Any) -> data.ImageTextDataset:
        return data.ImageTextDataset(
            data_args.data,
            transform=transform,
            keywords=data_args.keywords,
            seed=args.seed,
            min_batch=min(2, args.train_batch_size),  # a contrastive loss tells a pair from another
        )

    folder, crop = data_args.cache_locked_features, (data_args.crop_scale, 1.0)
    if folder is not None and name != "lit":
        raise ValueError(f"--cache-locked-features needs a locked tower, --model lit; got {name}")
    if data_args.synonyms is not None and name != "declip":
        raise ValueError(f"--synonyms needs --model declip, which rewrites captions; got {name}")
    if name == "declip":
        if data_args.jitter:
            raise ValueError(f"--jitter: DeCLIP's views have their own, expected 0; got {data_args.jitter}")
        views = data.two_views(data.moco_transform(side, scale=crop, flip=data_args.flip))
        synonyms = None if data_args.synonyms is None else data.read_synonyms(data_args.synonyms)
        return pairs(views), data.TwoViewCollator(
            tokenizer, max_length=data_args.max_length, rewrite=data.EDA(synonyms=synonyms)
        )
    if folder is None:
        transform = data.train_transform(side, scale=crop, flip=data_args.flip, jitter=data_args.jitter)
        return pairs(transform), data.Collator(tokenizer, max_length=data_args.max_length)
    dataset = pairs(data.eval_transform(side))
    model.to(args.device)
    dataset.features = data.cache_features(
        folder,
        dataset,
        lambda pixels: model.encode_locked(pixels.to(args.device)),
        model.locked_fingerprint(),
        num_workers=args.dataloader_num_workers,
        rank=args.process_index,
        world_size=args.world_size,
        progress=lambda done, blocks: print(f"locked features: {done} of {blocks} blocks", flush=True),
    )
    args.distributed_state.wait_for_everyone()
    return dataset, data.Collator(tokenizer, max_length=data_args.max_length, images="locked_features")


def _evaluator(data_args: DataArguments, tokenizer: Any, image_size: int, args: Any) -> Any:
    if data_args.val_data is None:
        if args.eval_strategy != "no":
            raise ValueError("--eval-strategy needs --val-data")
        return None
    from vlmfast.data import Collator, ImageTextDataset, eval_transform
    from vlmfast.tasks.retrieval import evaluate

    dataset = ImageTextDataset(data_args.val_data, transform=eval_transform(image_size))
    collator = Collator(tokenizer, max_length=data_args.max_length)
    return lambda model: evaluate(model, dataset, collator, device=args.device, progress=False).metrics


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
