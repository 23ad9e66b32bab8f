"""The example runs, learns, and gives equal losses."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

PATH = Path(__file__).parents[2] / "examples" / "swap_gated_cross_attention.py"


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("swap_gated_cross_attention", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_losses_are_equal(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(["--steps", "6"])
    rows = [[float(n) for n in re.findall(r"\d+\.\d+", line)[:2]] for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(rows) == 6
    for theirs, ours in rows:
        assert ours == pytest.approx(theirs, abs=2e-5)
    assert rows[-1][0] < rows[0][0] - 0.5


def test_the_images_matter(example: ModuleType) -> None:
    """Equal losses say something: they depend on the images through the swapped layers."""
    torch.manual_seed(0)
    model, samples = example.small_model(), example.batch()
    other = {**samples, "pixel_values": torch.randn_like(samples["pixel_values"])}
    with torch.no_grad():
        assert (model(**samples).loss - model(**other).loss).abs() > 1e-3


def test_different_losses_are_an_error(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(layer: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            layer.alpha_cross_attn.zero_()
        return layer

    monkeypatch.setattr(example.IdeficsGatedCrossAttentionLayer, "from_module", broken)
    with pytest.raises(SystemExit, match="the losses differ by"):
        example.main(["--steps", "2"])
