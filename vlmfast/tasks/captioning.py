"""Captions that a model generates, beside the true ones.

What stands beside the scores: `blind`, the captions that the model gives to other images, which is what it would score
if images changed places; `chance`, a true caption of another image; and with --train-data `nearest`, the caption of the
training image whose thumbnail is most like this one's, which takes no learning at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from vlmfast.data import ImageTextDataset, eval_transform
from vlmfast.data.records import captions_of
from vlmfast.tasks.batches import batches, cycle, seen_as
from vlmfast.tasks.caption_metrics import caption_scores, has_java, tokenize
from vlmfast.tasks.generation import GenerationOptions, generate
from vlmfast.tasks.page import ACCENT, INK, MUTED, Cell, gallery
from vlmfast.tasks.scores import Compared
from vlmfast.tasks.task import Run, Task

THUMBNAIL = 16  # pixels
SHOWN = 8


@dataclass
class CaptioningOptions(GenerationOptions):
    """Flags of `vlmfast eval --task captioning`."""

    prompt: str = field(default="", metadata={"help": "What the caption begins with, such as 'a picture of'."})
    train_data: str | None = field(
        default=None, metadata={"help": "Training samples, for the caption of the nearest of their images."}
    )
    java: bool = field(
        default=True, metadata={"help": "The Penn Treebank tokenizer, as papers have it, where there is Java."}
    )
    meteor: bool = field(default=False, metadata={"help": "METEOR too; needs Java."})
    spice: bool = field(default=False, metadata={"help": "SPICE too; needs Java, and fetches its models."})


class Captioning(Task):
    """CIDEr, BLEU-4 and ROUGE-L of generated captions."""

    Options = CaptioningOptions
    methods: ClassVar = (("generate", "prompt_collator"),)
    requires: ClassVar = ("caption",)

    def score(self, run: Run) -> Compared:
        options = self.options
        java = options.java and has_java()
        if (options.meteor or options.spice) and not has_java():
            raise ValueError(f"--{'meteor' if options.meteor else 'spice'} needs Java, and there is no program java")
        generated, indices, samples = generate(run, run.dataset, options, options.prompt)
        references = [captions_of(sample) for sample in samples]
        other = cycle(len(samples))
        answers = {
            "model": generated,
            "blind": [generated[index] for index in other],
            "chance": [references[index][0] for index in other],
        }
        if options.train_data:
            nearest = nearest_captions(run, options.train_data)
            answers["nearest"] = [nearest[index] for index in indices]
        words = _tokenized([*references, *([text] for answer in answers.values() for text in answer)], java)
        truth, rest = words[: len(samples)], words[len(samples) :]
        rows: dict[str, dict[str, float]] = {}
        each: list[float] = []
        for place, name in enumerate(answers):
            said = [text for (text,) in rest[place * len(samples) : (place + 1) * len(samples)]]
            rows[name], found = caption_scores(
                said, truth, meteor=options.meteor and name == "model", spice=options.spice and name == "model"
            )
            each = each or found
        tokenizer = "Penn Treebank" if java else "regular expression"
        listed = [
            {"key": sample.key, "generated": text, "CIDEr": score}
            for sample, text, score in zip(samples, generated, each, strict=True)
        ]
        return Compared(
            task=self.name,
            rows=rows,
            num_samples=len(samples),
            skipped=dict(run.dataset.skipped()),
            arguments={**vars(options), "batch_size": run.batch_size, "device": str(run.device)},
            draw=partial(_draw, run.dataset, indices, generated, references, each, rows),
            notes=f"all times 100; words by {tokenizer}",
            details={"tokenizer": tokenizer, "captions": listed},
        )


def nearest_captions(run: Run, train_data: Any) -> dict[int, str]:
    """For every sample that can be read, the first caption of the training image most like it.

    Likeness is the correlation of two thumbnails of 16 x 16 pixels.
    """
    train = ImageTextDataset(train_data, transform=eval_transform(THUMBNAIL))
    theirs, _, training = _thumbnails(run, train)
    with seen_as(run.dataset, eval_transform(THUMBNAIL)):
        ours, indices, _ = _thumbnails(run, run.dataset)
    best = torch.cat([(chunk @ theirs.T).argmax(dim=1) for chunk in ours.split(1024)])
    return {index: captions_of(training[place])[0] for index, place in zip(indices, best.tolist(), strict=True)}


def _thumbnails(run: Run, dataset: Any) -> tuple[torch.Tensor, list[int], list[Any]]:
    rows, seen, kept = [], [], []
    for batch, indices, samples in batches(
        dataset,
        _images,
        batch_size=256,
        num_workers=run.num_workers,
        device=torch.device("cpu"),
        progress=run.progress,
        name="thumbnails",
    ):
        rows.append(batch["images"].flatten(1).float())
        seen += indices
        kept += samples
    found = torch.cat(run.some(rows))
    return F.normalize(found - found.mean(dim=1, keepdim=True), dim=1), seen, kept


def _images(samples: Sequence[Any]) -> dict[str, torch.Tensor]:
    return {"images": torch.stack([sample.image for sample in samples])}


def _tokenized(captions: Sequence[Sequence[str]], java: bool) -> list[list[str]]:
    """Tokenized in one call, for Java takes a second to start."""
    flat = iter(tokenize([caption for several in captions for caption in several], java=java))
    return [[next(flat) for _ in several] for several in captions]


def _draw(
    dataset: Any,
    indices: Sequence[int],
    generated: Sequence[str],
    references: Sequence[Sequence[str]],
    each: Sequence[float],
    rows: dict[str, dict[str, float]],
    path: str | PathLike[str],
) -> None:
    order = sorted(range(len(each)), key=lambda place: -each[place])
    drawn = torch.randperm(len(each), generator=torch.Generator().manual_seed(0)).tolist()

    def cell(place: int) -> Cell:
        lines = [(generated[place] or "(nothing)", ACCENT), *((text, INK) for text in references[place][:2])]
        return Cell(dataset[indices[place]].image, [*lines, (f"CIDEr {100 * each[place]:.0f}", MUTED)])

    half = len(order) // 2
    sections = [("Best by CIDEr", order[: min(SHOWN, len(order) - half)]), ("Drawn at random", drawn[:SHOWN])]
    if half:
        sections.append(("Worst by CIDEr", order[-min(SHOWN, half) :]))
    scores = ", ".join(f"{row} {100 * values['CIDEr']:.1f}" for row, values in rows.items())
    subtitle = f"{len(each):,} images; CIDEr: {scores}.   Blue: generated.  Black: true."
    gallery(path, "Captions", subtitle, [(name, [cell(place) for place in places]) for name, places in sections])
