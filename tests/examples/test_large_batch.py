"""The large-batch example gives the losses of one process and one chunk, however it is run."""

from __future__ import annotations

import io
import os
import re
import runpy
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

PROGRAM = str(Path(__file__).parents[2] / "examples" / "large_batch.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def losses(*command: str) -> list[float]:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return found_in(done.stdout)


def here(*arguments: str) -> list[float]:
    """In this process."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(printed):
        monkeypatch.setattr("sys.argv", [PROGRAM, *arguments])
        runpy.run_path(PROGRAM, run_name="__main__")
    return found_in(printed.getvalue())


def found_in(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", printed, re.MULTILINE)]


@pytest.fixture(scope="module")
def expected() -> list[float]:
    found = here("--chunk", "64")
    assert len(found) == 6
    assert found[-1] < found[0] - 0.1
    return found


def test_losses_in_chunks_are_those_of_one(expected: list[float]) -> None:
    assert here("--chunk", "7") == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("how", ["ddp", "fsdp", "accelerate"])
def test_losses_are_those_of_one_process_and_one_chunk(expected: list[float], how: str) -> None:
    launch = {
        "ddp": [*TORCHRUN, PROGRAM, "--how", "ddp"],
        "fsdp": [*TORCHRUN, PROGRAM, "--how", "fsdp"],
        "accelerate": [
            sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
            "--main_process_port", free_port(), PROGRAM, "--how", "accelerate",
        ],
    }  # fmt: skip
    assert losses(*launch[how], "--chunk", "7") == pytest.approx(expected, abs=2e-4)
