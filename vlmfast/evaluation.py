"""The name of `vlmfast.tasks` before it had tasks: its `evaluate`, which takes a tokenizer in the collator's place."""

from typing import Any

from vlmfast.data import Collator
from vlmfast.tasks import retrieval


def evaluate(model: Any, dataset: Any, tokenizer: Any, *, max_length: int, **options: Any) -> retrieval.Evaluation:
    """`vlmfast.tasks.retrieval.evaluate`, texts cut to max_length tokens."""
    return retrieval.evaluate(model, dataset, Collator(tokenizer, max_length=max_length), **options)


__all__ = ["evaluate"]
