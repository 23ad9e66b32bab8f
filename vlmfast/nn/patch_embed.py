"""timm's patch embedding in one op, from uint8 or floating-point pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmfast.nn._sizes import check_integers, check_patch_fits, check_side
from vlmfast.nn._stem import Stem

FORMATS = ("NCHW", "NHWC", "NCL", "NLC")


class PatchEmbed(Stem):
    """Images to patch tokens; a drop-in for `timm.layers.PatchEmbed`, also as the `embed_layer` of timm's models.

    `PatchEmbed.from_original` takes the place of a timm module with its parameters.

    Where the model around reads image sizes off its input (timm's `forward_intermediates`), give layout "NCHW" and
    permuted images, images.permute(0, 3, 1, 2): strides are free, nothing is copied.

    Args:
        img_size, patch_size: an int or (height, width). img_size None takes any size and leaves out what is no whole
            patch.
        in_chans, embed_dim: C and D.
        norm_layer: called with embed_dim; None does not normalise tokens.
        flatten: return (B, n, D); else (B, D, H / p, W / p).
        output_fmt: "NCHW", "NHWC", "NCL" or "NLC" instead of flatten. All but NLC are views of NLC's memory.
        bias: of the projection.
        strict_img_size: take images of img_size only; else of any size that the patch divides.
        dynamic_img_pad: fill images up to whole patches, right and below, with zeros after normalisation.
        mean, std: C floats each, of uint8 pixels in [0, 1]. Without them uint8 pixels raise.
        layout: of uint8 pixels, "NHWC" (as decoders give them) or "NCHW". Floating-point pixels are NCHW.
    Raises:
        TypeError: a size is no integer.
        ValueError: a size is less than 1, a patch larger than the image, or not two-sided; output_fmt or layout is none
            of those; mean comes without std, or the two are not in_chans finite numbers, those of std above 0.
    Source: Dosovitskiy et al. 2021, equation 1; timm's layers/patch_embed.py for the interface.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[..., nn.Module] | None = None,
        flatten: bool = True,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        layout: str = "NHWC",
    ) -> None:
        super().__init__()
        if output_fmt is not None and output_fmt not in FORMATS:
            raise ValueError(f"PatchEmbed: output_fmt must be one of {', '.join(FORMATS)}; got {output_fmt!r}")
        check_integers("PatchEmbed", in_chans=in_chans, embed_dim=embed_dim)
        check_side("PatchEmbed", "patch_size", patch_size)
        self._set_normalisation(mean, std, layout, in_chans)
        self.patch_size = _pair(patch_size)
        self.dynamic_img_pad = dynamic_img_pad
        self._set_img_size(img_size)
        self.flatten = flatten and output_fmt is None
        self.output_fmt = output_fmt or "NCHW"
        self.strict_img_size = strict_img_size
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, stride=self.patch_size, bias=bias, **where)
        self.norm = norm_layer(embed_dim, **where) if norm_layer else nn.Identity()

    @classmethod
    def _replaces(cls) -> type[nn.Module]:
        from timm import layers

        original: type[nn.Module] = layers.PatchEmbed
        return original

    def _projection(self) -> nn.Module:
        return self.proj

    def _set_img_size(self, img_size: int | tuple[int, int] | None) -> None:
        self.img_size = self.grid_size = self.num_patches = None
        if img_size is not None:
            check_side("PatchEmbed", "img_size", img_size)
            if not self.dynamic_img_pad:
                check_patch_fits("PatchEmbed", img_size, self.patch_size)
            self.img_size = _pair(img_size)
            self.grid_size = (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])
            self.num_patches = self.grid_size[0] * self.grid_size[1]

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Changes the size of images and, resampling the projection by timm's function, of patches."""
        for argument, size in (("img_size", img_size), ("patch_size", patch_size)):
            if size is not None:
                check_side("PatchEmbed", argument, size)
        if patch_size is not None and _pair(patch_size) != self.patch_size:
            from timm.layers import resample_patch_embed

            old, self.patch_size = self.proj, _pair(patch_size)
            self.proj = nn.Conv2d(
                old.in_channels,
                old.out_channels,
                self.patch_size,
                stride=self.patch_size,
                bias=old.bias is not None,
                device=old.weight.device,
                dtype=old.weight.dtype,
            ).train(old.training)
            with torch.no_grad():
                self.proj.weight.copy_(resample_patch_embed(old.weight, list(self.patch_size)))
            self.proj.weight.requires_grad_(old.weight.requires_grad)
            if old.bias is not None:
                self.proj.bias = old.bias
        self._set_img_size(img_size or self.img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an image (height, width)."""
        sides = zip(img_size, self.patch_size, strict=True)
        rows, columns = (math.ceil(s / p) if self.dynamic_img_pad else s // p for s, p in sides)
        return rows, columns

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, n, D), or as output_fmt says.

        Args:
            x (B, C, H, W): normalised, floating point; or uint8 in `layout`.
        Raises:
            ValueError: the size of images is not what img_size and strict_img_size allow, uint8 pixels come without
                mean and std, or as `vlmfast.ops.patch_embed`.
        """
        images = self._images(x)
        self._check_size(images)
        if self.reason_not_eligible():
            images = self._floats(images, self.proj)
            if self.dynamic_img_pad:
                rows, columns = self.patch_size
                images = F.pad(images, (0, -images.shape[3] % columns, 0, -images.shape[2] % rows))
            tokens = self.proj(images).flatten(2).transpose(1, 2)
        else:
            tokens = self._embed(images, self.proj.weight, self.proj.bias, pad=self.dynamic_img_pad)
        return self.norm(self._formatted(tokens, (images.shape[2], images.shape[3])))

    def _check_size(self, images: Tensor) -> None:
        if self.img_size is None:
            return
        size = (images.shape[2], images.shape[3])
        if self.strict_img_size:
            if size != self.img_size:
                raise ValueError(f"PatchEmbed: images must be {self.img_size}, or strict_img_size False; got {size}")
        elif not self.dynamic_img_pad and any(s % p for s, p in zip(size, self.patch_size, strict=True)):
            raise ValueError(
                f"PatchEmbed: images must have sides that the patch {self.patch_size} divides, or dynamic_img_pad; "
                f"got {size}"
            )

    def _formatted(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        if self.flatten or self.output_fmt == "NLC":
            return tokens
        if self.output_fmt == "NCL":
            return tokens.transpose(1, 2)
        grid = tokens.unflatten(1, self.dynamic_feat_size(size))
        return grid if self.output_fmt == "NHWC" else grid.permute(0, 3, 1, 2)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, Sequence) else (size, size)
