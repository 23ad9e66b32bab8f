"""Everything to be learnt from one GPU, by one command, in under eight minutes: `make gpu-check`.

    python bench/gpu_check.py                    # on the first GPU
    python bench/gpu_check.py --device cpu       # what a CPU can run of it, with tiny sizes: a rehearsal

It needs this checkout and a Python that has torch with CUDA, setuptools, pybind11, cmake, ninja, nvcc, pytest,
hypothesis, transformers and matplotlib; it fetches nothing. vlmfast is built for this GPU alone, into a temporary
folder, from which every part imports it: what is installed stays as it is. A peer that is not installed has no row.
Each part has a time limit and a log of its own, and one that fails does not stop the others; for what the whole has
no time left, summary.json says so.

The folder, `runs/gpu_check` unless told: summary.json (machine, and of each part its command, seconds and fate;
written anew after each), logs/PART.log, doctor.json, launches.json and .png, masked_step.json, bench/OP.json and .png.

The exit code is 0 when every part passed, 1 when one did not, and 2 where there is no GPU and no --device cpu. In a
rehearsal a part that needs a GPU counts neither way.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
LIMIT = {"cuda": 465, "cpu": 1200}
"""Seconds of the whole; a rehearsal shares its processors."""
LEAST = 5
"""With fewer seconds left a part is not begun."""

BENCHES = {
    # op: providers, sizes on a GPU, size of a rehearsal, seconds
    "info_nce": (
        ("vlmfast streamed", "vlmfast kept", "vlmfast forward", "vlmfast cuda streamed", "vlmfast in a CUDA graph",
         "open_clip", "transformers", "transformers compiled", "memeff", "inf-cl"),
        ("1024", "8192", "32768"), "64x16", 60,
    ),
    "sigmoid_loss": (
        ("vlmfast", "vlmfast cuda", "open_clip", "transformers", "transformers compiled", "siglip-kernel"),
        ("1024", "8192", "32768"), "64x16", 45,
    ),
    "linear_cross_entropy": (
        ("vlmfast kept", "vlmfast recomputed", "eager", "compiled", "liger", "cut-cross-entropy"),
        ("256", "8192"), "16x32", 45,
    ),
    "patch_embed": (
        ("vlmfast", "vlmfast, half of the patches", "vlmfast cuda", "transformers", "transformers compiled"),
        ("16x8", "16x256", "14x64"), "16x1", 45,
    ),
    "media_attention": (
        ("vlmfast", "vlmfast cuda", "open_flamingo", "flamingo-pytorch", "sdpa, dense mask"),
        ("1 image", "16 images", "decode, 16 images"), "decode, 16 images", 45,
    ),
    "step": (("vlmfast", "original"), ("b32x8", "b32x128", "flamingox2"), "tinyx2", 50),
}  # fmt: skip
"""The ops beside their peers, from where a step waits for its launches to where it does not, and whole steps."""
REHEARSED = 2
"""Of the providers, in a rehearsal: on a CPU each takes a process to tell its memory."""


@dataclass(frozen=True)
class Part:
    """One process. `seconds`: its limit. `gpu`: whether it needs one."""

    name: str
    command: Sequence[str]
    seconds: float
    gpu: bool = False
    environment: tuple[tuple[str, str], ...] = ()


def parts(output: Path, site: Path, device: str) -> list[Part]:
    """In order of worth: what comes last is what the time may not reach."""
    python, script = sys.executable, lambda name: str(ROOT / "bench" / name)
    tiny = device == "cpu"
    pip = ("--no-deps", "--no-build-isolation", "--no-index", "--target", str(site), str(ROOT))
    build = (("VLMFAST_REQUIRE_EXT", "1"), ("VLMFAST_CUDA_ARCHS", "OFF" if tiny else architecture()))
    on_gpu = str(ROOT / "tests" / "kernels" / "test_gpu.py")
    tests = ("-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-m", "gpu", on_gpu)
    launches = ("--sizes", "64x16", "--calls", "2") if tiny else ("--sizes", "1024", "4096", "8192")
    masked = ("--tiny", "--rounds", "1", "--models", "visual_bert") if tiny else ("--rounds", "5")
    rounds = ("--rounds", "1" if tiny else "5", "--dtypes", "bfloat16")
    bench = (python, "-m", "vlmfast", "bench")

    def of_op(op: str) -> Part:
        providers, sizes, least, seconds = BENCHES[op]
        if tiny:
            providers, sizes = providers[:REHEARSED], (least,)
        chosen = ("--providers", *providers, "--sizes", *sizes)
        return Part(f"bench_{op}", (*bench, op, *chosen, *rounds, "--output", str(output / "bench")), seconds)

    return [
        Part("build", (python, "-m", "pip", "install", "--verbose", *pip), 150, gpu=True, environment=build),
        Part("doctor", (python, "-m", "vlmfast", "doctor", "--json", str(output / "doctor.json")), 60),
        Part("tests", (python, "-m", "pytest", *tests), 90, gpu=True),
        Part("launches", (python, script("launches.py"), *launches, "--output", str(output)), 60),
        *map(of_op, BENCHES),
        Part("masked_step", (python, script("masked_step.py"), *masked, "--device", device, "--no-memory",
                             "--output", str(output / "masked_step.json")), 40),
    ]  # fmt: skip


def architecture() -> str:
    """Of the first GPU, as VLMFAST_CUDA_ARCHS has it."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"


