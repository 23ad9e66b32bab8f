"""LXMERT: Tan and Bansal 2019, "Learning Cross-Modality Encoder Representations from Transformers" (1908.07490).

A BERT reads the words, another stack of self-attention the regions of an image; cross layers then let each read the
other, both as they were before the layer and with one set of weights::

    region  = (LN(W f) + LN(V [x1 / W, y1 / H, x2 / W, y2 / H])) / 2
    loss    = mean over masked words of CE(w | all) + CE(matched | tanh(P h_0)) + CE(answer | tanh(P h_0))
              + 6.67 mean over regions of { c_obj CE(object) + c_attr CE(attribute) + masked SmoothL1(f', f) }

Of the words 15 % are predicted, as BERT's. Of the regions 15 % are masked: 80 % of those are zeros, 10 % another
image's region, 10 % stay. Objects and attributes are predicted of every region, masked or not, and weighted by the
detector's confidence c in them; features f of masked regions alone. In half of the samples the sentence is another
image's; `matched` is 1 where it is the image's own. A question is a sentence whose answer is predicted, if it matches.
A term whose labels the data do not have is left out.

Everything is trained, but the detector, whose features are computed before (`vlmfast regions`).

Fine-tuning: vqa has the paper's head over tanh(P h_0), which is every task's.

Departures from transformers' classes, whose weights load, and from the paper:

- Any number of regions, with a mask (36 in the paper, without one); means are over those that are there.
- `labels` that are ignored are -100, as transformers' (-1 in the authors' code).
- Heads over the vocabulary, objects and attributes run on rows that count.
- Questions come from the records, and are answered where --answers names a list; each image's caption and questions are
  equally likely. In the paper answers are of the last 10 of 20 epochs, in the authors' code of all.
- Where samples have no detector's features, a small ResNet makes them of boxes or of a grid and is trained with the
  rest. Features are then not predicted, since the ResNet could make that easy. With --vision-tower it is frozen.
- Text may start from a BERT (--text-tower); in the paper all is from scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.models.lxmert import modeling_lxmert as original
from transformers.utils import ModelOutput

from vlmfast.data import Sample, TokenMask
from vlmfast.data.text import usable
from vlmfast.models.contract import JointFeatures
from vlmfast.models.gathered import mean_count
from vlmfast.models.masked_texts import Texts
from vlmfast.models.region_batches import RegionCollator, generators_of, mask_regions, mismatch, take_regions
from vlmfast.models.region_text import NewText, RegionTextOptions
from vlmfast.models.region_tower import NewRegions, ReadsRegions
from vlmfast.ops import linear_cross_entropy

IGNORED = -100


class LXMERTConfig(transformers.LxmertConfig):
    """transformers' LxmertConfig, with where regions come from.

    Args:
        region_tower, region_tower_frozen, image_size, grid: see `VisualBERTConfig`.
        answers: what questions may be answered in pre-training, num_qa_labels of them; None where none is.
        Others as transformers' LxmertConfig.
    Raises:
        ValueError: there are not num_qa_labels answers.
    """

    model_type = "lxmert"

    def __init__(
        self,
        *,
        region_tower: dict[str, Any] | None = None,
        region_tower_frozen: bool = False,
        image_size: int = 128,
        grid: int = 4,
        answers: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.region_tower = region_tower
        self.region_tower_frozen = region_tower_frozen
        self.image_size = image_size
        self.grid = grid
        self.answers = answers
        super().__init__(**kwargs)
        if answers is not None and len(answers) != self.num_qa_labels:
            raise ValueError(f"answers: expected num_qa_labels {self.num_qa_labels} of them, got {len(answers)}")


@dataclass
class LXMERTOptions(RegionTextOptions):
    """A new BERT, or a pretrained one, the layers of regions and the cross layers."""

    text_layers: int = field(default=3, metadata={"help": "Layers of words; of a pretrained BERT the first ones."})
    region_layers: int = field(default=2, metadata={"help": "Layers of regions."})
    cross_layers: int = field(default=2, metadata={"help": "Layers in which words and regions read each other."})
    answers: str | None = field(
        default=None,
        metadata={"help": "File with an answer a line; pre-training then answers the questions of the records too."},
    )

    text_flags: ClassVar[tuple[str, ...]] = ("text_width",)
    new_model: ClassVar[tuple[str, ...]] = (
        *RegionTextOptions.new_model,
        "region_layers",
        "cross_layers",
        "answers",
    )


@dataclass
class LXMERTOutput(ModelOutput):
    """`loss`, where there is something to predict, and its terms; `matching_logits` (B, 2)."""

    loss: Tensor | None = None
    word_loss: Tensor | None = None
    matching_loss: Tensor | None = None
    object_loss: Tensor | None = None
    attribute_loss: Tensor | None = None
    feature_loss: Tensor | None = None
    answer_loss: Tensor | None = None
    matching_logits: Tensor | None = None


class LXMERTModel(ReadsRegions, transformers.LxmertPreTrainedModel):
    """Masked words and regions, matching and answers; see the top of this file."""

    config: LXMERTConfig
    config_class = LXMERTConfig
    Options = LXMERTOptions
    strategy, paper = "masked", "Tan and Bansal 2019 (1908.07490)"
    tasks = ("retrieval", "vqa")
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-4, "weight_decay": 0.01}
    special_tokens: ClassVar[dict[str, str]] = {"mask_token": "<|mask|>"}
    new_parts = ("region_tower.", "cls.", "obj_predict_head.", "answer_head.")
    accepts_loss_kwargs = False
    _tied_weights_keys = transformers.LxmertForPreTraining._tied_weights_keys

    def __init__(self, config: LXMERTConfig) -> None:
        super().__init__(config)
        self.region_tower = self.new_region_tower("visual_feat_dim")
        self.lxmert = transformers.LxmertModel(config)
        self.cls = original.LxmertPreTrainingHeads(config)
        self.obj_predict_head = original.LxmertVisualObjHead(config) if config.task_obj_predict else None
        self.answer_head = None
        if config.task_qa:
            self.answer_head = original.LxmertVisualAnswerHead(config, config.num_qa_labels)
        self.freeze()
        self.post_init()

    @classmethod
    def create(cls, options: LXMERTOptions, tokenizer: Any, **overrides: Any) -> LXMERTModel:
        text = NewText(options, tokenizer)
        if text.source is not None and options.text_layers > text.source.config.num_hidden_layers:
            raise ValueError(
                f"--text-layers: expected at most the {text.source.config.num_hidden_layers} of --text-tower, got "
                f"{options.text_layers}"
            )
        layers = {"l_layers": options.text_layers, "r_layers": options.region_layers, "x_layers": options.cross_layers}
        regions = NewRegions(options)
        answers = None if options.answers is None else read_answers(options.answers)
        own = {
            "visual_feat_dim": regions.width,
            "visual_feat_loss": regions.settings["region_tower"] is None or regions.settings["region_tower_frozen"],
            "task_qa": answers is not None,
            "answers": answers,
            "num_qa_labels": len(answers or ()) or 1,
        }
        model = cls(LXMERTConfig(**{**text.sizes, **layers, **regions.settings, **own, **overrides}))
        regions.fill(model.region_tower)
        text.fill(model.lxmert, model.cls)
        return model

    def get_output_embeddings(self) -> Any:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.cls.predictions.decoder = new_embeddings

    def resize_vocabulary(self, size: int) -> None:
        """Makes room for tokens at the end; what was there stays. Their bias is 0."""
        super().resize_vocabulary(size)
        before = self.cls.predictions.bias
        self.cls.predictions.bias = torch.nn.Parameter(F.pad(before.data, (0, size - len(before))))

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        regions, texts = self.region_collator(options), Texts(tokenizer, options.max_length)
        mask = TokenMask(tokenizer, 0.15) if train else None
        return LXMERTCollator(regions, texts, mask, self.config.answers)

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
        labels: Tensor | None = None,
        matched: Tensor | None = None,
        object_labels: Tensor | None = None,
        object_weights: Tensor | None = None,
        attribute_labels: Tensor | None = None,
        attribute_weights: Tensor | None = None,
        answer: Tensor | None = None,
    ) -> LXMERTOutput:
        """The loss of what is to be predicted.

        Args:
            input_ids, attention_mask, token_type_ids (B, L): int64; a text's tokens, 1 for tokens, the segment.
            region_features (B, R, D): of a detector; or pixel_values uint8 (B, S, S, 3), for the image tower.
            region_boxes (B, R, 4): x1 y1 x2 y2, shares of width and height.
            region_mask (B, R): 1 where there is a region; None when there are no others.
            region_source, masked_regions (B, R): see `MaskedRegions`.
            labels (B, L): int64, the ids of masked words, and -100.
            matched (B,): int64, 1 where text and image belong together.
            object_labels, attribute_labels (B, R): int64; object_weights, attribute_weights (B, R): confidence in them.
            answer (B,): int64, the answer to the text, and -100 where it is no question or not the image's.
        Raises:
            ValueError: region_boxes are missing, or a label is out of range.
        """
        states, regions, pooled, seen = self._read(
            input_ids,
            attention_mask,
            token_type_ids,
            region_features=region_features,
            region_boxes=region_boxes,
            region_mask=region_mask,
            pixel_values=pixel_values,
            region_source=region_source,
        )
        terms: dict[str, Tensor] = {}
        if labels is not None and self.config.task_mask_lm:
            words, head = labels != IGNORED, self.cls.predictions
            terms["word_loss"] = linear_cross_entropy(
                head.transform(states[words]), head.decoder.weight, labels[words], bias=head.bias, reduction="sum"
            ) / mean_count(words)
        logits = self.cls.seq_relationship(pooled)
        if matched is not None and self.config.task_matched:
            each = F.cross_entropy(logits.float(), matched, reduction="sum")
            terms["matching_loss"] = each / mean_count(torch.ones_like(matched))
        if self.obj_predict_head is not None:
            present = torch.ones(regions.shape[:2], device=regions.device) if region_mask is None else region_mask
            hidden = self.obj_predict_head.transform(regions)
            share = self.config.visual_loss_normalizer / mean_count(present)
            weighted = (("obj", object_labels, object_weights), ("attr", attribute_labels, attribute_weights))
            for (name, label, weight), term in zip(weighted, ("object_loss", "attribute_loss"), strict=True):
                if label is not None and weight is not None and name in self.obj_predict_head.decoder_dict:
                    terms[term] = share * self._class_loss(name, hidden, label, weight * present)
            if masked_regions is not None and "feat" in self.obj_predict_head.decoder_dict:
                rows = masked_regions & (present > 0)
                found = self.obj_predict_head.decoder_dict["feat"](hidden[rows]).float()
                each = F.smooth_l1_loss(found, seen.detach()[rows].float(), reduction="sum")
                terms["feature_loss"] = share * each / self.config.visual_feat_dim
        if answer is not None and self.answer_head is not None:
            each = F.cross_entropy(self.answer_head(pooled).float(), answer, ignore_index=IGNORED, reduction="sum")
            terms["answer_loss"] = each / mean_count(answer != IGNORED)
        loss = torch.stack(list(terms.values())).sum() if terms else None
        return LXMERTOutput(loss=loss, matching_logits=logits, **terms)

    def joint_features(self, **batch: Any) -> JointFeatures:
        """`pooled` is tanh(P h_0), of the words' first state."""
        states, regions, pooled, _ = self._read(**batch)
        return JointFeatures(pooled, states, regions, batch.get("attention_mask"), batch.get("region_mask"))

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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States of words (B, L, D) and regions (B, R, D), pooled (B, D), and the regions' features before masking."""
        if region_boxes is None:
            raise ValueError("region_boxes: expected (B, R, 4), got None")
        features = self.region_features_of(region_features, pixel_values, region_boxes)
        output = self.lxmert(
            input_ids,
            visual_feats=features if region_source is None else take_regions(features, region_source),
            visual_pos=region_boxes.to(features.dtype),
            attention_mask=attention_mask,
            visual_attention_mask=region_mask,
            token_type_ids=token_type_ids,
        )
        return output.language_output, output.vision_output, output.pooled_output, features

    def _class_loss(self, name: str, hidden: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """The sum over regions of weight times cross-entropy; a region of weight 0 costs nothing."""
        assert self.obj_predict_head is not None
        head, rows = self.obj_predict_head.decoder_dict[name], weights > 0
        each = linear_cross_entropy(hidden[rows], head.weight, labels[rows], bias=head.bias, reduction="none")
        return (each * weights[rows]).sum()


@dataclass
class LXMERTCollator:
    """Samples to the arguments of `LXMERTModel`; with a mask, to those of training."""

    regions: RegionCollator
    texts: Texts
    mask: TokenMask | None = None
    answers: Sequence[str] | None = None

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        kept = usable(samples)
        batch = self.regions(kept)
        if self.mask is None:
            return batch | self.texts([sample.caption for sample in kept])
        generators = generators_of(kept)
        if self.answers is not None:
            places = {name: place for place, name in enumerate(self.answers)}
            drawn = [_sentence(sample, places, generator) for sample, generator in zip(kept, generators, strict=True)]
            kept = [replace(sample, caption=text) for sample, (text, _) in zip(kept, drawn, strict=True)]
        found = mismatch(kept, generators)
        batch["matched"] = found.matched
        if self.answers is not None:
            own = torch.tensor([answer for _, answer in drawn])
            batch["answer"] = torch.where(found.matched == 1, own, IGNORED)
        batch |= self.texts.masked(found.texts, self.mask, generators)
        masked = mask_regions(batch["region_mask"], generators, zeroed=0.8, replaced=0.1)
        batch |= {"masked_regions": masked.masked, "region_source": masked.source}
        labels = {
            "object_labels": "labels",
            "object_weights": "scores",
            "attribute_labels": "attributes",
            "attribute_weights": "attribute_scores",
        }
        rows = {name: self.regions.labels(kept, feature) for name, feature in labels.items()}
        return batch | {name: value for name, value in rows.items() if value is not None}


def _sentence(sample: Sample, answers: dict[str, int], generator: Any) -> tuple[str, int]:
    """The caption, or a question of the record with one of its answers, -100 for an answer that is not listed."""
    several = sample.record.get("questions")
    asked = several if isinstance(several, list) else [sample.record]
    known = [
        (each["question"].strip(), [answers[a] for a in each["answers"] if a in answers])
        for each in asked
        if isinstance(each, dict) and isinstance(each.get("question"), str) and isinstance(each.get("answers"), list)
    ]
    sentences: list[tuple[str, list[int]]] = [(sample.caption, []), *known]
    which, said = generator.random(2)
    text, found = sentences[int(which * len(sentences))]
    return text, found[int(said * len(found))] if found else IGNORED


def read_answers(path: str) -> list[str]:
    """The lines of a file without empty ones.

    Raises:
        ValueError: it cannot be read, is empty, or names an answer twice.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--answers {path}: {error}") from error
    if not lines or len(set(lines)) < len(lines):
        raise ValueError(f"--answers {path}: expected an answer a line, each once; got {len(lines)} lines")
    return lines
