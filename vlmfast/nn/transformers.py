"""Stems of transformers' vision models in one op, from uint8 or floating-point pixels, prefix and positions included.

    from vlmfast.nn.transformers import CLIPVisionEmbeddings

    vision = model.vision_model
    vision.embeddings = CLIPVisionEmbeddings.from_original(vision.embeddings, mean=mean, std=std)

Each class has the name of what it replaces, its constructor and its parameters; a size below 1 raises ValueError that
names it, one that is no integer TypeError. With interpolate_pos_encoding the grid
of positions is that of the configured image and patch sizes; the originals take a square, which for others fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bridgetower import modeling_bridgetower
from transformers.models.clip import modeling_clip
from transformers.models.flava import modeling_flava
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip2 import modeling_siglip2
from transformers.models.vit import modeling_vit

from vlmfast.nn._sizes import arguments_of, check_config, check_integers, check_patch_fits
from vlmfast.nn._stem import Stem, reason_to_call, reason_to_look_up
from vlmfast.nn.position import interpolate_position, interpolate_position_per_image
from vlmfast.ops import _patches


class _Stem(Stem):
    """Looks at the sizes in a configuration before the original is made of it."""

    _sizes: tuple[str, ...] = ("hidden_size", "num_channels")
    _sides: tuple[str, ...] = ("image_size", "patch_size")

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        check_config(name, config, self._sizes, self._sides)
        if "image_size" in self._sides:
            check_patch_fits(name, config.image_size, config.patch_size)
        super().__init__(config, *args, **kwargs)


class _ClassTokenStem(_Stem):
    """CLIP's stem and BridgeTower's: patches, class token, positions."""

    def _projection(self) -> nn.Module:
        return self.patch_embedding

    def _reason_to_call(self) -> str | None:
        return reason_to_look_up(self.position_embedding)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Tokens (B, 1 + n, D) of pixel_values (B, 3, H, W), or uint8 in `layout`.

        Raises:
            ValueError: images are not of the configured size and interpolate_pos_encoding is not set.
        """
        images = self._images(pixel_values)
        size = (self.image_size, self.image_size)
        if not interpolate_pos_encoding:
            _check_size(self, images, size)
        if self.reason_not_eligible():
            return super().forward(self._floats(images, self.patch_embedding), interpolate_pos_encoding)
        conv = self.patch_embedding
        position = self.position_embedding.weight
        if interpolate_pos_encoding:
            position = _interpolated(position, images, conv.weight, size, prefix_tokens=1)
        return self._embed(images, conv.weight, conv.bias, prefix=self.class_embedding[None], position=position)


class CLIPVisionEmbeddings(_ClassTokenStem, modeling_clip.CLIPVisionEmbeddings):
    """transformers' CLIPVisionEmbeddings: patches, class token, positions."""


class BridgeTowerVisionEmbeddings(_ClassTokenStem, modeling_bridgetower.BridgeTowerVisionEmbeddings):
    """transformers' BridgeTowerVisionEmbeddings: patches, class token, positions."""


class SiglipVisionEmbeddings(_Stem, modeling_siglip.SiglipVisionEmbeddings):
    """transformers' SiglipVisionEmbeddings: patches, positions."""

    def _projection(self) -> nn.Module:
        return self.patch_embedding

    def _reason_to_call(self) -> str | None:
        return reason_to_look_up(self.position_embedding)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Tokens (B, n, D) of pixel_values (B, 3, H, W), or uint8 in `layout`."""
        images = self._images(pixel_values)
        if self.reason_not_eligible():
            return super().forward(self._floats(images, self.patch_embedding), interpolate_pos_encoding)
        conv = self.patch_embedding
        position = self.position_embedding.weight
        if interpolate_pos_encoding:
            position = _interpolated(position, images, conv.weight, (self.image_size, self.image_size))
        return self._embed(images, conv.weight, conv.bias, position=position)


class ViTPatchEmbeddings(_Stem, modeling_vit.ViTPatchEmbeddings):
    """transformers' ViTPatchEmbeddings: patches only."""

    def _projection(self) -> nn.Module:
        return self.projection

    def forward(self, pixel_values: Tensor, **unchecked: Any) -> Tensor:
        """Tokens (B, n, D) of pixel_values (B, C, H, W), or uint8 in `layout`.

        Args:
            unchecked: `interpolate_pos_encoding` of transformers 5.0's; where it is False, the size is looked at.
        Raises:
            ValueError: images are not of the configured size, and interpolate_pos_encoding is False.
        """
        images = self._images(pixel_values)
        if unchecked.get("interpolate_pos_encoding") is False:
            _check_size(self, images, self.image_size)
        if self.reason_not_eligible():
            return super().forward(self._floats(images, self.projection), **unchecked)
        return self._embed(images, self.projection.weight, self.projection.bias)


