"""Fused ops. Each one's module holds its equation, reference, backends, schema, autograd and public function."""

from vlmfast.ops.info_nce import info_nce

__all__ = ["info_nce"]
