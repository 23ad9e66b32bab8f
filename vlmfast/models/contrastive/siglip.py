"""SigLIP: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training" (2303.15343).

Loss, the only one, over the global batch, with x, t the unit-norm image and text features; z is 1 for pairs, else -1::

    logits = exp(logit_scale) * x @ t.T + logit_bias
    -log_sigmoid(z * logits).sum() / N

Everything is trained. logit_scale starts at ln 10 and logit_bias at -10, so that the many negatives of the first steps
weigh what they should; neither is clamped.

The towers are Siglip's by default: the image is read by an attention pooling head, the text, padded to all positions of
the tower, at its last position, padding or not, without a mask, and through a linear head. Here the padding is made in
`get_text_features`, whatever length the texts come with, as for this tower in every model of two towers. Other towers
are read as in `vlmfast.models.two_towers` and have a linear projection without bias.

Departures from public implementations:

- transformers' SiglipModel starts logit_scale and logit_bias at 0, builds the (N, N) logits, and reads the last
  position of whatever it is given: texts padded to the longest of a batch get other features than in training.
- open_clip's SigLIP configurations start and read as here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import transformers
from torch import Tensor, nn

from vlmfast.distributed import rank_and_world_size
from vlmfast.models.two_tower_config import PatchOptions, TwoTowerConfig, small_towers
from vlmfast.models.two_towers import TwoTowerModel, TwoTowerOutput
from vlmfast.nn import SigLipLoss


class SigLIPConfig(TwoTowerConfig):
    """transformers' SiglipConfig with towers of any transformers type; each reads the other's of Siglip towers.

    Args:
        vision_config, text_config: as TwoTowerConfig's; a dict without `model_type` is Siglip's own tower.
        projection_dim: size D of the shared space; None is the image tower's width.
        logit_scale_init_value, logit_bias_init_value: initial values.
        image_mean, image_std: 0.5, as the released models have.
        Others as TwoTowerConfig.
    """

    model_type = "siglip"
    default_towers: ClassVar[dict[str, Any]] = {
        "vision_config": transformers.SiglipVisionConfig,
        "text_config": transformers.SiglipTextConfig,
    }

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        projection_dim: int | None = None,
        logit_scale_init_value: float = math.log(10),
        logit_bias_init_value: float = -10.0,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        self.logit_scale_init_value = logit_scale_init_value
        self.logit_bias_init_value = logit_bias_init_value
        super().__init__(
            vision_config,
            text_config,
            projection_dim=projection_dim,
            image_mean=image_mean,
            image_std=image_std,
            **kwargs,
        )

    @classmethod
    def small(cls, **sizes: Any) -> "SigLIPConfig":
        """Siglip's towers from a few numbers, those of `small_towers`; features are as wide as the image tower."""
        towers = small_towers(**sizes)
        vision, text = towers["vision_config"], towers["text_config"]
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        tokens = ("vocab_size", "max_position_embeddings", "eos_token_id", "bos_token_id", "pad_token_id")
        return cls(
            vision_config=transformers.SiglipVisionConfig(
                **{name: getattr(vision, name) for name in (*names, "image_size", "patch_size")}
            ),
            text_config=transformers.SiglipTextConfig(
                **{name: getattr(text, name) for name in (*names, *tokens)}, projection_size=vision.hidden_size
            ),
        )


@dataclass
class SigLIPOutput(TwoTowerOutput):
    """TwoTowerOutput's fields, and logit_bias ()."""

    logit_bias: Tensor | None = None

    def logits_per_image(self) -> Tensor:
        """(images, texts), built anew at each call."""
        return super().logits_per_image() + self["logit_bias"]


class SigLIPModel(TwoTowerModel):
    """Image and text towers and the sigmoid loss; see the top of this file.

    Parameters have the names and shapes of transformers' SiglipModel: each reads the other's checkpoints.
    """

    config: SigLIPConfig
    output_class = SigLIPOutput
    scalars = ("logit_scale", "logit_bias")
    base_model_prefix = "siglip"
    paper = "Zhai et al. 2023 (2303.15343)"
    Options = PatchOptions

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__(config)
        self.visual_projection, self.text_projection = self.linear_heads()
        if isinstance(self.vision_model, transformers.SiglipVisionModel):
            self.visual_projection = self._head(self.visual_projection)
        if isinstance(self.text_model, transformers.SiglipTextModel):
            self.text_projection = self._head(self.text_projection)
        for name in self.scalars:
            setattr(self, name, nn.Parameter(self.scalar(name).data.reshape(1)))  # the shape in released checkpoints
        self.post_init()

    def _head(self, projection: nn.Linear) -> Any:
        """A Siglip tower needs none, unless its features are of another size."""
        return nn.Identity() if projection.in_features == projection.out_features else projection

    def loss(  # type: ignore[override]
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
    ) -> Tensor:
        """The sigmoid loss over the global batch.

        After DDP's mean, gradients are those of one process with the whole batch.

        Args:
            image_features, text_features (B, D): unit-norm, this process's part of the batch.
            logit_scale (): the log-parameter.
            logit_bias ().
        """
        rank, world_size = rank_and_world_size()
        loss = SigLipLoss(rank=rank, world_size=world_size)
        return loss(image_features, text_features, logit_scale.float().exp(), logit_bias.float())
