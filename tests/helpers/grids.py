"""Grids of parameters, with fewer points where a point of the whole product tells nothing that others do not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlmfast.ops._dispatch import Impl

Point = tuple[Any, ...]


def pairwise(*axes: Sequence[Any]) -> list[Point]:
    """Points of the axes' product such that any value of an axis meets any of another; the same at every call."""

    def pairs(point: Sequence[int]) -> set[tuple[int, int, int, int]]:
        return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(point), 2)}

    product = list(itertools.product(*(range(len(axis)) for axis in axes)))
    left, found = set().union(*map(pairs, product)), []
    while left:
        point = max(product, key=lambda each: len(left & pairs(each)))
        left -= pairs(point)
        found.append(tuple(axis[i] for axis, i in zip(axes, point, strict=True)))
    return found


def by_backend(impls: Mapping[str, Impl], points: Iterable[Point], triton: Iterable[Point]) -> list[Point]:
    """(backend, *point): all points for every backend, but these for Triton, whose interpreter is slow."""
    points, triton = list(points), list(triton)
    return [(name, *point) for name in impls for point in (triton if name == "triton" else points)]
