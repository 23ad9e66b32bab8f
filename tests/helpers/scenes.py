"""The scenes of examples/scenes, few and fast, for tests of models and tasks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

SCENES = Path(__file__).parents[2] / "examples" / "scenes"


def scenes_module() -> ModuleType:
    """examples/scenes/build.py; under a name of its own, as another example has a build.py too."""
    if "scenes_build" not in sys.modules:
        sys.path.append(str(SCENES))
        spec = importlib.util.spec_from_file_location("scenes_build", SCENES / "build.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["scenes_build"] = module
        spec.loader.exec_module(module)
    return sys.modules["scenes_build"]


def build_scenes(folder: Path, *, train: int = 40, val: int = 8, val_open: int = 0) -> Path:
    """`folder` with train-00000.tar, val-00000.tar and, where asked for, val-open-00000.tar."""
    scenes_module().build(folder, train=train, val=val, val_open=val_open)
    return folder
