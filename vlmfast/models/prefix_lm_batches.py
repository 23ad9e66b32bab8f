"""Samples to batches of an encoder that reads an image and a part of its text, and a decoder of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmfast.data.dataset import Sample
from vlmfast.data.text import usable
from vlmfast.models.caption_batches import encode, image_of, pad_rows
from vlmfast.nn.prefix import IGNORED


class PrefixLMCollator:
    """A list of samples to one batch of SimVLM; skipped samples (None) are left out.

    A text is cut into what the encoder reads, before T_p, and what the decoder predicts: `input_ids` and
    `attention_mask` (B, L), `decoder_input_ids` and `labels` (B, T). Where `Sample.prompt` says what is given, that is
    the prefix. Samples without an image make `image_mask` (B,).

    Args:
        tokenizer: a transformers tokenizer.
        config: the model's, with `max_position_embeddings` and the begin and end tokens.
        max_length: tokens of a text at most, with its end; what is longer is cut, and has no end. None makes prompts:
            all of a text is the prefix, and nothing is cut or predicted.
        cut: probability that T_p is drawn, from 0 to T - 1, as a function of `Sample.seed`; else it is 0. Texts without
            images are always cut.
        lines: texts without images, of which `documents` are added to every batch.
    Raises:
        ValueError: in a call, a sample has several images, a prompt has more tokens than positions, or every sample of
            the batch was skipped.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: Any,
        *,
        max_length: int | None = None,
        cut: float = 0.0,
        lines: Sequence[str] = (),
        documents: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.begin, self.end = config.bos_token_id, config.eos_token_id
        self.positions = config.max_position_embeddings
        self.max_length = max_length
        self.cut = cut
        self.lines, self.documents = lines, documents

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        kept = usable(samples)
        if self.lines:
            generator = np.random.default_rng((kept[0].seed, 1))
            for line in generator.integers(len(self.lines), size=self.documents).tolist():
                seed = int(generator.integers(2**63))
                kept.append(Sample(None, self.lines[line], f"line {line}", None, seed))
        images = [image_of(sample) for sample in kept]
        batch: dict[str, Tensor] = {}
        present = [image for image in images if image is not None]
        if present:
            batch["pixel_values"] = torch.stack(present)
            if len(present) < len(images):
                batch["image_mask"] = torch.tensor([image is not None for image in images])
        rows = [self._cut(sample) for sample in kept]
        batch["input_ids"], batch["attention_mask"] = pad_rows([prefix for prefix, _ in rows])
        if self.max_length is not None:
            batch["decoder_input_ids"], _ = pad_rows([[self.begin, *rest[:-1]] for _, rest in rows])
            batch["labels"], _ = pad_rows([rest for _, rest in rows], filler=IGNORED)
        return batch

    def _cut(self, sample: Sample) -> tuple[list[int], list[int]]:
        """The tokens of the prefix, and those that follow."""
        if self.max_length is None:
            given, text = sample.caption, ""
        else:
            given, text = sample.prompt, sample.caption.removeprefix(sample.prompt)
        prefix = encode(self.tokenizer, given)
        if len(prefix) > self.positions:
            raise ValueError(
                f"prompt of sample {sample.key!r}: expected at most the model's {self.positions} positions, got "
                f"{len(prefix)} tokens"
            )
        if self.max_length is None:
            return prefix, []
        ids = [*encode(self.tokenizer, text), self.end][: self.max_length]
        generator, start = np.random.default_rng(sample.seed), 0
        if not given and (sample.image is None or generator.random() < self.cut):
            start = int(generator.integers(len(ids)))
        return prefix + ids[:start], ids[start:]
