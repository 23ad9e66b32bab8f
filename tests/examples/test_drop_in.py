"""The drop-in examples run; each compares with the original by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "library"),
    [("transformers", "transformers"), ("open_clip", "open_clip"), ("timm", "timm"), ("flamingo", "flamingo_pytorch")],
)
def test_runs(name: str, library: str) -> None:
    pytest.importorskip(library)
    program = EXAMPLES / f"drop_in_{name}.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False, cwd=EXAMPLES)
    assert done.returncode == 0, done.stderr
    assert "replaced" in done.stdout
    assert "left 0" in done.stdout
