"""Arrows only go down: the imports of every file of the package, against the table of the design."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "vlmfast"
# What a part may import of vlmfast. vlmfast.kernels is kernels/triton.
ALLOWED = {
    "": {"ops", "integrations"},
    "ops": {"kernels", "_C"},
    "distributed": set(),
    "nn": {"ops", "distributed"},
    "models": {"nn", "ops", "distributed", "data"},
    "integrations": {"nn", "ops"},
    "data": set(),
    "training": {"data", "distributed", "ops"},
    "tasks": {"data", "distributed", "ops"},
    "evaluation": {"data", "tasks"},
    "bench": {"ops", "integrations"},
    "doctor": {"bench", "ops"},
    "cli": {"bench", "doctor", "data", "training", "tasks", "models", "ops", "distributed", "nn"},
    "__main__": {"cli"},
}


def part(relative: Path) -> str:
    return "" if relative.name == "__init__.py" and len(relative.parts) == 1 else relative.parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """Absolute names of what a file imports, and whether at the top level."""
    tree = ast.parse(path.read_text())
    top = {
        node for statement in tree.body if not isinstance(statement, ast.FunctionDef) for node in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "vlmfast" else [node.module]
            )
            found += [(name, node in top) for name in names]
    return found


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    here = part(path.relative_to(ROOT))
    assert here in ALLOWED, f"{here} has no row in the table"
    for name, _ in imports(path):
        if name.split(".")[0] != "vlmfast" or name == "vlmfast":
            continue
        target = name.split(".")[1]
        assert target in ALLOWED[here] | {here}, f"{here or 'vlmfast'} imports {name}"


KERNELS = sorted((ROOT.parent / "kernels" / "triton").glob("*.py"))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    for name, _ in imports(path):
        first = name.split(".")[0]
        known = first in {"torch", "triton"} | sys.stdlib_module_names or name.startswith("vlmfast.kernels")
        assert known, f"imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_distributed_below_training_is_in_one_file(path: Path) -> None:
    if part(path.relative_to(ROOT)) in ("distributed", "training", "tasks", "cli"):
        return
    assert not any(name.startswith("torch.distributed") for name, _ in imports(path))
    assert "import distributed as dist" not in path.read_text()


def test_import_costs_torch_only(run_python) -> None:
    loaded = run_python(
        """
        import sys
        import torch
        before = set(sys.modules)
        import vlmfast, vlmfast.ops, vlmfast.nn, vlmfast.distributed
        print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
        """
    ).split()
    heavy = {"transformers", "accelerate", "triton", "open_clip", "timm", "webdataset", "PIL", "matplotlib", "tqdm"}
    assert "vlmfast" in loaded
    assert not heavy & set(loaded)


def test_every_package_is_installed() -> None:
    listed = re.findall(r'^    "(vlmfast[\w.]*)",$', (ROOT.parent / "pyproject.toml").read_text(), re.MULTILINE)
    found = {".".join(path.parent.relative_to(ROOT.parent).parts) for path in ROOT.rglob("__init__.py")}
    assert found <= set(listed), found - set(listed)
