"""Faster R-CNN: Ren et al. 2015, "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks"
(1506.01497), with the attribute head of Anderson et al. 2018, "Bottom-Up and Top-Down Attention" (1707.07998).

An image of any size goes through a ResNet up to res4 (C4). A proposal network scores anchors at every place of the map
and moves them; NMS at IoU 0.7 leaves proposals. Each proposal's part of the map, pooled to P x P, goes through res5,
which has stride 1 and dilation 2, and a mean: the region's feature, 2048 numbers for a ResNet of bottlenecks. From it a
layer each tells its class, background last, and a box for each class; two layers tell its attribute, from the feature
and an embedding of the class. With smooth_l1 of beta 1, of images B, N_cls = 256 anchors drawn of each, N_reg places of
the map, and N proposals drawn, a quarter of them objects at most (IoU 0.5 or more with a true box)::

    loss = 1/B sum_images [1/N_cls sum BCE(objectness) + 10/N_reg sum_positive smooth_l1(anchor's box)]
         + 1/N sum CE(class) + 1/N sum_objects smooth_l1(box of the true class) + 1/2 mean CE(attribute)

All is trained together. With pretrained weights batch norm is a fixed affine map, and the stem and res2 are frozen;
a new backbone is trained whole, with batch norm.

Departures:

- The paper trains in four alternating steps or approximately jointly; here jointly, without gradient through the
  proposals' coordinates, as in public code.
- Attributes: an object may have several, and the loss is the mean over all of them; one without any counts nothing. In
  training the embedding is of the true class, in evaluation of the predicted one. The last logit, "none", is never
  an answer, and no object is trained towards it. The weight 1/2 is ours.
- True boxes are among the proposals that are drawn, as in public code. Objects whose name is not among the classes, and
  crowds, are background.
- Images are RGB with ImageNet's mean and deviation, and res3 to res5 have torchvision's strides; the detector of
  "Bottom-Up" reads BGR. `roi_op` "pool" is the paper's; a small new model has "align", as a border rounded to 8 pixels
  is a fifth of an object of 40. Its map has stride 8, with res4 dilated, and up to half of its few proposals that are
  drawn are objects.
- Each image is padded to multiples of the stride and goes through the backbone beside images of the same padded size
  alone, so in evaluation an image gives the same in any batch. Public code pads to the largest of the batch.
- Regions: NMS at IoU 0.5 in each class, on boxes refined for the class; public ports run it once over all classes, and
  may find no region.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from typing_extensions import Self

from vlmfast.data import Transform
from vlmfast.models.contract import Pretrainable, eval_mode, fingerprint
from vlmfast.models.detection.batches import DetectionCollator, Group, Sizes, WholeImage, groups, named_objects, pad
from vlmfast.models.detection.config import LONGER, FasterRCNNConfig, FasterRCNNOptions
from vlmfast.models.detection.regions import Scored, Selection, as_batch, describe, detections, select

ATTRIBUTE_WEIGHT = 0.5
HEADS = ("class_score", "box_deltas", "class_embedding", "attribute_hidden", "attribute_score")


@dataclass
class FasterRCNNOutput(ModelOutput):
    """The loss () and its parts, as the top of this file has them, the attributes' before its weight."""

    loss: Tensor | None = None
    objectness: Tensor | None = None
    proposal_box: Tensor | None = None
    classes: Tensor | None = None
    boxes: Tensor | None = None
    attributes: Tensor | None = None


