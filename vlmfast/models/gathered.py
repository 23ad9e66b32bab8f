"""A process's own rows against the rows of all processes, for losses that `vlmfast.nn.ClipLoss` does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfast import distributed
from vlmfast.ops import info_nce


class Shards:
    """The shards of one batch: how many rows each process has.

    Args:
        name: for messages.
        features (n, D): this process's, several of n rows.
    Raises:
        ValueError: as `vlmfast.distributed.shard_sizes`.
    """

    def __init__(self, name: str, *features: Tensor) -> None:
        rank, world_size = distributed.rank_and_world_size()
        wanted = [torch.is_grad_enabled() and t.requires_grad for t in features]
        self.sizes = (
            [len(features[0])] if world_size == 1 else distributed.shard_sizes(name, *features, gradients=wanted)
        )
        self.offset = sum(self.sizes[:rank])
        self.share = self.sizes[rank] * world_size / sum(self.sizes)

    def gather(self, features: Tensor) -> Tensor:
        """Every process's rows (N, D), with the gradient of all processes' losses."""
        return features if len(self.sizes) == 1 else distributed.gather(features, self.sizes)

    def rows(self, values: Tensor) -> Tensor:
        """Every process's rows (N, ...) of any dtype, without gradient.

        Args:
            values (n, ...): of a second dimension that may differ between processes; shorter ones get zeros at the end.
        """
        if len(self.sizes) == 1:
            return values.detach()
        if values.ndim == 2:
            lengths = distributed.gather_scalars(torch.tensor(values.shape[1], device=values.device))
            values = torch.nn.functional.pad(values, (0, int(lengths.max()) - values.shape[1]))
        flat = distributed.gather(values.detach().reshape(len(values), -1), self.sizes)
        return flat.view(-1, *values.shape[1:])

    def info_nce(self, anchors: Tensor, samples: Tensor, scale: Tensor, **options: Any) -> Tensor:
        """`vlmfast.ops.info_nce` in one direction, this process's anchors (n, D) against all samples (N, D).

        Its mean over processes is the mean over all anchors, and so are gradients after DDP's mean.
        """
        loss = info_nce(anchors, samples, scale, label_offset=self.offset, bidirectional=False, **options)
        return loss * self.share


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean over processes, without gradient where there are several; the value itself where there is one."""
    return value if distributed.rank_and_world_size()[1] == 1 else distributed.mean(value)


def mean_count(rows: Tensor) -> Tensor:
    """How many of `rows` are True, float (), as the mean over processes, and 1 where none is anywhere.

    A sum over this process's rows divided by it has as its mean over processes the mean over the rows of all.
    """
    count = mean_over_ranks(rows.sum().float())
    return torch.where(count == 0, 1, count)
