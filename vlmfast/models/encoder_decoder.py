"""A transformer of an encoder and a decoder, pre-norm, with a bias by relative place among the patches of an image.

Parameters have the names of transformers' MBart layers, and the layers compute the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Scaled dot-product attention of several heads.

    Args:
        width: D, a multiple of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) of states (B, L, D).

        Args:
            mask: float, added to the scores, broadcast to (B, heads, L, L).
        """
        return self.attend(states, *self.keys_values(states), mask)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Each (B, heads, L, D / heads)."""
        return self._split(self.k_proj(states)), self._split(self.v_proj(states))

    def attend(self, states: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        """(B, L, D); zeros for a query whose keys are all at -inf. `causal` counts from the last query and key back."""
        queries = self._split(self.q_proj(states))
        length, before = queries.shape[2], keys.shape[2] - queries.shape[2]
        if causal and before and length > 1:
            mask = torch.ones(length, keys.shape[2], dtype=torch.bool, device=keys.device).tril(before)
        elif mask is not None:
            mask = mask.to(queries.dtype)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal and not before and length > 1
        )
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class RelativeBias(nn.Module):
    """One number for each head and each way from one place of a grid to another.

    The table has (2 height - 1)(2 width - 1) rows, and starts at 0.
    """

    def __init__(self, height: int, width: int, heads: int) -> None:
        super().__init__()
        self.height, self.width = height, width
        self.table = nn.Parameter(torch.zeros((2 * height - 1) * (2 * width - 1), heads))

    def forward(self) -> Tensor:
        """(heads, P, P), P = height * width: of query and key, places row by row."""
        places = torch.arange(self.height * self.width, device=self.table.device)
        rows, columns = places // self.width, places % self.width
        down = rows[:, None] - rows[None] + self.height - 1
        right = columns[:, None] - columns[None] + self.width - 1
        return self.table[down * (2 * self.width - 1) + right].permute(2, 0, 1)


class EncoderLayer(nn.Module):
    """Self-attention, with a bias among patches, and an MLP four times as wide with exact GELU."""

    def __init__(self, width: int, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.relative_bias = RelativeBias(*grid, heads)

    def forward(self, states: Tensor, keys: Tensor, patches: int) -> Tensor:
        """See `Encoder`. keys: float (B, 1, 1, S), -inf for what is not read."""
        mask = keys
        if patches:
            rest = states.shape[1] - patches
            mask = keys + F.pad(self.relative_bias(), (0, rest, 0, rest))
        states = states + self.self_attn(self.self_attn_layer_norm(states), mask)
        added: Tensor = states + self.fc2(F.gelu(self.fc1(self.final_layer_norm(states))))
        return added


class Encoder(nn.Module):
    """States of patches and tokens that all see each other.

    Args:
        width, heads, layers: of the transformer.
        grid: rows and columns of patches.
    """

    main_input_name = "input_ids"  # transformers' generate compares it with the model's

    def __init__(self, width: int, heads: int, layers: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(width, heads, grid) for _ in range(layers))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, states: Tensor, read: Tensor, patches: int) -> Tensor:
        """(B, S, D) of states (B, S, D).

        Args:
            read: bool (B, S), False for what no state sees, such as pads.
            patches: how many of the first states are an image's: all of the grid, or 0.
        """
        keys = states.new_zeros(read.shape).masked_fill(~read, -torch.inf)[:, None, None]
        for layer in self.layers:
            states = layer(states, keys, patches)
        normed: Tensor = self.layer_norm(states)
        return normed


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's states, and an MLP four times as wide with exact GELU."""

    def __init__(self, width: int, heads: int, number: int) -> None:
        super().__init__()
        self.number = number
        self.self_attn = Attention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn = Attention(width, heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, states: Tensor, memory: Tensor, keys: Tensor, past: Any = None) -> Tensor:
        """See `Decoder`. keys: float (B, 1, 1, S), -inf for what is not read."""
        normed = self.self_attn_layer_norm(states)
        own = self.self_attn.keys_values(normed)
        if past is not None:
            own = past.self_attention_cache.update(*own, self.number)
        states = states + self.self_attn.attend(normed, *own, None, causal=True)
        if past is not None and past.is_updated.get(self.number):
            stored = past.cross_attention_cache.layers[self.number]
            theirs = stored.keys, stored.values
        else:
            theirs = self.encoder_attn.keys_values(memory)
            if past is not None:
                theirs = past.cross_attention_cache.update(*theirs, self.number)
                past.is_updated[self.number] = True
        states = states + self.encoder_attn.attend(self.encoder_attn_layer_norm(states), *theirs, keys)
        added: Tensor = states + self.fc2(F.gelu(self.fc1(self.final_layer_norm(states))))
        return added


class Decoder(nn.Module):
    """States of tokens that see those before them, and all that the encoder has read.

    Args:
        width, heads, layers: of the transformer.
    """

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(width, heads, number) for number in range(layers))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, states: Tensor, memory: Tensor, read: Tensor, past: Any = None) -> Tensor:
        """(B, T, D) of states (B, T, D), pads on the right.

        Args:
            memory (B, S, D): of the encoder.
            read: bool (B, S), False for what is not seen.
            past: transformers' EncoderDecoderCache, of the tokens before these; they are added to it.
        """
        keys = memory.new_zeros(read.shape).masked_fill(~read, -torch.inf)[:, None, None]
        for layer in self.layers:
            states = layer(states, memory, keys, past)
        normed: Tensor = self.layer_norm(states)
        return normed
