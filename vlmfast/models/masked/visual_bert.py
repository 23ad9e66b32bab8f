"""VisualBERT: Li et al. 2019, "VisualBERT: A Simple and Performant Baseline for Vision and Language" (1908.03557).

One post-norm BERT reads the words of a text and the regions of an image, f of a detector, in one sequence::

    word    = LN(word[w] + position[l] + type[segment])
    region  = LN(W f + visual_position[0] + visual_type[0])    + mean of position[l] of aligned words, before LN
    loss    = mean over masked words of CE(w | all) + CE(matched | tanh(P h_0))

Regions have no place: their order does not matter, and their geometry is not read. Only words are masked. With two
captions of an image in the record, a text is "a [SEP] b": a is true, b another true one or, in half of the samples, one
of another image; `matched` 1 says that b is true, as in the authors' data. With one caption the text is that caption or
another image's.

Everything is trained, but the detector, whose features are computed before (`vlmfast regions`).

Fine-tuning: vqa reads the state of a mask token behind the question; hateful and reasoning tanh(P h_0). Grounding adds
a single-head attention, of the width of one of BERT's heads, from the last word of a phrase to the regions, trained by
the Kullback-Leibler divergence to a uniform distribution over the regions that overlap the phrase's boxes by an IoU of
0.5 or more.

Departures from transformers' classes, whose weights load:

- Regions are of token type 0 where they are not told (there 1), as in the authors' code.
- A new model's visual tables equal the text's, after its initialisation too; there `post_init` draws them anew.
- The padding token is 0, BERT's (there 1).
- `labels` are of the text alone (there of text and regions), and vocabulary logits are of labelled words only.
- A mismatch is 0 (the docstring there says 1; the authors' data have 0).
- `bypass_transformer`, which fails there, is refused.

Departures from the paper: where samples have no detector's features, a small ResNet makes them of boxes or of a grid
and is trained with the rest, unless it is a pretrained one (--vision-tower); `match_scores` reads the head of
pre-training without fine-tuning it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import initialization as init
from transformers.models.visual_bert import modeling_visual_bert as original
from transformers.utils import ModelOutput

from vlmfast.data import Sample, TokenMask
from vlmfast.data.records import captions_of
from vlmfast.data.text import usable
from vlmfast.models.contract import JointFeatures
from vlmfast.models.gathered import mean_count
from vlmfast.models.masked_texts import Text, Texts
from vlmfast.models.region_batches import ENOUGH, RegionCollator, generators_of, mismatch
from vlmfast.models.region_text import NewText, RegionTextOptions
from vlmfast.models.region_tower import NewRegions, ReadsRegions
from vlmfast.nn import language_model_loss


class VisualBERTConfig(transformers.VisualBertConfig):
    """transformers' VisualBertConfig, with where regions come from.

    Args:
        region_tower: config of an image tower as a dict, see `RegionTower`; None where features are given.
        region_tower_frozen: whether it stays as it is.
        image_size: S, to which images are stretched for the tower.
        grid: side of the grid that stands for regions where samples have none.
        matching: whether captions are mismatched in pre-training, and that is predicted; False for the paper's phase
            on the texts of a task.
        Others as transformers' VisualBertConfig.
    Raises:
        ValueError: bypass_transformer is set.
    """

    model_type = "visual_bert"

    def __init__(
        self,
        *,
        region_tower: dict[str, Any] | None = None,
        region_tower_frozen: bool = False,
        image_size: int = 128,
        grid: int = 4,
        matching: bool = True,
        pad_token_id: int | None = 0,
        **kwargs: Any,
    ) -> None:
        self.region_tower = region_tower
        self.region_tower_frozen = region_tower_frozen
        self.image_size = image_size
        self.grid = grid
        self.matching = matching
        super().__init__(pad_token_id=pad_token_id, **kwargs)
        if self.bypass_transformer:
            raise ValueError("bypass_transformer: expected False, got True")


@dataclass
class VisualBERTOptions(RegionTextOptions):
    """A new BERT, or a pretrained one, and the regions."""

    text_layers: int = field(default=4, metadata={"help": "Layers of a new BERT."})


@dataclass
class VisualBERTOutput(ModelOutput):
    """`loss`, where there is something to predict, and its terms; `matching_logits` (B, 2)."""

    loss: Tensor | None = None
    word_loss: Tensor | None = None
    matching_loss: Tensor | None = None
    matching_logits: Tensor | None = None


class Encoder(transformers.VisualBertModel):
    """transformers' VisualBertModel whose visual tables start as the text's."""

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, original.VisualBertEmbeddings) and self.config.special_visual_initialize:
            # Where a checkpoint has these tables, this does nothing.
            init.copy_(module.visual_token_type_embeddings.weight, module.token_type_embeddings.weight)
            init.copy_(module.visual_position_embeddings.weight, module.position_embeddings.weight)


class VisualBERTModel(ReadsRegions, transformers.VisualBertPreTrainedModel):
    """Masked words and matching, and the heads of the paper's tasks; see the top of this file."""

    config: VisualBERTConfig
    config_class = VisualBERTConfig
    Options = VisualBERTOptions
    strategy, paper = "masked", "Li et al. 2019 (1908.03557)"
    tasks = ("retrieval", "vqa", "grounding", "hateful", "reasoning")
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-4, "weight_decay": 0.01}
    special_tokens: ClassVar[dict[str, str]] = {"mask_token": "<|mask|>"}
    new_parts = ("attention.", "region_tower.", "cls.")
    accepts_loss_kwargs = False
    _tied_weights_keys = transformers.VisualBertForPreTraining._tied_weights_keys

    def __init__(self, config: VisualBERTConfig) -> None:
        super().__init__(config)
        self.region_tower = self.new_region_tower("visual_embedding_dim")
        self.visual_bert = Encoder(config)
        self.cls = original.VisualBertPreTrainingHeads(config)
        self.attention = original.VisualBertRegionToPhraseAttention(config)
        del self.attention.value  # made, and used by nothing
        self._keys_to_ignore_on_load_unexpected = [r"^attention\.value\."]
        self.freeze()
        self.post_init()

    @classmethod
    def create(cls, options: VisualBERTOptions, tokenizer: Any, **overrides: Any) -> VisualBERTModel:
        text, regions = NewText(options, tokenizer), NewRegions(options)
        sizes = text.with_layers(options.text_layers)
        own = {"visual_embedding_dim": regions.width, "pad_token_id": tokenizer.pad_token_id}
        model = cls(VisualBERTConfig(**{**sizes, **regions.settings, **own, **overrides}))
        regions.fill(model.region_tower)
        text.fill(model.visual_bert, model.cls)
        if text.source is not None:
            model.visual_bert._init_weights(model.visual_bert.embeddings)
        return model

    def get_output_embeddings(self) -> Any:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.cls.predictions.decoder = new_embeddings
        self.cls.predictions.bias = new_embeddings.bias

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        regions, texts = self.region_collator(options), Texts(tokenizer, options.max_length)
        mask = TokenMask(tokenizer, 0.15) if train else None
        return VisualBERTCollator(regions, texts, mask, matching=self.config.matching)

    def question_collator(self, options: Any, tokenizer: Any) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """As `collator`, of questions: each ends with the mask token whose state is read."""
        return VisualBERTCollator(self.region_collator(options), Texts(tokenizer, options.max_length), question=True)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        region_features: Tensor | None = None,
        region_boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        matched: Tensor | None = None,
        phrase_mask: Tensor | None = None,
        phrase_overlap: Tensor | None = None,
        image_text_alignment: Tensor | None = None,
    ) -> VisualBERTOutput:
        """The loss of what is to be predicted.

        Args:
            input_ids, attention_mask, token_type_ids (B, L): int64; a text's tokens, 1 for tokens, the segment.
            region_features (B, R, D): of a detector; or pixel_values uint8 (B, S, S, 3) and region_boxes (B, R, 4),
                shares of width and height, for the image tower.
            region_mask (B, R): 1 where there is a region; None when there are no others.
            labels (B, L): int64, the ids of masked words, and -100.
            matched (B,): int64, 1 where text and image belong together.
            phrase_mask, phrase_overlap: of grounding, see `vlmfast.models.contract`; the loss is then that of
                `phrase_scores`, and labels and matched are not read.
            image_text_alignment (B, R, K): int64, places of words that each region is aligned with, and -1.
        """
        parts = {"region_features": region_features, "region_boxes": region_boxes, "region_mask": region_mask}
        read = {**parts, "token_type_ids": token_type_ids, "image_text_alignment": image_text_alignment}
        states = self._states(input_ids, attention_mask, pixel_values=pixel_values, **read)
        if phrase_overlap is not None:
            assert phrase_mask is not None
            scores = self._phrase_scores(states, phrase_mask, region_mask)
            return VisualBERTOutput(loss=phrase_loss(scores, phrase_overlap))
        terms: dict[str, Tensor] = {}
        if labels is not None:
            words = labels != -100
            hidden = self.cls.predictions.transform(states[:, : labels.shape[1]][words])
            terms["word_loss"] = language_model_loss(
                hidden, self.cls.predictions.decoder, labels[words], shift=False, num_items_in_batch=mean_count(words)
            )
        logits = self.cls.seq_relationship(self.visual_bert.pooler(states))
        if matched is not None:
            each = F.cross_entropy(logits.float(), matched, reduction="sum")
            terms["matching_loss"] = each / mean_count(torch.ones_like(matched))
        loss = torch.stack(list(terms.values())).sum() if terms else None
        return VisualBERTOutput(loss=loss, matching_logits=logits, **terms)

    def joint_features(self, read_at: Tensor | None = None, **batch: Any) -> JointFeatures:
        """`pooled` is tanh(P h_0), or with read_at (B,), as `question_collator` gives it, the state of that token."""
        states = self._states(**batch)
        length = batch["input_ids"].shape[1]
        if read_at is None:
            pooled = self.visual_bert.pooler(states)
        else:
            pooled = states[torch.arange(len(states), device=states.device), read_at]
        masks = batch.get("attention_mask"), batch.get("region_mask")
        return JointFeatures(pooled, states[:, :length], states[:, length:], *masks)

    def phrase_scores(self, phrase_mask: Tensor, **batch: Any) -> Tensor:
        """(B, P, R), the logit of each region for each phrase; the lowest number for padding."""
        return self._phrase_scores(self._states(**batch), phrase_mask, batch.get("region_mask"))

    def _phrase_scores(self, states: Tensor, phrase_mask: Tensor, region_mask: Tensor | None) -> Tensor:
        length = phrase_mask.shape[2]
        places = torch.arange(length, device=states.device)
        last = torch.where(phrase_mask, places, -1).amax(dim=2).clamp(min=0)  # of a phrase without tokens, the first
        words = states.gather(1, last[..., None].expand(-1, -1, states.shape[2]))
        query, key = self.attention.query(words), self.attention.key(states[:, length:])
        scores = query @ key.transpose(1, 2) / self.attention.attention_head_size**0.5
        if region_mask is None:
            return scores
        lowest = max(torch.finfo(scores.dtype).min, torch.finfo(torch.float32).min)  # finite in the loss's float32 too
        return scores.masked_fill(region_mask[:, None] == 0, lowest)

    def _states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        region_features: Tensor | None = None,
        region_boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """The last states (B, L + R, D)."""
        features = self.region_features_of(region_features, pixel_values, region_boxes)
        types = torch.zeros(features.shape[:2], dtype=torch.int64, device=features.device)
        states: Tensor = self.visual_bert(
            input_ids,
            attention_mask=attention_mask,
            visual_embeds=features,
            visual_attention_mask=region_mask,
            visual_token_type_ids=types,
            **more,
        ).last_hidden_state
        return states


