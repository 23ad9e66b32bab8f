"""BridgeTower: Xu et al. 2022, "BridgeTower: Building Bridges Between Encoders in Vision-Language ..." (2206.08657).

A CLIP image tower and a RoBERTa of as many layers, and a cross-modal encoder of K layers with a stream for each. Every
one of its layers is bridged to one of the towers' last K, h being a tower's states and z the stream's::

    x_1 = LN(W h_1 + type),    x_k = LN(W h_k + type + z_(k-1)),    z_k = layer_k(x_k, of the other stream: x_k)

W is one matrix for all layers of a stream; images' h is normed before by the tower's last norm. What heads read is
p = [tanh(U z_text[0]) ; tanh(V z_image[0])].

    loss = MLM + ITM (+ ITC)
    MLM = -mean over masked tokens of log p(token | masked text, image)
    ITM = cross-entropy of Linear(p), whether image and text belong together
    ITC = -(mean over images of log p(its texts | image) + mean over texts of log p(its images | text)) / 2,
          p from exp(<i, t> / T), i and t unit-norm Linear(last layer of a tower, first token), over the global batch

`objectives` says which. Without ITC, half of the pairs of ITM have an image of another pair, drawn evenly. With ITC,
ITM has three pairs of each: the true one, the text with a wrong image, and the image with a wrong text, drawn from the
softmax of the similarities over the global batch. Pairs of one image, or of one caption, are never drawn. ITC's targets
are spread over all pairs of the same image (`image_id` in records), as in the paper's fine-tuning for retrieval.

All is trained. Names with `cross_modal` and the heads learn at 5 times the rate of the towers. T starts at 0.07 and is
kept in [0.001, 0.5].

Departures:

- From the paper: of its fine-tuning for questions, 50 times the rate for the head is `--task`'s own rate instead. New
  weights are drawn as transformers draws them. Norms add 1e-5, as transformers' do, where the paper's code adds 1e-12.
- From transformers: `BridgeTowerForContrastiveLearning` has another loss, three times one direction, and features of
  images from behind W; its heads are therefore not loaded. The MLM head is not tied, unless the config ties it.
  `share_link_tower_layers`, image norms of each layer (`share_layernorm=False`) and towers of unequal depth fail there
  and are refused here. `pixel_mask` is read by nothing there, and no argument here.
- An image is encoded once for MLM, ITM and ITC, which changes no value: the image tower has no dropout, and its layers
  do not see the text. MLM's logits are computed of masked tokens alone, and never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.bridgetower.modeling_bridgetower import (
    BridgeTowerITMHead,
    BridgeTowerMLMHead,
    BridgeTowerPreTrainedModel,
)
from transformers.utils import ModelOutput, can_return_tuple
from typing_extensions import Self

from vlmfast.data import Collator
from vlmfast.models.checkpoints import check_numbers
from vlmfast.models.contract import JointFeatures
from vlmfast.models.gathered import Shards
from vlmfast.models.masked.bridgetower_config import BridgeTowerConfig, BridgeTowerOptions
from vlmfast.models.masked.bridgetower_parts import Encoded, Trunk, clip_tower, roberta_tower
from vlmfast.models.masked_pairs import MaskedPairCollator
from vlmfast.models.masked_words import groups_of_two_rates, masked_word_loss
from vlmfast.models.matching import caption_codes, draw_negatives, hard_pairs, matching_loss, unlike
from vlmfast.models.roberta_text import ReadsRoBERTa
from vlmfast.models.towers import normalisation
from vlmfast.ops import info_nce

TEMPERATURES = (0.001, 0.5)


@dataclass
class BridgeTowerOutput(ModelOutput):
    """What the model returns.

    Attributes:
        loss (): float32, the sum of the losses, on batches for training.
        mlm_loss, itm_loss, itc_loss (): float32, of the objectives.
        text_states (B, L, D), image_states (B, R, D): of the cross-modal encoder, on batches without labels.
        pooled (B, 2 D): what heads read, on batches without labels.
    """

    loss: Tensor | None = None
    mlm_loss: Tensor | None = None
    itm_loss: Tensor | None = None
    itc_loss: Tensor | None = None
    text_states: Tensor | None = None
    image_states: Tensor | None = None
    pooled: Tensor | None = None


class BridgeTowerForPreTraining(ReadsRoBERTa, BridgeTowerPreTrainedModel):
    """Towers, bridges and heads; see the top of this file.

    Names are those of transformers' BridgeTowerForMaskedLM and BridgeTowerForImageAndTextRetrieval, whose checkpoints
    load; what a checkpoint lacks is new.
    """

    config: BridgeTowerConfig
    config_class = BridgeTowerConfig
    base_model_prefix = "bridgetower"
    main_input_name = "pixel_values"
    Options = BridgeTowerOptions
    strategy, paper = "masked", "Xu et al. 2022 (2206.08657)"
    tasks = ("retrieval", "zero_shot", "vqa", "hateful")
    training_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "adam_beta2": 0.98,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
    }
    special_tokens: ClassVar[dict[str, str]] = {"mask_token": "<|mask|>"}
    new_parts = ("mlm_score.", "itm_score.", "image_projection.", "text_projection.", "temperature")
    accepts_loss_kwargs = False
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "mlm_score.decoder.weight": "bridgetower.text_model.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: BridgeTowerConfig) -> None:
        super().__init__(config)
        check_numbers("config", config)
        self.bridgetower = Trunk(config)
        self.itm_score = BridgeTowerITMHead(2 * config.hidden_size)
        self.mlm_score = BridgeTowerMLMHead(config) if "mlm" in config.objectives else None
        self.image_projection = self.text_projection = self.temperature = None
        if "itc" in config.objectives:
            self.image_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
            self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim)
            self.temperature = nn.Parameter(torch.tensor(float(config.temperature_init_value)))
            # Who asks finds them where there are features to compare.
            self.get_image_features, self.get_text_features = self._image_features, self._text_features
            self.metrics = self._metrics
        if self.mlm_score is None:
            self._tied_weights_keys = {}  # type: ignore[misc]
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # else transformers passes over modules without parameters of their own

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.temperature is not None:
            init.constant_(self.temperature, self.config.temperature_init_value)

    @classmethod
    def overrides(cls, options: Any) -> dict[str, Any]:
        """The objectives, where asked for, and the fields that have the last word."""
        chosen = {"objectives": options.objectives.split(",")} if options.is_given("objectives") else {}
        return {**chosen, **super().overrides(options)}

    @classmethod
    def create(cls, options: Any, tokenizer: Any, **overrides: Any) -> Self:
        """A new model from the options, its towers new or pretrained ones."""
        width, layers, given = options.width, options.layers, {}
        if width % 64:
            raise ValueError(f"--width: expected a multiple of 64 (the head size), got {width}")
        text = vision = None
        if options.text_tower:
            text, given["text_model."] = roberta_tower(options.text_tower)
            width, layers = text.hidden_size, text.num_hidden_layers
        if options.vision_tower:
            vision, given["vision_model.visual."] = clip_tower(
                options.vision_tower, options.image_size if options.is_given("image_size") else None
            )
            layers = vision.num_hidden_layers
            overrides = {**normalisation(options.vision_tower), **overrides}
        if text is None:
            text = transformers.BridgeTowerTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                intermediate_size=4 * width,
                max_position_embeddings=options.max_length + tokenizer.pad_token_id + 1,  # as RoBERTa counts them
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        if vision is None:
            vision = transformers.BridgeTowerVisionConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                patch_size=options.patch_size,
                image_size=options.image_size,
            )
        settings = {
            "hidden_size": width,
            "num_hidden_layers": options.cross_layers,
            "num_attention_heads": text.num_attention_heads,
            **overrides,
        }
        model = cls(cls.config_class(text, vision, **settings))
        for prefix, weights in given.items():
            part: Any = model.bridgetower.get_submodule(prefix.removesuffix("."))
            part.load_state_dict({name: value for name, value in weights.items() if name in part.state_dict()})
        return model.eval()

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """Image and caption; in training with masked tokens, and the numbers by which wrong pairs are drawn."""
        if not train:
            return Collator(tokenizer, max_length=options.max_length)
        return MaskedPairCollator(
            tokenizer,
            max_length=options.max_length,
            mask_probability=self.config.mask_probability,
            captions_per_image=options.captions_per_image,
        )

    @property
    def text_tower(self) -> Any:
        return self.bridgetower.text_model

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
    ) -> BridgeTowerOutput:
        """The losses of a batch for training, which has `draws`; the fused states of any other.

        Args:
            pixel_values: uint8 (B, H, W, 3), normalised here; or floating point (B, 3, H, W), already normalised.
            input_ids, attention_mask (B, L): int64, padded on the right.
            mlm_input_ids, mlm_labels (B, L): the texts with tokens masked, and the masked tokens' ids, -100 elsewhere.
            draws (B, 2): float32 in [0, 1), by which wrong pairs are drawn.
            image_ids (B,): int64, equal for pairs of one image; None: no two pairs have one image.
        Raises:
            ValueError: an input that an objective needs is missing.
        """
        trunk = self.bridgetower
        image, text = trunk.encode_image(pixel_values), trunk.encode_text(input_ids, attention_mask)
        if draws is None:
            texts, images = trunk.fuse(text, image)
            return BridgeTowerOutput(
                text_states=texts, image_states=images, pooled=trunk.get_cls_features(texts, images)
            )
        losses = {}
        if self.mlm_score is not None:
            if mlm_input_ids is None or mlm_labels is None:
                raise ValueError("mlm_labels: missing, with mlm_input_ids, which objective mlm needs")
            losses["mlm_loss"] = self._masked_token_loss(image, mlm_input_ids, mlm_labels, attention_mask)
        shards = Shards(type(self).__name__, draws)
        all_ids, all_mask = shards.rows(input_ids), None if attention_mask is None else shards.rows(attention_mask)
        codes = [caption_codes(all_ids, all_mask)]
        if image_ids is not None:
            codes.append(shards.rows(image_ids[:, None])[:, 0])
        allowed = unlike(shards.offset, len(draws), *codes)
        own = torch.arange(len(draws), device=draws.device)

        def images_of(rows: Tensor) -> Encoded:
            """Of pairs of the global batch; other processes' images are encoded here again."""
            return image.at(rows) if len(shards.sizes) == 1 else trunk.encode_image(shards.rows(pixel_values)[rows])

        def texts_of(rows: Tensor) -> Encoded:
            if len(shards.sizes) == 1:
                return text.at(rows)
            return trunk.encode_text(all_ids[rows], None if all_mask is None else all_mask[rows])

        if self.temperature is None:
            drawn = draw_negatives(torch.zeros_like(allowed, dtype=torch.float32), allowed, draws[:, 1])
            wrong = (draws[:, 0] < 0.5) & (drawn >= 0)
            pairs = [(text, images_of(torch.where(wrong, drawn, own + shards.offset)))]
            labels = (~wrong).long()
        else:
            ids = None if image_ids is None else codes[1]
            losses["itc_loss"], image_scores, text_scores = self._contrast(image, text, shards, ids)
            for_text = draw_negatives(text_scores, allowed, draws[:, 0])
            for_image = draw_negatives(image_scores, allowed, draws[:, 1])
            labels = hard_pairs(for_text, for_image)
            pairs = [(text, image), (text, images_of(for_text.clamp(min=0))), (texts_of(for_image.clamp(min=0)), image)]
        logits = torch.cat([self.itm_score(self._pooled(*pair)) for pair in pairs])
        losses["itm_loss"] = matching_loss(logits, labels)
        return BridgeTowerOutput(loss=torch.stack(list(losses.values())).sum(), **losses)

    def _masked_token_loss(
        self, image: Encoded, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        states, _ = self.bridgetower.fuse(self.bridgetower.encode_text(input_ids, attention_mask), image, keep="text")
        return masked_word_loss(self.mlm_score, states, labels)

    def _contrast(
        self, image: Encoded, text: Encoded, shards: Shards, image_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ITC, and the logits (n, N) of own images with all texts and of own texts with all images."""
        own_image, own_text = self._project(image, text)
        scale = 1 / self.temperature.float()  # type: ignore[union-attr]
        images, texts = shards.gather(own_image), shards.gather(own_text)
        if image_ids is None:
            image_ids = torch.arange(len(images), device=images.device)
        groups = (image_ids[shards.offset : shards.offset + len(own_image)], image_ids)
        sides = [
            info_nce(a, b, scale, bidirectional=False, groups=groups)
            for a, b in ((own_image, texts), (own_text, images))
        ]
        with torch.no_grad():
            scores = [scale * a @ b.T for a, b in ((own_image, texts), (own_text, images))]
        return torch.stack(sides).mean() * shards.share, scores[0], scores[1]

    def _pooled(self, text: Encoded, image: Encoded) -> Tensor:
        pooled: Tensor = self.bridgetower.get_cls_features(*self.bridgetower.fuse(text, image, keep="first"))
        return pooled

    def _project(self, image: Encoded, text: Encoded) -> tuple[Tensor, Tensor]:
        """Unit-norm features (B, projection_dim), float32, of images and of texts."""
        found: list[Tensor] = []
        for head, states in ((self.image_projection, image.last), (self.text_projection, text.last)):
            found.append(F.normalize(head(states[:, 0]).float(), dim=-1))  # type: ignore[misc]
        return found[0], found[1]

    def _image_features(self, pixel_values: Tensor) -> Tensor:
        """Unit-norm (B, projection_dim), float32, where there is ITC; `get_image_features`."""
        last = self.bridgetower.encode_image(pixel_values).last
        return F.normalize(self.image_projection(last[:, 0]).float(), dim=-1)  # type: ignore[misc]

    def _text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Unit-norm (B, projection_dim), float32, where there is ITC; `get_text_features`."""
        last = self.bridgetower.encode_text(input_ids, attention_mask).last
        return F.normalize(self.text_projection(last[:, 0]).float(), dim=-1)  # type: ignore[misc]

    def match_scores(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B,) log-probability of ITM's head that image and text belong together."""
        trunk = self.bridgetower
        pooled = self._pooled(trunk.encode_text(input_ids, attention_mask), trunk.encode_image(pixel_values))
        return self.itm_score(pooled).float().log_softmax(1)[:, 1]

    def joint_features(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> JointFeatures:
        """Pooled (B, 2 D), and the cross-modal encoder's states of texts and images."""
        out = self(pixel_values, input_ids, attention_mask)
        return JointFeatures(out.pooled, out.text_states, out.image_states, attention_mask)

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Cross-modal layers and heads at `lr_factor` times the rate; gains, biases and scalars do not decay."""
        heads = ("mlm_score", "itm_score", "image_projection", "text_projection")
        return groups_of_two_rates(
            self.named_parameters(),
            lambda name: "cross_modal" in name or name.startswith(heads),
            lr=lr,
            factor=self.config.lr_factor,
            weight_decay=weight_decay,
        )

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Keeps the temperature in TEMPERATURES."""
        if self.temperature is not None:
            self.temperature.clamp_(*TEMPERATURES)

    def _metrics(self) -> dict[str, float]:
        return {"temperature": self.temperature.item()}  # type: ignore[union-attr]
