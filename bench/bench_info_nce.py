"""`vlmfast bench info_nce` as a script, and its rows one by one under pytest-benchmark."""

from __future__ import annotations

import sys

import pytest

from vlmfast.bench.harness import run_under_pytest
from vlmfast.bench.info_nce import OP
from vlmfast.cli.bench import run


@pytest.mark.parametrize("size", ["1024", "4096"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(OP.providers))
def test_info_nce(benchmark, name: str, dtype: str, size: str) -> None:
    run_under_pytest(OP, name, size, dtype, benchmark)


if __name__ == "__main__":
    raise SystemExit(run(["info_nce", *sys.argv[1:]]))
