"""vlmfast predict."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfast.cli.arguments import UsageError, parse

SURE = 0.3
"""The score from which on a box is told."""
SHOWN = 5


@dataclass
class PredictArguments:
    """What `vlmfast predict` takes besides the checkpoint and the images."""

    text: list[str] | None = field(
        default=None,
        metadata={"help": "A question, the beginning of a caption, the names to look for, or texts to compare."},
    )
    model: str | None = field(
        default=None,
        metadata={"help": "Name of a model, or package.module:Class; by default what the checkpoint says that it is."},
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or name; by default the checkpoint's own."})
    image_size: int | None = field(default=None, metadata={"help": "Side, where the checkpoint's config has none."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a text at most."})
    beams: int | None = field(default=None, metadata={"help": "Beams of the search; by default the model's own."})
    max_new_tokens: int = field(default=30, metadata={"help": "Tokens that are generated at most."})
    device: str | None = field(default=None, metadata={"help": "By default a GPU where there is one."})
    output: Path | None = field(default=None, metadata={"help": "Write what is printed to this JSON file."})
    report: Path | None = field(default=None, metadata={"help": "Write the images with it to this PNG."})


@dataclass
class Prediction:
    """What a model says of an image.

    Attributes:
        kind: generated, answers, labels, choices, similarity, match, or boxes.
        lines: of the answer, in the order of their scores where they have some.
        scores: of each line, or None; probabilities, but for the cosines of `similarity`.
        boxes: [x1, y1, x2, y2] of each line in pixels of the file, or None.
    """

    kind: str
    lines: list[str]
    scores: list[float] | None = None
    boxes: list[list[float]] | None = None


@dataclass
class Asked:
    """A model and what it is asked.

    Attributes:
        model, tokenizer: as loaded; the model may be a `TaskModel`.
        options: of the model.
        samples: of the images, their captions "".
        sizes: width and height of each file.
        texts: of --text.
    """

    model: Any
    tokenizer: Any
    options: Any
    samples: list[Any]
    sizes: list[tuple[int, int]]
    texts: list[str]
    args: PredictArguments

    def batch(self, collator: Any, texts: Sequence[str]) -> dict[str, Any]:
        """Each image beside its text; of one image or one text, beside all of the others."""
        count = max(len(self.samples), len(texts))
        samples = self.samples * count if len(self.samples) == 1 else self.samples
        said = list(texts) * count if len(texts) == 1 else list(texts)
        pairs = [replace(s, caption=t) for s, t in zip(samples[:count], said[:count], strict=True)]
        place = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        found = collator(pairs)
        return {name: v.to(place) if isinstance(v, Tensor) else v for name, v in found.items()}

    @property
    def text(self) -> str:
        """The one text, or "".

        Raises:
            UsageError: there are several.
        """
        if len(self.texts) > 1:
            raise UsageError(f"--text: expected one text, got {len(self.texts)}")
        return self.texts[0] if self.texts else ""


def run(arguments: Sequence[str]) -> int:
    """What a checkpoint says of images: whatever its model can do with them and with --text."""
    from vlmfast.cli.evaluate import checkpoint_class, model_options
    from vlmfast.models.checkpoints import find_tokenizer, load
    from vlmfast.tasks.batches import evaluating

    places = _leading(arguments)
    args = parse("vlmfast predict CHECKPOINT IMAGE ...", {"options": (PredictArguments, {})}, arguments[len(places) :])
    if args is None:
        return 0
    (options,) = args
    if len(places) < 2:
        raise UsageError(f"expected CHECKPOINT and one IMAGE or more before the options, got {places}")
    checkpoint, *images = places
    cls, _ = checkpoint_class(options.model, checkpoint)
    from transformers.utils import logging  # after the look for the checkpoint, which may end the command

    logging.disable_progress_bar()
    model = load(cls, checkpoint).eval()
    model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    own = model_options(model, checkpoint, image_size=options.image_size, max_length=options.max_length)
    samples, sizes, pictures = _read(images, model.transform(own, train=False))
    reads_text = getattr(cls, "reads_text", True)
    tokenizer = find_tokenizer(options.tokenizer or checkpoint) if reads_text else None
    asked = Asked(model, tokenizer, own, samples, sizes, options.text or [], options)
    with evaluating(model):
        found = predictions(asked)
    for name, each in zip(images, found, strict=True):
        print(name)
        for prediction in each:
            for line in _lines(prediction):
                print(f"  {line}")
    if options.output:
        listed = [
            {"image": name, "predictions": [dataclasses.asdict(one) for one in each]}
            for name, each in zip(images, found, strict=True)
        ]
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(listed, indent=2) + "\n")
        print(f"predictions: {options.output}")
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        said = f"{checkpoint}   {', '.join(asked.texts)}"
        _draw(options.report, type(model).__name__, said, images, pictures, found)
        print(f"report: {options.report}")
    return 0


def predictions(asked: Asked) -> list[list[Prediction]]:
    """Of each image, one prediction for each thing that the model can do.

    Raises:
        UsageError: a text is needed, or several are.
        TypeError: the model can do none of them.
    """
    model, texts = asked.model, asked.texts
    if callable(getattr(model, "logits", None)):
        return [[one] for one in _HEADS[model.config.task](asked)]
    able: list[tuple[bool, Callable[[Asked], list[Prediction]]]] = [
        (hasattr(model, "generate") and hasattr(model, "prompt_collator"), _generated),
        (hasattr(model, "detect"), _boxes),
        (hasattr(model, "get_image_features") and bool(texts), _similarity),
        (hasattr(model, "match_scores") and bool(texts), _match),
    ]
    kinds = [function for can, function in able if can]
    if not kinds:
        if hasattr(model, "get_image_features") or hasattr(model, "match_scores"):
            raise UsageError(f"--text is needed: {type(model).__name__} compares images with texts")
        raise TypeError(f"{type(model).__name__} predicts nothing of an image; fine-tune it for a task (--task)")
    found, refused = [], []
    for function in kinds:
        try:
            found.append(function(asked))
        except UsageError:
            raise
        except ValueError as error:  # a checkpoint may lack the part for it, as one trained for contrast alone
            refused.append(error)
    if not found:
        raise refused[0]
    for reason in refused:
        print(f"left out: {reason}", file=sys.stderr)
    return [list(each) for each in zip(*found, strict=True)]


def _generated(asked: Asked) -> list[Prediction]:
    from vlmfast.tasks.generation import decode

    settings: dict[str, Any] = {"max_new_tokens": asked.args.max_new_tokens}
    if asked.args.beams is not None:
        settings["num_beams"] = asked.args.beams
    batch = asked.batch(asked.model.prompt_collator(asked.options, asked.tokenizer), [asked.text])
    said = decode(asked.tokenizer, asked.model.generate(**batch, **settings))
    return [Prediction("generated", [text]) for text in said]


def _boxes(asked: Asked) -> list[Prediction]:
    from vlmfast.tasks.boxes import detected

    model, phrases = asked.model, None
    batch = asked.batch(model.collator(asked.options, asked.tokenizer, train=False), [""])
    if getattr(model, "open_vocabulary", False):
        if not asked.texts:
            raise UsageError(f"--text is needed: names for {type(model).__name__} to look for")
        phrases, names = [asked.texts] * len(asked.samples), dict(enumerate(asked.texts))
    else:
        names = {int(key): name for key, name in model.config.id2label.items()}
    found = []
    for one in detected(model, batch, phrases, asked.tokenizer, asked.sizes):
        kept = one["scores"] >= SURE
        labels = [names[label] for label in one["labels"][kept].tolist()]
        found.append(Prediction("boxes", labels, one["scores"][kept].tolist(), one["boxes"][kept].tolist()))
    return found


def _similarity(asked: Asked) -> list[Prediction]:
    model = asked.model
    collator = model.collator(asked.options, asked.tokenizer, train=False)
    images = model.get_image_features(asked.batch(collator, asked.texts[:1])["pixel_values"])
    batch = replace(asked, samples=asked.samples[:1]).batch(collator, asked.texts)  # towers read texts alone
    texts = model.get_text_features(batch["input_ids"], batch.get("attention_mask"))
    own = getattr(model, "similarities", None)  # of a model whose features are not compared by a product
    scores = images.float() @ texts.float().T if own is None else own(images, texts)
    return [_ranked("similarity", asked.texts, row) for row in scores.cpu()]


def _match(asked: Asked) -> list[Prediction]:
    collator = asked.model.collator(asked.options, asked.tokenizer, train=False)
    rows = [
        asked.model.match_scores(**asked.batch(collator, [text] * len(asked.samples))).float().exp()
        for text in asked.texts
    ]
    return [_ranked("match", asked.texts, row) for row in torch.stack(rows, dim=1).cpu()]


def _answers(asked: Asked) -> list[Prediction]:
    from vlmfast.tasks.heads import question_collator

    if not asked.texts:
        raise UsageError("--text is needed: the question")
    collator = question_collator(asked.model, asked.options, asked.tokenizer)
    rows = asked.model.logits(**asked.batch(collator, [asked.text])).float().sigmoid().cpu()
    return [_ranked("answers", asked.model.config.outputs, row) for row in rows]


def _labels(asked: Asked) -> list[Prediction]:
    collator = asked.model.collator(asked.options, asked.tokenizer, train=False)
    rows = asked.model.logits(**asked.batch(collator, [asked.text])).float().softmax(dim=1).cpu()
    return [_ranked("labels", [f"label {name}" for name in asked.model.config.outputs], row) for row in rows]


def _choices(asked: Asked) -> list[Prediction]:
    if len(asked.texts) < 3:
        raise UsageError(f"--text: expected a question and two choices or more, got {len(asked.texts)} texts")
    question, *choices = asked.texts
    collator = asked.model.collator(asked.options, asked.tokenizer, train=False)
    found = []
    for sample in asked.samples:
        one = replace(asked, samples=[sample])
        batch = one.batch(collator, [f"{question} {choice}" for choice in choices])
        logits = asked.model.logits(**batch).float().squeeze(1)
        found.append(_ranked("choices", choices, logits.softmax(dim=0).cpu()))
    return found


_HEADS = {"vqa": _answers, "hateful": _labels, "reasoning": _choices}


def _ranked(kind: str, names: Sequence[str], scores: Tensor) -> Prediction:
    """The names with the highest scores (N,)."""
    best = scores.topk(min(SHOWN, len(scores)))
    return Prediction(kind, [names[place] for place in best.indices.tolist()], best.values.tolist())


def _lines(prediction: Prediction) -> Iterator[str]:
    if not prediction.lines:
        yield f"{prediction.kind}: nothing"
    for number, line in enumerate(prediction.lines):
        score = "" if prediction.scores is None else f"{prediction.scores[number]:6.3f}  "
        box = "" if prediction.boxes is None else f"  at {[round(side) for side in prediction.boxes[number]]}"
        yield f"{prediction.kind}: {score}{line}{box}"


def _leading(arguments: Sequence[str]) -> list[str]:
    """The arguments before the first option."""
    found = []
    for argument in arguments:
        if argument.startswith("-"):
            break
        found.append(argument)
    return found


def _read(images: Sequence[str], transform: Any) -> tuple[list[Any], list[tuple[int, int]], list[Tensor]]:
    """Samples, sizes of the files, and the pictures (H, W, 3).

    Raises:
        ValueError: one is no image that can be read.
    """
    import numpy as np

    from vlmfast.data import ImageTextDataset

    for name in images:
        if not Path(name).is_file():
            raise ValueError(f"{name}: there is no such file")
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "images.csv"
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["path", "caption"], *([str(Path(name).resolve()), ""] for name in images)])

        def seen(image: Any, generator: Any) -> Any:
            pictures.append(torch.from_numpy(np.array(image)))
            return transform(image, generator)

        pictures: list[Tensor] = []
        samples = []
        dataset = ImageTextDataset(str(table), transform=seen, requires=())
        for number, name in enumerate(images):
            sample = dataset[number]
            if sample is None:
                why = next((reason for reason, count in dataset.skipped().items() if count), "cannot be read")
                raise ValueError(f"{name}: {why}")
            samples.append(sample)
    return samples, [(picture.shape[1], picture.shape[0]) for picture in pictures], pictures


def _draw(
    path: Path,
    title: str,
    subtitle: str,
    images: Sequence[str],
    pictures: Sequence[Tensor],
    found: Sequence[Sequence[Prediction]],
) -> None:
    from vlmfast.tasks.page import ACCENT, INK, Cell, gallery

    cells = []
    for name, picture, each in zip(images, pictures, found, strict=True):
        lines = [(Path(name).name, INK), *((line, ACCENT) for one in each for line in _lines(one))]
        boxes = [
            (box, ACCENT, label)
            for one in each
            for box, label in zip(one.boxes or (), one.lines, strict=bool(one.boxes))
        ]
        cells.append(Cell(picture, lines, boxes))
    gallery(path, title, subtitle, [("Predictions", cells)])
