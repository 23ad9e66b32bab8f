"""Train every contrastive model on the bundled pairs with the same budget, and print their scores side by side.

Small models from scratch, 48 px, batch 512, the same number of epochs. LiT locks the image tower of the CLIP that was
trained before it, and trains a text tower for as long.

    python examples/contrastive_family.py --epochs 8
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

PAIRS = Path(__file__).parent / "pairs"
MODELS = ("clip", "cloob", "align", "declip", "siglip", "lit")
RECIPE = (
    "--image-size=48", "--per-device-train-batch-size=512", "--weight-decay=0.1",
    "--max-length=16", "--keywords=0.5", "--crop-scale=0.9", "--dataloader-num-workers=1",
    "--save-strategy=no", "--report-to=none", "--bf16",
)  # fmt: skip
LAYERS = "--vision-layers=5"
LEARNING_RATES = {"cloob": 2e-4, "siglip": 3e-4}
"""Of the others 1e-3, at which the features of these two become all the same in the first steps, and stay so."""


def vlmfast(*arguments: str) -> None:
    command = [sys.executable, "-m", "vlmfast", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: exit status {done.returncode}")


def run(name: str, folder: Path, options: list[str]) -> dict[str, float]:
    """Scores in percent, and minutes of training, start-up included."""
    output = folder / name
    tower = [f"--vision-tower={folder / 'clip'}"] if name == "lit" else [LAYERS]
    start = time.perf_counter()
    vlmfast(
        "train",
        name,
        f"--data={PAIRS}/train-*.tar",
        f"--output-dir={output}",
        *options,
        *tower,
        f"--learning-rate={LEARNING_RATES.get(name, 1e-3)}",
    )
    minutes = (time.perf_counter() - start) / 60
    scores = output / "scores.json"
    vlmfast("eval", f"--checkpoint={output}", f"--data={PAIRS}/val-*.tar", f"--output={scores}")
    found = json.loads(scores.read_text())
    recall = {
        f"{side.replace('_', ' ')} {k}": 100 * found[side][k]
        for side in ("image_to_text", "text_to_image")
        for k in ("R@1", "R@5", "R@10")
    }
    return {**recall, "zero-shot": 100 * found["zero_shot"]["top-1"], "minutes": minutes}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/family"))
    parser.add_argument("options", nargs="*", help="more options of vlmfast train, after --")
    chosen = parser.parse_args(arguments)
    if "lit" in chosen.models and "clip" not in chosen.models:
        parser.error("lit locks the tower of clip: name both")
    options = [*RECIPE, f"--num-train-epochs={chosen.epochs}", *chosen.options]
    if not torch.cuda.is_available():
        options.append("--use-cpu")
    rows: dict[str, dict[str, float]] = {}
    for name in chosen.models:
        rows[name] = run(name, chosen.output_dir, options)
        print(f"{name:8}" + "  ".join(f"{key} {value:.1f}" for key, value in rows[name].items()), flush=True)
    (chosen.output_dir / "family.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(f"scores: {chosen.output_dir / 'family.json'}")


if __name__ == "__main__":
    main()
