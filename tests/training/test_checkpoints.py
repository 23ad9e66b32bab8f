"""Checkpoints: whole on disk before older ones go, checked before they are used, resumed from bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from scenarios import Line, Run, make_trainer
from torch import nn

from vlmfast.training import checkpoints, last_checkpoint
from vlmfast.training.checkpoints import check_weights, damage_of, keep_newest, usable_checkpoint
from vlmfast.training.trainer import PretrainingTrainer

STEPS = 9


def run_in(folder: Path, **options: object) -> PretrainingTrainer:
    torch.manual_seed(3)
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 3, "warmup_steps": 4, **options}
    return make_trainer(folder, dataloader_num_workers=0, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 6 and 9 of a whole run."""
    folder = tmp_path_factory.mktemp("finished")
    run_in(folder).train()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-6", "checkpoint-9"]
    return folder


def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("damage", [cut, empty, zeros, one_bit, Path.unlink])
@pytest.mark.parametrize("name", [*FILES, "training_args.bin", "files.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    finished: Path, tmp_path: Path, name: str, damage: object
) -> None:
    folder = copy(finished, tmp_path)
    damage(folder / "checkpoint-9" / name)
    checkpoint, notes = usable_checkpoint(folder)
    if name == "files.json" and damage in (Path.unlink, one_bit):
        assert damage is one_bit or checkpoint == folder / "checkpoint-9"  # what it lists is whole
        return
    assert checkpoint == folder / "checkpoint-6"
    assert len(notes) == 1
    assert notes[0].startswith("checkpoint-9 is damaged: ")
    assert name in notes[0]
    assert (folder / "damaged-checkpoint-9").is_dir()


@pytest.mark.parametrize("damage", [cut, empty, zeros, Path.unlink])
@pytest.mark.parametrize("name", FILES[:-1])
def test_checkpoints_of_before_there_were_checksums(finished: Path, tmp_path: Path, name: str, damage: object) -> None:
    folder = copy(finished, tmp_path)
    (folder / "checkpoint-9" / "files.json").unlink()
    (folder / "checkpoint-6" / "files.json").unlink()
    assert usable_checkpoint(folder) == (folder / "checkpoint-9", [])
    damage(folder / "checkpoint-9" / name)
    if damage is Path.unlink and name != "model.safetensors":
        with pytest.raises(ValueError, match=f"has no {name}"):
            usable_checkpoint(folder)
        return
    checkpoint, notes = usable_checkpoint(folder)
    assert checkpoint == folder / "checkpoint-6"
    assert name in notes[0]


def test_a_run_goes_on_from_before_the_damage_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    folder = copy(finished, tmp_path)
    cut(folder / "checkpoint-9" / "optimizer.pt")
    checkpoint, _ = usable_checkpoint(folder)
    trainer = run_in(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]
    same = [json.loads((root / "checkpoint-9" / "trainer_state.json").read_text()) for root in (folder, finished)]
    losses = [[(e["step"], e["loss"]) for e in state["log_history"] if "loss" in e] for state in same]
    assert losses[0] == losses[1]
    for name in ("model.safetensors", "scheduler.pt"):
        assert (folder / "checkpoint-9" / name).read_bytes() == (finished / "checkpoint-9" / name).read_bytes()


def test_nothing_whole_is_an_error(finished: Path, tmp_path: Path) -> None:
    folder = copy(finished, tmp_path)
    for step in (6, 9):
        empty(folder / f"checkpoint-{step}" / "model.safetensors")
    with pytest.raises(ValueError, match=r"no whole checkpoint: checkpoint-9 is .*model.safetensors.*checkpoint-6 is"):
        usable_checkpoint(folder)


def test_a_half_written_checkpoint_is_passed_over_in_silence(finished: Path, tmp_path: Path) -> None:
    folder = copy(finished, tmp_path)
    for name in ("files.json", "trainer_state.json"):
        (folder / "checkpoint-9" / name).unlink()
    assert usable_checkpoint(folder) == (folder / "checkpoint-6", [])


def test_what_a_resumed_run_needs_may_be_left_out_by_name_only(tmp_path: Path) -> None:
    trainer = run_in(tmp_path, save_only_model=True)
    trainer.train()
    rates = {e["step"]: e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e}
    with pytest.raises(ValueError, match=r"no optimizer.pt, scheduler.pt, rng_state.pth.*--resume-incomplete"):
        usable_checkpoint(tmp_path)
    checkpoint, _ = usable_checkpoint(tmp_path, incomplete=True)
    assert checkpoint == tmp_path / "checkpoint-9"
    again = run_in(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    logs = [e for e in again.state.log_history if e["step"] > 6 and "learning_rate" in e]
    assert {e["step"]: e["learning_rate"] for e in logs} == pytest.approx({s: rates[s] for s in (7, 8, 9)})


def test_another_number_of_processes_has_other_random_states(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no rng_state_0.pth, rng_state_1.pth"):
        usable_checkpoint(copy(finished, tmp_path), world_size=2)


def test_a_complete_run_is_not_trained_on(finished: Path, tmp_path: Path) -> None:
    trainer = run_in(tmp_path)
    with torch.no_grad():
        trainer.model.layer.weight.fill_(5.0)
    trainer.train(resume_from_checkpoint=str(finished / "checkpoint-9"))
    weights, _ = run_in(tmp_path), None
    weights.train()
    assert torch.equal(trainer.model.layer.weight, weights.model.layer.weight)
    assert trainer.state.global_step == STEPS
    assert trainer.optimizer is None  # nothing was prepared for a step
    longer = run_in(tmp_path, max_steps=STEPS + 2)
    longer.train(resume_from_checkpoint=str(finished / "checkpoint-9"))
    assert longer.state.global_step == STEPS + 2


def test_epochs_decide_whether_a_run_is_complete(finished: Path, tmp_path: Path) -> None:
    def over(**options: object) -> bool:
        return checkpoints.is_over(finished / "checkpoint-9", run_in(tmp_path, **options).args)

    assert over()
    assert over(max_steps=-1, num_train_epochs=1)
    assert not over(max_steps=-1, num_train_epochs=3)
    assert not over(max_steps=10)


def test_older_checkpoints_go_when_the_new_one_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rmtree = os.fsync, shutil.rmtree

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))

    def watched_rmtree(path: Path, **options: object) -> None:
        done.append(f"removed {Path(path).name}")
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(shutil, "rmtree", watched_rmtree)
    run_in(tmp_path, save_total_limit=1).train()
    removed = [entry for entry in done if entry.startswith("removed")]
    assert removed == ["removed .checkpoint-3", "removed .checkpoint-6"]
    before = done[: done.index("removed .checkpoint-3")]
    for name in FILES:
        assert f"checkpoint-6/{name}" in before
    assert before[-1] == "."  # the entry of the folder, after all that is in it


def test_a_kill_in_the_midst_of_removing_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            keep_newest(tmp_path, 1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    keep_newest(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    keep_newest(tmp_path, None)
    keep_newest(tmp_path, 2, best=str(tmp_path / "checkpoint-1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-10", "checkpoint-3"]


def holding(folder: Path) -> None:
    held = checkpoints.lock(folder)
    (folder / "held").touch()
    time.sleep(60)
    held.close()


def test_a_folder_is_one_run_s_until_its_process_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, holding, tmp_path)
    run.wait_for((tmp_path / "held").exists)
    with pytest.raises(ValueError, match=rf"is in use by another run, process {run.pid} on "):
        checkpoints.lock(tmp_path)
    run.send(signal.SIGKILL)
    assert run.code() == -signal.SIGKILL
    checkpoints.lock(tmp_path).close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    model = nn.Sequential(Line(), nn.Linear(2, 3))
    check_weights(model, "--pretrained x")
    with torch.no_grad():
        model[1].weight[0, 1] = value
    with pytest.raises(ValueError, match=r"--pretrained x: expected finite weights; 1 parameters .*: 1.weight"):
        check_weights(model, "--pretrained x")


def test_sealed_folders(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "b").write_text("text")
    checkpoints.seal(folder)
    assert damage_of(folder) is None
    (folder / "sub" / "b").write_text("next")
    assert "other bytes" in str(damage_of(folder))


def test_last_checkpoint_passes_over_half_written_ones(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, state in ((5, "{}"), (10, "{}"), (20, '{"epoch": 1'), (30, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
