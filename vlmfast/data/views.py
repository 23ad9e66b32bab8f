"""Two text views of each pair beside its two image views, for DeCLIP: the caption masked, and the caption rewritten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlmfast.data.dataset import Sample
from vlmfast.data.masking import TokenMask
from vlmfast.data.text import Collator, usable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TwoViewCollator:
    """A list of samples with two image views each to one batch with two text views; skipped samples are left out.

    The batch holds `pixel_values` uint8 (B, 2, H, W, 3); `input_ids` and `attention_mask` int64 (B, 2, L), of which
    [:, 0] is the caption with tokens masked and [:, 1] the caption rewritten; and `mlm_labels` int64 (B, L), the token
    ids of the caption where they are masked and -100 elsewhere. All randomness comes from each sample's seed.

    Args:
        tokenizer: a transformers tokenizer with a padding and a mask token.
        max_length: limit on tokens per caption, special tokens included.
        rewrite: (caption, generator) -> another caption of the same meaning, such as `EDA`.
        mask_probability: of each token that is not special to be predicted.
    Raises:
        ValueError: the tokenizer lacks a token; an argument is out of its range; in a call, when every sample of the
            batch was skipped or has one view.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        rewrite: Callable[[str, np.random.Generator], str],
        mask_probability: float = 0.15,
    ) -> None:
        self.collator = Collator(tokenizer, max_length=max_length)
        self.rewrite = rewrite
        self.mask = TokenMask(tokenizer, mask_probability)

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        kept = usable(samples)
        images = [sample.image for sample in kept if sample.image is not None]
        if len(images) < len(kept) or images[0].dim() != 4 or len(images[0]) != 2:
            shape = tuple(images[0].shape) if images else None
            raise ValueError(f"samples: expected images of shape (2, H, W, 3), as two_views gives them, got {shape}")
        generators = [np.random.default_rng(sample.seed) for sample in kept]
        captions = [sample.caption for sample in kept]
        rewritten = [self.rewrite(*pair) or pair[0] for pair in zip(captions, generators, strict=True)]
        tokens = self.collator.tokens(captions + rewritten)
        ids, second = tokens["input_ids"].numpy().reshape(2, len(kept), -1)
        masked = [self.mask(*pair) for pair in zip(ids, generators, strict=True)]
        first, labels = (torch.from_numpy(np.stack(rows)) for rows in zip(*masked, strict=True))
        return {
            "pixel_values": torch.stack(images),
            "input_ids": torch.stack([first, torch.from_numpy(second)], 1),
            "attention_mask": tokens["attention_mask"].unflatten(0, (2, -1)).transpose(0, 1).contiguous(),
            "mlm_labels": labels,
        }
