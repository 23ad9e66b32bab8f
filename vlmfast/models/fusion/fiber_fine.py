"""FIBER, its fine stage: Dou et al. 2022, "Coarse-to-Fine Vision-Language Pre-training ..." (2206.07643).

The coarse stage's Swin and RoBERTa, fused in their last layers, read an image of any size and a text: a caption, or a
list of names. A feature pyramid over all of Swin's stages but the first, two levels more, and DyHead give at each place
a box, its centerness, and a logit for each word of the text, so that any phrase can be looked for::

    S = (o . (W e / 2 + b)) / exp(s) + e . b_lang + b_0, within +-5e4     o of the place, e the unit-norm word
    loss = 1/N sum over places and words of focal(S, whether the place's box is called by the word)      N positives
         + 2 / sum c * sum over positives of c (1 - GIoU)  +  1/N sum over positives of BCE(centerness, c)

with alpha 0.25 and gamma 2. ATSS (of 9 anchors a level) says which places are positive, and for which box; c is the
true centerness. The head has no fusion of its own. A phrase's score at a place is sqrt(mean over its words of
sigmoid(S) * sigmoid(centerness)); NMS at IoU 0.6 leaves 100 boxes.

All is trained, fusions at 5 times the rate. `--pretrained` takes a coarse stage's checkpoint; what it lacks is new.

Departures from the released code:

- Its loss of class logits has weight 0; there are none here.
- Its default fusion (v2) has no norm of the image's queries. Here there is one, as in the coarse stage (and in v3), so
  that the coarse stage's weights mean the same. RoBERTa keeps its last norm, as there.
- An image is padded to multiples of Swin's stride, not to the largest of its batch, so that it gives the same in any
  batch; and to one window at least.
- The maps of the pyramid are read after a norm each; the last is Swin's own.
- DyHead reads its coarser neighbour after that is enlarged; see `vlmfast.models.fusion.dyhead`.
- Names that do not fit into one text are asked for in several. In training the names that an image lacks are drawn
  from those of all training data, as many as fit.
- Images are not made larger or smaller at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from vlmfast.data import Transform
from vlmfast.data.phrases import phrase_mask
from vlmfast.models.checkpoints import check_numbers
from vlmfast.models.contract import eval_mode
from vlmfast.models.detection.batches import Group, Sizes, WholeImage, groups
from vlmfast.models.fusion.fiber_fine_batches import GroundingCollator, Prompt, names_of, prompts
from vlmfast.models.fusion.fiber_fine_config import LONGER, FIBERFineConfig, FIBERFineOptions
from vlmfast.models.fusion.fiber_model import FusedTowers
from vlmfast.models.fusion.fiber_parts import Backbone, Image


@dataclass
class FIBERFineOutput(ModelOutput):
    """The loss () and its parts, float32, as the top of this file has them, the boxes' after its weight."""

    loss: Tensor | None = None
    words: Tensor | None = None
    boxes: Tensor | None = None
    centerness: Tensor | None = None


