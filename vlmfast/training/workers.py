"""The data workers of a process that has a process group, and that finishes its step after SIGINT or SIGTERM."""

from __future__ import annotations

import functools
import multiprocessing
import signal
import threading
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

from torch.utils.data import DataLoader

from vlmfast.distributed import rank_and_world_size

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def worker_context() -> str | None:
    """`multiprocessing_context` for a DataLoader: "forkserver" in a process with others in its group, else None.

    A fork copies locks that other threads hold. Those of gloo take CPython's list of threads, which CPython 3.11 locks
    once more in the forked process before it makes the lock anew: about one worker in a thousand stood still for ever
    inside fork, and the run with it. The fork server has no other threads. It and its workers ignore SIGINT and
    SIGTERM, which torchrun sends to every process of a rank; a fork server that was there before does not.
    """
    if rank_and_world_size()[1] == 1 or "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    multiprocessing.set_forkserver_preload([__name__])
    main = threading.current_thread() is threading.main_thread()  # only it may set handlers
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS if main}
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return "forkserver"


def guard_workers(loader: DataLoader[Any]) -> None:
    """Has the loader start its workers by `worker_context`, and these ignore SIGINT and SIGTERM."""
    if loader.num_workers == 0:
        return
    loader.multiprocessing_context = loader.multiprocessing_context or worker_context()
    loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)


def _start_worker(init: Callable[[int], None] | None, worker_id: int) -> None:
    for number in _SIGNALS:  # torch has just set its own handler of SIGTERM
        signal.signal(number, signal.SIG_IGN)
    if init is not None:
        init(worker_id)
