"""ViLBERT's config and options; `vlmfast.models.masked.vilbert` says what they are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import transformers

from vlmfast.models.contract import flag
from vlmfast.models.region_text import RegionTextOptions

REFUSED = ("dynamic_attention", "in_batch_pairs", "predict_feature", "fixed_t_layer", "fixed_v_layer")
"""Options of the authors' code that this model does not have."""


class ViLBERTConfig(transformers.BertConfig):
    """BertConfig of the words, and the regions' stream in the names of the authors' code.

    Args:
        v_feature_size: D_f, width of the regions' features.
        v_target_size: classes of the detector, background included; None where regions are not predicted.
        v_hidden_size, v_num_hidden_layers, v_num_attention_heads, v_intermediate_size, v_hidden_act,
            v_hidden_dropout_prob, v_attention_probs_dropout_prob: of the regions' stream.
        bi_hidden_size, bi_num_attention_heads: of co-attention; the former is also the width of `pooled`.
        t_biattention_id, v_biattention_id: before which layer of each stream the co-attentions stand.
        region_tower, region_tower_frozen, image_size, grid: see `VisualBERTConfig`.
        Others as BertConfig.
    Raises:
        ValueError: the lists differ in length, do not rise or name layers that there are not; a width is not a multiple
            of its heads; an option of a later paper is set.
    """

    model_type = "vilbert"

    def __init__(
        self,
        *,
        v_feature_size: int = 2048,
        v_target_size: int | None = 1601,
        v_hidden_size: int = 1024,
        v_num_hidden_layers: int = 6,
        v_num_attention_heads: int = 8,
        v_intermediate_size: int = 1024,
        v_hidden_act: str = "gelu",
        v_hidden_dropout_prob: float = 0.1,
        v_attention_probs_dropout_prob: float = 0.1,
        bi_hidden_size: int = 1024,
        bi_num_attention_heads: int = 8,
        t_biattention_id: Sequence[int] = (6, 7, 8, 9, 10, 11),
        v_biattention_id: Sequence[int] = (0, 1, 2, 3, 4, 5),
        region_tower: dict[str, Any] | None = None,
        region_tower_frozen: bool = False,
        image_size: int = 128,
        grid: int = 4,
        **kwargs: Any,
    ) -> None:
        for name in REFUSED:
            if kwargs.get(name):
                raise ValueError(f"{name}: expected none of later papers' options, got {kwargs[name]!r}")
        if kwargs.get("pooling_method", "mul") != "mul":
            raise ValueError(f"pooling_method: expected 'mul', got {kwargs['pooling_method']!r}")
        self.v_feature_size = v_feature_size
        self.v_target_size = v_target_size
        self.v_hidden_size = v_hidden_size
        self.v_num_hidden_layers = v_num_hidden_layers
        self.v_num_attention_heads = v_num_attention_heads
        self.v_intermediate_size = v_intermediate_size
        self.v_hidden_act = v_hidden_act
        self.v_hidden_dropout_prob = v_hidden_dropout_prob
        self.v_attention_probs_dropout_prob = v_attention_probs_dropout_prob
        self.bi_hidden_size = bi_hidden_size
        self.bi_num_attention_heads = bi_num_attention_heads
        self.t_biattention_id = list(t_biattention_id)
        self.v_biattention_id = list(v_biattention_id)
        self.region_tower = region_tower
        self.region_tower_frozen = region_tower_frozen
        self.image_size = image_size
        self.grid = grid
        super().__init__(**kwargs)
        for stream, layers in (("t", self.num_hidden_layers), ("v", self.v_num_hidden_layers)):
            places = getattr(self, f"{stream}_biattention_id")
            rises = all(a < b for a, b in pairwise(places))
            if not places or not rises or places[0] < 0 or places[-1] > layers:
                raise ValueError(f"{stream}_biattention_id: expected rising places from 0 to {layers}, got {places}")
        if len(self.t_biattention_id) != len(self.v_biattention_id):
            raise ValueError(
                f"t_biattention_id and v_biattention_id: expected as many of both, got {self.t_biattention_id} and "
                f"{self.v_biattention_id}"
            )
        for width, heads in (("v_hidden_size", "v_num_attention_heads"), ("bi_hidden_size", "bi_num_attention_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width}: expected a multiple of {heads}, got {getattr(self, width)}")

    def of_regions(self) -> transformers.BertConfig:
        """The regions' stream as a BERT's config."""
        names = (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
            "hidden_dropout_prob", "attention_probs_dropout_prob",
        )  # fmt: skip
        found = transformers.BertConfig(
            **{name: getattr(self, f"v_{name}") for name in names}, layer_norm_eps=self.layer_norm_eps
        )
        found._attn_implementation = self._attn_implementation
        return found


@dataclass
class ViLBERTOptions(RegionTextOptions):
    """A new BERT, or a pretrained one, the regions' stream and co-attention before the last layers of both."""

    text_layers: int = field(default=4, metadata={"help": "Layers of a new BERT."})
    region_width: int = field(default=192, metadata={"help": "Width of the regions' stream, a multiple of 64."})
    region_layers: int = field(default=2, metadata={"help": "Layers of regions, each behind a co-attention."})
    region_classes: int | None = field(
        default=None,
        metadata={"help": "Classes of a detector, background included, such as 1601: masked regions are predicted."},
    )

    new_model: ClassVar[tuple[str, ...]] = (
        *RegionTextOptions.new_model,
        "region_width",
        "region_layers",
        "region_classes",
    )

    def check(self) -> None:
        super().check()
        if self.region_dim is None and self.vision_tower is None:
            self.refuse(("region_classes",), "a new image tower, whose regions are not predicted; --region-dim has one")
        if self.region_width % 64:
            raise ValueError(f"{flag('region_width')}: expected a multiple of 64, got {self.region_width}")
