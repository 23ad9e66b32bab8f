"""Attention of short sequences of 16-bit numbers on CPUs, in float32.

torch 2.14's backward pass of it in bfloat16 or float16 is slow there. Forward and backward on one core of a Xeon, heads
of 64: at 65 tokens 51 ms, in float32 with the casts 20; at 25 tokens 16 and 5.5; at 197 as long; at 512 42 and 61.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

LONGEST = 128
"""Keys at most; with more the casts cost more than they save."""


@contextmanager
def short_attention_in_float32() -> Iterator[None]:
    """Inside, what transformers calls "sdpa" computes short sequences that need a gradient on a CPU in float32.

    Its output has the query's dtype. Other implementations, devices and lengths are as outside, and so is attention
    with a bias of positions.
    """
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        short = key.shape[-2] <= LONGEST and query.device.type == "cpu" and query.dtype.itemsize == 2
        backward = torch.is_grad_enabled() and query.requires_grad
        if not short or not backward or options.get("position_bias") is not None:
            return original(module, query, key, value, attention_mask, **options)
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        with torch.autocast("cpu", enabled=False):
            found, weights = original(module, query.float(), key.float(), value.float(), attention_mask, **options)
        return found.to(query.dtype), weights

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original
