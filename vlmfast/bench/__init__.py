"""The microbenchmarks behind `vlmfast bench`: each op beside the backends, eager, torch.compile and peers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmfast.bench.harness import Bench

NAMES = ("info_nce", "sigmoid_loss", "linear_cross_entropy", "patch_embed", "media_attention", "step")


def load(name: str) -> Bench:
    """What is measured of one of NAMES.

    Raises:
        ValueError: there is no benchmark of that name.
    """
    if name not in NAMES:
        raise ValueError(f"op must be one of {', '.join(NAMES)}; got {name!r}")
    found: Bench = import_module(f"vlmfast.bench.{name}").BENCH
    return found
