"""ViLBERT's streams and heads, with the names of parameters of the authors' code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bert import modeling_bert as bert

from vlmfast.models.masked.vilbert_config import ViLBERTConfig
from vlmfast.models.region_batches import corners_and_area


class Streams(nn.Module):
    """Embeddings, layers of both streams, co-attention between them, and poolers; names as in the authors' code."""

    def __init__(self, config: ViLBERTConfig) -> None:
        super().__init__()
        self.embeddings = bert.BertEmbeddings(config)
        self.v_embeddings = RegionEmbeddings(config)
        self.encoder = CoEncoder(config)
        self.t_pooler = Pooler(config.hidden_size, config.bi_hidden_size)
        self.v_pooler = Pooler(config.v_hidden_size, config.bi_hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        words: Tensor,
        features: Tensor,
        places: Tensor,
        regions: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Last states (B, L, D) and (B, R, D_v); words (B, L) and regions (B, R) are bool, True where there is one."""
        text = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        image = self.v_embeddings(features, places)
        found: tuple[Tensor, Tensor] = self.encoder(text, words[:, None, None], image, regions[:, None, None])
        return found


class RegionEmbeddings(nn.Module):
    """LN(W f + V place) (B, R, D_v) of features (B, R, D_f) and places (B, R, 5), with dropout."""

    def __init__(self, config: ViLBERTConfig) -> None:
        super().__init__()
        self.image_embeddings = nn.Linear(config.v_feature_size, config.v_hidden_size)
        self.image_location_embeddings = nn.Linear(5, config.v_hidden_size)
        self.LayerNorm = nn.LayerNorm(config.v_hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, features: Tensor, places: Tensor) -> Tensor:
        found: Tensor = self.dropout(
            self.LayerNorm(self.image_embeddings(features) + self.image_location_embeddings(places))
        )
        return found


class CoEncoder(nn.Module):
    """The layers of both streams, in the order that the config's places of co-attention give."""

    def __init__(self, config: ViLBERTConfig) -> None:
        super().__init__()
        regions = config.of_regions()
        self.layer = nn.ModuleList([bert.BertLayer(config) for _ in range(config.num_hidden_layers)])
        self.v_layer = nn.ModuleList([bert.BertLayer(regions) for _ in range(config.v_num_hidden_layers)])
        self.c_layer = nn.ModuleList([CoLayer(config) for _ in config.v_biattention_id])
        self.places = list(zip(config.t_biattention_id, config.v_biattention_id, strict=True))

    def forward(self, text: Tensor, words: Tensor, image: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, L, D) and (B, R, D_v) after all layers; masks are bool (B, 1, 1, L) and (B, 1, 1, R)."""
        done = 0, 0
        for (t, v), co_attention in zip(self.places, self.c_layer, strict=True):
            text = self._through(self.layer[done[0] : t], text, words)
            image = self._through(self.v_layer[done[1] : v], image, regions)
            image, text = co_attention(image, regions, text, words)
            done = t, v
        return (
            self._through(self.layer[done[0] :], text, words),
            self._through(self.v_layer[done[1] :], image, regions),
        )

    @staticmethod
    def _through(layers: Any, states: Tensor, mask: Tensor) -> Tensor:
        for layer in layers:
            # Of what attention makes of a mask: sdpa takes bool, eager adds numbers.
            eager = layer.attention.self.config._attn_implementation == "eager"
            added = torch.zeros_like(mask, dtype=states.dtype).masked_fill(~mask, torch.finfo(states.dtype).min)
            states = layer(states, added if eager else mask)
        return states


class CoLayer(nn.Module):
    """Each stream reads the other, both as they come in, then has its own MLP; 1 is the image, 2 the text."""

    def __init__(self, config: ViLBERTConfig) -> None:
        super().__init__()
        regions = config.of_regions()
        self.biattention = CoAttention(config)
        self.biOutput = CoOutput(config)
        self.v_intermediate = bert.BertIntermediate(regions)
        self.v_output = bert.BertOutput(regions)
        self.t_intermediate = bert.BertIntermediate(config)
        self.t_output = bert.BertOutput(config)

    def forward(self, image: Tensor, regions: Tensor, text: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        of_image, of_text = self.biattention(image, regions, text, words)
        image, text = self.biOutput(of_text, image, of_image, text)
        return (
            self.v_output(self.v_intermediate(image), image),
            self.t_output(self.t_intermediate(text), text),
        )


class CoAttention(nn.Module):
    """Queries, keys and values of both streams, of one width."""

    def __init__(self, config: ViLBERTConfig) -> None:
        super().__init__()
        image, text, width = config.v_hidden_size, config.hidden_size, config.bi_hidden_size
        self.query1, self.key1, self.value1 = (nn.Linear(image, width) for _ in range(3))
        self.query2, self.key2, self.value2 = (nn.Linear(text, width) for _ in range(3))
        self.heads = config.bi_num_attention_heads
        self.dropouts = config.v_attention_probs_dropout_prob, config.attention_probs_dropout_prob

    def forward(self, image: Tensor, regions: Tensor, text: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """What words read of the image (B, L, W), and regions of the text (B, R, W)."""
        q1, k1, v1 = (self._heads(layer(image)) for layer in (self.query1, self.key1, self.value1))
        q2, k2, v2 = (self._heads(layer(text)) for layer in (self.query2, self.key2, self.value2))
        return self._attend(q2, k1, v1, regions, self.dropouts[0]), self._attend(q1, k2, v2, words, self.dropouts[1])

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout if self.training else 0.0)
        return found.transpose(1, 2).flatten(2)


class CoOutput(nn.Module):
    """LN(dropout(W c) + x) of each stream, c being what it has read and x its own states."""

    def __init__(self, config: ViLBERTConfig) -> None:
        super().__init__()
        width, eps = config.bi_hidden_size, config.layer_norm_eps
        self.dense1 = nn.Linear(width, config.v_hidden_size)
        self.LayerNorm1 = nn.LayerNorm(config.v_hidden_size, eps=eps)
        self.dropout1 = nn.Dropout(config.v_hidden_dropout_prob)
        self.dense2 = nn.Linear(width, config.hidden_size)
        self.LayerNorm2 = nn.LayerNorm(config.hidden_size, eps=eps)
        self.dropout2 = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, read1: Tensor, own1: Tensor, read2: Tensor, own2: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self.LayerNorm1(self.dropout1(self.dense1(read1)) + own1),
            self.LayerNorm2(self.dropout2(self.dense2(read2)) + own2),
        )


class Pooler(nn.Module):
    """relu(P h_0) (B, W) of the first state."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, out)

    def forward(self, states: Tensor) -> Tensor:
        return F.relu(self.dense(states[:, 0]))


class Heads(nn.Module):
    """What pre-training predicts: words, matching, and classes of regions where `v_target_size` is not None."""

    def __init__(self, config: ViLBERTConfig) -> None:
        super().__init__()
        self.predictions = bert.BertLMPredictionHead(config)
        self.bi_seq_relationship = nn.Linear(config.bi_hidden_size, 2)
        self.imagePredictions = None if config.v_target_size is None else RegionHead(config)


class RegionHead(nn.Module):
    """Logits (N, C) of the detector's classes, of states (N, D_v)."""

    def __init__(self, config: ViLBERTConfig) -> None:
        super().__init__()
        self.transform = bert.BertPredictionHeadTransform(config.of_regions())
        self.decoder = nn.Linear(config.v_hidden_size, int(config.v_target_size or 1))

    def forward(self, states: Tensor) -> Tensor:
        found: Tensor = self.decoder(self.transform(states))
        return found


def with_whole_image(features: Tensor, boxes: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[IMG] before the regions: features (B, 1 + R, D_f), places (B, 1 + R, 5) and which are there (B, 1 + R).

    Args:
        features (B, R, D_f), boxes (B, R, 4), present (B, R): of the regions, the features as they are seen.
    """
    there = present.to(features.dtype)[..., None]
    mean = (features * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    places = corners_and_area(boxes)
    whole = places.new_tensor([0, 0, 1, 1, 1]).expand(len(places), 1, 5)
    return (
        torch.cat([mean, features], dim=1),
        torch.cat([whole, places], dim=1),
        torch.cat([torch.ones_like(present[:, :1]), present], dim=1),
    )
