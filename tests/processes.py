"""Runs a function in several gloo processes of this machine, and makes one loss of what they compute."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist


def _entry(
    rank: int, function: Callable[..., None], world_size: int, store: str, seconds: float, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=seconds),
    )
    function(rank, world_size, *arguments)
    dist.destroy_process_group()


def run_processes(function: Callable[..., None], world_size: int, *arguments: Any, timeout: float = 60) -> None:
    """function(rank, world_size, *arguments) on every rank; an exception on any is raised here.

    `timeout`: of the process group, in seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        # Forked, so that functions of test modules, which importlib mode does not put on the path, are found.
        multiprocessing.start_processes(
            _entry, (function, world_size, store, timeout, arguments), nprocs=world_size, start_method="fork"
        )


class _MeanOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()


def as_one_process(loss: Callable[..., Tensor], sizes: list[int]) -> Callable[..., Tensor]:
    """A function of the global batch and scalars, each rank's loss on its shard: value and gradients as after DDP."""

    def function(image: Tensor, text: Tensor, *scalars: Tensor) -> Tensor:
        image, text, *scalars = (_MeanOfGradients.apply(t) if t.requires_grad else t for t in (image, text, *scalars))
        own = loss(image.split(sizes)[dist.get_rank()], text.split(sizes)[dist.get_rank()], *scalars)
        mean = own.detach().clone()
        dist.all_reduce(mean)
        return own + (mean / dist.get_world_size() - own.detach())

    return function
