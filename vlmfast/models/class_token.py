"""The last layer of a CLIP image tower where only its class token is read.

A feature is made of the class token alone. In the last layer the other tokens matter as keys and values; their queries,
their output projection and their MLP are read by nothing. Without them the layer does 2 of its 12 products of (W, W)
for each patch, with the same class token and the same gradients up to rounding.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPEncoderLayer


class ClassTokenLayer(CLIPEncoderLayer):
    """CLIP's layer; with class_token_only=True it returns the first token (B, 1, W) of what it would return."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        *args: Any,
        class_token_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        attention = self.self_attn
        # Whoever asks for another implementation may want its weights.
        if not class_token_only or attention.config._attn_implementation != "sdpa" or attention_mask is not None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)

        def heads(states: Tensor) -> Tensor:
            return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        states = self.layer_norm1(hidden_states)
        query, key, value = attention.q_proj(states[:, :1]), attention.k_proj(states), attention.v_proj(states)
        dropout = attention.dropout if self.training else 0.0
        read, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
            attention, heads(query), heads(key), heads(value), None, scaling=attention.scale, dropout=dropout
        )
        token = hidden_states[:, :1] + attention.out_proj(read.flatten(2))
        return token + self.mlp(self.layer_norm2(token))


def end_at_class_token(tower: Any) -> dict[str, bool]:
    """Gives a CLIP image tower such a last layer.

    Args:
        tower: an image tower of any type.
    Returns:
        keyword arguments with which the tower's `pooler_output` is that of the class token alone, and its
        last_hidden_state (B, 1, W); none for a tower that has no such layer.
    """
    encoder = getattr(tower, "encoder", None)
    if not isinstance(tower, transformers.CLIPVisionModel) or encoder is None:
        return {}
    passed = inspect.signature(type(encoder).forward).parameters.values()
    if type(encoder.layers[-1]) is not CLIPEncoderLayer or all(p.kind is not p.VAR_KEYWORD for p in passed):
        return {}
    encoder.layers[-1].__class__ = ClassTokenLayer
    return {"class_token_only": True}
