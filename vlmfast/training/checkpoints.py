"""Checkpoints that can be trusted: complete on disk, checked before they are used, never of weights gone wrong.

A checkpoint is the folder that Trainer writes and `files.json`, written last: the size and the CRC-32 of every file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from vlmfast.training.fsdp import whole_tensor

MANIFEST = "files.json"
STATE = "trainer_state.json"
OWN = (".lock", "run.json", MANIFEST)
"""Files of an output folder that are no part of the model in it."""


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint-<step> folder in output_dir, or None; its files are not looked into.

    Trainer writes trainer_state.json last, so a folder in which it is missing or cut short is one that a killed run
    left behind.
    """
    return next((folder for folder in _newest_first(output_dir) if _is_json(folder / STATE)), None)


def usable_checkpoint(
    output_dir: str | Path, *, world_size: int = 1, incomplete: bool = False
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence on each newer one that is damaged.

    A damaged one is renamed to damaged-<name>: the run goes on from before it and will save its own.

    Args:
        output_dir: of the run.
        world_size: how many processes will resume, each of which has a random state.
        incomplete: take a checkpoint without optimizer, schedule or random state, too.
    Raises:
        ValueError: all checkpoints are damaged, or the whole one was saved without what a resumed run needs.
    """
    notes: list[str] = []
    for folder in _newest_first(output_dir):
        if not (folder / MANIFEST).exists() and not _is_json(folder / STATE):
            continue  # a kill fell on its saving; the run writes it anew
        damage = damage_of(folder)
        if damage is None:
            lacks = _lacks(folder, world_size)
            if lacks and not incomplete:
                raise ValueError(
                    f"{folder} cannot be resumed from exactly: it has no {', '.join(lacks)}, as --save-only-model or"
                    " another number of processes saves it; --resume-incomplete goes on all the same, with what is"
                    " missing started anew"
                )
            return folder, notes
        renamed = _free_name(folder.with_name(f"damaged-{folder.name}"))
        folder.rename(renamed)
        notes.append(f"{folder.name} is damaged: {damage}; it is now {renamed.name}")
    if notes:
        raise ValueError(f"{output_dir} has no whole checkpoint: {'; '.join(notes)}")
    return None, notes


def damage_of(folder: Path) -> str | None:
    """What is wrong with the files of a sealed folder, or of a checkpoint of before there were seals; None if nothing.

    Every file is read.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        return _unreadable(folder)
    try:
        files = json.loads(manifest.read_text())
        expected = {name: (int(size), int(crc)) for name, (size, crc) in files.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{manifest} cannot be read ({error})"
    for name, (size, crc) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}"
        if _crc(path) != crc:
            return f"{path} holds other bytes than were saved"
    return None


def seal(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Brings files, all in the folder by default, to the disk, and then writes their sizes and checksums beside them.

    Returns when even a power cut leaves them whole.
    """
    paths = sorted(path for path in (folder.rglob("*") if files is None else files) if path.is_file())
    paths = [path for path in paths if path != folder / MANIFEST]
    for path in paths:
        _sync(path)
    listed = {str(path.relative_to(folder)): (path.stat().st_size, _crc(path)) for path in paths}
    write_text(folder / MANIFEST, json.dumps(listed, indent=1) + "\n")
    _sync_folder(folder.parent)


def seal_model(output_dir: Path) -> None:
    """Seals the final model in an output folder, which marks the run as complete."""
    seal(output_dir, [path for path in output_dir.iterdir() if path.name not in OWN])


def unseal(folder: Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)


def is_complete(output_dir: Path) -> bool:
    """Whether the run in this folder has saved its final model, and it is whole."""
    return (output_dir / MANIFEST).exists() and damage_of(output_dir) is None


def keep_newest(output_dir: Path, limit: int | None, best: str | None = None) -> None:
    """Removes all but the newest `limit` checkpoints and the best one."""
    if not limit or limit < 0:
        return
    for folder in _newest_first(output_dir)[limit:]:
        if best is None or folder.name != Path(best).name:
            folder.rename(folder.with_name(f".{folder.name}"))  # a kill must not leave half a checkpoint by its name
    for folder in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(folder)


def lock(output_dir: Path) -> IO[str]:
    """Holds an output folder for this process until the returned file is closed or the process ends, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    file = (output_dir / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: data workers that are forked do not hold it
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise ValueError(f"--output-dir {output_dir} is in use by another run, {owner}") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def not_finite(model: nn.Module) -> list[str]:
    """Names of parameters that hold NaN or infinity; one pass, one synchronisation.

    Of a model that FSDP has sharded, to be called on every process.
    """
    parameters = [(n, p) for n, p in model.named_parameters() if p.is_floating_point() and p.device.type != "meta"]
    if not parameters:
        return []
    home = parameters[0][1].device
    flags = [whole_tensor(p.detach().isfinite().all()).to(home) for _, p in parameters]
    finite = torch.stack(flags).tolist()
    return [name for (name, _), good in zip(parameters, finite, strict=True) if not good]


def check_weights(model: nn.Module, source: str) -> None:
    """Refuses weights that are no numbers.

    Args:
        model: any module.
        source: where its weights came from, for the message, such as "--pretrained runs/x".
    Raises:
        ValueError: a parameter holds NaN or infinity.
    """
    if bad := not_finite(model):
        shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise ValueError(f"{source}: expected finite weights; {len(bad)} parameters hold NaN or infinity: {shown}")


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one piece: a kill or a power cut leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)
    _sync_folder(path.parent)


def _newest_first(output_dir: str | Path) -> list[Path]:
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and folder.is_dir():
            found.append((int(step), folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def _lacks(folder: Path, world_size: int) -> list[str]:
    """Files that a resumed run needs and that were not saved; DeepSpeed and FSDP keep their optimizer in folders."""
    states = [f"rng_state_{rank}.pth" for rank in range(world_size)] if world_size > 1 else ["rng_state.pth"]
    needed = states if any(folder.glob("global_step*")) else ["scheduler.pt", *states]
    lacking = [name for name in needed if not (folder / name).exists()]
    return lacking if [*folder.glob("optimizer*"), *folder.glob("global_step*")] else ["optimizer.pt", *lacking]


def _unreadable(folder: Path) -> str | None:
    """The same question by opening the files, of which no checksums are known."""
    from safetensors import SafetensorError, safe_open

    if not _is_json(folder / STATE):
        return f"{folder / STATE} cannot be read"
    if not [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*")]:
        return f"{folder / 'model.safetensors'} is missing"
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    file.keys()
            elif path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as archive:
                    if (member := archive.testzip()) is not None:
                        return f"{path} holds other bytes than were saved, in {member}"
        except (OSError, zipfile.BadZipFile, SafetensorError) as error:
            return f"{path} cannot be read ({error})"
    return None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            crc = zlib.crc32(part, crc)
    return crc


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can
        _sync(path)


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def is_over(checkpoint: str | Path, args: Any) -> bool:
    """Whether a checkpoint is of the last step that these TrainingArguments ask for."""
    state = json.loads((Path(checkpoint) / STATE).read_text())
    if not isinstance(state, dict) or not {"global_step", "max_steps", "num_train_epochs"} <= set(state):
        return False  # damaged, as will be found
    if args.max_steps > 0:
        return bool(state["global_step"] >= args.max_steps)
    return bool(state["global_step"] >= state["max_steps"] and args.num_train_epochs <= state["num_train_epochs"])