@dataclass
class VisualBERTCollator:
    """Samples to the arguments of `VisualBERTModel`.

    With a mask, that of training: words are masked and texts matched or not. The batch has then `labels` and, with
    matching, `matched`.
    """

    regions: RegionCollator
    texts: Texts
    mask: TokenMask | None = None
    matching: bool = True
    question: bool = False

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        kept = usable(samples)
        batch = self.regions(kept)
        if self.question:
            return batch | self.texts.questions([sample.caption for sample in kept])
        if self.mask is None:
            return batch | self.texts([sample.caption for sample in kept])
        generators = generators_of(kept)
        texts: list[Text] = [sample.caption for sample in kept]
        if self.matching:
            found = mismatch(kept, generators)
            batch["matched"] = found.matched
            texts = [
                _pair(sample, text, bool(matched), generator)
                for sample, text, matched, generator in zip(kept, *found, generators, strict=True)
            ]
        return batch | self.texts.masked(texts, self.mask, generators)


def _pair(sample: Sample, text: str, matched: bool, generator: Any) -> Text:
    """The caption with another true one, or with one of another image; the text alone where there is one caption."""
    others = [caption for caption in captions_of(sample) if caption != sample.caption]
    place = generator.random()
    if not others:
        return text
    return sample.caption, others[int(place * len(others))] if matched else text


def phrase_loss(scores: Tensor, overlap: Tensor) -> Tensor:
    """The Kullback-Leibler divergence, summed over phrases and averaged over the batch, of the softmax of the scores
    (B, P, R) from a uniform distribution over the regions whose overlap (B, P, R) is ENOUGH; phrases without any of
    them are left out."""
    right = (overlap >= ENOUGH).float()
    target = right / right.sum(dim=2, keepdim=True).clamp(min=1)
    return F.kl_div(scores.float().log_softmax(dim=2), target, reduction="batchmean")
