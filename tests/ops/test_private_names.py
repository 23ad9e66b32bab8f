"""What PyTorch does not document makes ops faster; nothing needs it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PUBLIC = Path(__file__).parent / "public_autograd.py"
FILES = sorted([*(ROOT / "vlmfast").glob("**/*.py"), *(ROOT / "kernels").glob("**/*.py")])


def private_names(tree: ast.Module) -> set[str]:
    """The names of modules of torch, and in them, that begin with an underscore."""
    modules = {"torch"}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "torch"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {alias.asname or alias.name for alias in node.names if alias.name[0].islower()}
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", text := ast.unparse(node)):
            found |= {text} if text.split(".")[0] in modules else set()
    return {name for name in found if any(part[0] == "_" and part[-2:] != "__" for part in name.split("."))}


def test_one_file_names_them() -> None:
    found = {path.relative_to(ROOT): names for path in FILES if (names := private_names(ast.parse(path.read_text())))}
    assert list(found) == [Path("vlmfast/ops/_private.py")], found


def test_ops_without_them() -> None:
    """In a process where vlmfast does not see them."""
    files = [PUBLIC, Path(__file__).parent / "test_dispatch.py"]
    command = [sys.executable, "-m", "pytest", "-p", "hide_private_names", "-q", "-rA", *map(str, files)]
    command += ["-k", "not profiler"]  # which shows another name
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "helpers")}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    for test in ("names_are_hidden", "every_op[the_media_attention]", "a_compiled_op", "transforms_raise_or_are_right"):
        assert re.search(rf"^PASSED .*{re.escape(test)}$", done.stdout, re.MULTILINE), done.stdout[-4000:]
