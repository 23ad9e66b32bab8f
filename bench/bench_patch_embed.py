"""`vlmfast bench patch_embed` as a script, and its rows one by one under pytest-benchmark."""

from __future__ import annotations

import sys

import pytest

from vlmfast.bench.harness import run_under_pytest
from vlmfast.bench.patch_embed import OP
from vlmfast.cli.bench import run


@pytest.mark.parametrize("size", ["16", "14", "32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(OP.providers))
def test_patch_embed(benchmark, name: str, dtype: str, size: str) -> None:
    run_under_pytest(OP, name, size, dtype, benchmark)


if __name__ == "__main__":
    raise SystemExit(run(["patch_embed", *sys.argv[1:]]))
