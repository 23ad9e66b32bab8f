"""Every instruction set of the one build: what torch is told to use decides the kernels, and all give exact results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlmfast.ops._dispatch import core

PROGRAM = Path(__file__).parents[1] / "helpers" / "instruction_sets.py"
SUPPORTED = {"default": "baseline", "avx2": "avx2", "avx512": "avx512"}
LEVELS = ["DEFAULT", "AVX2", "AVX512"]


@pytest.mark.skipif(core is None, reason="the C++ extension was not built")
@pytest.mark.parametrize("capability", list(SUPPORTED))
def test_every_instruction_set_of_the_one_build(capability: str) -> None:
    highest = torch.backends.cpu.get_cpu_capability().removesuffix("_AMX")
    if highest in LEVELS and capability.upper() in LEVELS[LEVELS.index(highest) + 1 :]:
        pytest.skip(f"this processor has no {capability}; tests/kernels/test_simd.py runs its vector width without it")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "VLMFAST_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == (SUPPORTED[capability] if highest in LEVELS else "baseline")