class ViTEmbeddings(_Stem, modeling_vit.ViTEmbeddings):
    """transformers' ViTEmbeddings: patches, mask token, class token, positions, dropout.

    ViTModel casts its pixel_values to floats before it calls this, without dividing by 255: uint8 pixels are for
    `model.embeddings` itself.
    """

    def _projection(self) -> nn.Module:
        return self.patch_embeddings.projection

    def _reason_to_call(self) -> str | None:
        patches = self.patch_embeddings
        if type(patches) is ViTPatchEmbeddings:  # computes the same
            return reason_to_call(patches)
        return reason_to_call(patches, modeling_vit.ViTPatchEmbeddings)

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
    ) -> Tensor:
        """Tokens (B, 1 + n, D) of pixel_values (B, C, H, W), or uint8 in `layout`.

        Args:
            bool_masked_pos (B, n): 1 or True where the mask token stands for the patch.
        Raises:
            ValueError: images are not of the configured size and interpolate_pos_encoding is not set; there is no mask
                token for bool_masked_pos.
        """
        images = self._images(pixel_values)
        if self.reason_not_eligible():
            floats = self._floats(images, self.patch_embeddings)
            return super().forward(floats, bool_masked_pos, interpolate_pos_encoding)
        size, conv = self.patch_embeddings.image_size, self.patch_embeddings.projection
        if not interpolate_pos_encoding:
            _check_size(self, images, size)
        position = self.position_embeddings[0]
        if interpolate_pos_encoding:
            position = _interpolated(position, images, conv.weight, size, prefix_tokens=1)
        tokens = self._embed(images, conv.weight, conv.bias, prefix=self.cls_token[0], position=position)
        if bool_masked_pos is not None:
            tokens = _masked(self, tokens, bool_masked_pos, self.mask_token, position)
        return self.dropout(tokens)


class FlavaImageEmbeddings(_Stem, modeling_flava.FlavaImageEmbeddings):
    """transformers' FlavaImageEmbeddings: patches, mask token, class token, positions, dropout."""

    def _projection(self) -> nn.Module:
        return self.patch_embeddings.projection

    def _reason_to_call(self) -> str | None:
        patches = self.patch_embeddings
        return reason_to_call(patches, modeling_flava.PatchEmbeddings)

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """Tokens (B, 1 + n, D) of pixel_values (B, C, H, W), or uint8 in `layout`.

        Args:
            bool_masked_pos (B, n) or (B, rows, columns): 1 or True where the mask token stands for the patch.
        Raises:
            ValueError: as `ViTEmbeddings`.
        """
        images = self._images(pixel_values)
        if self.reason_not_eligible():
            floats = self._floats(images, self.patch_embeddings)
            return super().forward(floats, bool_masked_pos, interpolate_pos_encoding)
        size, conv = self.patch_embeddings.image_size, self.patch_embeddings.projection
        if not interpolate_pos_encoding:
            _check_size(self, images, size)
        position = self.position_embeddings[0]
        if interpolate_pos_encoding:
            position = _interpolated(position, images, conv.weight, size, prefix_tokens=1)
        tokens = self._embed(images, conv.weight, conv.bias, prefix=self.cls_token[0], position=position)
        if bool_masked_pos is not None:
            tokens = _masked(self, tokens, bool_masked_pos.flatten(1), self.mask_token, position)
        return self.dropout(tokens)


