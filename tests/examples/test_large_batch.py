"""The large-batch example gives the losses of one process and one chunk, however it is run.

By torchrun once; FSDP and Accelerate in processes of the tests, which need not import everything again.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from processes import run_processes

PROGRAM = str(Path(__file__).parents[2] / "examples" / "large_batch.py")


def here(*arguments: str) -> str:
    """What it prints, in this process."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(printed):
        monkeypatch.setattr("sys.argv", [PROGRAM, *arguments])
        runpy.run_path(PROGRAM, run_name="__main__")
    return printed.getvalue()


def on_a_rank(rank: int, world_size: int, how: str, folder: Path) -> None:
    os.environ.pop("RANK", None)  # the group is made already
    if how == "accelerate":  # what its launcher sets
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({name: str(value) for name, value in ranks.items()}, ACCELERATE_USE_CPU="1")
    (folder / str(rank)).write_text(here("--how", how, "--chunk", "7"))


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", printed, re.MULTILINE)]


@pytest.fixture(scope="module")
def expected() -> list[float]:
    found = losses(here("--chunk", "64"))
    assert len(found) == 6
    assert found[-1] < found[0] - 0.1
    return found


def test_losses_in_chunks_are_those_of_one(expected: list[float]) -> None:
    assert losses(here("--chunk", "7")) == pytest.approx(expected, abs=2e-4)


def test_losses_by_torchrun_are_those_of_one_process(expected: list[float]) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            PROGRAM, "--how", "ddp", "--chunk", "7",
        ],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(done.stdout) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("how", ["fsdp", "accelerate"])
def test_losses_of_two_processes_are_those_of_one(expected: list[float], how: str, tmp_path: Path) -> None:
    run_processes(on_a_rank, 2, how, tmp_path)
    assert losses((tmp_path / "0").read_text()) == pytest.approx(expected, abs=2e-4)
    assert not losses((tmp_path / "1").read_text())
