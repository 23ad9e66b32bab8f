"""FLAVA's batches: of images, of texts or of pairs, with what is hidden of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmfast.data import BlockMask, Collator, Sample, TokenMask
from vlmfast.data.text import usable


class FLAVACollator:
    """Samples of one kind to a batch for training, the keyword arguments of `FLAVAModel.forward`.

    - Samples without caption: `pixel_values` and `bool_masked_pos` bool (B, n), True where a patch is hidden.
    - Samples without image: `input_ids_masked`, `attention_mask` and `mlm_labels` int64 (B, L); labels are the ids
      where tokens are masked and -100 elsewhere.
    - Pairs: all of these, `input_ids` with nothing masked, and `itm_labels` int64 (B,), 1 where the text is the image's
      own. Captions of the others changed places among themselves, so that no caption is twice in the batch.

    All randomness comes from each sample's seed.

    Args:
        tokenizer: with a padding and a mask token.
        max_length: limit on tokens per text, special tokens included.
        grid: rows and columns of patches.
        mismatched: probability of a pair to be given another caption.
        mask_probability: of each token that is not special to be predicted.
    Raises:
        ValueError: the tokenizer lacks a token; an argument is out of its range; in a call, when only some of the
            samples have an image.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        grid: tuple[int, int],
        mismatched: float = 0.1,
        mask_probability: float = 0.15,
    ) -> None:
        if not 0 <= mismatched <= 1:
            raise ValueError(f"mismatched: expected a probability, got {mismatched}")
        self.collator = Collator(tokenizer, max_length=max_length)
        self.hide_tokens = TokenMask(tokenizer, mask_probability)
        self.hide_patches = BlockMask(*grid)
        self.mismatched = mismatched

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        kept = usable(samples)
        generators = [np.random.default_rng(sample.seed) for sample in kept]
        images = [sample.image for sample in kept if sample.image is not None]
        captions = [sample.caption for sample in kept]
        if 0 < len(images) < len(kept):
            raise ValueError(f"samples: expected an image in each or in none, got {len(images)} in {len(kept)}")
        batch: dict[str, Tensor] = {}
        if images:
            batch["pixel_values"] = torch.stack(images)
            masks = [self.hide_patches(generator).ravel() for generator in generators]
            batch["bool_masked_pos"] = torch.from_numpy(np.stack(masks))
        if any(captions):
            if images:
                chosen = [generator.random() < self.mismatched for generator in generators]
                captions, batch["itm_labels"] = exchange(captions, chosen)
            tokens = self.collator.tokens(captions)
            if images:
                batch["input_ids"] = tokens["input_ids"]
            hidden = [self.hide_tokens(*pair) for pair in zip(tokens["input_ids"].numpy(), generators, strict=True)]
            batch["attention_mask"] = tokens["attention_mask"]
            batch["input_ids_masked"], batch["mlm_labels"] = (
                torch.from_numpy(np.stack(rows)) for rows in zip(*hidden, strict=True)
            )
        return batch


def exchange(captions: Sequence[str], chosen: Sequence[bool]) -> tuple[list[str], Tensor]:
    """The captions, the chosen ones moved on by one place among themselves; and int64 (B,), 1 where it is the same."""
    places = [place for place, one in enumerate(chosen) if one]
    found = list(captions)
    for place, source in zip(places, places[-1:] + places[:-1], strict=True):
        found[place] = captions[source]
    return found, torch.tensor([int(a == b) for a, b in zip(captions, found, strict=True)])
