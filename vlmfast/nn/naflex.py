"""The stem of timm's NaFlexVit in one op, for images and for rows of patches of images of different sizes.

To put it into a model::

    from vlmfast.nn.naflex import NaFlexEmbeds

    model.embeds = NaFlexEmbeds.from_original(model.embeds, mean=mean, std=std)
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import naflexvit
from torch import Tensor, nn

from vlmfast.nn._sizes import arguments_of, check_integer, check_integers, check_side
from vlmfast.nn._stem import Stem, reason_to_call
from vlmfast.nn.position import MODES, interpolate_position, interpolate_position_per_image


class NaFlexEmbeds(Stem, naflexvit.NaFlexEmbeds):
    """timm's NaFlexEmbeds with a grid of learned positions, or none: patches, positions, prefix tokens, dropout.

    The original asks the device for the size of every image; here sizes stay where they are. Patches of another size
    than the projection's (a patch interpolator) run the original's forward, and so do, on CPUs, grids of more patches
    than the batch is long.

    A size below 1 raises ValueError that names it, one that is no integer TypeError.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = arguments_of(naflexvit.NaFlexEmbeds.__init__, args, kwargs)
        check_integers("NaFlexEmbeds", in_chans=given["in_chans"], embed_dim=given["embed_dim"])
        check_integer("NaFlexEmbeds", "reg_tokens", given["reg_tokens"], least=0)
        for argument in ("patch_size", "default_img_size", "pos_embed_grid_size"):
            if given[argument] is not None:
                check_side("NaFlexEmbeds", argument, given[argument])
        super().__init__(*args, **kwargs)

    def _projection(self) -> nn.Module:
        return self.proj

    def reason_not_eligible(self) -> str | None:
        """Why the original's forward runs instead of `patch_embed`, or None."""
        if self.pos_embed_type not in ("learned", "none"):
            return f"its positions are {self.pos_embed_type}; learned and none can be"
        if self.pos_embed_type == "learned":
            if self.pos_embed_interp_mode not in MODES or not self.pos_embed_antialias:
                return "its positions are not interpolated by antialiased bilinear or bicubic"
            if self.pos_embed_ar_preserving or self.pos_embed_align_corners or self.pos_embed_use_grid_sample:
                return "its positions keep the aspect ratio, align corners or are sampled at coordinates"
        if self.norm_input is not None or type(self.norm) is not nn.Identity:
            return "it has a norm beside the projection"
        if self.is_linear and not self.channels_last:
            return "its patches have channels first"
        return reason_to_call(self.norm) or super().reason_not_eligible()

    def forward(
        self, x: Tensor, patch_coord: Tensor | None = None, patch_valid: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, int] | None]:
        """Tokens (B, k + N, D), k of them prefix tokens, and the grid of images, None of rows of patches.

        Args:
            x: images (B, C, H, W), or uint8 in `layout`; with patch_coord rows of patches (B, N, p * q * C), also
                (B, N, p, q, C), the entries of a patch row by row, channels last; floating point and normalised, or
                uint8.
            patch_coord (B, N, 2): row and column of each patch in its image.
            patch_valid (B, N): not looked at.
        """
        rows, columns = self.patch_size
        not_eligible = self.reason_not_eligible() is not None
        if not self.is_linear or patch_coord is None:
            images = self._images(x)
            height, width = images.shape[2:]
            whole = self.dynamic_img_pad or not self.is_linear or not (height % rows or width % columns)
            if not_eligible or not whole:
                return self._original(self._floats(images, self.proj), patch_coord, patch_valid)
            size = self.dynamic_feat_size((height, width))
            grid: tuple[int, int] | None = size
            position = self._position_of_grid(size)
        else:
            shapes = patch_coord.amax(1) + 1
            same = x.dim() == 3 or x.shape[2:4] == (rows, columns)
            length = x.shape[1]
            known = x.device.type == "cpu" and not torch.compiler.is_compiling()
            if not_eligible or not same or (known and bool((shapes.prod(1) > length).any())):
                return self._original(x, patch_coord, patch_valid)
            # An image of N patches, one below the other.
            images = x.reshape(x.shape[0], length * rows, columns, self.in_chans).permute(0, 3, 1, 2)
            grid, position = None, self._position_of_images(shapes, length)
        weight = self.proj.weight
        if self.is_linear:
            weight = weight.unflatten(1, (rows, columns, self.in_chans)).permute(0, 3, 1, 2)
        tokens = self._embed(images, weight, self.proj.bias, position=position, pad=self.dynamic_img_pad)
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        return self.pos_drop(torch.cat([*prefix, tokens], dim=1) if prefix else tokens), grid

    def _original(
        self, x: Tensor, patch_coord: Tensor | None, patch_valid: Tensor | None
    ) -> tuple[Tensor, tuple[int, int] | None]:
        tokens, grid = super().forward(x, patch_coord, patch_valid)
        return tokens, grid

    def _position_of_grid(self, grid: tuple[int, int]) -> Tensor | None:
        """(N, D), or None."""
        if self.pos_embed is None:
            return None
        old_size = (self.pos_embed.shape[1], self.pos_embed.shape[2])
        return interpolate_position(
            self.pos_embed[0].flatten(0, 1), grid, old_size=old_size, mode=self.pos_embed_interp_mode, antialias=True
        )

    def _position_of_images(self, shapes: Tensor, length: int) -> Tensor | None:
        """(B, N, D), 0 after an image's last patch; or None."""
        if self.pos_embed is None:
            return None
        old_size = (self.pos_embed.shape[1], self.pos_embed.shape[2])
        position = interpolate_position_per_image(
            self.pos_embed[0].flatten(0, 1), shapes, length, old_size=old_size, mode=self.pos_embed_interp_mode
        )
        inside = torch.arange(length, device=shapes.device) < shapes.prod(1)[:, None]
        return torch.where(inside[:, :, None], position, 0)
