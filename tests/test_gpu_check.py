"""`make gpu-check` on a machine without a GPU: what it says of parts that fail, hang or cannot run."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmfast import bench

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu_check.py"


@pytest.fixture(scope="module")
def check() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # where dataclasses look for its annotations
    spec.loader.exec_module(module)
    return module


def run(check: Any, tmp_path: Path, parts: list[Any], limit: float = 60, device: str = "cuda") -> tuple[bool, Any]:
    good = check.run_parts(parts, tmp_path, {"gpu": "none"}, device=device, site=tmp_path / "site", limit=limit)
    return good, json.loads((tmp_path / "summary.json").read_text())


def python(program: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", program)


def test_a_part_that_fails_or_hangs_stops_no_other(
    check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = tmp_path / "child"
    hangs = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
open({str(started)!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    parts = [
        check.Part("breaks", python("print('what went wrong'); raise SystemExit(3)"), 30),
        check.Part("hangs", python(hangs), 2),
        check.Part("works", python("import os; print(os.environ['PYTHONPATH'], os.environ['MINE'])"), 30,
                   environment=(("MINE", "given"),)),
    ]  # fmt: skip
    good, summary = run(check, tmp_path, parts)
    assert not good
    assert summary["passed"] is False
    assert {name: row["state"] for name, row in summary["parts"].items()} == {
        "breaks": "failed with exit code 3",
        "hangs": "stopped at its limit of 2 s",
        "works": "passed",
    }
    assert "what went wrong" in capsys.readouterr().out
    site, given = (tmp_path / "logs" / "works.log").read_text().split()[-2:]
    assert (site.split(":")[0], given) == (str(tmp_path / "site"), "given")
    status = Path(f"/proc/{started.read_text()}/status")
    until = time.monotonic() + 10  # what it had started is gone too, or a zombie that nobody has waited for
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_what_the_whole_has_no_time_for_is_named_and_has_not_passed(check: Any, tmp_path: Path) -> None:
    good, summary = run(check, tmp_path, [check.Part("late", python(""), 30)], limit=check.LEAST - 1)
    assert not good
    assert summary["parts"]["late"]["state"] == "not run: the 4 s of the whole were over"


def test_a_rehearsal_names_what_needs_a_gpu_and_passes_without_it(check: Any, tmp_path: Path) -> None:
    parts = [check.Part("kernels", python("raise SystemExit(1)"), 30, gpu=True), check.Part("works", python(""), 30)]
    good, summary = run(check, tmp_path, parts, device="cpu")
    assert good
    assert summary["parts"]["kernels"] | {"command": ""} == {
        "state": "not run: it needs a GPU", "passed": None, "seconds": 0.0, "command": "",
    }  # fmt: skip


def test_every_op_is_measured_with_providers_and_sizes_that_it_knows(check: Any, tmp_path: Path) -> None:
    assert tuple(check.BENCHES) == bench.NAMES
    for name, (providers, sizes, least, _) in check.BENCHES.items():
        one = bench.load(name)
        assert set(providers) <= set(one.providers), name
        for size in (*sizes, least):
            one.check(size)
    names = [part.name for part in check.parts(tmp_path, tmp_path, "cpu")]
    assert names[:4] == ["build", "doctor", "tests", "launches"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_nothing_is_run(
    check: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert check.main() == 2
    assert "sees no CUDA device, and nothing was run" in capsys.readouterr().err
