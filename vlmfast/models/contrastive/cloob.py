"""CLOOB: Fürst et al. 2022, "CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP" (2110.11316).

With X, T the unit-norm image and text features of the global batch, and a row-normalised retrieval without parameters::

    retrieve(Q, M) = normalize(softmax(scale_hopfield * Q @ M.T) @ M)
    Ux, Uy = retrieve(X, X), retrieve(T, X)    both from stored images
    Vx, Vy = retrieve(X, T), retrieve(T, T)    both from stored texts
    loo(A, B) = tau * mean_i(-k_ii + logsumexp_(j != i) k_ij),  k = A @ B.T / tau
    loss = loo(Ux, Uy) + loo(Vy, Vx)

Each term has one direction, its anchors Ux and Vy; the factor tau is outside. The loss can be negative. Gradients flow
through queries and through what is stored, which is the whole batch of all processes, the query itself included.

All weights of the encoders are trained; 1 / tau (30) and scale_hopfield (8), the released recipe for Conceptual
Captions, are constants. `logit_scale` is the fixed ln(1 / tau). Retrieval is for training alone: `get_image_features`
and `get_text_features` give X and T.

Departures from the released code:

- It excludes a positive by writing -1000 over its logit; here it is not there.
- It keeps the (N, N) softmax of each retrieval for backward; here scaled_dot_product_attention does not, on CPUs and
  where its flash or memory-efficient kernels run.
- Retrieval, the loss and features are float32, also under autocast.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.models.gathered import Shards
from vlmfast.models.two_tower_config import TwoTowerConfig
from vlmfast.models.two_towers import TwoTowerModel


class CLOOBConfig(TwoTowerConfig):
    """TwoTowerConfig with CLOOB's constants.

    Args:
        logit_scale_init_value: ln(1 / tau), not trained.
        scale_hopfield: factor of the retrievals' scores.
        Others as TwoTowerConfig.
    """

    model_type = "cloob"

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        logit_scale_init_value: float = math.log(30),
        scale_hopfield: float = 8.0,
        **kwargs: Any,
    ) -> None:
        self.logit_scale_init_value = logit_scale_init_value
        self.scale_hopfield = scale_hopfield
        super().__init__(vision_config, text_config, **kwargs)


class CLOOBModel(TwoTowerModel):
    """CLIP's towers and projections, and CLOOB's loss; see the top of this file."""

    config: CLOOBConfig
    base_model_prefix = "cloob"
    paper = "Fürst et al. 2022 (2110.11316)"

    def __init__(self, config: CLOOBConfig) -> None:
        super().__init__(config)
        self.visual_projection, self.text_projection = self.linear_heads()
        self.register_buffer("logit_scale", self.scalar("logit_scale").data)
        self.post_init()

    def loss(  # type: ignore[override]
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor
    ) -> Tensor:
        """CLOOB's loss over the global batch.

        After DDP's mean, gradients are those of one process with the whole batch.

        Args:
            image_features, text_features (B, D): unit-norm, this process's part of the batch.
            logit_scale (): ln(1 / tau).
        Raises:
            ValueError: the global batch is a single pair, which has no negatives.
        """
        shards = Shards("CLOOBModel", image_features, text_features)
        if sum(shards.sizes) < 2:
            raise ValueError("image_features: expected a batch of at least 2 pairs, which are each other's negatives")
        inverse = logit_scale.detach().float().exp()
        terms = []
        with torch.autocast(image_features.device.type, enabled=False):
            image, text = image_features.float(), text_features.float()
            for own, other in ((image, text), (text, image)):
                stored = shards.gather(own)
                anchors, samples = (retrieve(query, stored, self.config.scale_hopfield) for query in (own, other))
                terms.append(shards.info_nce(anchors, shards.gather(samples), inverse, exclude_positive=True))
        return torch.stack(terms).sum() / inverse


def retrieve(queries: Tensor, stored: Tensor, scale: float) -> Tensor:
    """normalize(softmax(scale * queries @ stored.T) @ stored), (n, D), of queries (n, D) and stored (N, D)."""
    memory = stored[None, None]
    found = F.scaled_dot_product_attention(queries[None, None], memory, memory, scale=scale)
    return F.normalize(found[0, 0], dim=-1)
