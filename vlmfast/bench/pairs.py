"""Sizes and inputs of the losses over pairs of features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.bench.harness import Size, one_or_two


def size(text: str) -> Size:
    """N or NxD; D is 512 unless told."""
    rows, dim = one_or_two(text, 512)
    return Size({"N": rows, "D": dim}, rows * rows * dim, (rows, rows, dim), exact=rows <= 8192)


def inputs(*scalars: float) -> Callable[[Size, torch.dtype], list[Tensor]]:
    def made(size: Size, dtype: torch.dtype) -> list[Tensor]:
        features = [F.normalize(torch.randn(size.numbers["N"], size.numbers["D"]), dim=1).to(dtype) for _ in range(2)]
        return features + [torch.tensor(value) for value in scalars]

    return made


def matrices(count: int) -> Callable[[Size, int], float]:
    """Memory of a provider that holds this many (N, N) matrices of the features' dtype."""
    return lambda size, itemsize: float(count * size.numbers["N"] ** 2 * itemsize)
