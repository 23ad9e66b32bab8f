"""Runs a function in several gloo processes of this machine."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing


def _entry(rank: int, function: Callable[..., None], world_size: int, store: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    function(rank, world_size, *arguments)
    dist.destroy_process_group()


def run_processes(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """function(rank, world_size, *arguments) on every rank; an exception on any is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        # Forked, so that functions of test modules, which importlib mode does not put on the path, are found.
        multiprocessing.start_processes(
            _entry, (function, world_size, store, arguments), nprocs=world_size, start_method="fork"
        )
