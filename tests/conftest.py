import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

# Before anything imports triton: without a GPU its kernels run in its interpreter, where VLMFAST_BACKEND=triton asks.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# tests/ has no packages; what several of its folders use is imported from tests/helpers.
sys.path.insert(0, str(Path(__file__).parent / "helpers"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run_python():
    """Runs a program in a fresh interpreter and returns what it printed; its errors are the test's."""

    def run(program: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
