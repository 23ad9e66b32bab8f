"""Attention of BERT's kind over the projections of transformers' modules, whatever attention these would choose."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def heads_attention(own: Any, states: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of states (B, L, D) to memory (B, M, D) by heads, side by side (B, L, D).

    The mask is all that hides a key: transformers marks some of these modules as causal, which they are not.

    Args:
        own: a BertSelfAttention, or a class copied from it: query, key, value, dropout, num_attention_heads.
        mask (B, 1, 1 or L, M): bool, True where a key is seen; None: everywhere.
    """
    q, k, v = (
        project(x).unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2)
        for project, x in ((own.query, states), (own.key, memory), (own.value, memory))
    )
    dropout = own.dropout.p if own.training else 0.0
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return found.transpose(1, 2).flatten(2)
