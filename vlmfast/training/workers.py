"""The data workers of a run: deaf to the signals that stop it, and gone when it ends, however it ends."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from vlmfast.distributed import rank_and_world_size

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What stops a run after a checkpoint."""

_started: weakref.WeakSet[BaseProcess] = weakref.WeakSet()
os.register_at_fork(after_in_child=_started.clear)  # they are the parent's to end


def worker_context(method: str | None = None) -> BaseContext:
    """`multiprocessing_context` for a DataLoader, whose processes `end_workers` knows.

    Without a method it is "forkserver" in a process with others in its group, else Python's default.

    A fork copies locks that other threads hold. Those of gloo take CPython's list of threads, which CPython 3.11 locks
    once more in the forked process before it makes the lock anew: about one worker in a thousand stood still for ever
    inside fork, and the run with it. The fork server has no other threads. It and its workers ignore the signals that
    torchrun sends to every process of a rank; a fork server that was there before does not.
    """
    if method is None and rank_and_world_size()[1] > 1 and "forkserver" in multiprocessing.get_all_start_methods():
        method = "forkserver"
        multiprocessing.set_forkserver_preload([__name__])
        main = threading.current_thread() is threading.main_thread()  # only it may set handlers
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS if main}
        try:
            forkserver.ensure_running()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    context: Any = copy.copy(multiprocessing.get_context(method))
    make = context.Process

    def process(*args: Any, **options: Any) -> BaseProcess:
        worker: BaseProcess = make(*args, **options)
        _started.add(worker)
        return worker

    context.Process = process
    found: BaseContext = context
    return found


def guard_workers(loader: DataLoader[Any]) -> None:
    """Has the loader start its workers by `worker_context`; they ignore the stop signals and end with their parent."""
    if loader.num_workers == 0:
        return
    chosen = loader.multiprocessing_context
    loader.multiprocessing_context = worker_context(chosen and chosen.get_start_method())
    loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)


def kill_workers() -> list[BaseProcess]:
    """Sends SIGKILL to the workers that are alive, and returns them. They ignore SIGTERM, which a stop sends to all."""
    alive = [worker for worker in list(_started) if worker.pid is not None and worker.is_alive()]
    for worker in alive:
        worker.kill()
    return alive


def end_workers() -> None:
    """Kills the workers and waits until they are gone."""
    with _without_torchs_handler():
        for worker in kill_workers():
            worker.join(timeout=5)


@contextmanager
def _without_torchs_handler() -> Iterator[None]:
    """Inside, the end of a worker raises nothing: torch has a handler of SIGCHLD that would."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGCHLD, handler)


def fate_of_workers(wait: float) -> str | None:
    """What became of a worker that has not ended by itself, in words, or None; looks again until `wait` seconds."""
    with _without_torchs_handler():
        workers = [worker for worker in list(_started) if worker.pid is not None]
        alive = [worker.sentinel for worker in workers if worker.is_alive()]
        if alive and not any(worker.exitcode for worker in workers):
            ended = multiprocessing.connection.wait(alive, timeout=wait)
            for worker in workers:
                if worker.sentinel in ended:
                    worker.join()  # it closes its files a moment before it can be asked for its exit code
    for worker in workers:
        code = worker.exitcode
        if code == -signal.SIGKILL:
            return f"data worker {worker.pid} was killed, as when memory runs out; fewer --dataloader-num-workers help"
        if code:
            end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return f"data worker {worker.pid} ended with {end}"
    return None


def _start_worker(init: Callable[[int], None] | None, worker_id: int) -> None:
    for number in STOP_SIGNALS:  # torch has just set its own handler of SIGTERM
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if init is not None:
        init(worker_id)


def _end_with_parent() -> None:
    """torch looks at the process that forked the worker, which may be the fork server, and only between batches."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
