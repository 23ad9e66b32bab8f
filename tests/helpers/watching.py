"""What a dispatch mode sees of the ops."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """`seen`: each op that was called, and what it returned last."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self.seen[func] = func(*args, **(kwargs or {}))
        return out
