"""FIBER, its coarse stage: Dou et al. 2022, "Coarse-to-Fine Vision-Language Pre-training ..." (2206.07643).

A Swin and a RoBERTa whose last layers are paired, and either reads the other inside its layer::

    text layer:  a = dense(self-attention(x)),   h = LN(a + alpha * attention(a, image) + x),   then the MLP
    image block: s = proj(window attention(x)),  x + s + alpha * attention(LN(s), text),        then the MLP

Each reads the other's states from before the pair. All alphas start at 0, where each tower is what it is alone, and a
tower alone is also how the model runs where features are compared.

    pretraining: loss = MLM + ITM + ITC;    matching: ITM + ITC;    contrast: ITC
    MLM = -mean over masked tokens of log p(token | masked text, image)
    ITM = cross-entropy of Linear([text ; image]) over three pairs of each: the true one, the text with a wrong image,
          and the image with a wrong text, drawn from the softmax of ITC's similarities
    ITC = -(mean of log p(text | image) + mean of log p(image | text)) / 2 from exp(<i, t> / T), towers alone, over the
          global batch and a queue of the pairs of earlier batches, which are negatives without gradient
    captioning: -mean over l of log p(y_l | image, y_<l)

[text ; image] are Linear and tanh of the first token and of the mean of all image tokens. In captioning the image tower
is alone, RoBERTa is causal and reads the last image tokens, mapped to the width that each of its fusions knows.

All is trained, names with cross_modal, t2i and i2t at 5 times the rate. T starts at 0.07, kept in [0.001, 1]. The queue
keeps the pairs themselves too, since ITM reads them again; it is in buffers, and checkpoints hold it.

Departures from the released code:

- Its queue starts as random numbers, which its logits include until they are overwritten. Here an empty place is none.
- A pair with the same caption, or of the same image (`image_id` in records), is never drawn as a negative.
- With several processes negatives come from the global batch, and the queue is the same in each.
- Norms that nothing reads (`crossattention_t2i.output.LayerNorm`) and alphas of layers without fusion are not there.
- Captions are decoded with all states anew for each token; GOLD and CIDEr as rewards are left out. RoBERTa's
  last layer has no last norm there, as in MLM, whose head writes the words: this the paper does not say.
- Fusions have no dropout of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerMLMHead
from transformers.utils import ModelOutput, can_return_tuple

from vlmfast.data import Collator
from vlmfast.models.checkpoints import check_numbers
from vlmfast.models.contract import JointFeatures
from vlmfast.models.fusion.fiber_captions import Captioning, PromptCollator
from vlmfast.models.fusion.fiber_config import FIBERConfig, FIBEROptions
from vlmfast.models.fusion.fiber_model import FusedTowers
from vlmfast.models.fusion.fiber_parts import Backbone, Image, Pooler, Text
from vlmfast.models.fusion.fiber_queue import PairQueue, raw_pairs
from vlmfast.models.gathered import Shards
from vlmfast.models.masked_pairs import MaskedPairCollator
from vlmfast.models.masked_words import masked_word_loss
from vlmfast.models.matching import caption_codes, draw_negatives, hard_pairs, matching_loss

TEMPERATURES = (0.001, 1.0)


@dataclass
class FIBEROutput(ModelOutput):
    """What the model returns.

    Attributes:
        loss (): float32, the sum of the losses, on batches for training.
        mlm_loss, itm_loss, itc_loss, caption_loss (): float32, of the objective.
        text_states (B, L, H), image_states (B, R, H), pooled (B, 2 H): fused, on batches without `draws`.
    """

    loss: Tensor | None = None
    mlm_loss: Tensor | None = None
    itm_loss: Tensor | None = None
    itc_loss: Tensor | None = None
    caption_loss: Tensor | None = None
    text_states: Tensor | None = None
    image_states: Tensor | None = None
    pooled: Tensor | None = None


class FIBERModel(Captioning, FusedTowers, PreTrainedModel):
    """Towers, fusions and heads of one objective, and nothing that it does not read; see the top of this file."""

    config: FIBERConfig
    config_class = FIBERConfig
    base_model_prefix = "fiber"
    Options = FIBEROptions
    paper = "Dou et al. 2022 (2206.07643)"
    tasks = ("retrieval", "vqa")
    special_tokens: ClassVar[dict[str, str]] = {"mask_token": "<|mask|>"}
    new_parts: tuple[str, ...] = (
        "towers.t2i.",
        "towers.i2t.",
        "towers.cross_modal_att_layers.",
        "cross_modal_",
        "mlm_score.",
        "itm_score.",
        "temperature",
        "queue.",
    )
    fast = ("cross_modal", "t2i", "i2t")

    def __init__(self, config: FIBERConfig) -> None:
        super().__init__(config)
        check_numbers("config", config)
        objective, width = config.objective, config.hidden_size
        text_width = config.text_config.hidden_size
        image_width = config.vision_config.embed_dim * 2 ** (len(config.vision_config.depths) - 1)
        self.towers = Backbone(config, {"contrast": None, "captioning": "decoder"}.get(objective, "both"))
        fused = objective in ("pretraining", "matching")
        contrasts = objective != "captioning"
        writes = objective in ("pretraining", "captioning")
        self.cross_modal_text_transform = nn.Linear(text_width, width) if objective != "contrast" else None
        self.cross_modal_image_transform = nn.Linear(image_width, width) if fused else None
        self.cross_modal_text_pooler = Pooler(width) if fused else None
        self.cross_modal_image_pooler = Pooler(width) if fused else None
        self.itm_score = nn.Linear(2 * width, 2) if fused else None
        self.mlm_score = BridgeTowerMLMHead(config) if writes else None
        self.cross_modal_text_transform_itc = nn.Linear(text_width, width) if contrasts else None
        self.cross_modal_image_transform_itc = nn.Linear(image_width, width) if contrasts else None
        self.cross_modal_text_pooler_itc = Pooler(width) if contrasts else None
        self.cross_modal_image_pooler_itc = Pooler(width) if contrasts else None
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature_init_value))) if contrasts else None
        self.queue = None
        if contrasts and config.queued_pairs:
            self.queue = PairQueue(config.queued_pairs, width, config.vision_config.image_size, config.queued_tokens)
            # Equal on every rank already; DDP would broadcast it in every step.
            self._ddp_params_and_buffers_to_ignore = [f"queue.{name}" for name, _ in self.queue.named_buffers()]
        if objective == "captioning":  # so that who asks for them finds them in no other model
            self.generate, self.prompt_collator = self._generate, self._prompt_collator
        else:  # a checkpoint of captions lacks the norm behind the last layer
            last = config.text_config.num_hidden_layers - 1
            self.new_parts = (*type(self).new_parts, f"towers.text_model.encoder.layer.{last}.output.LayerNorm.")
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BridgeTowerMLMHead):
            init.zeros_(module.bias)
        elif isinstance(module, PairQueue):
            for buffer in module.buffers():
                init.zeros_(buffer)
        elif module is self and self.temperature is not None:
            init.constant_(self.temperature, self.config.temperature_init_value)

    @classmethod
    def overrides(cls, options: Any) -> dict[str, Any]:
        """The objective, where asked for, and the fields that have the last word."""
        chosen = {"objective": options.objective} if options.is_given("objective") else {}
        return {**chosen, **super().overrides(options)}

    @classmethod
    def settings(cls, options: Any, text: Any) -> dict[str, Any]:
        return {
            "hidden_size": text.hidden_size,
            "queued_pairs": options.queued_pairs or 0,
            "queued_tokens": options.max_length,
        }

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """Image and caption; in training with masked tokens, and the numbers by which wrong pairs are drawn."""
        if not train or self.config.objective == "captioning":
            return Collator(tokenizer, max_length=options.max_length)
        return MaskedPairCollator(
            tokenizer, max_length=options.max_length, mask_probability=self.config.mask_probability
        )

    def _prompt_collator(self, options: Any, tokenizer: Any) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """Image and the words that a caption begins with; `prompt_collator`."""
        return PromptCollator(Collator(tokenizer, max_length=options.max_length), tokenizer)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        mlm_input_ids: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        draws: Tensor | None = None,
        image_ids: Tensor | None = None,
    ) -> FIBEROutput:
        """The losses of a batch for training, which has `draws` or is of captions; the fused states of any other.

        In training mode the queue then takes in the pairs of all processes.

        Args:
            pixel_values: uint8 (B, H, W, 3), normalised here; or floating point (B, 3, H, W), already normalised, where
                there is no queue.
            input_ids, attention_mask (B, L): int64, padded on the right.
            mlm_input_ids, mlm_labels (B, L): the texts with tokens masked, and the masked tokens' ids, -100 elsewhere.
            draws (B, 2): float32 in [0, 1), by which wrong pairs are drawn.
            image_ids (B,): int64, equal for pairs of one image; None: no two pairs have one image.
        Raises:
            ValueError: an input that the objective needs is missing.
        """
        towers = self.towers
        if self.config.objective == "captioning":
            loss = self._caption_loss(pixel_values, input_ids, attention_mask)
            return FIBEROutput(loss=loss, caption_loss=loss)
        image, text = towers.encode_image(pixel_values), towers.encode_text(input_ids, attention_mask)
        if draws is None:
            self._need(self.itm_score, "fused states, which a batch without draws is for")
            states = self._fused(text, image)
            return FIBEROutput(text_states=states[0], image_states=states[1], pooled=self._pool(*states))
        losses = {}
        if self.mlm_score is not None:
            if mlm_input_ids is None or mlm_labels is None:
                raise ValueError("mlm_labels: missing, with mlm_input_ids, which objective pretraining needs")
            masked = towers.encode_text(mlm_input_ids, attention_mask)
            losses["mlm_loss"] = self._word_loss(towers.fuse(image, masked, text_only=True)[0], mlm_labels)
        shards = Shards(type(self).__name__, draws)
        batch = raw_pairs(shards, self.queue, pixel_values, input_ids, attention_mask, image_ids)
        own = self._compare(towers.alone(image=image), towers.alone(text=text))
        losses["itc_loss"], scores = self._contrast(shards, *own, batch)
        if self.itm_score is not None:
            losses["itm_loss"] = self._match(shards, image, text, scores, draws, batch)
        if self.training and self.queue is not None:
            self.queue.push(**{name: values[: sum(shards.sizes)] for name, values in batch.items()})
        return FIBEROutput(loss=torch.stack(list(losses.values())).sum(), **losses)

    # Heads

    def _fused(self, text: Text, image: Image) -> tuple[Tensor, Tensor]:
        """States of texts (B, L, H) and images (B, R, H) that read each other."""
        texts, images = self.towers.fuse(image, text)
        return self.cross_modal_text_transform(texts), self.cross_modal_image_transform(images)  # type: ignore[misc]

    def _pool(self, texts: Tensor, images: Tensor) -> Tensor:
        """[text ; image] (B, 2 H)."""
        pooled = self.cross_modal_text_pooler(texts[:, 0]), self.cross_modal_image_pooler(images.mean(1))  # type: ignore[misc]
        return torch.cat(pooled, 1)

    def _word_loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the words that are predicted, of all processes, from texts' last states (B, L, W)."""
        return masked_word_loss(self.mlm_score, self.cross_modal_text_transform(states), labels)  # type: ignore[misc]

    def _compare(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Unit-norm features (B, H), float32, of the towers' last states, each alone."""
        return self._image_feature(images), self._text_feature(texts)

    def _image_feature(self, states: Tensor) -> Tensor:
        feature = self.cross_modal_image_pooler_itc(self.cross_modal_image_transform_itc(states.mean(1)))  # type: ignore[misc]
        return F.normalize(feature.float(), dim=-1)

    def _text_feature(self, states: Tensor) -> Tensor:
        feature = self.cross_modal_text_pooler_itc(self.cross_modal_text_transform_itc(states[:, 0]))  # type: ignore[misc]
        return F.normalize(feature.float(), dim=-1)

    # Contrast and matching, over the global batch and the queue

    def _contrast(
        self, shards: Shards, image: Tensor, text: Tensor, batch: dict[str, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """ITC, and the logits (n, N + Q) of own texts with all images and of own images with all texts.

        `batch` gets the features of all processes.
        """
        scale = 1 / self.temperature.float()  # type: ignore[union-attr]
        images, texts = shards.gather(image), shards.gather(text)
        batch["image_features"], batch["text_features"] = images.detach(), texts.detach()
        if self.queue is not None:
            filled = self.queue.filled()
            images = torch.cat([images, self.queue.image_features[:filled]])
            texts = torch.cat([texts, self.queue.text_features[:filled]])
        sides = [shards.info_nce(a, b, scale) for a, b in ((image, texts), (text, images))]
        with torch.no_grad():
            scores = scale * text @ images.T, scale * image @ texts.T
        return torch.stack(sides).mean(), scores

    def _match(
        self,
        shards: Shards,
        image: Image,
        text: Text,
        scores: tuple[Tensor, Tensor],
        draws: Tensor,
        batch: dict[str, Tensor],
    ) -> Tensor:
        names = ("input_ids", "attention_mask", "image_ids")
        ids, mask, numbers = (batch[n] if self.queue is None else self.queue.after(batch, n) for n in names)
        codes = [caption_codes(ids, mask), numbers]
        own = slice(shards.offset, shards.offset + len(draws))
        allowed = torch.stack([code[own, None] != code for code in codes]).all(0)
        for_text, for_image = (draw_negatives(s, allowed, draws[:, k]) for k, s in enumerate(scores))
        labels = hard_pairs(for_text, for_image)
        chosen = for_text.clamp(min=0)
        pixels = batch["pixel_values"][chosen] if self.queue is None else self.queue.pixels(batch, chosen)
        wrong_images = self.towers.encode_image(pixels)
        chosen = for_image.clamp(min=0)
        wrong_texts = self.towers.encode_text(ids[chosen], mask[chosen])
        pairs = [(text, image), (text, wrong_images), (wrong_texts, image)]
        logits = torch.cat([self.itm_score(self._pool(*self._fused(*pair))) for pair in pairs])  # type: ignore[misc]
        return matching_loss(logits, labels)

    # What tasks ask for; ValueError where the objective has no part for it

    def _need(self, part: nn.Module | None, what: str) -> None:
        if part is None:
            raise ValueError(f"objective {self.config.objective}: has no {what}; another --objective has")

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Unit-norm (B, H), float32, of the image tower alone."""
        self._need(self.cross_modal_image_pooler_itc, "features to compare")
        return self._image_feature(self.towers.alone(image=self.towers.encode_image(pixel_values)))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Unit-norm (B, H), float32, of the text tower alone."""
        self._need(self.cross_modal_text_pooler_itc, "features to compare")
        return self._text_feature(self.towers.alone(text=self.towers.encode_text(input_ids, attention_mask)))

    def match_scores(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B,) log-probability of ITM's head that image and text belong together."""
        self._need(self.itm_score, "matching")
        pooled = self(pixel_values, input_ids, attention_mask).pooled
        found: Tensor = self.itm_score(pooled).float().log_softmax(1)[:, 1]  # type: ignore[misc]
        return found

    def joint_features(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> JointFeatures:
        """Pooled (B, 2 H), and the fused states of texts and images."""
        self._need(self.itm_score, "fused features")
        out = self(pixel_values, input_ids, attention_mask)
        return JointFeatures(out.pooled, out.text_states, out.image_states, attention_mask)

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Keeps the temperature in TEMPERATURES."""
        if self.temperature is not None:
            self.temperature.clamp_(*TEMPERATURES)

    def metrics(self) -> dict[str, float]:
        """The temperature, where there is one, and the mean size of the gates of either side."""
        own = {} if self.temperature is None else {"temperature": self.temperature.item()}
        return own | super().metrics()
