"""The CUDA C++ kernels in the built extension, against the committed table of what they use."""

from __future__ import annotations

import json

import cuda_resources
import pytest

from vlmfast.ops._dispatch import core

TABLE = json.loads(cuda_resources.TABLE.read_text())
ARCHITECTURES = {name: rows for name, rows in TABLE.items() if name.startswith("sm_")}


def test_all_architectures_and_ops_are_there() -> None:
    assert set(ARCHITECTURES) == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
    assert len({tuple(rows) for rows in ARCHITECTURES.values()}) == 1  # the same kernels on each


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_the_table_keeps_within_the_limits(architecture: str) -> None:
    for name, row in ARCHITECTURES[architecture].items():
        assert row["registers"] <= 255, name
        assert (row["stack"], row["spills"]) == (0, 0), name
        assert row["shared"] <= 99 * 1024, name  # what a block can have at most on sm_86, 89 and 120
        assert row.get("occupancy", 1) > 0, name


@pytest.mark.skipif(core is None or not hasattr(core, "cuda"), reason="the extension was built without CUDA")
def test_the_table_is_what_the_compiler_makes() -> None:
    info = core.build_info()
    if info["nvcc"] != TABLE["nvcc"]:
        pytest.skip(f"the table is of nvcc {TABLE['nvcc']}, the extension of {info['nvcc']}")
    found = cuda_resources.table(TABLE["dynamic_shared"])
    assert set(found) == {f"sm_{arch.removesuffix('a')}" for arch in info["cuda_archs"].split(",")}
    for architecture, rows in found.items():
        assert rows == TABLE[architecture]
