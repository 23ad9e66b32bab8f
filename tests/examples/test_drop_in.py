"""The drop-in examples run; each compares with the original by itself."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "library"),
    [("transformers", "transformers"), ("open_clip", "open_clip"), ("timm", "timm"), ("flamingo", "flamingo_pytorch")],
)
def test_runs(name: str, library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(library)
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr("sys.argv", [f"drop_in_{name}.py"])
    runpy.run_path(str(EXAMPLES / f"drop_in_{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "replaced" in printed
    assert "left 0" in printed
