"""Whatever ends a run ends its process within seconds, with a message, and leaves nothing behind."""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
from scenarios import Collate, Line, Numbers, Run, make_trainer
from torch import distributed as dist
from transformers import TrainerCallback

from vlmfast.training import last_checkpoint, workers

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def fail_at(where: int, at: int) -> None:
    if at == where:
        raise RuntimeError("this went wrong")


def fail(*_: object) -> None:
    raise RuntimeError("this went wrong")


def die(number: int, where: int, at: int) -> None:
    if at == where:
        os.kill(os.getpid(), number)
        time.sleep(600)


def crash(at: int) -> None:
    if at == 9:
        os._exit(3)


class FailingCallback(TrainerCallback):
    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        raise RuntimeError("this went wrong")


def failing(folder: Path, where: str, persistent: bool) -> None:
    killed = functools.partial(die, signal.SIGKILL, 9)
    parts = {
        "model": {"model": Line(functools.partial(fail_at, 2))},
        "worker": {"dataset": Numbers(functools.partial(fail_at, 9))},
        "collator": {"collator": Collate(fail)},
        "callback": {"callbacks": [FailingCallback()]},
        "killed worker": {"dataset": Numbers(killed)},
        "crashed worker": {"dataset": Numbers(crash)},
        "nowhere": {},
    }
    trainer = make_trainer(
        folder, **parts[where], dataloader_num_workers=2, dataloader_persistent_workers=persistent, max_steps=40
    )
    trainer.train()


MESSAGES = {"killed worker": "was killed, as when memory runs out", "crashed worker": "ended with exit code 3"}


@pytest.mark.parametrize(
    ("where", "persistent"),
    [
        ("model", False),
        ("worker", False),
        ("worker", True),
        ("collator", False),
        ("callback", True),
        ("killed worker", False),
        ("crashed worker", True),
        ("nowhere", True),
    ],
)
def test_an_error_ends_the_process(tmp_path: Path, where: str, persistent: bool) -> None:
    run = Run(tmp_path, failing, tmp_path, where, persistent)
    assert run.code() == (0 if where == "nowhere" else 1)
    assert where == "nowhere" or MESSAGES.get(where, "this went wrong") in run.text()


class Slow:
    """Marks a file at the given call, or at all, then waits, in Python or in C."""

    def __init__(self, marker: Path, at: int | None, *, in_c: bool = False, seconds: float = 600.0) -> None:
        self.marker, self.at, self.in_c, self.seconds = marker, at, in_c, seconds

    def __call__(self, at: int) -> None:
        if self.at is not None and (at != self.at or self.marker.exists()):
            return
        self.marker.touch()
        if self.in_c:
            dist.HashStore().wait(["nobody sets it"], timedelta(seconds=self.seconds))
        end = time.monotonic() + self.seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(left)


class SlowSaving(Line):
    def state_dict(self, *args: object, **kwargs: object) -> object:
        if self.act is not None:
            self.act(-1)
        return super().state_dict(*args, **kwargs)


def stopping(folder: Path, where: str, step_seconds: float) -> int:
    marker = folder / "marker"
    slow = {
        "start": Slow(marker, None),
        "step": Slow(marker, 3, seconds=step_seconds),
        "C": Slow(marker, 3, in_c=True),
        "saving": Slow(marker, -1, seconds=step_seconds),
    }[where]
    parts = {"dataset": Numbers(slow)} if where == "start" else {"model": SlowSaving(slow)}
    trainer = make_trainer(
        folder, **parts, dataloader_num_workers=2, max_steps=400, save_strategy="steps", save_steps=2
    )
    trainer.train()
    return 128 + (trainer.stop.received or 0)


@pytest.mark.parametrize(
    ("where", "step", "number"),
    [("start", None, signal.SIGTERM), *(("step", 3, number) for number in SIGNALS), ("saving", 2, signal.SIGINT)],
)
def test_a_signal_saves_what_there_is_and_ends_the_run(
    tmp_path: Path, where: str, step: int | None, number: signal.Signals
) -> None:
    run = Run(tmp_path, stopping, tmp_path, where, 3.0)
    run.wait_for((tmp_path / "marker").exists)
    run.send(number)
    assert run.code() == 128 + number
    assert number.name in run.text()
    saved = last_checkpoint(tmp_path)
    assert saved == (None if step is None else tmp_path / f"checkpoint-{step}")


