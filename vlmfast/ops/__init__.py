"""Fused ops. Each one's module holds its equation, reference, backends, schema, autograd and public function."""

from vlmfast.ops.gated_residual import gated_residual
from vlmfast.ops.info_nce import info_nce
from vlmfast.ops.linear_cross_entropy import linear_cross_entropy
from vlmfast.ops.media_attention import media_attention
from vlmfast.ops.media_index import media_index
from vlmfast.ops.patch_embed import patch_embed, patch_embed_packed
from vlmfast.ops.sigmoid_loss import sigmoid_loss

__all__ = [
    "gated_residual",
    "info_nce",
    "linear_cross_entropy",
    "media_attention",
    "media_index",
    "patch_embed",
    "patch_embed_packed",
    "sigmoid_loss",
]
