"""ViLBERT: Lu, Batra, Parikh and Lee 2019, "ViLBERT: Pretraining Task-Agnostic Visiolinguistic Representations for
Vision-and-Language Tasks" (1908.02265).

Two post-norm streams, of words and of the regions of an image, that co-attention joins::

    region  = LN(W f + V [x1 / W, y1 / H, x2 / W, y2 / H, area / (W H)])
    [IMG]   = a region before all others: the mean of their features, in the box of the whole image
    words:    layer 0 .. t_0 - 1, co-attention 0, layer t_0 .. t_1 - 1, co-attention 1, ...
    regions:  layer 0 .. v_0 - 1, co-attention 0, layer v_0 .. v_1 - 1, co-attention 1, ...
    co-attention: words read regions and regions read words, both as they were before it; then each its own MLP
    pooled  = relu(P h_CLS) * relu(Q h_IMG)
    loss    = mean over masked words of CE(w | all) + mean over masked regions of KL(q | p) + CE(pooled)

Of the words 15 % are predicted, as BERT's. Of the regions 15 % are: 90 % of those are zeros, 10 % stay. q is the
detector's distribution over its classes, background first. In half of the samples the caption is another image's; the
class of a pair that belongs together is 0, as in the authors' code. Words and regions are predicted in other pairs too.

Everything is trained, but the detector, whose features are computed before (`vlmfast regions`).

Fine-tuning: vqa and reasoning read `pooled`; grounding a linear map of each region's last state beside the phrase
alone, trained by binary cross-entropy: 1 for regions that overlap the phrase's boxes by an IoU of 0.5 or more.

Departures from the authors' code (vilbert_beta), whose weights load:

- A batch without masked regions has a loss of 0 in that term (there NaN). Means are over the batch of all processes.
- The layers `q_dense1` and `q_dense2`, which nothing reads there, are left out.
- `dynamic_attention`, `in_batch_pairs` and `predict_feature`, of later papers, are refused; so are `fixed_t_layer` and
  `fixed_v_layer`, which freeze layers.
- Where samples have no detector's features, a small ResNet makes them of boxes or of a grid and is trained with the
  rest, and regions are neither masked nor predicted. With --vision-tower it is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bert import modeling_bert as bert
from transformers.utils import ModelOutput

from vlmfast.data import Sample, TokenMask
from vlmfast.data.text import usable
from vlmfast.models.contract import JointFeatures
from vlmfast.models.gathered import mean_count
from vlmfast.models.masked.vilbert_config import ViLBERTConfig, ViLBERTOptions
from vlmfast.models.masked.vilbert_parts import Heads, Streams, with_whole_image
from vlmfast.models.masked_texts import Texts
from vlmfast.models.region_batches import ENOUGH, RegionCollator, generators_of, mask_regions, mismatch, take_regions
from vlmfast.models.region_text import NewText
from vlmfast.models.region_tower import NewRegions, ReadsRegions
from vlmfast.nn import language_model_loss

IGNORED = -100


@dataclass
class ViLBERTOutput(ModelOutput):
    """`loss`, where there is something to predict, and its terms; `matching_logits` (B, 2), the first of aligned."""

    loss: Tensor | None = None
    word_loss: Tensor | None = None
    region_loss: Tensor | None = None
    matching_loss: Tensor | None = None
    matching_logits: Tensor | None = None


class ViLBERTModel(ReadsRegions, bert.BertPreTrainedModel):
    """Masked words and regions, and matching; see the top of this file."""

    config: ViLBERTConfig
    config_class = ViLBERTConfig
    Options = ViLBERTOptions
    strategy, paper = "masked", "Lu et al. 2019 (1908.02265)"
    tasks = ("retrieval", "vqa", "grounding", "reasoning")
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-4, "weight_decay": 0.01}
    special_tokens: ClassVar[dict[str, str]] = {"mask_token": "<|mask|>"}
    new_parts = ("vision_logit.", "region_tower.", "cls.")
    accepts_loss_kwargs = False
    matched_class = 0  # as in the authors' data
    base_model_prefix = "vilbert"  # never a prefix of names
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"\.biOutput\.q_dense[12]\.", r"position_ids$"]

    def __init__(self, config: ViLBERTConfig) -> None:
        super().__init__(config)
        self.region_tower = self.new_region_tower("v_feature_size")
        self.bert = Streams(config)
        self.cls = Heads(config)
        self.dropout = nn.Dropout(0.1)
        self.vision_logit = nn.Linear(config.v_hidden_size, 1)
        self.freeze()
        self.post_init()

    @classmethod
    def create(cls, options: ViLBERTOptions, tokenizer: Any, **overrides: Any) -> ViLBERTModel:
        text = NewText(options, tokenizer)
        sizes = text.with_layers(options.text_layers)
        layers, width = options.region_layers, options.region_width
        if layers > sizes["num_hidden_layers"]:
            raise ValueError(
                f"--region-layers: expected at most the {sizes['num_hidden_layers']} layers of words, got {layers}"
            )
        heads = width // 128 if width % 128 == 0 else width // 64  # of 128 in the paper
        regions = NewRegions(options)
        streams = {
            "v_feature_size": regions.width,
            "v_target_size": options.region_classes,
            "v_hidden_size": width,
            "v_intermediate_size": width,
            "v_num_hidden_layers": layers,
            "v_num_attention_heads": heads,
            "bi_hidden_size": width,
            "bi_num_attention_heads": heads,
            "v_biattention_id": list(range(layers)),
            "t_biattention_id": list(range(sizes["num_hidden_layers"] - layers, sizes["num_hidden_layers"])),
        }
        model = cls(ViLBERTConfig(**{**sizes, **streams, **regions.settings, **overrides}))
        regions.fill(model.region_tower)
        text.fill(model.bert, model.cls)
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.bert.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.bert.embeddings.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        regions, texts = self.region_collator(options), Texts(tokenizer, options.max_length)
        mask = TokenMask(tokenizer, 0.15) if train else None
        return ViLBERTCollator(regions, texts, mask, self.config.v_target_size)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        region_features: Tensor | None = None,
        region_boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        region_source: Tensor | None = None,
        masked_regions: Tensor | None = None,
        region_targets: Tensor | None = None,
        labels: Tensor | None = None,
        matched: Tensor | None = None,
        phrase_mask: Tensor | None = None,
        phrase_overlap: Tensor | None = None,
    ) -> ViLBERTOutput:
        """The loss of what is to be predicted.

        Args:
            input_ids, attention_mask, token_type_ids (B, L): int64; a text's tokens, 1 for tokens, the segment.
            region_features (B, R, D_f): of a detector; or pixel_values uint8 (B, S, S, 3), for the image tower.
            region_boxes (B, R, 4): x1 y1 x2 y2, shares of width and height.
            region_mask (B, R): 1 where there is a region; None when there are no others.
            region_source, masked_regions (B, R): see `MaskedRegions`.
            region_targets (B, R, C): the detector's distribution over its classes, background first.
            labels (B, L): int64, the ids of masked words, and -100.
            matched (B,): int64, 1 where text and image belong together.
            phrase_mask, phrase_overlap: of grounding, see `vlmfast.models.contract`; the loss is then that of
                `phrase_scores`, and what pre-training predicts is not read.
        Raises:
            ValueError: region_boxes are missing, a label is out of range, or C is not `v_target_size`.
        """
        read: dict[str, Any] = {
            "region_features": region_features,
            "region_boxes": region_boxes,
            "region_mask": region_mask,
            "pixel_values": pixel_values,
        }
        if phrase_overlap is not None:
            assert phrase_mask is not None
            scores = self.phrase_scores(phrase_mask, input_ids=input_ids, attention_mask=attention_mask, **read)
            return ViLBERTOutput(loss=phrase_loss(scores, phrase_overlap, phrase_mask, region_mask))
        words, regions = self._read(input_ids, attention_mask, token_type_ids, region_source=region_source, **read)
        terms: dict[str, Tensor] = {}
        if labels is not None:
            rows = labels != IGNORED
            hidden = self.cls.predictions.transform(words[rows])
            terms["word_loss"] = language_model_loss(
                hidden, self.cls.predictions.decoder, labels[rows], shift=False, num_items_in_batch=mean_count(rows)
            )
        if region_targets is not None and masked_regions is not None:
            terms["region_loss"] = self._region_loss(regions[:, 1:], masked_regions, region_targets)
        logits = self.cls.bi_seq_relationship(self._pooled(words, regions))
        if matched is not None:
            terms["matching_loss"] = F.cross_entropy(logits.float(), 1 - matched)  # aligned is 0
        loss = torch.stack(list(terms.values())).sum() if terms else None
        return ViLBERTOutput(loss=loss, matching_logits=logits, **terms)

    def joint_features(self, **batch: Any) -> JointFeatures:
        """`pooled` is the product of both streams' pooled states; regions are without [IMG]."""
        words, regions = self._read(**batch)
        masks = batch.get("attention_mask"), batch.get("region_mask")
        return JointFeatures(self._pooled(words, regions), words, regions[:, 1:], *masks)

    def phrase_scores(
        self,
        phrase_mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        region_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **regions: Any,
    ) -> Tensor:
        """(B, P, R), the logit of each region beside each phrase alone; the lowest number for padding.

        A phrase is a text of its own: its tokens between the caption's first and last, which are BERT's special ones.
        """
        rows, phrases = phrase_mask.shape[:2]
        ids, mask = phrase_texts(input_ids, attention_mask, phrase_mask)

        def repeated(value: Any) -> Any:
            return value.repeat_interleave(phrases, 0) if isinstance(value, Tensor) else value

        given = {name: repeated(value) for name, value in regions.items() if name != "pixel_values"}
        if self.region_tower is not None:  # each image once
            features = self.region_features_of(None, regions.get("pixel_values"), regions.get("region_boxes"))
            given["features"] = repeated(features)
        _, states = self._read(ids, mask, region_mask=repeated(region_mask), **given)
        scores: Tensor = self.vision_logit(self.dropout(states[:, 1:])).view(rows, phrases, -1)
        if region_mask is None:
            return scores
        return scores.masked_fill(region_mask[:, None] == 0, torch.finfo(scores.dtype).min)

    def _read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        region_features: Tensor | None = None,
        region_boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        region_source: Tensor | None = None,
        features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The last states of words (B, L, D) and of [IMG] and regions (B, 1 + R, D_v)."""
        if region_boxes is None:
            raise ValueError("region_boxes: expected (B, R, 4), got None")
        if features is None:
            features = self.region_features_of(region_features, pixel_values, region_boxes)
        present = torch.ones(features.shape[:2], device=features.device) if region_mask is None else region_mask
        if region_source is not None:
            features = take_regions(features, region_source)
        features, places, present = with_whole_image(features, region_boxes.to(features.dtype), present)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        found: tuple[Tensor, Tensor] = self.bert(
            input_ids, token_type_ids, attention_mask != 0, features, places, present != 0
        )
        return found

    def _pooled(self, words: Tensor, regions: Tensor) -> Tensor:
        pooled: Tensor = self.dropout(self.bert.t_pooler(words) * self.bert.v_pooler(regions))
        return pooled

    def _region_loss(self, states: Tensor, masked: Tensor, targets: Tensor) -> Tensor:
        """The divergence of the masked regions' predictions from the detector's, over the number of masked regions."""
        head = self.cls.imagePredictions
        if head is None:
            raise ValueError("region_targets: expected None, got a tensor; v_target_size of this model is None")
        if targets.shape[2] != self.config.v_target_size:
            raise ValueError(
                f"region_targets: expected {self.config.v_target_size} classes (v_target_size), got "
                f"{targets.shape[2]}; --region-classes is the number of the detector's classes with the background"
            )
        found = head(states[masked]).float().log_softmax(dim=1)
        return F.kl_div(found, targets[masked].float(), reduction="sum") / mean_count(masked)


def phrase_texts(input_ids: Tensor, attention_mask: Tensor | None, phrase_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each phrase between its caption's first and last token: ids and mask (B * P, L'), int64, padded on the right.

    Args:
        input_ids, attention_mask (B, L): padded on the right.
        phrase_mask: bool (B, P, L).
    """
    phrases, length = phrase_mask.shape[1:]
    there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    places = torch.arange(length, device=input_ids.device)
    ends = (places == 0) | (places == there.sum(1, keepdim=True) - 1)
    kept = (phrase_mask | ends[:, None]).flatten(0, 1)
    order = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, : int(kept.sum(1).max())]
    mask = kept.gather(1, order)
    ids = input_ids.repeat_interleave(phrases, 0).gather(1, order)
    return ids.masked_fill(~mask, 0), mask.long()


