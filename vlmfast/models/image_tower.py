"""An image tower for a language model: one feature of an image, or the states of all its patches."""

from __future__ import annotations

from collections.abc import Sequence
from os import fspath
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vlmfast.models.towers import load_model, load_tower, new_tower, read_bytes, tower_input, tower_width


class ImageTower(nn.Module):
    """A tower of transformers with what is read from it.

    `pooled` is, of towers whose pooler is a dense layer with tanh (ViT, DeiT, BEiT), the class token after the last
    norm; `pooler_output` of others, through `projection` where there is one, as CLIP's. `tokens` are the
    `last_hidden_state` with its class token: of CLIP towers before the last norm. What is not read is left out, since
    DDP stops at a parameter without gradient.

    Args:
        config: of a type that AutoModel knows and that reads images alone.
        projection_dim: of a linear map without bias after the pooled feature; None where there is none.
        mean, std: per channel, of pixels in [0, 1]; they normalise uint8 pixels only.
        reads: "pooled" or "tokens".
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        projection_dim: int | None,
        mean: Sequence[float],
        std: Sequence[float],
        reads: str = "pooled",
    ) -> None:
        super().__init__()
        self.tower = new_tower(config, "image", "vision_config")
        self.mean, self.std, self.reads = tuple(mean), tuple(std), reads
        self.reads_bytes = read_bytes(self.tower, mean, std)
        pooler = getattr(self.tower, "pooler", None)
        self.class_token = hasattr(pooler, "dense")
        # One without parameters, as of convolutions, stays: their forward calls it.
        if self.class_token or (reads == "tokens" and isinstance(pooler, nn.Module) and list(pooler.parameters())):
            self.tower.register_module("pooler", None)
        if reads == "tokens":
            for unread in ("post_layernorm", "head"):  # of CLIP; of Siglip, whose norm comes before `tokens`
                if hasattr(self.tower, unread) and (unread == "head" or config.model_type == "clip_vision_model"):
                    setattr(self.tower, unread, nn.Identity())
        width = tower_width("vision_config", config)
        self.projection = nn.Identity() if projection_dim is None else nn.Linear(width, projection_dim, bias=False)
        self.width = width if projection_dim is None else projection_dim

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, W) pooled, or (B, R, W) tokens, R being fixed or, of convolutions, H x W of the last map.

        Args:
            pixel_values: as `vlmfast.models.towers.tower_input`.
        """
        pixels = tower_input(self.tower, pixel_values, self.mean, self.std, reads_bytes=self.reads_bytes)
        outputs = self.tower(pixels)
        if self.reads == "tokens":
            states: Tensor = outputs.last_hidden_state
            return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states
        pooled: Tensor = outputs.last_hidden_state[:, 0] if self.class_token else outputs.pooler_output.flatten(1)
        projected: Tensor = self.projection(pooled)
        return projected

    @torch.no_grad()
    def copy_weights(self, tower: nn.Module, projection: Tensor | None) -> None:
        """Takes the weights of a pretrained tower, and of its projection where this one has one."""
        weights, own = tower.state_dict(), self.tower.state_dict()
        self.tower.load_state_dict({name: weights[name] for name in own})
        if projection is not None and isinstance(self.projection, nn.Linear):
            self.projection.weight.copy_(projection)


def small_vit(image_size: int, patch_size: int, width: int, layers: int, **more: Any) -> transformers.CLIPVisionConfig:
    """CLIP's image tower from a few numbers: heads of 64, MLPs four times as wide, exact GELU; more is of its config.

    Raises:
        ValueError: the width is not a multiple of 64, or `image_size` not one of `patch_size`.
    """
    if width <= 0 or width % 64:
        raise ValueError(f"vision_width: expected a positive multiple of 64 (the head size), got {width}")
    if image_size % patch_size:
        raise ValueError(f"image_size: expected a multiple of patch_size {patch_size}, got {image_size}")
    return transformers.CLIPVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act="gelu",
        **more,
    )


def load_image_tower(source: Any) -> tuple[PreTrainedModel, Tensor | None]:
    """A pretrained image tower and, where its model has one, the weight of its `visual_projection`.

    Args:
        source: a folder or a name on a hub; of a model of two towers, the image tower is taken.
    Raises:
        FileNotFoundError: there is no such folder or name.
        ValueError: a file is damaged, or weights are missing.
    """
    model = load_model("vision_tower", fspath(source))
    projection = getattr(model, "visual_projection", None)
    tower: Any = load_tower("vision_model", model)
    weight = projection.weight.detach() if isinstance(projection, nn.Linear) else None
    return tower.eval(), weight
