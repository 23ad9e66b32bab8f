"""ALIGN: Jia et al. 2021, "Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision"
(2102.05918).

Loss over the global batch of N, with x, t the unit-norm image and text features, in training with the one-hot targets
smoothed by e = label_smoothing: 1 - e + e / N at the pair, e / N elsewhere::

    logits = x @ t.T / temperature
    (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2

Everything is trained. `temperature` is the divisor itself, not its logarithm, and starts at 1.

An image's feature is the global mean of an EfficientNet's last stage, without the 1 x 1 convolution that classifiers
have after it and without a layer of its own; a text's is BERT's [CLS] through a linear layer with bias to the image's
width. Other towers are read as in `vlmfast.models.two_towers`.

Departures from the paper:

- The mean of both directions, as transformers and CLIP have it; the paper's sum is twice that.
- `temperature` is kept at 0.01 or above after every step: below 0 the loss is turned round, and nothing else stops it.

Departures from transformers' AlignModel, whose checkpoints load:

- It takes `batch_norm_momentum` 0.99, Keras' share of the old mean, for torch's share of the new one, so that running
  statistics are those of the last batch; one of four norms has torch's default instead. Here all have 0.01.
- Its drop-connect drops single values; here whole samples of a block, as in EfficientNet. Both hold for transformers'
  EfficientNet as a tower of any model too.
- It smoothes labels in evaluation too, and builds the (N, N) logits.
- Its text tower has a pooler that nothing reads; here it is removed, since DDP stops at a parameter without gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from vlmfast.models.gathered import Shards
from vlmfast.models.towers import small_bert, tower_width
from vlmfast.models.two_tower_config import TwoTowerConfig, TwoTowerOptions
from vlmfast.models.two_towers import TwoTowerModel, TwoTowerOutput

MIN_TEMPERATURE = 0.01


class ALIGNConfig(TwoTowerConfig):
    """transformers' AlignConfig with towers of any transformers type; each reads the other's of ALIGN towers.

    Args:
        vision_config, text_config: as TwoTowerConfig's; a dict without `model_type` is ALIGN's own tower.
        projection_dim: size D of the shared space, the image tower's width, which None is.
        temperature_init_value: initial value.
        label_smoothing: in training.
        image_mean, image_std: 0.5, pixels in [-1, 1].
        Others as TwoTowerConfig.
    Raises:
        ValueError: projection_dim is not the image tower's width.
    """

    model_type = "align"
    default_towers: ClassVar[dict[str, Any]] = {
        "vision_config": transformers.AlignVisionConfig,
        "text_config": transformers.AlignTextConfig,
    }

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        projection_dim: int | None = None,
        temperature_init_value: float = 1.0,
        label_smoothing: float = 0.1,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        self.temperature_init_value = temperature_init_value
        self.label_smoothing = label_smoothing
        super().__init__(
            vision_config,
            text_config,
            projection_dim=projection_dim,
            image_mean=image_mean,
            image_std=image_std,
            **kwargs,
        )
        width = tower_width("vision_config", self.vision_config)
        if self.projection_dim != width:
            raise ValueError(
                f"projection_dim: expected the image tower's width {width}, as images have no layer of their own, "
                f"got {self.projection_dim}"
            )

    @classmethod
    def small(  # type: ignore[override]
        cls,
        *,
        vocab_size: int,
        eos_token_id: int,
        bos_token_id: int | None = None,
        pad_token_id: int | None = None,
        image_size: int = 64,
        vision_width: int = 192,
        vision_layers: int = 4,
        text_width: int = 192,
        text_layers: int = 2,
        max_length: int = 32,
    ) -> "ALIGNConfig":
        """An EfficientNet of three stages, its last of `vision_width` channels at an eighth of the size, and a BERT.

        `vision_layers` is the number of its blocks, at least 3. Small models are trained for few steps, in which a
        temperature of 1 does not come down and statistics with a memory of 100 steps do not settle: here they are 0.07
        and 10 steps.

        Raises:
            ValueError: a width is not a multiple of 64, or there are fewer blocks than stages.
        """
        for name, width in {"vision_width": vision_width, "text_width": text_width}.items():
            if width <= 0 or width % 64:
                raise ValueError(f"{name}: expected a positive multiple of 64, got {width}")
        if vision_layers < 3:
            raise ValueError(f"vision_layers: expected at least 3, one for each stage, got {vision_layers}")
        vision = transformers.AlignVisionConfig(
            image_size=image_size,
            width_coefficient=1.0,
            depth_coefficient=1.0,
            kernel_sizes=[3, 3, 5],
            in_channels=[32, 16, vision_width // 4],
            out_channels=[16, vision_width // 4, vision_width],
            depthwise_padding=[],
            strides=[1, 2, 2],
            num_block_repeats=[1, (vision_layers - 1) // 2, vision_layers // 2],
            expand_ratios=[1, 6, 6],
            batch_norm_momentum=0.9,
        )
        text = small_bert(
            transformers.AlignTextConfig,
            text_width,
            text_layers,
            max_length,
            vocab_size=vocab_size,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )
        return cls(vision_config=vision, text_config=text, temperature_init_value=0.07)


@dataclass
class ALIGNOutput(TwoTowerOutput):
    """TwoTowerOutput's fields but logit_scale, which is None, and temperature (), the divisor."""

    temperature: Tensor | None = None

    def logits_per_image(self) -> Tensor:
        """image_features @ text_features.T / temperature: (images, texts), built anew at each call."""
        return self["image_features"] @ self["text_features"].T / self["temperature"]


class ALIGNModel(TwoTowerModel):
    """EfficientNet and BERT, and the smoothed contrastive loss; see the top of this file.

    Parameters have the names of transformers' AlignModel.
    """

    config: ALIGNConfig
    output_class = ALIGNOutput
    scalars = ("temperature",)
    base_model_prefix = "align"
    paper = "Jia et al. 2021 (2102.05918)"
    Options = TwoTowerOptions
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"text_model\.pooler\."]

    def __init__(self, config: ALIGNConfig) -> None:
        super().__init__(config)
        self.visual_projection = nn.Identity()
        _, self.text_projection = self.linear_heads(text_bias=True)
        if isinstance(self.text_model, transformers.AlignTextModel):
            self.text_pools_first = True
            self.text_model.register_module("pooler", None)
        self.temperature = self.scalar("temperature")
        self.post_init()

    def loss(  # type: ignore[override]
        self, image_features: Tensor, text_features: Tensor, temperature: Tensor
    ) -> Tensor:
        """The contrastive loss over the global batch, with smoothed labels in training mode.

        After DDP's mean, gradients are those of one process with the whole batch.

        Args:
            image_features, text_features (B, D): unit-norm, this process's part of the batch.
            temperature (): the divisor.
        """
        shards = Shards("ALIGNModel", image_features, text_features)
        scale = 1 / temperature.float()
        smoothing = float(self.config.label_smoothing) if self.training else 0.0
        directions = ((image_features, text_features), (text_features, image_features))
        terms = [shards.info_nce(a, shards.gather(b), scale, label_smoothing=smoothing) for a, b in directions]
        return torch.stack(terms).mean()

    def metrics(self) -> dict[str, float]:
        """The temperature."""
        return {"temperature": self.temperature.item()}

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Keep `temperature` at 0.01 or above, in place."""
        self.temperature.clamp_(min=MIN_TEMPERATURE)