def phrase_loss(scores: Tensor, overlap: Tensor, phrase_mask: Tensor, region_mask: Tensor | None) -> Tensor:
    """Binary cross-entropy of the scores (B, P, R), summed over regions and averaged over phrases that have tokens.

    Args:
        overlap (B, P, R): IoU with the phrase's boxes; ENOUGH is 1.
    """
    there = phrase_mask.any(2)
    counted = there[..., None].expand_as(scores)
    if region_mask is not None:
        counted = counted & (region_mask[:, None] != 0)
    found = F.binary_cross_entropy_with_logits(
        scores[counted].float(), (overlap >= ENOUGH)[counted].float(), reduction="sum"
    )
    return found / there.sum().clamp(min=1)


@dataclass
class ViLBERTCollator:
    """Samples to the arguments of `ViLBERTModel`; with a mask, to those of training.

    Args:
        classes: of the detector, background included; None where regions are not predicted.
    """

    regions: RegionCollator
    texts: Texts
    mask: TokenMask | None = None
    classes: int | None = None

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        """The batch.

        Raises:
            ValueError: as `RegionCollator`; regions are predicted and a sample has no probabilities.
        """
        kept = usable(samples)
        batch = self.regions(kept)
        if self.mask is None:
            return batch | self.texts([sample.caption for sample in kept])
        generators = generators_of(kept)
        found = mismatch(kept, generators)
        batch |= {"matched": found.matched, **self.texts.masked(found.texts, self.mask, generators)}
        if self.classes is None:
            return batch
        probabilities = self.regions.labels(kept, "probabilities")
        if probabilities is None:
            raise ValueError(
                "features: expected 'probabilities' of every sample, since masked regions are predicted "
                "(--region-classes)"
            )
        masked = mask_regions(batch["region_mask"], generators, zeroed=0.9)
        return batch | {
            "masked_regions": masked.masked,
            "region_source": masked.source,
            "region_targets": probabilities.roll(1, dims=-1),  # background, which is last here, comes first
        }
