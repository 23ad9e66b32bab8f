"""Small training runs in processes of their own, to be failed, stopped and killed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from processes import ROOT
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.utils import ModelOutput

from vlmfast.training import PretrainingArguments, PretrainingTrainer

ENDS_WITHIN = 60.0
"""Seconds, of which a free machine needs two; what hangs does so for ever."""


class Numbers(Dataset[Tensor]):
    """`act(index)` is called in the worker before a sample is returned."""

    def __init__(self, act: Callable[[int], None] | None = None, length: int = 64) -> None:
        self.act, self.length = act, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int | tuple[int, int]) -> Tensor:
        index = position[1] if isinstance(position, tuple) else position
        if self.act is not None:
            self.act(index)
        return torch.tensor([index / self.length, 1.0])


class Collate:
    def __init__(self, act: Callable[[], None] | None = None) -> None:
        self.act = act

    def __call__(self, samples: list[Tensor]) -> dict[str, Tensor]:
        if self.act is not None:
            self.act()
        return {"numbers": torch.stack(samples)}


class Line(nn.Module):
    """`act(step)` is called at the start of every forward pass."""

    def __init__(self, act: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.act, self.steps = act, 0

    def forward(self, numbers: Tensor) -> ModelOutput:
        self.steps += 1
        if self.act is not None:
            self.act(self.steps)
        return ModelOutput(loss=self.layer(numbers).square().mean())


def make_trainer(
    folder: Path,
    *,
    model: Any = None,
    dataset: Any = None,
    collator: Any = None,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> PretrainingTrainer:
    settings = {"max_steps": 8, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, **options}
    arguments = PretrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        **settings,
    )
    return PretrainingTrainer(
        model=Line() if model is None else model,
        args=arguments,
        train_dataset=Numbers() if dataset is None else dataset,
        data_collator=Collate() if collator is None else collator,
        callbacks=callbacks,
    )


class Run:
    """`function(*arguments)` in a process of its own session; its return value, or else 1, is the exit code."""

    cold = True

    def __init__(self, folder: Path, function: Callable[..., int | None], *arguments: Any, **environment: str) -> None:
        self.errors = folder / f"errors-{time.monotonic_ns()}"
        self.process = multiprocessing.get_context("forkserver").Process(
            target=_enter, args=(str(self.errors), environment, pickle.dumps((function, arguments)))
        )
        if Run.cold:  # the server's imports are no part of a run's time
            warm = multiprocessing.get_context("forkserver").Process(target=os.getpid)
            warm.start()
            warm.join()
            Run.cold = False
        self.shared_memory = set(os.listdir("/dev/shm"))
        self.process.start()
        self.pid = self.process.pid

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_for(self, condition: Callable[[], object], seconds: float = 150) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.01)

    def code(self, seconds: float = ENDS_WITHIN) -> int:
        """The exit code, once the process and all that it has started are gone."""
        self.process.join(seconds)
        try:
            assert not self.process.is_alive(), f"still there after {seconds} s: {self.text()}"
            end = time.monotonic() + seconds
            while self.session() and time.monotonic() < end:
                time.sleep(0.02)
            assert not self.session(), f"left behind: {self.session()}"
            left = {n for n in set(os.listdir("/dev/shm")) - self.shared_memory if str(self.pid) in n}
            assert not left
        finally:
            self.close()
        return int(self.process.exitcode)

    def close(self) -> None:
        for pid in self.session():
            os.kill(pid, signal.SIGKILL)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()

    def session(self) -> list[int]:
        """Living processes that descend from this run."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == self.pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return found

    def text(self) -> str:
        return self.errors.read_text() if self.errors.exists() else ""


def _enter(errors: str, environment: dict[str, str], payload: bytes) -> None:
    os.setsid()
    sys.path.append(str(ROOT))  # test modules are named from here
    os.environ.update(environment)
    os.environ.pop("PYTHONUNBUFFERED", None)
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.dup2(descriptor, 1)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # Python's default here, which a fork server's child is not told
    function, arguments = pickle.loads(payload)
    raise SystemExit(function(*arguments) or 0)


__all__ = ["ROOT", "Collate", "Line", "Numbers", "Run", "make_trainer"]
