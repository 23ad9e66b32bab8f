"""The documentation builds without a broken link, and so do the links of files that are read outside of it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from vlmfast import ops

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)\s]+)\)")
PAGES = ["README.md", "CHANGELOG.md", "kernels/README.md", "examples/pairs/README.md", "examples/scenes/README.md", *(
    str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))
)]  # fmt: skip


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings, and those that are written out."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'<a id="([^"]+)"', text))


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        if anchor:
            assert anchor in anchors(file), link


def backends_of() -> dict[str, list[str]]:
    modules = {name: sys.modules.get(f"vlmfast.ops.{name}") for name in ops.__all__}
    return {name: list(module.IMPLS) for name, module in modules.items() if hasattr(module, "IMPLS")}


def test_the_matrix_has_every_op_and_says_what_its_backends_say(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for kernels in (ROOT / "kernels" / "triton").glob("[a-z]*.py"):
        import_module(f"vlmfast.kernels.{kernels.stem}")  # interpreted, for later tests; the matrix asks as on a GPU
    supported = runpy.run_path(str(ROOT / "docs" / "supported.py"))
    expected = backends_of()
    assert supported["VARIANTS"].keys() == expected.keys()
    square = supported["VARIANTS"]["sigmoid_loss"]["square"]
    found = supported["backends"]("sigmoid_loss", square, torch.float16)
    assert found == {
        "CPU": [name for name in expected["sigmoid_loss"] if name in ("cpu", "torch")],
        "GPU": [name for name in expected["sigmoid_loss"] if name != "cpu"],
    }
    assert supported["cell"]("sigmoid_loss", square, torch.float64) == "raises TypeError"
    heads = supported["VARIANTS"]["media_attention"]["heads of 256"]
    assert "triton" not in supported["backends"]("media_attention", heads, torch.float16)["GPU"]

    def refuses(first: torch.Tensor, *args: object) -> str | None:
        return "float16 is not" if first.dtype == torch.float16 else None

    impls = sys.modules["vlmfast.ops.sigmoid_loss"].IMPLS
    monkeypatch.setitem(impls, "cpu", dataclasses.replace(impls["cpu"], unsupported=refuses))
    assert "cpu" not in supported["backends"]("sigmoid_loss", square, torch.float16)["CPU"]
    assert "cpu" in supported["backends"]("sigmoid_loss", square, torch.float32)["CPU"]


def test_the_table_of_errors_is_that_of_the_benchmarks_runs() -> None:
    row = re.compile(r"^\| (info_nce|sigmoid_loss|patch_embed) \| (\w+) \| (.+) \|$", re.MULTILINE)
    rows = row.findall((ROOT / "docs" / "numerics.md").read_text())
    assert len(rows) == 6
    for op, dtype, cells in rows:
        runs = json.loads((ROOT / "bench" / "results" / f"{op}_epyc_zen5_2_cores.json").read_text())["rows"]
        size = {"patch": 16, "batch": 64} if op == "patch_embed" else {"N": 8192, "D": 512}
        errors = {
            run["provider"].removesuffix(" kept"): run["error"]
            for run in runs
            if run["dtype"] == dtype and "error" in run and run["size"] == size
        }
        expected = [
            f"{errors[provider][kind]:.1e}" if provider in errors else ""
            for kind in ("value", "gradient")
            for provider in ("vlmfast", "open_clip", "transformers")
        ]
        assert [cell.strip() for cell in cells.split("|")] == expected, (op, dtype)


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ops = (tmp_path / "api" / "ops" / "index.html").read_text()
    assert "InfoNCE" in ops
    assert "Raises:" in ops
    matrix = (tmp_path / "supported" / "index.html").read_text()
    for op in backends_of():
        assert re.search(rf"<h3[^>]*>{op}", matrix), op
    assert (tmp_path / "bench" / "results" / "info_nce_sizes_epyc_zen5_2_cores.png").stat().st_size > 1000
