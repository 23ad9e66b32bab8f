from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parents[2] / "examples" / "patch_embed.py"


def test_uint8_gives_the_same_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    differences = [float(number) for number in re.findall(r"largest difference from \w+: (\S+)", printed)]
    assert len(differences) == 2
    assert max(differences) < 1e-4
    assert "bytes per image: 150528, before 602112" in printed
