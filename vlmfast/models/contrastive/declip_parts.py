"""DeCLIP's parts beside the towers: the heads of its image self-supervision, and the bank of text features."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmfast import distributed

BANK_CHUNK = 8192
"""Rows of the bank that are compared at a time."""


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d over the rows of all processes, on any device; torch's SyncBatchNorm needs an accelerator.

    Statistics are float32. Gradients flow to the other processes' rows, by the convention of `vlmfast.distributed`.
    """

    def forward(self, input: Tensor) -> Tensor:
        _, world_size = distributed.rank_and_world_size()
        if not self.training or world_size == 1:
            return super().forward(input)
        sizes = [1] * world_size
        x = input.float()
        sums = distributed.gather(torch.cat([x.new_full((1, 1), len(x)), x.sum(0, keepdim=True)], 1), sizes).sum(0)
        count, mean = sums[0], sums[1:] / sums[0]
        centred = x - mean
        variance = distributed.gather(centred.square().sum(0, keepdim=True), sizes).sum(0) / count
        self._track(mean, variance * count / (count - 1))
        output = centred * (variance + self.eps).rsqrt() * self.weight.float() + self.bias.float()
        return output.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)


def projector(in_dim: int, dim: int) -> nn.Sequential:
    """Three times linear and batch norm, with ReLU between: (B, in_dim) to (B, dim)."""
    return nn.Sequential(
        nn.Linear(in_dim, dim, bias=False),
        GlobalBatchNorm1d(dim),
        nn.ReLU(),
        nn.Linear(dim, dim, bias=False),
        GlobalBatchNorm1d(dim),
        nn.ReLU(),
        nn.Linear(dim, dim, bias=False),
        GlobalBatchNorm1d(dim),
    )


def predictor(dim: int, hidden_dim: int) -> nn.Sequential:
    """Two linear layers with a batch norm and ReLU between, narrow in the middle: (B, dim) to (B, dim)."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim, bias=False), GlobalBatchNorm1d(hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim)
    )


def simsiam_loss(predictions: Tensor, projections: Tensor) -> Tensor:
    """What each image's two views say of each other, (B,) float32 in [-1, 1]::

        -(cosine(p1, z2) + cosine(p2, z1)) / 2, without gradient to z

    Args:
        predictions, projections (B, 2, D): p and z of the two views.
    Source: Chen and He 2021 (2011.10566), equations 1 to 4.
    """
    others = projections.detach().flip(1)
    return -F.cosine_similarity(predictions.float(), others.float(), dim=-1).mean(1)


class FeatureBank(nn.Module):
    """The last `size` features that were pushed, first in, first out; buffers, so checkpoints hold them.

    Attributes:
        features (size, D): float32; push number k is in row k % size.
        pushed (): int64, how many there have been.
    """

    features: Tensor
    pushed: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(size, dim, dtype=torch.float32))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def nearest(self, queries: Tensor) -> Tensor:
        """The stored feature of the largest dot product with each query, zeros while there is none: (B, D) float32.

        Args:
            queries (B, D): unit-norm, like what was pushed; then it is the nearest neighbour.
        Memory: O(B * BANK_CHUNK). Nothing is read back from the device.
        """
        with torch.autocast(queries.device.type, enabled=False):
            best = queries.new_full(queries.shape[:1], -math.inf, dtype=torch.float32)
            place = torch.zeros_like(best, dtype=torch.int64)
            for start in range(0, len(self.features), BANK_CHUNK):
                rows = self.features[start : start + BANK_CHUNK]
                empty = torch.arange(start, start + len(rows), device=rows.device) >= self.pushed
                value, index = (queries.float() @ rows.T).masked_fill_(empty, -math.inf).max(1)
                place = torch.where(value > best, index + start, place)
                best = torch.maximum(best, value)
            return self.features[place]

    @torch.no_grad()
    def push(self, features: Tensor) -> None:
        """Store features (B, D) in order, the oldest making room; of more than fit, the last ones stay."""
        size = len(self.features)
        kept = features[-size:].to(self.features)
        self.pushed += len(features)
        places = (self.pushed - len(kept) + torch.arange(len(kept), device=self.pushed.device)) % size
        self.features[places] = kept
