"""Interleaved documents as batches of Flamingo."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.data.dataset import IMAGE_PLACE, Sample
from vlmfast.data.text import usable
from vlmfast.models.prefix_batches import PrefixCollator
from vlmfast.nn.prefix import IGNORED, IMAGE


def chunk_labels(input_ids: Tensor, attention_mask: Tensor, media_id: int, end_id: int, reads_next: Tensor) -> Tensor:
    """Which tokens of documents are predicted: those of chunks that have an image, and what ends them; (B, L).

    Where a row reads the image before its text, these are the tokens after the first image, but for those between a
    chunk's end and the next image, as in open_flamingo. Where it reads the image after its text, these are the tokens
    before the last image. Pads, images and the first token of a row are never predicted.

    Args:
        input_ids, attention_mask (B, L): pads on the right.
        reads_next (B,): bool.
    """
    media, present = input_ids == media_id, attention_mask != 0
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    last_media = torch.where(media, place, -1).cummax(1).values
    ended_before = F.pad(torch.where(input_ids == end_id, place, -1)[:, :-1], (1, 0), value=-1).cummax(1).values
    before = (last_media >= 0) & (ended_before < last_media)
    after = place < last_media[:, -1:]
    predicted = torch.where(reads_next[:, None], after, before) & present & ~media
    predicted[:, 0] = False  # nothing stands before it
    return input_ids.masked_fill(~predicted, IGNORED)


class DocumentCollator(PrefixCollator):
    """Interleaved documents, or pairs of image and caption, to batches of Flamingo; skipped samples are left out.

    As `PrefixCollator`, with the token of an image in the place of each, and every chunk of text ended:
    "one `<image>` two `<image>` three" becomes one `<image>` two END `<image>` three END; or, where a row reads the
    image that comes after its text, one END `<image>` two END `<image>` three. In training the batch has besides:

    - reads_next (B,): bool, whether a row reads the image after its text; where any does;
    - sample_weights (B,): float32, the `weight` of each record, 1 where there is none; where any record has one.

    Args:
        media_id: the token of an image.
        train: whether those two are there.
        next_probability: that a document whose text begins before its first image reads the image after its text.
        Others as PrefixCollator; `stop` ends a chunk.
    """

    def __init__(
        self, tokenizer: Any, *, media_id: int, train: bool = False, next_probability: float = 0.0, **options: Any
    ) -> None:
        super().__init__(tokenizer, image_length=1, **options)
        self.media_id = media_id
        self.train = train
        self.next_probability = next_probability if train else 0.0
        self._next = False

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        kept = usable(samples)
        batch = super().__call__(kept)
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, self.media_id)
        if self.stop is None:
            return batch
        reads_next = torch.tensor([self._reads_next(sample) for sample in kept])
        batch["labels"] = chunk_labels(
            batch["input_ids"], batch["attention_mask"], self.media_id, self.stop, reads_next
        )
        if reads_next.any():
            batch["reads_next"] = reads_next
        if self.train and any("weight" in sample.record for sample in kept):
            batch["sample_weights"] = torch.tensor([_weight(sample) for sample in kept])
        return batch

    def _row(self, sample: Sample) -> list[int]:
        self._next = self._reads_next(sample)
        return super()._row(sample)

    def _reads_next(self, sample: Sample) -> bool:
        text, place, _ = sample.caption.partition(IMAGE_PLACE)
        if not (self.next_probability and place and text.strip()):
            return False
        return random.Random(f"next {sample.seed}").random() < self.next_probability

    def _ids(self, text: str) -> list[int]:
        return super()._ids(text.strip())  # space beside an image is no token, as in open_flamingo

    def _ended(self, parts: list[list[int] | None], stop: int) -> list[list[int] | None]:
        """At most max_length tokens of text, and the end of every chunk that has text and was not cut."""
        texts = [k for k, part in enumerate(parts) if part is not None]
        chunks = texts[:-1] if self._next else texts[1:]
        left, found = self.max_length, []
        for k, part in enumerate(parts):
            if part is not None:
                if k in chunks and (part or len(chunks) == 1) and part[-1:] != [stop]:
                    part = [*part, stop]
                part = part[:left]
                left -= len(part)
            found.append(part)
        return found


def _weight(sample: Sample) -> float:
    weight = sample.record.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise ValueError(f"weight of sample {sample.key!r}: expected a number that is not negative, got {weight!r}")
    return float(weight)
