"""`vlmfast bench linear_cross_entropy` as a script, and its rows one by one under pytest-benchmark."""

from __future__ import annotations

import sys

import pytest

from vlmfast.bench.harness import run_under_pytest
from vlmfast.bench.linear_cross_entropy import OP
from vlmfast.cli.bench import run


@pytest.mark.parametrize("size", ["256", "1024"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(OP.providers))
def test_linear_cross_entropy(benchmark, name: str, dtype: str, size: str) -> None:
    run_under_pytest(OP, name, size, dtype, benchmark)


if __name__ == "__main__":
    raise SystemExit(run(["linear_cross_entropy", *sys.argv[1:]]))
