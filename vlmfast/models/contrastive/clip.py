"""CLIP: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (2103.00020).

Loss, the only one, with x, t the unit-norm image and text features and s = exp(logit_scale)::

    logits = s * x @ t.T
    (cross_entropy(logits, arange(N)) + cross_entropy(logits.T, arange(N))) / 2

Everything is trained. `logit_scale` starts at ln(1/0.07) and is kept in [0, ln 100] after every optimizer step.

Towers and what a feature is read from: `vlmfast.models.two_towers`.

Departures from public implementations, beside those of all models of two towers:

- transformers' CLIPModel builds the (N, N) logits in every forward, and under DDP contrasts each process with itself.
  Here the loss is `vlmfast.nn.ClipLoss` over the global batch; `CLIPOutput.logits_per_image` builds logits when called.
- transformers rounds the initial logit_scale to 2.6592 and does not clamp it; the paper and open_clip do.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vlmfast.distributed import rank_and_world_size
from vlmfast.models.two_tower_config import TwoTowerConfig
from vlmfast.models.two_towers import TwoTowerModel, TwoTowerOutput
from vlmfast.nn import ClipLoss


class CLIPConfig(TwoTowerConfig):
    """transformers' CLIPConfig with towers of any transformers type; each reads the other's config.json of CLIP towers.

    Args:
        logit_scale_init_value: initial value of the log-parameter.
        Others as TwoTowerConfig.
    """

    model_type = "clip"

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        logit_scale_init_value: float = math.log(1 / 0.07),
        **kwargs: Any,
    ) -> None:
        self.logit_scale_init_value = logit_scale_init_value
        super().__init__(vision_config, text_config, **kwargs)


CLIPOutput = TwoTowerOutput


class CLIPModel(TwoTowerModel):
    """Image and text towers, a linear projection of each, and the contrastive loss; see the top of this file.

    Parameters have the names of transformers' CLIPModel: `from_pretrained` reads its checkpoints, and it reads those of
    CLIP towers saved here.
    """

    config: CLIPConfig
    base_model_prefix = "clip"
    paper = "Radford et al. 2021 (2103.00020)"

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.visual_projection, self.text_projection = self.linear_heads()
        self.logit_scale = self.scalar("logit_scale")
        self.post_init()

    def loss(  # type: ignore[override]
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor
    ) -> Tensor:
        """Symmetric InfoNCE over the global batch.

        After DDP's mean, gradients are those of one process with the whole batch.

        Args:
            image_features, text_features (B, D): unit-norm, this process's part of the batch.
            logit_scale (): the log-parameter.
        """
        rank, world_size = rank_and_world_size()
        clip_loss = ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)
        return clip_loss(image_features, text_features, logit_scale.float().exp())

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Clamp `logit_scale` to [0, ln 100], in place."""
        self.logit_scale.clamp_(0, math.log(100))
