"""Data workers beside a process group: forked from a process without its threads, and deaf to what stops the run."""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections.abc import Iterator
from multiprocessing import forkserver

import pytest
from torch.utils.data import DataLoader, Dataset

from vlmfast.training import workers
from vlmfast.training.workers import guard_workers


class Processes(Dataset[tuple[int, int]]):
    """The worker's process and its parent."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[int, int]:
        return os.getpid(), os.getppid()


@pytest.fixture
def in_a_group_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With a fork server of its own: other tests have one, too."""
    monkeypatch.setattr(workers, "rank_and_world_size", lambda: (0, 2))
    server = forkserver._forkserver
    server._stop()
    monkeypatch.setattr(server, "_preload_modules", server._preload_modules)
    yield
    server._stop()


@pytest.mark.usefixtures("in_a_group_of_two")
def test_a_process_of_a_group_does_not_fork() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    loader = DataLoader(Processes(), batch_size=None, num_workers=1)
    guard_workers(loader)
    assert signal.getsignal(signal.SIGTERM) is handler
    parents = {parent for _ in range(2) for _, parent in loader}
    assert len(parents) == 1
    assert os.getpid() not in parents


def check_signals() -> None:
    loader = DataLoader(Processes(), batch_size=None, num_workers=1, prefetch_factor=1)
    guard_workers(loader)
    seen = 0
    for worker, parent in loader:
        seen += 1
        if seen == 2:
            for number in (signal.SIGINT, signal.SIGTERM):
                for process in {worker, parent} - {os.getpid()}:
                    os.kill(process, number)
    assert seen == len(Processes())
    assert {again for _, again in loader} == {parent}  # which starts new workers


def test_signals_leave_workers_at_work() -> None:
    check_signals()


@pytest.mark.usefixtures("in_a_group_of_two")
def test_signals_leave_workers_and_the_fork_server_at_work() -> None:
    check_signals()


def end_with_3() -> None:
    time.sleep(0.3)
    os._exit(3)


def test_the_end_of_a_worker_while_its_fate_is_looked_for_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's handler of SIGCHLD does, where a broken connection was seen before the signal."""

    def raising(*_: object) -> None:
        raise RuntimeError("a worker exited")

    monkeypatch.setattr(workers, "_started", weakref.WeakSet())
    worker = workers.worker_context("fork").Process(target=end_with_3)
    worker.start()
    before = signal.signal(signal.SIGCHLD, raising)
    try:
        assert workers.fate_of_workers(wait=30) == f"data worker {worker.pid} ended with exit code 3"
        assert signal.getsignal(signal.SIGCHLD) is raising
    finally:
        signal.signal(signal.SIGCHLD, before)
