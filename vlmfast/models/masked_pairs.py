"""Batches of pairs for masked language modelling, image-text matching and contrast, as BridgeTower and FIBER learn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlmfast.data import Collator
from vlmfast.data.dataset import Sample
from vlmfast.data.masking import TokenMask
from vlmfast.data.records import text_of
from vlmfast.data.text import usable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MaskedPairCollator:
    """A list of samples to one batch; skipped samples are left out. All that is random comes from each sample's seed.

    To what `Collator` gives come `mlm_input_ids` and `mlm_labels` int64 (B, L), the caption with tokens masked and the
    masked tokens' ids, -100 elsewhere; `draws` float32 (B, 2), uniform in [0, 1), by which negatives are drawn; and
    `image_ids` int64 (B,), equal for pairs of one image, and for those whose records have the same `image_id`.

    Args:
        tokenizer: a transformers tokenizer with a padding and a mask token.
        max_length: limit on tokens per caption, special tokens included.
        mask_probability: of each token that is not special to be predicted.
        captions_per_image: pairs of an image in the batch, each with another of its record's `captions`, where there
            are as many.
    Raises:
        ValueError: the tokenizer lacks a token; an argument is out of its range; every sample of a batch was skipped.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        mask_probability: float = 0.15,
        captions_per_image: int = 1,
    ) -> None:
        self.collator = Collator(tokenizer, max_length=max_length)
        self.mask = TokenMask(tokenizer, mask_probability)
        self.captions_per_image = captions_per_image

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        kept = [pair for sample in usable(samples) for pair in self._pairs(sample)]
        batch = self.collator(kept)
        generators = [np.random.default_rng(sample.seed) for sample in kept]
        draws = np.stack([generator.random(2, dtype=np.float32) for generator in generators])
        ids = batch["input_ids"].numpy()
        masked = [self.mask(*pair) for pair in zip(ids, generators, strict=True)]
        inputs, labels = (torch.from_numpy(np.stack(rows)) for rows in zip(*masked, strict=True))
        return {
            **batch,
            "mlm_input_ids": inputs,
            "mlm_labels": labels,
            "draws": torch.from_numpy(draws),
            "image_ids": torch.tensor([_image_id(sample) for sample in kept]),
        }

    def _pairs(self, sample: Sample) -> list[Sample]:
        """The sample, and as many more with other captions of its record as are wanted."""
        if self.captions_per_image == 1:
            return [sample]
        others = sorted(set(text_of(sample.record).captions) - {sample.caption})
        drawn = np.random.default_rng((sample.seed, 1)).permutation(len(others))[: self.captions_per_image - 1]
        more = [replace(sample, caption=others[k], seed=sample.seed ^ (n + 1)) for n, k in enumerate(drawn)]
        return [sample, *more]


def _image_id(sample: Sample) -> int:
    name = str(sample.record.get("image_id", sample.key))
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:8], "big", signed=True)
