"""The stages of a ResNet as a map of features, for models that read an image through convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer

from vlmfast.models.checkpoints import making
from vlmfast.models.towers import tower_config, tower_input


class ResNetStages(transformers.ResNetBackbone):
    """transformers' ResNet without a head; every residual branch starts at 0, as torchvision's `zero_init_residual`."""

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # else transformers passes over modules without parameters of their own

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResNetBasicLayer | ResNetBottleNeckLayer):
            init.zeros_(module.layer[-1].normalization.weight)


class ConvStage(nn.Module):
    """Images to the last map of a ResNet, one row a place.

    Args:
        config: of a ResNet; its last stage is what is read.
        mean, std: per channel, of pixels in [0, 1]; they normalise uint8 pixels only.
    """

    def __init__(self, config: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.resnet = making("vision_config", config, lambda: ResNetStages(deepcopy(config)))
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, h * w, C), places row by row.

        Args:
            pixel_values: uint8 (B, H, W, 3), or floating point (B, 3, H, W), already normalised.
        """
        pixels = tower_input(self.resnet, pixel_values, self.mean, self.std, reads_bytes=False)
        (features,) = self.resnet(pixels).feature_maps
        rows: Tensor = features.flatten(2).transpose(1, 2)
        return rows


def resnet_config(given: Any, stages: int, **defaults: Any) -> Any:
    """A ResNet's config with `image_size`: as given, or of a dict; None is one of `defaults`.

    Args:
        stages: how many there must be.
    Raises:
        TypeError, ValueError: it is of another model, has another number of stages, or its last is not what is read.
    """
    config = deepcopy(tower_config("vision_config", defaults if given is None else given, transformers.ResNetConfig))
    if config.model_type != "resnet":
        raise ValueError(f"vision_config: expected a ResNet, got {config.model_type!r}")
    if not len(config.depths) == len(config.hidden_sizes) == stages:
        raise ValueError(f"vision_config: expected depths and hidden_sizes of {stages} stages, got {config.depths}")
    if list(config.out_features) != [f"stage{stages}"]:
        raise ValueError(f"vision_config: expected out_features ['stage{stages}'], got {config.out_features}")
    if getattr(config, "image_size", None) is None:
        config.image_size = 224
    return config


def small_resnet(image_size: int, width: int, depth: int, stages: int) -> transformers.ResNetConfig:
    """A narrow ResNet's config: blocks of two convolutions, channels doubling from stage to stage.

    Args:
        width: channels of the last map.
        depth: blocks of each stage.
    Raises:
        ValueError: the width cannot be halved that often.
    """
    if width % 2 ** (stages - 1):
        raise ValueError(f"--vision-width: expected a multiple of {2 ** (stages - 1)}, got {width}")
    widths = [width // 2**k for k in reversed(range(stages))]
    return transformers.ResNetConfig(
        image_size=image_size,
        embedding_size=widths[0],
        hidden_sizes=widths,
        depths=[depth] * stages,
        layer_type="basic",
    )