@pytest.mark.parametrize(
    ("where", "first", "second"),
    [
        ("step", signal.SIGINT, signal.SIGINT),
        ("C", signal.SIGTERM, signal.SIGTERM),
        ("saving", signal.SIGTERM, signal.SIGHUP),
    ],
)
def test_a_second_signal_ends_the_process_at_once(
    tmp_path: Path, where: str, first: signal.Signals, second: signal.Signals
) -> None:
    run = Run(tmp_path, stopping, tmp_path, where, 600.0)
    run.wait_for((tmp_path / "marker").exists)
    run.send(first)
    time.sleep(2.0)  # signals that are pending together are handled in the order of their numbers
    assert run.process.is_alive()
    run.send(second)
    assert run.code() == 128 + second


def printing(folder: Path, pipe: str) -> int:
    descriptor = os.open(pipe, os.O_WRONLY)
    os.dup2(descriptor, 2)
    trainer = make_trainer(
        folder, dataloader_num_workers=1, max_steps=4000, disable_tqdm=False, callbacks=[Counting(folder / "steps")]
    )
    trainer.train()
    return 128 + (trainer.stop.received or 0)


class Counting(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.path.write_text(str(state.global_step))


def test_a_signal_may_fall_on_the_printing_of_the_bar(tmp_path: Path) -> None:
    """With a reader of stderr that stands still, the run is inside a write when the signal comes."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    run = Run(tmp_path, printing, tmp_path, str(pipe))
    steps = tmp_path / "steps"
    run.wait_for(lambda: steps.exists() and time.time() - steps.stat().st_mtime > 1.5)
    stuck_at = int(steps.read_text())
    run.send(signal.SIGTERM)
    time.sleep(0.3)
    os.set_blocking(reader, True)
    shown = b""
    while part := os.read(reader, 4096):
        shown += part
    assert run.code() == 128 + signal.SIGTERM
    assert b"SIGTERM: saving a checkpoint" in shown
    assert b"reentrant" not in shown
    saved = last_checkpoint(tmp_path)
    assert saved is not None
    # of this step, or of the next when it was the loss of this one that was being shown
    assert int(saved.name.removeprefix("checkpoint-")) - stuck_at in (1, 2)
    os.close(reader)


def forked(folder: Path, where: str) -> int:
    return stopping(folder, where, 600.0)


def served(folder: Path, where: str) -> int:
    """With workers of a fork server, as in a group of processes."""
    workers.rank_and_world_size = lambda: (0, 2)
    return stopping(folder, where, 600.0)


@pytest.mark.parametrize(
    ("function", "where"),  # the workers are at work, or wait for more of it
    [(forked, "start"), (forked, "step"), (served, "step")],
    ids=["fork, at work", "fork, idle", "server, idle"],
)
def test_workers_and_fork_server_end_with_a_killed_process(tmp_path: Path, function: object, where: str) -> None:
    run = Run(tmp_path, function, tmp_path, where)
    run.wait_for((tmp_path / "marker").exists)
    assert len(run.session()) >= 3
    run.send(signal.SIGKILL)
    assert run.code() == -signal.SIGKILL


def one_of_two(folder: Path, where: str, rank: int) -> int:
    slow = Slow(folder / "marker", 3)
    act = {"error": functools.partial(fail_at, 3), "stopped": slow, "start": functools.partial(fail_at, 1)}[where]
    parts = {"model": Line(act)} if rank == 1 else {}
    trainer = make_trainer(folder, **parts, dataloader_num_workers=0, max_steps=400, ddp_backend="gloo", ddp_timeout=20)
    trainer.train()
    return 0


@pytest.mark.parametrize("where", ["error", "start", "stopped"])
def test_one_process_of_two_ends_both(tmp_path: Path, where: str, free_port: int) -> None:
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        Run(tmp_path, one_of_two, tmp_path, where, rank, RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(2)
    ]
    if where == "stopped":
        ranks[0].wait_for((tmp_path / "marker").exists)
        ranks[1].send(signal.SIGSTOP)
    else:
        assert ranks[1].code() == 1
        assert "this went wrong" in ranks[1].text()
    assert ranks[0].code() == 1
    ranks[1].close()


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
