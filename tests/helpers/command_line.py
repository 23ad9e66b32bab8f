"""vlmfast on small coloured squares, in this process or in one of its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from PIL import Image
from processes import run_processes
from safetensors.torch import load_file

from vlmfast.cli import main
from vlmfast.models import model_class

PAIRS = 40
COLOURS = ("red", "green", "blue", "black", "yellow", "pink", "grey", "brown")
TINY = {"image_size": 16, "patch_size": 8, "vision_width": 64, "vision_layers": 1, "text_width": 64, "text_layers": 1}
STEPS = 12


def tiny(name: str, **sizes: int) -> dict[str, int]:
    """The sizes of a small model, of those that this model has."""
    options = model_class(name).Options()
    return {key: value for key, value in {**TINY, "region_layers": 1, **sizes}.items() if hasattr(options, key)}


def write_pairs(folder: Path, count: int = PAIRS) -> Path:
    """A folder of small coloured images with captions."""
    for k in range(count):
        image = Image.new("RGB", (16, 16), COLOURS[k % 8])
        image.putpixel((k % 16, k // 16), (k, 2 * k, 3 * k))
        image.save(folder / f"{k:03}.png")
        (folder / f"{k:03}.txt").write_text(f"{COLOURS[k % 8]} square number {k}")
    return folder


def write_shards(folder: Path, *names: str) -> Path:
    """The same 16 pairs in each of these shards."""
    folder.mkdir()
    pairs = folder / "files"
    pairs.mkdir()
    write_pairs(pairs, 16)
    for name in names:
        with tarfile.open(folder / name, "w") as out:
            for path in sorted(pairs.iterdir()):
                out.add(path, path.name)
    return folder


def command(data: Path, output_dir: Path, *extra: str, model: str = "clip", towers: Sequence[str] = ()) -> list[str]:
    """`vlmfast train MODEL` of a small model, its towers new ones but for those that options in towers name."""
    given = [name for name in ("vision", "text") if any(f"--{name}-tower" in option for option in towers)]
    sizes = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in tiny(model, embed_dim=32).items()
        if not name.startswith(tuple(f"{kind}_" for kind in given))
        and not ("vision" in given and name in ("image_size", "patch_size"))
    ]
    return [
        sys.executable, "-m", "vlmfast", "train", model, "--data", str(data), "--output-dir", str(output_dir), *sizes,
        *towers, "--per-device-train-batch-size=8", f"--max-steps={STEPS}", "--logging-steps=1",
        "--report-to=none", "--save-steps=3", "--cache-chunk=4", "--dataloader-num-workers=1", "--use-cpu", *extra,
    ]  # fmt: skip


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """`python -m vlmfast ...` in this process, which saves eight seconds of imports."""
    assert arguments[1:3] == ["-m", "vlmfast"]
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments[3:])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def _on_a_rank(rank: int, world_size: int, arguments: list[str], folder: str) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    done = run(arguments)
    if rank == 0:
        Path(folder, "out").write_text(done.stdout)
    assert done.returncode == 0, done.stderr


def run_on_two(arguments: list[str]) -> str:
    """What rank 0 prints where torchrun would have started two processes; these are forked and import nothing again."""
    with tempfile.TemporaryDirectory() as folder:
        run_processes(_on_a_rank, 2, arguments, folder)
        return Path(folder, "out").read_text()


def start(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)


def logged(output_dir: Path, step: int = STEPS) -> dict[int, float]:
    state = json.loads((output_dir / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def assert_same_run(a: Path, b: Path) -> None:
    assert logged(a) == logged(b)
    for name, weight in load_file(a / "model.safetensors").items():
        assert torch.equal(load_file(b / "model.safetensors")[name], weight), name
