"""LiT: Zhai et al. 2022, "LiT: Zero-Shot Transfer with Locked-image text Tuning" (2111.07991).

CLIP's loss over the global batch, with x, t the unit-norm image and text features and s = exp(logit_scale)::

    logits = s * x @ t.T
    (cross_entropy(logits, arange(N)) + cross_entropy(logits.T, arange(N))) / 2

The image tower is pretrained and locked: without gradients, hence never in an optimizer, and in eval mode whatever
`train` is asked for, so neither dropout nor running statistics move its features. They can be computed once, by
`encode_locked`, and passed as `locked_features`. Trained are the text tower, pretrained ("LU" of the paper) or from
scratch ("Lu"), a linear head with bias from its width to the image tower's, and logit_scale, which starts at ln 10 and
is not clamped. Images have no head; `image_head` gives both sides one, which is trained.

What one feature per sample is read from:

- images: the class token after the last norm, as in the paper, of towers whose pooler is a dense layer with tanh (ViT,
  DeiT, BEiT); that pooler is removed. `pooler_output` of others (CLIP, ResNet, ConvNeXt, timm's).
- texts: towers of types that have a masked language model: their [CLS], without the tanh pooler, or the mean over
  tokens (`text_pooling`), which is how sentence encoders such as MiniLM were trained. Others: `pooler_output`.

Departures from public implementations:

- transformers' VisionTextDualEncoderModel reads the tanh poolers, has bias-free heads on both sides, and trains all.
- open_clip's lock_image_tower leaves a locked tower's dropout and batch norms in training mode unless told otherwise.
- big_vision divides by norm + 1e-8 and, from scratch, has a ViT-style text transformer that reads the last token; here
  features are divided by max(norm, 1e-12), and `LiTConfig.small` makes a BERT.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.utils import can_return_tuple
from typing_extensions import Self

from vlmfast.distributed import rank_and_world_size
from vlmfast.models.contract import vision_fingerprint
from vlmfast.models.towers import small_bert, tower_width
from vlmfast.models.two_tower_config import PatchOptions, TwoTowerConfig, small_towers
from vlmfast.models.two_towers import TwoTowerModel, TwoTowerOutput, mean_of_tokens, read_class_token
from vlmfast.nn import ClipLoss


class LiTConfig(TwoTowerConfig):
    """TwoTowerConfig for a locked image tower.

    Args:
        projection_dim: size D of the shared space; None is the image tower's width, the only choice without image_head.
        image_head: give images a trained linear head too.
        text_pooling: "first" or "mean", of text towers with bidirectional attention.
        logit_scale_init_value: ln 10, as in the paper.
        Others as TwoTowerConfig. A timm tower's config (`TimmWrapperConfig`) needs `hidden_size`, the width of its
            features.
    Raises:
        ValueError: text_pooling is another, or projection_dim is not the image tower's width without image_head.
    """

    model_type = "lit"

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        projection_dim: int | None = None,
        logit_scale_init_value: float = math.log(10),
        image_head: bool = False,
        text_pooling: str = "first",
        **kwargs: Any,
    ) -> None:
        self.logit_scale_init_value = logit_scale_init_value
        self.image_head = image_head
        self.text_pooling = text_pooling
        super().__init__(vision_config, text_config, projection_dim=projection_dim, **kwargs)
        if self.text_pooling not in ("first", "mean"):
            raise ValueError(f"text_pooling: expected 'first' or 'mean', got {self.text_pooling!r}")
        width = tower_width("vision_config", self.vision_config)
        if not self.image_head and self.projection_dim != width:
            reason = f"the image tower's width {width}, as images have no head"
            raise ValueError(f"projection_dim: expected {reason}, got {self.projection_dim}")

    @classmethod
    def small(cls, *, text_width: int = 192, text_layers: int = 2, max_length: int = 32, **sizes: Any) -> "LiTConfig":
        """A ViT to be locked, as `small_towers` makes it, and a BERT, from a few numbers."""
        tokens = {name: value for name, value in sizes.items() if name.endswith("_token_id") or name == "vocab_size"}
        vision = small_towers(text_width=text_width, **sizes)["vision_config"]
        text = small_bert(transformers.BertConfig, text_width, text_layers, max_length, **tokens)
        return cls(vision_config=vision, text_config=text)


class LiTModel(TwoTowerModel):
    """A locked image tower, a text tower that learns to read it, and CLIP's loss; see the top of this file."""

    config: LiTConfig
    base_model_prefix = "lit"
    paper = "Zhai et al. 2022 (2111.07991)"
    Options = PatchOptions
    new_parts = ("text_projection.bias",)

    def __init__(self, config: LiTConfig) -> None:
        super().__init__(config)
        self.reads_class_token = read_class_token(self.vision_model)
        width = tower_width("vision_config", config.vision_config)
        self.visual_projection = nn.Linear(width, config.projection_dim) if config.image_head else nn.Identity()
        _, self.text_projection = self.linear_heads(text_bias=True)
        self.logit_scale = self.scalar("logit_scale")
        self.freeze()
        self.post_init()

    @classmethod
    def create(cls, options: Any, tokenizer: Any, **overrides: Any) -> Self:
        """As TwoTowerModel's; the image tower is a pretrained one."""
        if not options.vision_tower:
            raise ValueError("lit needs the --vision-tower that it locks, --config or --pretrained")
        return super().create(options, tokenizer, **overrides)

    def frozen_parts(self) -> tuple[nn.Module, ...]:
        """The image tower: neither dropout nor running statistics move its features."""
        return (self.vision_model,)

    @torch.no_grad()
    def encode_locked(self, pixel_values: Tensor) -> Tensor:
        """The locked tower's features (B, W), float32, before head and norm, without gradients: `locked_features`.

        Args:
            pixel_values: as `get_image_features`.
        """
        if not self.reads_class_token:
            return self._pool_image(pixel_values).float()
        states: Tensor = self.vision_model(self._tower_input(pixel_values)).last_hidden_state
        return states[:, 0].float()

    def frozen_features(self, pixel_values: Tensor, **others: Tensor) -> dict[str, Tensor]:
        """`encode_locked`, by the name that `forward` has for it."""
        return {"locked_features": self.encode_locked(pixel_values)}

    def frozen_fingerprint(self) -> str:
        """A hash of what decides `encode_locked`: the tower's architecture and weights, the normalisation of pixels."""
        return vision_fingerprint(self.config, self.vision_model)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """As TwoTowerModel's; a gradient reaches the image head alone, where there is one."""
        return self._image_features(self.encode_locked(pixel_values))

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """As TwoTowerModel's."""
        if self.config.text_pooling == "first" or not self.text_pools_first:
            return super().get_text_features(input_ids, attention_mask, position_ids)
        states, _ = self._pool_text(input_ids, attention_mask, position_ids)
        pooled = mean_of_tokens(states, input_ids, attention_mask, position_ids)
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    def loss(  # type: ignore[override]
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor
    ) -> Tensor:
        """Symmetric InfoNCE over the global batch; without image_head the gradient of the images is not computed.

        After DDP's mean, gradients are those of one process with the whole batch.

        Args:
            image_features, text_features (B, D): unit-norm, this process's part of the batch.
            logit_scale (): the log-parameter.
        """
        if not self.config.image_head:
            image_features = image_features.detach()  # GradCache makes every feature a leaf that wants one
        rank, world_size = rank_and_world_size()
        clip_loss = ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)
        return clip_loss(image_features, text_features, logit_scale.float().exp())

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool = True,
        locked_features: Tensor | None = None,
    ) -> TwoTowerOutput:
        """As TwoTowerModel's forward.

        Args:
            locked_features (B, W): what `encode_locked` makes of the images, in the place of `pixel_values`; the image
                tower is not run.

        Raises:
            ValueError: an input is missing, images are given twice, there is not one text per image, or locked_features
                is not (B, W).
        """
        if input_ids is None or (pixel_values is None) == (locked_features is None):
            name = "input_ids" if input_ids is None else "pixel_values"
            raise ValueError(f"{name}: expected input_ids, and either pixel_values or locked_features")
        if locked_features is None:
            assert pixel_values is not None
            locked_features = self.encode_locked(pixel_values)
        width = tower_width("vision_config", self.config.vision_config)
        if locked_features.ndim != 2 or locked_features.shape[1] != width:
            raise ValueError(f"locked_features: expected (B, {width}), got shape {tuple(locked_features.shape)}")
        if return_loss and len(input_ids) != len(locked_features):
            raise ValueError(f"input_ids: expected {len(locked_features)} texts, one per image, got {len(input_ids)}")
        image_features = self._image_features(locked_features)
        text_features = self.get_text_features(input_ids, attention_mask, position_ids)
        output: TwoTowerOutput = self._output(image_features, text_features, return_loss)
        return output

    def _image_features(self, locked_features: Tensor) -> Tensor:
        if self.config.image_head:
            locked_features = self.visual_projection(locked_features.to(self.visual_projection.weight.dtype))
        return F.normalize(locked_features.float(), dim=-1)
