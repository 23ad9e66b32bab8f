"""What signals do to a run: the first one saves a checkpoint and stops it, the second one ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import distributed as dist
from transformers import TrainerCallback

from vlmfast.training.workers import STOP_SIGNALS, kill_workers


class StopOnSignal(TrainerCallback):
    """SIGINT, SIGTERM and SIGHUP finish the step, save a checkpoint and stop the run; a second one ends it at once.

    Before the end of the first step there is nothing to save: the process exits. The exit code is 128 + the signal's
    number. Handlers are set inside the context `with StopOnSignal() as stop`, in the main thread only. SIGHUP stays
    ignored where it is, as under nohup.

    Attributes:
        received: the first signal's number, or None.
    """

    _active: StopOnSignal | None = None

    def __init__(self) -> None:
        self.received: int | None = None
        self._can_save = False
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}
        self._wakeup = self._previous_wakeup = -1

    def __enter__(self) -> StopOnSignal:
        self.received, self._can_save, self._process = None, False, os.getpid()
        if threading.current_thread() is not threading.main_thread():
            return self
        read, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        threading.Thread(target=self._watch, args=(read,), daemon=True).start()
        self._previous_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        StopOnSignal._active = self
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        if StopOnSignal._active is not self:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        signal.set_wakeup_fd(self._previous_wakeup)
        StopOnSignal._active = None
        os.close(self._wakeup)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._can_save = True
        if self._agreed(args):
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._agreed(args):  # it came while the checkpoint was being saved
            control.should_training_stop = True

    def _agreed(self, args: Any) -> bool:
        """Whether any rank has received a signal: all stop after the same step, or none does."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.received is not None
        flag = torch.tensor(int(self.received is not None), device=args.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data worker that inherited the handler: its batches are still wanted
            return
        if self.received is not None:
            _leave(number)
        self.received = number
        if not self._can_save:
            _say(f"{signal.Signals(number).name}: stopped before the end of the first step; nothing to save")
            raise SystemExit(128 + number)
        _say(
            f"{signal.Signals(number).name}: saving a checkpoint at the end of this step, then stopping; a second"
            " signal ends the run at once"
        )

    def _watch(self, read: int) -> None:
        """Ends the process at the second signal, also while the main thread is in a call of C that does not return."""
        seen = 0
        while numbers := os.read(read, 64):
            seen += sum(number in STOP_SIGNALS for number in numbers)
            if seen > 1:
                _leave(next(number for number in reversed(numbers) if number in STOP_SIGNALS))
        os.close(read)


def _say(text: str) -> None:
    """To stderr past Python's buffer, which the signal may have interrupted in the midst of a write."""
    with contextlib.suppress(OSError):  # a terminal that has hung up
        os.write(2, f"\n{text}\n".encode())


def _leave(number: int) -> NoReturn:
    kill_workers()
    os._exit(128 + number)


def _in_child() -> None:
    if StopOnSignal._active is not None:  # signals of a worker are not its parent's
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_in_child)
