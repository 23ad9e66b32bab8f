"""A run on a stream: its batches, and the place in the data that a checkpoint keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from vlmfast.data import StreamingDataset, StreamLoader
from vlmfast.training.checkpoints import write_text
from vlmfast.training.workers import guard_workers


def stream_loader(
    dataset: StreamingDataset, collate: Callable[[Any], Any], args: Any, checkpoint: str | None
) -> StreamLoader:
    """The batches of this process, from where a checkpoint was made.

    Args:
        args: PretrainingArguments.
        checkpoint: a folder, or None for the start.
    Raises:
        ValueError: the checkpoint has no place in the data and args.resume_incomplete is not set, or one in other
            data or of another number of processes or workers.
    """
    if (dataset.rank, dataset.world_size) != (args.process_index, args.world_size):
        raise ValueError(
            f"train_dataset: expected rank {args.process_index} of {args.world_size}, "
            f"got {dataset.rank} of {dataset.world_size}"
        )
    loader = StreamLoader(
        dataset,
        args.train_batch_size,
        collate,
        num_workers=args.dataloader_num_workers,
        note=tqdm.write,
        prefetch_factor=args.dataloader_prefetch_factor,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
    )
    guard_workers(loader.loader)
    if checkpoint is not None:
        path = _path(Path(checkpoint), args.process_index)
        if path.exists():
            try:
                loader.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise ValueError(f"--resume must go on with the same stream; of {path}, {error}") from error
        elif not args.resume_incomplete:
            raise ValueError(f"--resume: {path} is missing, which says where in the data the run was")
    return loader


def save_place(folder: Path, loader: StreamLoader) -> None:
    """Keeps beside a checkpoint of this process where in the data it is."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(_path(folder, loader.dataset.rank), json.dumps(loader.state_dict()) + "\n")


def _path(folder: Path, rank: int) -> Path:
    return folder / f"stream_{rank}.json"