class Siglip2VisionEmbeddings(_Stem, modeling_siglip2.Siglip2VisionEmbeddings):
    """transformers' Siglip2VisionEmbeddings: rows of patches of padded images, each with positions for its own grid.

    The original asks the device for the size of every image; here sizes stay where they are.
    """

    _sizes = ("hidden_size", "num_channels", "num_patches", "patch_size")
    _sides = ()

    def _projection(self) -> nn.Module:
        return self.patch_embedding

    def forward(self, pixel_values: Tensor, spatial_shapes: Tensor) -> Tensor:
        """Tokens (B, L, D).

        Args:
            pixel_values (B, L, p * p * C): patches of images, padded to L; the entries of a patch row by row, channels
                last. Floating point and normalised, or uint8.
            spatial_shapes (B, 2): int64, rows and columns of patches of each image.
        Raises:
            ValueError: as `vlmfast.nn.interpolate_position_per_image`.
        """
        length, p = pixel_values.shape[1], self.patch_size
        # An image of L patches, one below the other.
        images = pixel_values.unflatten(2, (p, p, -1)).flatten(1, 2).permute(0, 3, 1, 2)
        if self.reason_not_eligible():
            floats = self._floats(images, self.patch_embedding)
            return super().forward(floats.permute(0, 2, 3, 1).reshape(pixel_values.shape), spatial_shapes)
        position = interpolate_position_per_image(
            self.position_embedding.weight, spatial_shapes.to(self.position_embedding.weight.device), length
        )
        linear = self.patch_embedding
        weight = linear.weight.unflatten(1, (p, p, -1)).permute(0, 3, 1, 2)
        return self._embed(images, weight, linear.bias, position=position)


class Qwen2VLPatchEmbed(Stem, modeling_qwen2_vl.PatchEmbed):
    """transformers' PatchEmbed of Qwen2-VL: rows of patches over time, height and width, projected by a Conv3d.

    Qwen2VLModel casts its pixel_values to floats before it calls this, without dividing by 255: uint8 pixels are for
    `model.visual` itself.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_integers("Qwen2VLPatchEmbed", **arguments_of(modeling_qwen2_vl.PatchEmbed.__init__, args, kwargs))
        super().__init__(*args, **kwargs)

    def _projection(self) -> nn.Module:
        return self.proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Tokens (N, D) of hidden_states (N, C * T * p * p), normalised floats or uint8; entries in that order."""
        # One image of one patch each, (T * p, p).
        p = self.patch_size
        images = hidden_states.reshape(-1, self.in_channels, self.temporal_patch_size * p, p)
        if self.reason_not_eligible():
            return super().forward(self._floats(images, self.proj))
        return self._embed(images, self.proj.weight.flatten(2, 3), self.proj.bias).squeeze(1)


def _check_size(stem: nn.Module, images: Tensor, size: Sequence[int]) -> None:
    if images.shape[2:] != tuple(size):
        raise ValueError(
            f"{type(stem).__name__}: images must be {tuple(size)} as configured, or interpolate_pos_encoding=True; "
            f"got {tuple(images.shape[2:])}"
        )


def _interpolated(
    position: Tensor, images: Tensor, weight: Tensor, configured: Sequence[int], prefix_tokens: int = 0
) -> Tensor:
    """position (k + n, D) of the configured image size, for the grid of images (B, C, H, W)."""
    grid = configured[0] // weight.shape[2], configured[1] // weight.shape[3]
    size = _patches.grid(images, weight, pad=False)
    return interpolate_position(position, size, old_size=grid, prefix_tokens=prefix_tokens)


def _masked(stem: nn.Module, tokens: Tensor, mask: Tensor, mask_token: Tensor | None, position: Tensor) -> Tensor:
    """tokens (B, 1 + n, D) with mask_token (1, 1, D), at its position, where mask (B, n) is set."""
    if mask_token is None:
        raise ValueError(f"{type(stem).__name__}: bool_masked_pos needs a mask token; this module has none")
    mask = F.pad(mask.bool(), (1, 0))
    return torch.where(mask[:, :, None], mask_token[0] + position, tokens)