class FIBERFineModel(FusedTowers, PreTrainedModel):
    """See the top of this file. torchvision is needed to make one."""

    config: FIBERFineConfig
    config_class = FIBERFineConfig
    base_model_prefix = "fiber_fine"
    Options = FIBERFineOptions
    paper = "Dou et al. 2022 (2206.07643), fine stage"
    tasks = ("detection", "grounding")
    requires = ("objects",)
    open_vocabulary = True
    training_defaults: ClassVar[dict[str, Any]] = {
        **FusedTowers.training_defaults,
        "per_device_train_batch_size": 16,
    }
    new_parts = ("towers.t2i.", "towers.i2t.", "level_norms.", "pyramid.", "head.")

    def __init__(self, config: FIBERFineConfig) -> None:
        super().__init__(config)
        check_numbers("config", config)
        # Here, so that naming the model needs no torchvision.
        from torchvision.ops import FeaturePyramidNetwork
        from torchvision.ops.feature_pyramid_network import LastLevelP6P7

        from vlmfast.models.fusion.region_words import RegionWordHead

        vision, channels = config.vision_config, config.head_channels
        self.towers = Backbone(config, "both")
        self.first = min(1, len(vision.depths) - 1)
        widths = [vision.embed_dim * 2**stage for stage in range(self.first, len(vision.depths))]
        self.level_norms = nn.ModuleList([nn.LayerNorm(width, eps=vision.layer_norm_eps) for width in widths[:-1]])
        self.pyramid = FeaturePyramidNetwork(widths, channels, LastLevelP6P7(channels, channels))
        self.head = RegionWordHead(
            channels, config.text_config.hidden_size, config.head_blocks, len(widths) + 2, config.anchor_scale
        )
        self._names: list[str] | None = None
        self._parts: dict[str, Tensor] = {}
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Convolutions of the pyramid uniform, others normal of 0.01."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            if module in set(self.pyramid.modules()):
                init.kaiming_uniform_(module.weight, a=1)
            else:
                init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif type(module).__name__ == "DeformConv2d":
            init.normal_(module.weight, std=0.01)
        elif module is self.head:
            from vlmfast.models.fusion.region_words import prior_logit

            init.kaiming_uniform_(module.word_projection.weight, a=math.sqrt(5))  # as of nn.Linear
            init.ones_(module.level_scale)
            init.constant_(module.log_scale, self.config.log_scale_init)
            init.zeros_(module.bias_lang)
            init.constant_(module.bias0, prior_logit())

    @classmethod
    def overrides(cls, options: Any) -> dict[str, Any]:
        """Sizes that a checkpoint or a config leaves open or that are asked for, and the fields that come last."""
        chosen: dict[str, Any] = {}
        if (options.pretrained or options.config) and options.is_given("image_size"):
            chosen = {"image_size": options.image_size, "longer_size": round(LONGER * options.image_size)}
        if options.is_coarse():
            chosen = _sizes(options)
        return {**chosen, **super().overrides(options)}

    @classmethod
    def settings(cls, options: Any, text: Any) -> dict[str, Any]:
        return _sizes(options)

    def training_data(self, options: Any, dataset: Any, tokenizer: Any = None) -> Any:
        """The dataset as it is; its names are those that an image is asked for in vain."""
        self._names = names_of(dataset)
        return dataset

    def transform(self, options: Any, *, train: bool) -> Transform:
        """None of the pixels: the collator changes the size."""
        return WholeImage()

    def image_size(self, options: Any) -> int:
        """The shorter side of images: --image-size where it is given, else the config's."""
        return int(options.image_size if options.is_given("image_size") else self.config.image_size)

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """Whole images and captions; in training boxes, and their words in a caption or in a list of names.

        Raises:
            ValueError: in training, where `training_data` has not been asked for.
        """
        side = self.image_size(options)
        longer = self.config.longer_size if side == self.config.image_size else round(LONGER * side)
        length = min(options.max_length, self.max_text_length)
        if train and self._names is None:
            raise ValueError("collator: expected training_data to be called first, which reads the names")
        return GroundingCollator(
            Sizes(side, longer), tokenizer, length, self._names if train else None, options.caption_share
        )

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_sizes: Tensor | None = None,
        boxes: Tensor | None = None,
        box_words: Tensor | None = None,
    ) -> FIBERFineOutput:
        """The loss; see the top of this file.

        Args:
            pixel_values (B, H, W, 3): uint8, images in the upper left corner of each.
            input_ids, attention_mask (B, L): int64, padded on the right.
            image_sizes (B, 2): int64, widths and heights; None where there is no padding.
            boxes (B, G, 4), box_words (B, G, L): as `GroundingCollator` makes them.
        Raises:
            ValueError: boxes or box_words are missing.
        """
        from vlmfast.models.fusion.region_words import losses, match

        if boxes is None or box_words is None:
            raise ValueError("boxes and box_words: expected those of a training batch, got None")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        matched = []
        for group in self._groups(pixel_values, image_sizes):
            places = group.places
            found = self._dense(self._encode(group.images), input_ids[places], mask[places])
            for row, place in enumerate(places):
                there = box_words[place].any(1)
                own = (boxes[place][there], box_words[place][there], mask[place].bool())
                matched.append(match(found, row, *own))
        parts = losses(matched)
        self._parts = {f"loss_{name}": value.detach() for name, value in parts.items()}
        return FIBERFineOutput(loss=torch.stack(list(parts.values())).sum(), **parts)

    @torch.no_grad()
    def phrase_scores(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        phrase_mask: Tensor,
        attention_mask: Tensor | None = None,
        image_sizes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores (B, P, R) float32 of the image's best regions for each phrase, and their boxes (B, R, 4).

        Regions are the places with the highest score for any phrase, 100 or all that there are. Boxes are within the
        image, in pixels of what is given. Behind the regions of an image that has fewer than another are scores -inf.

        Args:
            pixel_values, input_ids, attention_mask, image_sizes: as `forward`.
            phrase_mask (B, P, L): bool, the tokens that a phrase spans. A phrase without any scores 0.
        """
        from torchvision.ops import clip_boxes_to_image

        from vlmfast.models.fusion.found_phrases import FOUND, of_phrases

        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows: list[Any] = [None] * len(pixel_values)
        for places, images, sizes in self._groups(pixel_values, image_sizes):
            found = self._dense(self._encode(images), input_ids[places], mask[places])
            scores = of_phrases(found.logits, phrase_mask[places])
            scores = (scores * found.centerness.sigmoid()[..., None]).sqrt()
            for row, (place, size) in enumerate(zip(places, sizes, strict=True)):
                rank = torch.cat([scores[row], scores[row].new_zeros(scores.shape[1], 1)], 1).amax(1)
                best = rank.topk(min(FOUND, len(rank))).indices
                rows[place] = (scores[row][best].T, clip_boxes_to_image(found.boxes[row][best], size))
        most = max(boxes.shape[0] for _, boxes in rows)
        scores = pixel_values.new_full((len(rows), phrase_mask.shape[1], most), -torch.inf, dtype=torch.float32)
        boxes = pixel_values.new_zeros((len(rows), most, 4), dtype=torch.float32)
        for place, (own, where) in enumerate(rows):
            scores[place, :, : len(where)], boxes[place, : len(where)] = own, where
        return scores, boxes

    @torch.no_grad()
    def detect(
        self,
        pixel_values: Tensor,
        phrases: Sequence[Sequence[str]],
        image_sizes: Tensor | None = None,
        *,
        tokenizer: Any,
        max_length: int | None = None,
    ) -> list[dict[str, Tensor]]:
        """Of each image "boxes" (N, 4) in its pixels, "scores" (N,) and "labels" (N,), best first.

        Args:
            pixel_values, image_sizes: as `forward`.
            phrases: of each image what to look for; labels are places in its list.
            tokenizer: the model's.
            max_length: tokens of a text at most; by default as many as the model can read. More phrases than that holds
                are looked for in several texts.
        Raises:
            ValueError: there is not one list of phrases for each image, or a phrase is empty.
        """
        if phrases is None or len(phrases) != len(pixel_values):
            raise ValueError(f"phrases: expected a list for each of {len(pixel_values)} images, got {phrases!r}")
        for own in phrases:
            if isinstance(own, str) or not all(isinstance(one, str) and one.strip() for one in own):
                raise ValueError(f"phrases: expected lists of phrases that are not empty, got {own!r}")
        from vlmfast.models.fusion.found_phrases import best

        length = min(max_length or self.max_text_length, self.max_text_length)
        made = {tuple(own): prompts(tokenizer, own, length) for own in phrases}
        asked = [made[tuple(own)] for own in phrases]
        results: list[Any] = [None] * len(pixel_values)
        with eval_mode(self):
            for places, images, sizes in self._groups(pixel_values, image_sizes):
                found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in places]
                encoded = self._encode(images)
                for turn in range(max(len(asked[place]) for place in places)):
                    rows = [row for row, place in enumerate(places) if turn < len(asked[place])]
                    texts = [asked[places[row]][turn] for row in rows]
                    several = self._look(_rows(encoded, rows), [sizes[row] for row in rows], texts, tokenizer, length)
                    for row, one in zip(rows, several, strict=True):
                        found[row].append(one)
                for row, place in enumerate(places):
                    results[place] = best(found[row], pixel_values.device)
        return results

    def _look(
        self,
        encoded: tuple[Image, list[Image]],
        sizes: Sequence[tuple[int, int]],
        texts: Sequence[Prompt],
        tokenizer: Any,
        length: int,
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each image boxes (N, 4), scores (N,) and labels (N,) of the candidates for the phrases of its text."""
        from vlmfast.models.fusion.found_phrases import candidates, of_phrases

        tokens = tokenizer(
            [text.text for text in texts], padding=True, padding_side="right", truncation=True, max_length=length,
            return_tensors="pt",
        )  # fmt: skip
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        spans = phrase_mask(tokenizer, [text.text for text in texts], [text.spans for text in texts], ids)
        device = encoded[0].states.device
        dense = self._dense(encoded, ids.to(device), mask.to(device))
        scores = of_phrases(dense.logits, spans.to(device))
        return [
            candidates(scores[row], dense.centerness[row], dense.boxes[row], text.names, size)
            for row, (text, size) in enumerate(zip(texts, sizes, strict=True))
        ]

    def _groups(self, pixel_values: Tensor, image_sizes: Tensor | None) -> list[Group]:
        config, vision = self.config, self.config.vision_config
        stride = vision.patch_size * 2 ** (len(vision.depths) - 1)
        return groups(
            pixel_values, image_sizes, stride, config.image_mean, config.image_std, self.dtype,
            least=stride * vision.window_size,
        )  # fmt: skip

    def _encode(self, images: Tensor) -> tuple[Image, list[Image]]:
        """Normalised images (N, 3, H, W) before the first fused block, and the stages that ended before."""
        stages: list[Image] = []
        return self.towers.encode_image(images, stages), stages

    def _dense(self, encoded: tuple[Image, list[Image]], input_ids: Tensor, attention_mask: Tensor) -> Any:
        """What the head says of each place (`region_words.Dense`)."""
        image, before = encoded
        stages = list(before)
        text = self.towers.encode_text(input_ids, attention_mask)
        words, _ = self.towers.fuse(image, text, last_norm=True, stages=stages)
        norms = [*self.level_norms, self.towers.vision_model.layernorm]
        maps = {
            str(level): norm(stage.states).transpose(1, 2).unflatten(2, stage.size)
            for level, (norm, stage) in enumerate(zip(norms, stages[self.first :], strict=True))
        }
        stride = self.config.vision_config.patch_size * 2**self.first
        return self.head(list(self.pyramid(maps).values()), words, stride)

    def metrics(self) -> dict[str, float]:
        """The parts of the last loss, and the mean size of the gates of either side."""
        return {name: value.item() for name, value in self._parts.items()} | super().metrics()


def _sizes(options: Any) -> dict[str, Any]:
    return {
        "head_channels": options.head_width,
        "head_blocks": options.head_blocks,
        "anchor_scale": options.anchor_scale,
        "log_scale_init": options.log_scale,
        "image_size": options.image_size,
        "longer_size": round(LONGER * options.image_size),
    }


def _rows(encoded: tuple[Image, list[Image]], rows: Sequence[int]) -> tuple[Image, list[Image]]:
    image, stages = encoded
    return image._replace(states=image.states[rows]), [each._replace(states=each.states[rows]) for each in stages]
