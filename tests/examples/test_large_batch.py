"""The large-batch example gives the losses of one process and one chunk, however it is run."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
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
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", done.stdout, re.MULTILINE)]


@pytest.fixture(scope="module")
def expected() -> list[float]:
    found = losses(sys.executable, PROGRAM, "--chunk", "64")
    assert len(found) == 6
    assert found[-1] < found[0] - 0.1
    return found


@pytest.mark.parametrize("how", ["one process", "ddp", "fsdp", "accelerate"])
def test_losses_are_those_of_one_process_and_one_chunk(expected: list[float], how: str) -> None:
    launch = {
        "one process": [sys.executable, PROGRAM],
        "ddp": [*TORCHRUN, PROGRAM, "--how", "ddp"],
        "fsdp": [*TORCHRUN, PROGRAM, "--how", "fsdp"],
        "accelerate": [
            sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
            "--main_process_port", free_port(), PROGRAM, "--how", "accelerate",
        ],
    }  # fmt: skip
    assert losses(*launch[how], "--chunk", "7") == pytest.approx(expected, abs=2e-4)
