"""Runs a function in several gloo processes of this machine, and makes one loss of what they compute."""

from __future__ import annotations

import datetime
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist

from vlmfast.nn import clip_loss, siglip_loss

ROOT = Path(__file__).parents[2]
# What the processes import, once: they are forked from a server that has it, and that never ran a backward pass, as
# autograd's threads do not survive a fork of the process of the tests.
multiprocessing.set_forkserver_preload(
    ["pytest", "hypothesis", "vlmfast.models.contrastive", "vlmfast.training", "open_clip.loss", "torch.nn.parallel"]
)


def _entry(rank: int, world_size: int, store: str, seconds: float, environment: dict[str, str], payload: bytes) -> None:
    os.environ.update(environment)
    sys.path.append(str(ROOT))  # test modules are named from here, as in tests.nn.test_clip_loss
    function, arguments = pickle.loads(payload)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=seconds),
    )
    function(rank, world_size, *arguments)
    if dist.is_initialized():  # an example that is run has ended it
        dist.destroy_process_group()


def run_processes(function: Callable[..., None], world_size: int, *arguments: Any, timeout: float = 60) -> None:
    """function(rank, world_size, *arguments) on every rank; an exception on any is raised here.

    `function` and `arguments` are pickled. `timeout`: of the process group, in seconds.
    """
    payload = pickle.dumps((function, arguments))
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        multiprocessing.start_processes(
            _entry,
            (world_size, store, timeout, dict(os.environ), payload),
            nprocs=world_size,
            start_method="forkserver",
        )


def exchange(shards_per_block: int) -> None:
    """From now on in this process the losses send texts in such blocks, and gather them where it is the world size."""
    for module in (clip_loss, siglip_loss):
        module.shards_per_block = lambda sizes, text: shards_per_block


def divisors(world_size: int) -> list[int]:
    """What `exchange` may be given, from the ring of single shards to one gathered block."""
    return [block for block in range(1, world_size + 1) if world_size % block == 0]


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
