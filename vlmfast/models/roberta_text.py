"""What models whose text tower is a RoBERTa have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmfast.models.contract import Pretrainable
from vlmfast.models.masked_words import grow_bias


class ReadsRoBERTa(Pretrainable):
    """A model with a RoBERTa and perhaps an `mlm_score`, a BridgeTowerMLMHead of transformers.

    A model says where its RoBERTa is: `text_tower`.
    """

    config: Any

    @property
    def text_tower(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__}.text_tower")

    @property
    def max_text_length(self) -> int:
        """Tokens of a text at most, as RoBERTa counts its positions."""
        text = self.config.text_config
        return int(text.max_position_embeddings - text.pad_token_id - 1)

    @torch.no_grad()
    def resize_vocabulary(self, size: int) -> None:
        """Makes room for tokens at the end; what was there stays."""
        super().resize_vocabulary(size)
        if (head := getattr(self, "mlm_score", None)) is not None:
            grow_bias(head, size)
        for config in (self.config.text_config, self.text_tower.config):
            config.vocab_size = size

    def get_output_embeddings(self) -> nn.Module | None:
        head: Any = getattr(self, "mlm_score", None)
        return None if head is None else head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if (head := getattr(self, "mlm_score", None)) is not None:
            head.decoder = new_embeddings
