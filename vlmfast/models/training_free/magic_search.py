"""The search of MAGiC: a language model's candidates in one row beside a prefix that is kept once, and their scores."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from vlmfast.models.contract import eval_mode
from vlmfast.models.language_model import last_hidden_states


class Prefix:
    """What a language model has read of B texts, and states of tokens that may follow.

    The k candidates of a text stand in one row behind its prefix. Each has the position that follows it, and a mask
    lets it see the prefix and itself. So keys and values of the prefix are there once, not k times.

    Args:
        model: a causal language model that `check_candidates` has passed.
        input_ids, attention_mask (B, L): texts, with padding on the left.

    Attributes:
        states (B, t, D): last hidden states of all that was read.
        mask (B, t): 0 for padding.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.model, self.mask = model, attention_mask
        self.takes_positions = "position_ids" in signature(model.base_model.forward).parameters
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        outputs = self._read(input_ids, attention_mask, positions, None)
        self.states: Tensor = outputs.last_hidden_state
        self.cache = outputs.past_key_values

    def candidates(self, tokens: Tensor) -> Tensor:
        """Last hidden states (B, k, D) of tokens (B, k), each as if it alone followed; `take` must come next."""
        length, k = self.mask.shape[1], tokens.shape[1]
        dtype = self.states.dtype
        hidden = torch.cat(
            [
                (self.mask == 0)[:, None].expand(-1, k, -1),
                ~torch.eye(k, dtype=torch.bool, device=tokens.device).expand(len(tokens), -1, -1),
            ],
            dim=2,
        )
        # Added, as a boolean mask of four dimensions is read as numbers where attention is "eager".
        mask = torch.zeros(hidden.shape, dtype=dtype, device=tokens.device)
        mask = mask.masked_fill(hidden, torch.finfo(dtype).min)[:, None]
        positions = self.mask.sum(1, keepdim=True).expand(-1, k)
        states: Tensor = self._read(tokens, mask, positions, self.cache).last_hidden_state
        assert self.cache.layers[0].keys.shape[2] == length + k
        return states

    def take(self, states: Tensor, choice: Tensor) -> None:
        """Goes on with one candidate of each text.

        Args:
            states (B, k, D): of `candidates`.
            choice (B,): int64.
        """
        length = self.mask.shape[1]
        rows = torch.arange(len(choice), device=choice.device)
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                held = getattr(layer, name)
                held[:, :, length] = held[rows, :, length + choice]
                setattr(layer, name, held[:, :, : length + 1])
        self.states = torch.cat([self.states, states[rows, choice][:, None]], dim=1)
        self.mask = F.pad(self.mask, (0, 1), value=1)

    def _read(self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Any:
        takes = {"position_ids": positions} if self.takes_positions else {}
        embeddings = self.model.get_input_embeddings()(input_ids)
        return self.model.base_model(
            inputs_embeds=embeddings, attention_mask=mask, past_key_values=cache, use_cache=True, **takes
        )


@torch.no_grad()
def check_candidates(name: str, model: PreTrainedModel) -> None:
    """Whether candidates in one row have the states that they have alone, tried on two tokens behind three, twice.

    Raises:
        ValueError: they have not, as where positions come from the mask (ALiBi), or the cache is of another kind.
    """
    kind = model.config.model_type
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]], device=model.device) % model.get_input_embeddings().num_embeddings
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]], device=model.device)
    choice = torch.tensor([1, 0], device=model.device)
    try:
        with eval_mode(model):
            prefix = Prefix(model, ids, mask)
            if {type(layer) for layer in prefix.cache.layers} != {DynamicLayer}:
                raise ValueError(f"{name}: expected a language model that keeps keys and values of all, got {kind!r}")
            for _ in range(2):
                states = prefix.candidates(ids[:, :2])
                for column in range(2):
                    alone = torch.cat([ids, ids[:, column : column + 1]], dim=1)
                    seen = F.pad(mask, (0, alone.shape[1] - mask.shape[1]), value=1)
                    embeddings, positions = model.get_input_embeddings()(alone), (seen.cumsum(1) - 1).clamp(min=0)
                    expected = last_hidden_states(model, embeddings, seen, positions)[:, -1]
                    if not torch.allclose(states[:, column], expected, rtol=1e-3, atol=1e-3):
                        raise ValueError("its states differ from those of one candidate alone")
                prefix.take(states, choice)
                ids = torch.cat([ids, ids.gather(1, choice[:, None])], dim=1)
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        if str(error).startswith(name):
            raise
        raise ValueError(
            f"{name}: expected a language model whose tokens see what a mask of four dimensions says, and that counts "
            f"positions by position_ids; {kind!r} does not: {error}"
        ) from error


def degeneration(states: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """How much candidates are like what stands before: (B, k), the largest cosine with any earlier state.

    Args:
        states (B, k, D): of the candidates.
        context (B, t, D), mask (B, t): of all that was read, 0 for padding.
    """
    cosines = F.normalize(states.float(), dim=-1) @ F.normalize(context.float(), dim=-1).transpose(1, 2)
    return cosines.masked_fill((mask == 0)[:, None], -torch.inf).amax(dim=2)


def simctg(states: Tensor, mask: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """The sum of SimCTG's contrastive loss over all ordered pairs of tokens of a text, and how many pairs there are.

    Each pair costs max(0, margin - 1 + cosine), 1 being a state's cosine with itself.

    Args:
        states (B, L, D): last hidden states.
        mask (B, L): 0 for padding.
    """
    unit = F.normalize(states.float(), dim=-1)
    there = mask.bool()
    pairs = there[:, :, None] & there[:, None] & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    cost = (margin - 1 + unit @ unit.transpose(1, 2)).clamp(min=0)
    return cost.masked_fill(~pairs, 0).sum(), pairs.sum()
