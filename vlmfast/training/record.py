"""The record of a run: what decides its course, kept in run.json, and compared when the run is resumed.

A record is a dict of parts (model, data, training), each a dict of JSON values by name. A name that a record of an
older version lacks counts as the default, so that a flag added since does not break the run.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vlmfast.training.checkpoints import write_text

Record = dict[str, dict[str, Any]]

DECISIVE = (
    "seed", "data_seed", "num_train_epochs", "max_steps", "gradient_accumulation_steps", "dataloader_drop_last",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "cache_chunk", "bf16", "fp16",
)  # fmt: skip
"""Training arguments that decide the course of a run. Others say where, how often or how fast."""


def plain(values: Any, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """A dataclass object or a mapping as a dict that JSON gives back unchanged."""
    if dataclasses.is_dataclass(values):
        items = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    else:
        items = dict(values)
    return {name: _as_json(value) for name, value in items.items() if name not in leave_out}


def defaults(kind: type, **others: Any) -> dict[str, Any]:
    """What a dataclass has where nothing is said, and `others` instead of it, such as a model's own defaults."""
    found = {}
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            found[field.name] = _as_json(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = _as_json(field.default_factory())
    return {**found, **plain(others)}


def training_part(args: Any) -> dict[str, Any]:
    """The decisive values of TrainingArguments, and the global batch, however many processes share it."""
    chosen = {name: _as_json(getattr(args, name, None)) for name in DECISIVE}
    return {**chosen, "global_batch_size": args.train_batch_size * args.world_size}


def changes(before: Record, now: Record, default: Record) -> list[str]:
    """A phrase for every value that differs: "seed was 42 and is 7".

    Args:
        before: as `read` from run.json; a part or a name may be missing.
        now: of the run that is about to go on.
        default: of every part, values for names that `before` lacks. What is in neither is not compared.
    """
    found = []
    anywhere = {name: value for values in before.values() for name, value in values.items()}  # flags move between parts
    for part, values in now.items():
        moved = {name: anywhere[name] for name in values if name in anywhere}
        old = {**default.get(part, {}), **moved, **before.get(part, {})}
        found += [
            f"{name} was {old[name]!r} and is {value!r}"
            for name, value in values.items()
            if name in old and old[name] != value
        ]
    return found


def read(path: Path) -> Record | None:
    """The record, or None where there is none.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: expected the JSON record of a run ({error})") from error
    if not isinstance(record, dict) or not all(isinstance(part, Mapping) for part in record.values()):
        raise ValueError(f"{path} is damaged: expected the JSON record of a run, got {str(record)[:60]!r}")
    return record


def write(path: Path, record: Record) -> None:
    write_text(path, json.dumps(record, indent=2) + "\n")


def check_same_run(path: Path, now: Record, default: Record) -> None:
    """Refuses to resume with other arguments or data than those in run.json; see `changes`.

    Raises:
        ValueError: the file is damaged, or names each value that has changed.
    """
    before = read(path)
    if before is None:
        return
    if changed := changes(before, now, default):
        raise ValueError(f"--resume must repeat the arguments of the run in {path.parent}: {'; '.join(changed)}")


def _as_json(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, Mapping):
        return {str(name): _as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_as_json(item) for item in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