class FasterRCNNModel(Pretrainable, PreTrainedModel):
    """See the top of this file. torchvision is needed to make one."""

    config: FasterRCNNConfig
    config_class = FasterRCNNConfig
    base_model_prefix = "faster_rcnn"
    main_input_name = "pixel_values"
    Options = FasterRCNNOptions
    strategy, paper, tasks = "detection", "Ren et al. 2015 (1506.01497)", ("detection",)
    requires = ("objects",)
    reads_text = False
    training_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 10.0,
        "per_device_train_batch_size": 16,
    }

    def __init__(self, config: FasterRCNNConfig) -> None:
        super().__init__(config)
        # Here, so that naming the model needs no torchvision.
        from vlmfast.models.detection.backbone import Backbone
        from vlmfast.models.detection.rpn import RPN

        self.backbone = Backbone(config.backbone, config.backbone_width, config.stride, config.frozen_norm)
        self.rpn = RPN(
            self.backbone.map_width,
            config.anchor_sizes,
            config.aspect_ratios,
            config.candidates,
            (config.train_proposals, config.proposals),
        )
        self._make_heads()
        self._parts: dict[str, Tensor] = {}
        self.freeze()
        self.post_init()

    def _make_heads(self) -> None:
        config, width = self.config, self.backbone.width
        classes = len(config.id2label)
        self.class_score = nn.Linear(width, classes + 1)
        self.box_deltas = nn.Linear(width, 4 * classes)
        self.class_embedding = self.attribute_hidden = self.attribute_score = None
        if config.attributes:
            self.class_embedding = nn.Embedding(classes, config.attribute_embed_dim)
            self.attribute_hidden = nn.Linear(width + config.attribute_embed_dim, config.attribute_hidden_size)
            self.attribute_score = nn.Linear(config.attribute_hidden_size, len(config.attributes) + 1)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            if module.bias is None:
                init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            else:  # of the proposal network
                init.normal_(module.weight, std=0.01)
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.001 if module is self.box_deltas else 0.01)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.01)
        elif isinstance(module, nn.BatchNorm2d):
            super()._init_weights(module)

    @classmethod
    def create(cls, options: Any, tokenizer: Any, **overrides: Any) -> Self:
        """A new model without classes; `training_data` reads them from the training data."""
        side, small = options.image_size, options.backbone == "small"
        shares = (0.16, 0.24, 0.36, 0.54) if small else (0.16, 0.32, 0.64)  # the paper's are of images of 800
        settings: dict[str, Any] = {
            "backbone": options.backbone,
            "frozen_norm": options.backbone_weights is not None,
            "frozen_stages": 0 if options.backbone_weights is None else 2,
            "image_size": side,
            "longer_size": round(LONGER * side),
            "anchor_sizes": options.anchor_sizes or [max(1, round(share * side)) for share in shares],
        }
        if small:
            settings |= {
                "backbone_width": options.backbone_width,
                "stride": 8,
                "candidates": 200,
                "train_proposals": 100,
                "proposals": 100,
                "roi_size": 4,
                "roi_op": "align",
                "roi_batch": 16,
                "roi_objects": 0.5,
            }
        model = cls(FasterRCNNConfig(**settings | overrides))
        if options.backbone_weights is not None:
            from vlmfast.models.detection.backbone import load_weights

            load_weights(model.backbone, options.backbone_weights)
        return model

    @classmethod
    def overrides(cls, options: Any) -> dict[str, Any]:
        chosen = super().overrides(options)
        if (options.pretrained or options.config) and options.is_given("image_size"):
            chosen |= {"image_size": options.image_size, "longer_size": round(LONGER * options.image_size)}
        return chosen

    def training_data(self, options: Any, dataset: Any, tokenizer: Any = None) -> Any:
        """The dataset as it is, once the model has a class for each name in it, and an attribute for each.

        A new model's classes are the most frequent names, in alphabetical order. A pretrained one keeps its own, and
        their weights, before the new ones.

        Raises:
            ValueError: no object has a name and a box.
        """
        names: Counter[str] = Counter()
        attributes: Counter[str] = Counter()
        for index in range(len(dataset)):
            for _, name, said in named_objects(dataset.record(index)):
                names[name] += 1
                attributes.update(said)
        if not names:
            raise ValueError(f"--data: no object of {len(dataset)} samples has a name and a box")
        old = self.config.names if self.config.names != ["object"] else []
        self._extend(
            old + _new(names, old, options.num_names),
            self.config.attributes + _new(attributes, self.config.attributes, options.num_attributes),
        )
        return dataset

    @torch.no_grad()
    def _extend(self, names: list[str], attributes: list[str]) -> None:
        """Heads for names and attributes that begin with those there are, whose weights stay."""
        kept, before = len(self.config.names), self.config.names
        if names == before and attributes == self.config.attributes:
            return
        if names[:kept] != before:
            kept = 0
        old = {name: value for name, value in self.named_parameters() if name.partition(".")[0] in HEADS}
        some = len(self.config.attributes)
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: number for number, name in enumerate(names)}
        self.config.attributes = attributes
        self._make_heads()
        for module in self.children():
            if module not in (self.backbone, self.rpn):
                self._init_weights(module)
        for name, value in self.named_parameters():
            rows = {"class_score": kept, "box_deltas": 4 * kept, "class_embedding": kept, "attribute_score": some}
            head = name.partition(".")[0]
            if head == "attribute_hidden" and name in old:
                value.copy_(old[name])
            elif head in rows and name in old:
                value[: rows[head]] = old[name][: rows[head]]
                if head in ("class_score", "attribute_score") and rows[head]:
                    value[-1] = old[name][-1]  # background, or no attribute

    def transform(self, options: Any, *, train: bool) -> Transform:
        """None of the pixels: the collator changes the size, and in training turns some images."""
        return WholeImage()

    def image_size(self, options: Any) -> int:
        """The shorter side of images: --image-size where it is given, else the config's."""
        return int(options.image_size if options.is_given("image_size") else self.config.image_size)

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        side = self.image_size(options)
        longer = self.config.longer_size if side == self.config.image_size else round(LONGER * side)
        if not train:
            return DetectionCollator(Sizes(side, longer))
        attributes = {name: number for number, name in enumerate(self.config.attributes)}
        return DetectionCollator(Sizes(side, longer), _numbers(self.config.names), attributes, options.flip)

    def frozen_parts(self) -> tuple[nn.Module, ...]:
        return self.backbone.first(self.config.frozen_stages)

    def forward(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        boxes: Tensor | None = None,
        labels: Tensor | None = None,
        attributes: Tensor | None = None,
    ) -> FasterRCNNOutput:
        """The loss; see the top of this file.

        Args:
            pixel_values (B, H, W, 3): uint8, images in the upper left corner of each.
            image_sizes (B, 2): int64, their widths and heights; None where there is no padding.
            boxes (B, G, 4), labels (B, G), attributes (B, G, M): as `DetectionCollator` makes them.
        Raises:
            ValueError: boxes, labels or attributes are missing.
        """
        from vlmfast.models.detection import rois

        if boxes is None or labels is None or attributes is None:
            raise ValueError("boxes, labels and attributes: expected those of a training batch, got None")
        targets = [
            {"boxes": own[label >= 0], "labels": label[label >= 0], "attributes": said[label >= 0]}
            for own, label, said in zip(boxes, labels, attributes, strict=True)
        ]
        pooled, drawn = [], []
        losses: dict[str, Tensor] = defaultdict(lambda: pixel_values.new_zeros((), dtype=torch.float32))
        for places, images, sizes in self._groups(pixel_values, image_sizes):
            maps, own_targets = self.backbone(images), [targets[place] for place in places]
            proposals, parts = self._propose(images, maps, sizes, own_targets)
            for name, value in parts.items():
                losses[name] = losses[name] + value / len(pixel_values)
            own = [
                rois.draw(proposal, target, len(self.config.id2label), self.config.roi_batch, self.config.roi_objects)
                for proposal, target in zip(proposals, own_targets, strict=True)
            ]
            pooled.append(self._pool(maps, [each.boxes for each in own]))
            drawn += own
        labels, goals = torch.cat([each.labels for each in drawn]), torch.cat([each.goals for each in drawn])
        features = self.backbone.res5(torch.cat(pooled))
        scores, deltas = self._score(features)
        losses |= rois.roi_losses(scores, deltas, labels, goals)
        total = sum(losses.values(), start=torch.zeros_like(losses["classes"]))
        if self.attribute_score is not None:
            objects = labels < deltas.shape[1]
            said = torch.cat([each.attributes for each in drawn])[objects]
            losses["attributes"] = rois.attribute_loss(self._attributes(features[objects], labels[objects]), said)
            total = total + ATTRIBUTE_WEIGHT * losses["attributes"]
        self._parts = {f"loss_{name}": value.detach() for name, value in losses.items()}
        return FasterRCNNOutput(loss=total, **losses)

    def metrics(self) -> dict[str, float]:
        """The parts of the last batch's loss."""
        return {name: float(value) for name, value in self._parts.items()}

    @torch.no_grad()
    def detect(self, pixel_values: Tensor, phrases: Any = None, image_sizes: Tensor | None = None) -> list[Any]:
        """Of each image "boxes" (N, 4) in its pixels, "scores" (N,) and "labels" (N,), places in `config.names`.

        Args:
            pixel_values, image_sizes: as `forward`.
            phrases: must be None: the classes are fixed.
        """
        if phrases is not None:
            raise ValueError(f"phrases: expected None, as the classes of this detector are fixed, got {phrases!r}")
        with eval_mode(self):
            return [detections(scored) for scored in self._scored(pixel_values, image_sizes)]

    @torch.no_grad()
    def regions(
        self, images: Tensor | Sequence[Tensor], *, least: int = 10, most: int = 100, threshold: float = 0.2
    ) -> dict[str, list[Tensor]]:
        """The regions of images, as `Sample.features` has them, one tensor an image under each name.

        `boxes` (R, 4) float32, in pixels of the image that is given; `features` (R, D); `probabilities` (R, K + 1),
        background last; `labels` (R,) int64 and `scores` (R,) their probability; where the model has attributes
        `attributes` (R,) int64 and `attribute_scores` (R,); `image_size` (2,) int64, width and height. Best first. The
        same in training mode and in any batch.

        Args:
            images: uint8 (H_i, W_i, 3) each, of any size, or (B, H, W, 3).
            least, most, threshold: how many, see `vlmfast.models.detection.regions.Selection`.
        """
        selection = Selection(least, most, threshold)
        sizes = Sizes(self.config.image_size, self.config.longer_size)
        pixel_values, image_sizes = pad([sizes.resize(image) for image in images])
        found = []
        with eval_mode(self):
            several = self._scored(pixel_values.to(self.device), image_sizes)
            for image, seen, scored in zip(images, image_sizes.tolist(), several, strict=True):
                places, labels = select(scored, selection)
                size = (image.shape[1], image.shape[0])
                scale = [seen[0] / size[0], seen[1] / size[1]]
                one = describe(scored, places, labels, scale, size)
                if self.attribute_score is not None:
                    told = self._attributes(one["features"], labels).softmax(dim=1)[:, :-1]
                    one["attribute_scores"], one["attributes"] = told.max(dim=1)
                found.append(one)
        return as_batch(found)

    def frozen_fingerprint(self) -> str:
        """A hash of what decides `regions`."""
        settings = self.config.to_dict()
        for name in ("_name_or_path", "transformers_version", "dtype", "architectures", "frozen_stages"):
            settings.pop(name, None)
        return fingerprint(settings, self)

    def _groups(self, pixel_values: Tensor, image_sizes: Tensor | None) -> list[Group]:
        config, stride = self.config, self.backbone.stride
        return groups(pixel_values, image_sizes, stride, config.image_mean, config.image_std, self.dtype)

    def _propose(
        self, images: Tensor, maps: Tensor, sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        from vlmfast.models.detection.rpn import image_list

        proposals, losses = self.rpn(image_list(images, sizes), maps, targets)
        return proposals, losses

    def _pool(self, maps: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        from vlmfast.models.detection.rois import pool

        return pool(maps, boxes, self.config.roi_size, self.backbone.stride, self.config.roi_op)

    def _score(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, K + 1) and deltas (R, K, 4), float32."""
        return self.class_score(features).float(), self.box_deltas(features).float().view(len(features), -1, 4)

    def _attributes(self, features: Tensor, labels: Tensor) -> Tensor:
        """Logits (R, A + 1) from features and classes."""
        assert self.class_embedding is not None
        assert self.attribute_hidden is not None
        assert self.attribute_score is not None
        both = torch.cat([features, self.class_embedding(labels).to(features)], dim=1)
        logits: Tensor = self.attribute_score(F.relu(self.attribute_hidden(both))).float()
        return logits

    def _scored(self, pixel_values: Tensor, image_sizes: Tensor | None) -> list[Scored]:
        """Of each image its proposals after the head."""
        from torchvision.ops import clip_boxes_to_image

        from vlmfast.models.detection.rois import CODER

        found: dict[int, Scored] = {}
        for places, images, sizes in self._groups(pixel_values, image_sizes):
            maps = self.backbone(images)
            proposals, _ = self._propose(images, maps, sizes)
            features = self.backbone.res5(self._pool(maps, proposals)).float()
            logits, deltas = self._score(features)
            counts = [len(each) for each in proposals]
            boxes = CODER.decode_single(deltas.flatten(1), torch.cat(proposals)).view(deltas.shape)
            parts = (boxes.split(counts), logits.softmax(dim=1).split(counts), features.split(counts))
            for place, size, own, probabilities, each in zip(places, sizes, *parts, strict=True):
                found[place] = Scored(clip_boxes_to_image(own, size), probabilities, each)
        return [found[place] for place in range(len(pixel_values))]


def _numbers(names: Sequence[str]) -> Mapping[str, int]:
    return {name: number for number, name in enumerate(names)}


def _new(counts: Counter[str], old: Sequence[str], limit: int) -> list[str]:
    """Names that are not among the old ones, sorted: the most frequent, as many as the limit leaves room for."""
    room = max(0, limit - len(old))
    ranked = sorted((name for name in counts if name not in old), key=lambda name: (-counts[name], name))
    return sorted(ranked[:room])
