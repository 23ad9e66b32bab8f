"""What decides the course of a run is compared when it is resumed; a flag added since does not count."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from vlmfast.training import PretrainingArguments, record

OTHER: dict[str, Any] = {
    "seed": 7, "data_seed": 3, "num_train_epochs": 9.0, "max_steps": 77, "gradient_accumulation_steps": 3,
    "dataloader_drop_last": False, "learning_rate": 0.5, "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"num_cycles": 2}, "warmup_steps": 3, "optim": "sgd", "optim_args": "a=1",
    "optim_target_modules": ["q"], "weight_decay": 0.3, "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 0.5,
    "max_grad_norm": 5.0, "label_smoothing_factor": 0.5, "neftune_noise_alpha": 0.5, "cache_chunk": 2,
    "bf16": True, "fp16": True,
}  # fmt: skip


def training(**options: Any) -> record.Record:
    # some options refuse others, which is not the matter here
    args = PretrainingArguments(output_dir="unused", use_cpu=True, report_to=[])
    for name, value in options.items():
        setattr(args, name, value)
    return {"training": record.training_part(args)}


DEFAULT = {"training": record.defaults(PretrainingArguments)}


@pytest.mark.parametrize("name", record.DECISIVE)
def test_every_decisive_argument_is_compared(name: str) -> None:
    changed = record.changes(training(), training(**{name: OTHER[name]}), DEFAULT)
    assert len(changed) == 1
    assert changed[0].startswith(f"{name} was ")
    assert json.loads(json.dumps(training(**{name: OTHER[name]}))) == training(**{name: OTHER[name]})


def test_the_batch_is_the_global_one() -> None:
    changed = record.changes(training(), training(per_device_train_batch_size=3), DEFAULT)
    assert changed == ["global_batch_size was 8 and is 3"]


@pytest.mark.parametrize("name", ["output_dir", "logging_steps", "save_steps", "save_total_limit", "report_to"])
def test_what_decides_nothing_is_not(name: str) -> None:
    assert not record.changes(training(), training(**{name: 3}), DEFAULT)


@dataclasses.dataclass
class Options:
    width: int = 8
    names: tuple[str, ...] = ("a",)
    new: bool = False


def test_a_flag_added_later_counts_as_its_default() -> None:
    default = {"model": record.defaults(Options, width=16)}
    now = {"model": record.plain(Options(width=16))}
    assert now["model"] == {"width": 16, "names": ["a"], "new": False}
    old = {"model": {"names": ["a"], "gone": 3}}
    assert record.changes(old, now, default) == []
    assert record.changes({}, now, default) == []
    assert record.changes(old, {"model": {**now["model"], "new": True}}, default) == ["new was False and is True"]
    # without a default there is nothing to compare with, as for the fingerprint of data
    assert record.changes({"data": {}}, {"data": {"fingerprint": "x"}}, default) == []
    assert record.changes({"data": {"fingerprint": "y"}}, {"data": {"fingerprint": "x"}}, default) != []


def test_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    assert record.read(path) is None
    record.check_same_run(path, training(), DEFAULT)
    record.write(path, training())
    assert record.read(path) == training()
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    record.check_same_run(path, training(), DEFAULT)
    with pytest.raises(ValueError, match=r"--resume must repeat the arguments of the run in .*: seed was 42 and is 7"):
        record.check_same_run(path, training(seed=7), DEFAULT)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"training": 3}', "\0\0\0", '"text"'])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"run.json is damaged: expected the JSON record of a run"):
        record.read(path)
