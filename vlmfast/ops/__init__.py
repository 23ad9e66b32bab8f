"""Fused ops. Each one's module holds its equation, reference, backends, schema, autograd and public function."""

from vlmfast.ops.info_nce import info_nce
from vlmfast.ops.patch_embed import patch_embed, patch_embed_packed
from vlmfast.ops.sigmoid_loss import sigmoid_loss

__all__ = ["info_nce", "patch_embed", "patch_embed_packed", "sigmoid_loss"]
