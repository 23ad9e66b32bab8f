"""The Triton kernels compiled ahead of time, against the committed table of what they use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("aot.py")
TABLE = json.loads(SCRIPT.with_name("resources.json").read_text())
CAPABILITIES = [int(name.removeprefix("sm_")) for name in TABLE if name.startswith("sm_")]
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
MATRIX = {90: "wgmma", 100: "tcgen05"}
COMPILE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("aot", sys.argv[1])
aot = importlib.util.module_from_spec(spec)
sys.modules["aot"] = aot
spec.loader.exec_module(aot)
made = {name: aot.table(int(name)) if name != "hip" else aot.compile_for_amd() for name in sys.argv[2:]}
print(json.dumps(made))
"""


def compiled(*targets: str) -> dict[str, dict]:
    # A process of its own, one for all targets: this one interprets kernels.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(SCRIPT), *targets],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_table_keeps_within_the_limits(capability: int) -> None:
    rows = {name: row for name, row in TABLE[f"sm_{capability}"].items() if name.startswith(("info_nce", "sigmoid"))}
    assert len(rows) == 19
    for name, row in rows.items():
        assert row["registers"] <= 255, name
        assert (row["stack"], row["spills"]) == (0, 0), name
        assert row["shared"] <= SHARED_LIMIT[capability], name
        if name in ("info_nce sums", "info_nce normalise", "info_nce finish"):  # O(N): without products
            continue
        assert row["matrix"] == MATRIX.get(capability, "mma.sync"), name
        if name.startswith(("info_nce exp_sums", "sigmoid_loss")):  # one exponential per logit
            assert row["exps_per_thread"] == row["logits_per_thread"], name


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_linear_cross_entropy_keeps_within_the_limits(capability: int) -> None:
    rows = {name: row for name, row in TABLE[f"sm_{capability}"].items() if name.startswith("linear_cross_entropy")}
    assert len(rows) == 6
    for name, row in rows.items():
        assert row["registers"] <= 255, name
        assert (row["stack"], row["spills"]) == (0, 0), name
        assert row["shared"] <= SHARED_LIMIT[capability], name
        assert row["matrix"] != "none", name


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_patch_embed_keeps_within_the_limits(capability: int) -> None:
    rows = {name: row for name, row in TABLE[f"sm_{capability}"].items() if name.startswith("patch_embed")}
    assert len(rows) == 12
    for name, row in rows.items():
        assert row["registers"] <= 255, name
        # Of patches of 14 pixels with padding and keep. On an H100 tiles that need no stack were slower.
        stack = 408 if capability == 90 and name.startswith("patch_embed tokens") else 0
        assert row["stack"] <= stack, name
        assert row["spills"] == 0, name
        assert row["shared"] <= SHARED_LIMIT[capability], name
        assert row["matrix"] == MATRIX.get(capability, "mma.sync"), name


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_media_attention_keeps_within_the_limits(capability: int) -> None:
    rows = {name: row for name, row in TABLE[f"sm_{capability}"].items() if name.startswith(("media", "gated"))}
    assert len(rows) == 30
    for name, row in rows.items():
        assert row["registers"] <= 255, name
        assert (row["stack"], row["spills"]) == (0, 0), name
        assert row["shared"] <= SHARED_LIMIT[capability], name
        if "half" in name:  # float32 in float32 has no matrix instruction, and small tiles have the older one
            assert row["matrix"] == MATRIX.get(capability, "mma.sync"), name


def test_all_architectures_are_there() -> None:
    assert set(CAPABILITIES) == {80, 86, 89, 90, 100, 120}


@pytest.mark.skipif(triton.__version__ != TABLE["triton"], reason=f"the table is of triton {TABLE['triton']}")
def test_the_table_is_what_the_compiler_makes() -> None:
    for capability, rows in compiled(*map(str, CAPABILITIES)).items():
        for name, row in rows.items():
            assert row == TABLE[f"sm_{capability}"][name], (capability, name)


def test_amd_compiles() -> None:
    assert all(size > 0 for size in compiled("hip")["hip"].values())


def test_what_the_interpreter_does_to_bfloat16() -> None:
    """The trap that the kernels avoid by float16 operands; when this fails, the interpreter has changed."""
    import torch

    assert os.environ.get("TRITON_INTERPRET") == "1"
    import triton.language as tl

    @triton.jit
    def product(a, b, c, SIZE: tl.constexpr):  # noqa: N803
        k = tl.arange(0, SIZE)
        at = k[:, None] * SIZE + k[None, :]
        tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))

    a, b = torch.randn(16, 16), torch.randn(16, 16)
    results = {}
    for dtype in (torch.float16, torch.bfloat16):
        c = torch.zeros(16, 16)
        product[(1,)](a.to(dtype), b.to(dtype), c, 16)
        results[dtype] = (c - a.to(dtype).float() @ b.to(dtype).float()).abs().max().item()
    assert results[torch.float16] < 1e-3
    assert not results[torch.bfloat16] < 1.0