def run_part(part: Part, log: Path, limit: float, environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """Runs it in `folder`, with all that it starts, for at most `limit` seconds; what it prints goes to the log."""
    start = time.monotonic()
    with log.open("w") as file:
        file.write(f"$ {shlex.join(part.command)}\n")
        file.flush()
        process = subprocess.Popen(
            part.command,
            cwd=folder,
            env={**environment, **dict(part.environment)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            state = "passed" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            state = f"stopped at its limit of {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {"state": state, "passed": state == "passed", "seconds": round(time.monotonic() - start, 1)}


def run_parts(
    chosen: Sequence[Part], output: Path, machine: dict[str, Any], *, device: str, site: Path, limit: float
) -> bool:
    """All of them, one after the other; whether each that this device can run has passed.

    Args:
        output: a folder that exists; summary.json and logs/ are written to it.
        machine: goes into the summary.
        device: "cuda" or "cpu", where parts that need a GPU are not run.
        site: what the parts import vlmfast from, before all that is installed.
        limit: seconds of all of them.
    """
    (output / "logs").mkdir(exist_ok=True)
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    visible = "" if device == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": visible}
    end = time.monotonic() + limit
    found: dict[str, dict[str, Any]] = {}
    good = True
    for part in chosen:
        left = end - time.monotonic()
        log = output / "logs" / f"{part.name}.log"
        if part.gpu and device == "cpu":
            row: dict[str, Any] = {"state": "not run: it needs a GPU", "passed": None, "seconds": 0.0}
        elif left < LEAST:
            row = {"state": f"not run: the {limit:.0f} s of the whole were over", "passed": False, "seconds": 0.0}
        else:
            # Not the checkout: its vlmfast may lack what is built, and would be found first.
            with tempfile.TemporaryDirectory() as folder:
                row = run_part(
                    part,
                    log,
                    min(part.seconds if device == "cuda" else 3 * part.seconds, left),
                    environment,
                    Path(folder),
                )
        good = good and row["passed"] is not False
        found[part.name] = {**row, "command": shlex.join(part.command)}
        print(f"{part.name:28}{row['seconds']:7.1f} s  {row['state']}", flush=True)
        if row["passed"] is False and log.exists():
            print("".join(f"    {line}\n" for line in log.read_text(errors="replace").splitlines()[-8:]), end="")
        summary = {"device": device, "machine": machine, "passed": good, "parts": found}
        (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return good


def machine() -> dict[str, Any]:
    """What is known of it without vlmfast; bench/*.json say more."""

    def printed(*command: str) -> str | None:
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": printed("git", "describe", "--always", "--dirty"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": gpu,
        "driver": gpu and printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "processors": os.cpu_count(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal with tiny sizes")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu_check", metavar="DIR")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            f"no GPU: torch {torch.__version__} at {sys.executable} sees no CUDA device, and nothing was run.",
            file=sys.stderr,
        )
        print("--device cpu rehearses with tiny sizes what a CPU can run.", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the part that is running
    output = args.output.resolve()
    with tempfile.TemporaryDirectory() as site:
        every = parts(output, Path(site), args.device)
        if unknown := set(args.parts or ()) - {part.name for part in every}:
            parser.error(
                f"--parts must be of {', '.join(part.name for part in every)}; got {', '.join(sorted(unknown))}"
            )
        chosen = [part for part in every if not args.parts or part.name in args.parts]
        output.mkdir(parents=True, exist_ok=True)
        good = run_parts(chosen, output, machine(), device=args.device, site=Path(site), limit=LIMIT[args.device])
    print(f"\n{'all passed' if good else 'not all passed'}; written: {output}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
