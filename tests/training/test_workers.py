"""Data workers beside a process group: forked from a process without its threads, and deaf to what stops the run."""

from __future__ import annotations

import os
import signal

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


def in_a_group_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "rank_and_world_size", lambda: (0, 2))


def test_a_process_of_a_group_does_not_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_group_of_two(monkeypatch)
    handler = signal.getsignal(signal.SIGTERM)
    loader = DataLoader(Processes(), batch_size=None, num_workers=1)
    guard_workers(loader)
    assert signal.getsignal(signal.SIGTERM) is handler
    parents = {parent for _ in range(2) for _, parent in loader}
    assert len(parents) == 1
    assert os.getpid() not in parents


@pytest.mark.parametrize("grouped", [False, True])
def test_signals_leave_workers_and_their_parent_at_work(monkeypatch: pytest.MonkeyPatch, grouped: bool) -> None:
    if grouped:
        in_a_group_of_two(monkeypatch)
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
    assert len(list(loader)) == len(Processes())  # by new workers
