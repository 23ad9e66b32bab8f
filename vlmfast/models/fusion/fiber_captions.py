"""FIBER as a writer of captions: their loss, prompts in batches, and decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.data import Collator
from vlmfast.models.beam_search import beam_search


class Captioning:
    """Methods of a FIBERModel whose objective is captioning, of its `config`, `towers` and word head."""

    def _caption_loss(self: Any, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        labels = input_ids[:, 1:]
        if attention_mask is not None:
            labels = labels.masked_fill(attention_mask[:, 1:] == 0, -100)
        loss: Tensor = self._word_loss(
            self._decoded(self._memory(pixel_values), input_ids, attention_mask)[:, :-1], labels
        )
        return loss

    def _memory(self: Any, pixel_values: Tensor) -> Tensor:
        states: Tensor = self.towers.alone(image=self.towers.encode_image(pixel_values))
        return states

    def _decoded(self: Any, memory: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        states: Tensor = self.towers.decode(memory, self.towers.encode_text(input_ids, attention_mask, causal=True))
        return states

    @torch.no_grad()
    def _generate(
        self: Any,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 30,
        num_beams: int = 1,
    ) -> Tensor:
        """Token ids (B, N) int64 of what follows, up to the token that ends a text; `generate`.

        Args:
            pixel_values, input_ids, attention_mask: as `forward`, of prompts padded on the right.
            max_new_tokens: at most; fewer where RoBERTa has no position left.
            num_beams: 1 is greedy; more are those of `vlmfast.models.beam_search`.
        Raises:
            ValueError: a prompt is longer than RoBERTa's positions; as `beam_search`.
        """
        config, most = self.config.text_config, self.max_text_length
        if input_ids.shape[1] > most:
            raise ValueError(f"input_ids: expected at most {most} tokens, got {input_ids.shape[1]}")
        memory = self._memory(pixel_values)
        count = min(max_new_tokens, most - input_ids.shape[1] + 1)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lengths, end, pad = mask.sum(1), config.eos_token_id, config.pad_token_id

        def step(tokens: Tensor, rows: Tensor) -> Tensor:
            ids, seen, places = continued(input_ids[rows], lengths[rows], tokens, pad)
            states = self._decoded(memory[rows], ids, seen)[torch.arange(len(rows), device=rows.device), places]
            logits: Tensor = self.mlm_score(self.cross_modal_text_transform(states))
            return logits

        if num_beams == 1:
            return greedy(step, torch.arange(len(mask), device=mask.device), count, end=end, pad=pad)
        return beam_search(
            step, len(mask), beams=num_beams, per_node=num_beams, max_steps=count, end=end, device=mask.device
        )[0]


class PromptCollator:
    """A collator of prompts: texts without the token that ends them, of which at least the first stays."""

    def __init__(self, collator: Collator, tokenizer: Any) -> None:
        self.collator = collator
        self.end = tokenizer.eos_token_id

    def __call__(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        batch = self.collator(samples)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        rows, last = torch.arange(len(ids)), mask.sum(1) - 1
        ends = (ids[rows, last] == self.end) & (last > 0)
        mask[rows[ends], last[ends]] = 0
        longest = int(mask.sum(1).max())
        return {**batch, "input_ids": ids[:, :longest], "attention_mask": mask[:, :longest]}


def greedy(step: Callable[[Tensor, Tensor], Tensor], rows: Tensor, count: int, *, end: int, pad: int) -> Tensor:
    """Up to `count` tokens (B, N), each the likeliest one; `pad` after `end`.

    Args:
        step: (tokens (B, t), rows (B,)) to the logits (B, V) of what follows.
        rows (B,): of the batch, in order.
    """
    tokens = torch.zeros(len(rows), 0, dtype=torch.long, device=rows.device)
    going = torch.ones_like(rows, dtype=torch.bool)
    while tokens.shape[1] < count and bool(going.any()):
        token = torch.where(going, step(tokens, rows).argmax(-1), pad)
        tokens = torch.cat([tokens, token[:, None]], 1)
        going = going & (token != end)
    return tokens


def continued(input_ids: Tensor, lengths: Tensor, tokens: Tensor, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with what follows them, their mask, and the place (n,) of each row's last token.

    Args:
        input_ids (n, L): prompts, padded on the right; of `lengths` (n,).
        tokens (n, t): that follow.
    """
    count = tokens.shape[1]
    ids = F.pad(input_ids, (0, count), value=pad)
    ids = ids.scatter(1, lengths[:, None] + torch.arange(count, device=ids.device), tokens)
    longest = int(lengths.max()) + count
    mask = torch.arange(longest, device=ids.device) < (lengths + count)[:, None]
    return ids[:, :longest], mask.long(), lengths + count - 1
