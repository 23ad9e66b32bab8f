"""A whole training run of `vlmfast train clip` beside one of open_clip's own trainer (`open_clip_train.main`).

    python bench/train_against_open_clip.py --dtypes float32 bfloat16 --output runs/against.json

Both are the programs that people start, each in a process of its own, their runs one after the other in turn. They
have the same model (CLIP, ViT of 4 layers 192 wide, patches of 8 at 64 px; text of 2 layers 192 wide, exact GELU; the
numbers of parameters are compared), tokenizer, shards, batch, crops, AdamW with its settings, one data worker and as
many threads. Neither clips gradients, saves within the run or evaluates. What differs is the program: among other
things vlmfast pads a batch of texts to its longest, open_clip every text to the length the model has, here 32 tokens.

Time is taken where the optimizer has made a step, which for both is a hook of torch's; pairs per second are those
between the end of the last warm-up step and that of the last step, data, logs and what begins an epoch included.
`processor_s` is the time that the process itself has had of processors, per 1,000 pairs, which other programs of a
shared machine change less. With --profile one run of each shows instead where the time goes, by torch.profiler.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from vlmfast.bench.report import machine, to_json
from vlmfast.data.text import BUNDLED

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("vlmfast", "open_clip")
WIDTH, VISION_LAYERS, TEXT_LAYERS, PATCH, IMAGE, DIM, LENGTH = 192, 4, 2, 8, 64, 256, 32
HEADS = WIDTH // 64
CROP = 0.9


def write_shards(folder: Path, pairs: int) -> int:
    """The bundled pairs with their captions in .txt files, where open_clip looks for them; how many there are."""
    count = 0
    for path in sorted((ROOT / "examples" / "pairs").glob("train-*.tar")):
        with tarfile.open(path) as source, tarfile.open(folder / path.name, "w") as target:
            for member in source:
                if count >= pairs:
                    break
                data = source.extractfile(member).read()  # type: ignore[union-attr]
                if member.name.endswith(".json"):
                    data, member.name = json.loads(data)["caption"].encode(), member.name[: -len("json")] + "txt"
                    count += 1
                member.size = len(data)
                target.addfile(member, io.BytesIO(data))
    return count


def open_clip_model(folder: Path) -> str:
    """Writes the config of the model where open_clip looks for it; its name."""
    tokenizer = json.loads((BUNDLED / "tokenizer.json").read_text())
    added = {token["id"] for token in tokenizer["added_tokens"]}
    vocabulary = len(added | set(tokenizer["model"]["vocab"].values()))
    config = {
        "embed_dim": DIM,
        "vision_cfg": {"image_size": IMAGE, "layers": VISION_LAYERS, "width": WIDTH, "patch_size": PATCH,
                       "head_width": 64},
        "text_cfg": {"context_length": LENGTH, "vocab_size": vocabulary, "width": WIDTH, "heads": HEADS,
                     "layers": TEXT_LAYERS, "hf_tokenizer_name": str(BUNDLED), "pool_type": "eos", "eos_id": 1},
    }  # fmt: skip
    (folder / "small-clip.json").write_text(json.dumps(config))
    return "small-clip"


def run_vlmfast(folder: Path, args: argparse.Namespace) -> None:
    from vlmfast.cli import main

    options = {
        "data": folder / "train-*.tar", "output-dir": folder / "vlmfast", "image-size": IMAGE, "patch-size": PATCH,
        "vision-width": WIDTH, "vision-layers": VISION_LAYERS, "text-width": WIDTH, "text-layers": TEXT_LAYERS,
        "embed-dim": DIM, "max-length": LENGTH, "crop-scale": CROP, "per-device-train-batch-size": args.batch,
        "max-steps": args.steps, "save-strategy": "no", "report-to": "none", "max-grad-norm": 0, "disable-tqdm": True,
        "dataloader-num-workers": 1, "use-cpu": args.device == "cpu", "bf16": args.dtype == "bfloat16",
    }  # fmt: skip
    if code := main(["train", "clip", *(f"--{name}={value}" for name, value in options.items())]):
        raise SystemExit(code)


def run_open_clip(folder: Path, args: argparse.Namespace) -> None:
    import open_clip

    if importlib.util.find_spec("pandas") is None:  # which open_clip's loader imports, and uses for CSV files alone
        sys.modules["pandas"] = types.ModuleType("pandas")
    from open_clip_train import data
    from open_clip_train.main import main

    # webdataset 1.0 marks the end of a shard by a sample without a name, which open_clip 3.3 stops at.
    data.tar_file_expander = functools.partial(data.tar_file_expander, eof_value=None)
    open_clip.add_model_config(folder)
    shards = sorted(folder.glob("train-*.tar"))
    options = {
        "train-data": f"{folder}/train-{{00000..{len(shards) - 1:05}}}.tar", "train-num-samples": args.pairs,
        "dataset-type": "webdataset", "model": "small-clip", "batch-size": args.batch, "workers": 1,
        "epochs": -(-args.steps // max(1, -(-args.pairs // args.batch))), "lr": 5e-4, "beta1": 0.9, "beta2": 0.98,
        "eps": 1e-6, "wd": 0.2, "warmup": 1, "precision": {"float32": "fp32", "bfloat16": "amp_bf16"}[args.dtype],
        "device": args.device, "logs": folder / "logs", "save-frequency": 0, "log-every-n-steps": 10,
    }  # fmt: skip
    crop = ["--aug-cfg", f"scale=({CROP}, 1.0)"]
    main([*(part for name, value in options.items() for part in (f"--{name}", str(value))), *crop])


class Enough(Exception):  # noqa: N818
    """The steps that are measured are done."""


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One run in this process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    ends: list[float] = []
    spent: list[float] = []
    parameters = 0
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if args.profile else None

    def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal parameters
        parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        if args.device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        spent.append(time.process_time())
        if profiler and len(ends) == args.warm_up:
            profiler.start()
        if len(ends) == args.steps:
            raise Enough

    register_optimizer_step_post_hook(stepped)
    with contextlib.suppress(Enough):
        (run_vlmfast if args.side == "vlmfast" else run_open_clip)(folder, args)
    if len(ends) < args.steps:
        raise SystemExit(f"{args.side}: {len(ends)} steps instead of {args.steps}")
    if profiler:
        profiler.stop()
        averages = profiler.key_averages()
        print(averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=48), file=sys.stderr)
    pairs = args.batch * (args.steps - args.warm_up)
    return {
        "pairs_per_second": pairs / (ends[-1] - ends[args.warm_up - 1]),
        "processor_s": (spent[-1] - spent[args.warm_up - 1]) / pairs * 1000,
        "parameters": parameters,
        "threads": torch.get_num_threads(),
    }


def one_run(side: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """A run in a process of its own, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = write_shards(Path(folder), args.pairs)
        open_clip_model(Path(folder))
        command = [
            sys.executable,
            __file__,
            "--side",
            side,
            "--dtypes",
            dtype,
            "--pairs",
            str(pairs),
            "--folder",
            folder,
        ]
        for name in ("batch", "steps", "warm_up", "threads", "device"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            [*command, *(["--profile"] if args.profile else [])], capture_output=True, text=True, check=False,
            env=environment,
        )  # fmt: skip
        if args.profile or done.returncode:
            print(f"== {side}, {dtype}\n{done.stderr[-6000:]}", flush=True)
        if done.returncode:
            raise SystemExit(f"{side}: exit code {done.returncode}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10, help="of a run, the warm-up included")
    parser.add_argument("--warm-up", type=int, default=3, help="steps that are not counted")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument("--pairs", type=int, default=6603, help="of the bundled ones, at most")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path, metavar="JSON")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 1 <= args.warm_up < args.steps:
        parser.error(f"--warm-up must be from 1 to fewer than --steps; got {args.warm_up} of {args.steps}")
    if args.side:
        args.dtype = args.dtypes[0]
        print(json.dumps(measure(args.folder, args)))
        return
    figures: dict[str, Any] = {}
    for dtype in args.dtypes:
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(1 if args.profile else args.rounds):
            for side in SIDES:
                runs[side].append(one_run(side, dtype, args))
                print(f"{dtype} {side:10} {runs[side][-1]}", flush=True)
        counts = {side: runs[side][0]["parameters"] for side in SIDES}
        if len(set(counts.values())) > 1:
            raise SystemExit(f"the models differ: {counts}")
        ratios = [a["pairs_per_second"] / b["pairs_per_second"] for a, b in zip(*runs.values(), strict=True)]
        less = [b["processor_s"] / a["processor_s"] for a, b in zip(*runs.values(), strict=True)]
        figures[dtype] = {**runs, "ratios": ratios, "ratios_of_processor_time": less}
        ours, theirs = (statistics.median(run["pairs_per_second"] for run in runs[side]) for side in SIDES)
        print(
            f"{dtype}: {ours:.0f} against {theirs:.0f} pairs/s, {statistics.median(ratios):.2f}x"
            f" ({min(ratios):.2f} to {max(ratios):.2f}); by processor time {statistics.median(less):.2f}x",
            flush=True,
        )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        header = {**machine(), "open_clip_torch": version("open_clip_torch"), "accelerate": version("accelerate")}
        settings = {name: getattr(args, name) for name in ("batch", "steps", "warm_up", "pairs", "device")}
        args.output.write_text(to_json({"machine": header, "settings": settings, "runs": figures}))


if __name__ == "__main__":
    main()
