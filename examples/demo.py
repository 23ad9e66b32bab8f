"""Train a CLIP on the bundled pairs and show what it learned: `make demo`, or `python examples/demo.py`.

A small ResNet and a small text transformer from scratch, batches of 2048 pairs in chunks of 256 (GradCache), on a CPU:
52 epochs in bfloat16 where the processor multiplies it, 26 in float32 elsewhere, which takes longer all the same.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from vlmfast.ops._dispatch import core

HERE = Path(__file__).resolve().parent
BATCH, CHUNK = 2048, 256
EPOCHS, EPOCHS_WITHOUT_BF16 = 52, 26


def vlmfast(*arguments: str) -> None:
    print("\n$ vlmfast", *arguments, flush=True)
    done = subprocess.run([sys.executable, "-m", "vlmfast", *arguments], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=HERE.parent / "runs" / "demo")
    parser.add_argument("--epochs", type=float, help="by default as many as take a few minutes")
    options = parser.parse_args()
    out, pairs = options.output_dir, HERE / "pairs"
    if (out / "model.safetensors").exists():
        raise SystemExit(f"{out} holds a trained model already; remove it or pass another --output-dir")
    bf16 = core is not None and core.build_info()["bf16_products"]
    epochs = options.epochs or (EPOCHS if bf16 else EPOCHS_WITHOUT_BF16)
    start = time.perf_counter()
    vlmfast(
        "train", "clip", "--config", str(HERE / "demo" / "config.json"), "--data", f"{pairs}/train-*.tar",
        "--output-dir", str(out), "--per-device-train-batch-size", str(BATCH), "--cache-chunk", str(CHUNK),
        "--num-train-epochs", str(epochs), "--learning-rate", "1e-3", "--weight-decay", "0.1",
        "--max-length", "16", "--crop-scale", "0.9", "--keywords", "0.5", "--dataloader-drop-last", "False",
        "--use-cpu", "--bf16", str(bf16), "--logging-steps", "4", "--save-steps", "0.25", "--resume",
        "--dataloader-num-workers", "1", "--report-to", "tensorboard",
    )  # fmt: skip
    vlmfast(
        "eval", "--checkpoint", str(out), "--data", f"{pairs}/val-*.tar", "--max-length", "16",
        "--output", str(out / "scores.json"), "--report", str(out / "report.png"),
    )  # fmt: skip
    print(f"\ntrained and evaluated in {(time.perf_counter() - start) / 60:.1f} minutes; look at {out / 'report.png'}")


if __name__ == "__main__":
    main()
