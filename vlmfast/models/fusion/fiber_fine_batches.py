"""Images, boxes and the text in which the boxes' words stand: a caption with phrases, or a list of names."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmfast.data import Collator, Sample
from vlmfast.data.phrases import phrase_mask
from vlmfast.data.text import usable
from vlmfast.models.detection.batches import Sizes, box_of, pad, resized_box

Span = tuple[int, int]


class Prompt(NamedTuple):
    """A list of names as a text.

    Attributes:
        text: "cat. dog. old car."
        spans: of each name in it.
        names: their places in the list that the prompt was made of.
    """

    text: str
    spans: list[Span]
    names: list[int]


def prompt(names: Sequence[str], places: Sequence[int] | None = None) -> Prompt:
    """The names in order, each before a full stop."""
    text, spans = "", []
    for name in names:
        start = len(text) + bool(text)
        text += f" {name}." if text else f"{name}."
        spans.append((start, start + len(name)))
    return Prompt(text, spans, list(range(len(names)) if places is None else places))


def prompts(tokenizer: Any, names: Sequence[str], max_length: int) -> list[Prompt]:
    """All names in as few texts of at most `max_length` tokens as their order allows, at least one in each."""
    found: list[Prompt] = []
    own: list[int] = []
    for place in range(len(names)):
        longer = [*own, place]
        if own and _length(tokenizer, prompt([names[p] for p in longer]).text) > max_length:
            found.append(prompt([names[p] for p in own], own))
            longer = [place]
        own = longer
    return [*found, prompt([names[p] for p in own], own)] if own else found


class GroundingCollator:
    """Samples, their images whole, to `pixel_values` uint8 (B, H, W, 3), padded, `image_sizes` int64 (B, 2), and
    `input_ids`, `attention_mask` (B, L) of the caption.

    In training the text is, by `Sample.seed`, the caption or a list of names: those of the image, and of others as many
    as `max_length` leaves room for, in any order. Besides there are `boxes` float32 (B, G, 4), pixels of the resized
    images; and `box_words` bool (B, G, L), the tokens that each is called by, none behind an image's last. A box that
    no token of the text is about is left out, and so are crowds and boxes less than a pixel wide or high.

    Args:
        sizes: of images.
        tokenizer, max_length: as of `vlmfast.data.Collator`.
        names: of training, from which others are drawn; None in evaluation.
        caption_share: how often a caption that has phrases is the text.
    """

    def __init__(
        self,
        sizes: Sizes,
        tokenizer: Any,
        max_length: int,
        names: Sequence[str] | None = None,
        caption_share: float = 0.5,
    ) -> None:
        self.sizes, self.names, self.caption_share = sizes, names, caption_share
        self.texts = Collator(tokenizer, max_length=max_length)

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        kept = usable(samples)
        images = []
        for sample in kept:
            assert sample.image is not None
            images.append(self.sizes.resize(sample.image))
        pixel_values, image_sizes = pad(images)
        batch = {"pixel_values": pixel_values, "image_sizes": image_sizes}
        if self.names is None:
            return batch | self.texts.tokens([sample.caption for sample in kept])
        texts, spans, boxes = [], [], []
        for sample, image in zip(kept, images, strict=True):
            assert sample.image is not None
            found = _objects(sample.record, sample.image.shape[1::-1], image.shape[1::-1])  # type: ignore[arg-type]
            text, named = self._text(sample, found)
            texts.append(text)
            spans.append([span for box_spans in named.values() for span in box_spans])
            boxes.append([(found[place][0], len(box_spans)) for place, box_spans in named.items()])
        tokens = self.texts.tokens(texts)
        words = phrase_mask(self.texts.tokenizer, texts, spans, tokens["input_ids"])
        return batch | tokens | _stack(boxes, words)

    def _text(self, sample: Sample, found: dict[int, tuple[list[float], str]]) -> tuple[str, dict[int, list[Span]]]:
        """The text, and of each object that it is about the spans of what it is called."""
        generator = random.Random(sample.seed)
        named: dict[int, list[Span]] = {}
        if generator.random() < self.caption_share:
            for phrase in sample.record.get("phrases") or ():
                start, end = phrase["span"]
                for place in phrase["objects"]:
                    if place in found and 0 <= start < end <= len(sample.caption):
                        named.setdefault(place, []).append((start, end))
            if named:
                return sample.caption, named
        own = sorted({name for _, name in found.values() if name})
        there = set(own)
        assert self.names is not None
        others = [name for name in self.names if name not in there]
        generator.shuffle(own)
        generator.shuffle(others)
        room = self.texts.max_length - self.texts.tokenizer.num_special_tokens_to_add()
        asked: list[str] = []
        for name in own + others:
            room -= _length(self.texts.tokenizer, f" {name}.", special=False)
            if room < 0 and asked:
                break
            asked.append(name)
        generator.shuffle(asked)
        made = prompt(asked)
        where = dict(zip(asked, made.spans, strict=True))
        for place, (_, name) in found.items():
            if name in where:
                named[place] = [where[name]]
        return made.text, named


def _objects(
    record: dict[str, Any], size: tuple[int, int], resized: tuple[int, int]
) -> dict[int, tuple[list[float], str]]:
    """By its place in the record, of each object that has one its box in pixels of the resized image, and its name."""
    found = {}
    scale = (resized[0] / size[0], resized[1] / size[1])
    for place, each in enumerate(record.get("objects") or ()):
        box = box_of(each)
        sides = None if box is None else resized_box(box, scale, *resized)
        if sides is not None:
            found[place] = (sides, str(each.get("name") or ""))
    return found


def _stack(images: Sequence[Sequence[tuple[list[float], int]]], words: Tensor) -> dict[str, Tensor]:
    """`boxes` and `box_words` of boxes, each with how many of its image's rows of `words` (B, S, L) it has."""
    rows = max(1, max(map(len, images)))
    boxes = torch.zeros(len(images), rows, 4)
    of_boxes = torch.zeros(len(images), rows, words.shape[2], dtype=torch.bool)
    for image, own in enumerate(images):
        first = place = 0
        for box, count in own:
            about = words[image, first : first + count].any(0)
            first += count
            if about.any():
                boxes[image, place], of_boxes[image, place] = torch.tensor(box), about
                place += 1
    return {"boxes": boxes, "box_words": of_boxes}


def names_of(dataset: Any) -> list[str]:
    """The names of the objects of all samples, sorted.

    Raises:
        ValueError: no object has a name.
    """
    found = {
        each["name"]
        for index in range(len(dataset))
        for each in dataset.record(index).get("objects") or ()
        if isinstance(each, dict) and isinstance(each.get("name"), str) and each["name"]
    }
    if not found:
        raise ValueError(f"--data: no object of {len(dataset)} samples has a name")
    return sorted(found)


@lru_cache(maxsize=65536)
def _length(tokenizer: Any, text: str, special: bool = True) -> int:
    return len(tokenizer(text, add_special_tokens=special)["input_ids"])
