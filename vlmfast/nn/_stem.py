"""What the drop-in stems have in common: which modules they can stand in for, shared parameters, uint8 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from vlmfast.nn._sizes import check_numbers
from vlmfast.ops import _patches, patch_embed
from vlmfast.ops._arguments import DTYPES
from vlmfast.ops._patches import LAYOUTS

AnyStem = TypeVar("AnyStem", bound="Stem")


def reason_not_eligible(projection: nn.Module) -> str | None:
    """Why `vlmfast.ops.patch_embed` cannot stand in for a module that projects patches, or None if it can.

    It can for nn.Conv2d and nn.Conv3d whose stride is their kernel, without padding, dilation or groups, and for
    nn.Linear over the pixels of a patch; in float32, float16 or bfloat16, without hooks.
    """
    kind = type(projection)
    if kind not in (nn.Conv2d, nn.Conv3d, nn.Linear):
        return f"it is a {kind.__name__}; only Conv2d, Conv3d and Linear themselves can be replaced"
    if isinstance(projection, (nn.Conv2d, nn.Conv3d)):
        if projection.stride != projection.kernel_size:
            return f"its stride {projection.stride} is not its kernel {projection.kernel_size}: patches would overlap"
        if projection.padding != "valid" and set(projection.padding) != {0}:
            return f"it has padding {projection.padding}"
        if set(projection.dilation) != {1}:
            return f"it has dilation {projection.dilation}"
        if projection.groups != 1:
            return f"it has {projection.groups} groups"
    if projection.weight.dtype not in DTYPES:
        return f"its weight is {projection.weight.dtype}; float32, float16 and bfloat16 can be"
    return reason_to_call(projection)


def reason_to_call(module: nn.Module, kind: type[nn.Module] | None = None) -> str | None:
    """Why a module must be called, and not only its parameters read, or None.

    Args:
        kind: the very class that computes what is computed in the module's place; None: any.
    """
    name = type(module).__name__
    if kind is not None and type(module) is not kind:
        return f"its {kind.__name__} is a {name}, which would not be called"
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    if any(hooks):
        return f"its {name} has hooks, which would not run"
    if forward_replaced(module):
        return f"the forward of its {name} was replaced"
    return None


def reason_to_look_up(table: nn.Module) -> str | None:
    """Why an nn.Embedding must be called, and not only its weight read, or None."""
    if reason := reason_to_call(table, nn.Embedding):
        return reason
    # Of those, two change the forward's weight and two the gradient.
    for option in ("max_norm", "padding_idx", "scale_grad_by_freq", "sparse"):
        if (value := getattr(table, option)) not in (None, False):
            return f"its Embedding has {option} {value}"
    return None


def forward_replaced(module: nn.Module) -> bool:
    """Whether somebody gave the instance a forward; its class's own, put back by those who had taken it, is none."""
    forward = module.__dict__.get("forward")
    return forward is not None and not own_forward(forward, module)


def own_forward(forward: object, module: nn.Module) -> bool:
    """Whether forward is the method of the module's class, bound to the module."""
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward


class Stem(nn.Module):
    """Base of the drop-in stems: takes an original's place and its parameters, tells uint8 pixels from floats.

    Floating-point pixels are what the original takes, normalised, and give what it gives. uint8 pixels are normalised
    on the way in, (pixels / 255 - mean) / std, without a pass of their own.

    A stem looks at what it stands in for in every call. If that has become not eligible since (hooks were registered, a
    submodule was wrapped, exchanged or cast to float64), the original's forward runs, on normalised floats.

    Attributes:
        mean, std: a float per channel each, for uint8 pixels in [0, 1]; None if not given.
        layout: "NHWC" or "NCHW", of uint8 images. Floating-point images are NCHW.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: str = "NHWC"

    if TYPE_CHECKING:
        # Parameters and submodules are the originals'.
        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def from_original(
        cls: type[AnyStem],
        module: nn.Module,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        layout: str = "NHWC",
    ) -> AnyStem:
        """A stem with the original's own parameters, buffers and submodules, to put in its place.

        Keys of the state_dict do not change, and optimizers that hold the parameters go on working.

        Args:
            module: an instance of the very class that this one replaces.
            mean, std: a float per channel each, of pixels in [0, 1]. Without them uint8 pixels raise.
            layout: of uint8 images, "NHWC" (as decoders give them) or "NCHW"; rows of patches have their own.
        Raises:
            TypeError: module is of another class.
            ValueError: module is not eligible, with the reason; mean and std do not come together, or are not a finite
                number per channel, those of std above 0; layout is neither.
        """
        replaces = cls._replaces()
        if type(module) is not replaces:
            wanted = f"{replaces.__module__}.{replaces.__qualname__}"
            raise TypeError(f"{cls.__name__}.from_original: module must be a {wanted}; got {type(module).__name__}")
        stem = cls.__new__(cls)
        stem.__dict__.update(module.__dict__)
        # What would call the original: its own forward, put back, and what module.compile() made of it.
        for name in ("forward", "_compiled_call_impl"):
            stem.__dict__.pop(name, None)
        reason = "its forward was replaced" if forward_replaced(module) else stem.reason_not_eligible()
        if reason:
            raise ValueError(f"{cls.__name__}.from_original: module is not eligible: {reason}")
        projection = stem._projection()
        channels = projection.in_channels if isinstance(projection, (nn.Conv2d, nn.Conv3d)) else None
        stem._set_normalisation(mean, std, layout, channels)
        return stem

    def reason_not_eligible(self) -> str | None:
        """Why the original's forward runs instead of `patch_embed`, or None."""
        return self._reason_to_call() or reason_not_eligible(self._projection())

    @classmethod
    def _replaces(cls) -> type[nn.Module]:
        # class X(Stem, Original)
        return cls.__bases__[-1]

    def _projection(self) -> nn.Module:
        """The submodule that projects patches, of which only the parameters are used."""
        raise NotImplementedError

    def _reason_to_call(self) -> str | None:
        """Why another submodule, of which only the parameters are used, must be called; asked first. Or None."""
        return None

    def _set_normalisation(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, layout: str, channels: int | None = None
    ) -> None:
        name = type(self).__name__
        if (mean is None) != (std is None):
            raise ValueError(f"{name}: mean and std must be given together; got mean {mean} and std {std}")
        if layout not in LAYOUTS:
            raise ValueError(f"{name}: layout must be NHWC or NCHW; got {layout!r}")
        if mean is not None and std is not None:
            self.mean = check_numbers(name, "mean", mean, channels)
            self.std = check_numbers(name, "std", std, len(self.mean))
            if min(self.std) <= 0:
                raise ValueError(f"{name}: std must be above 0; got {std}")
        self.layout = layout

    def _images(self, pixels: Tensor) -> Tensor:
        """pixels as (B, C, H, W)."""
        if pixels.dim() != 4:
            raise ValueError(f"{type(self).__name__}: pixels must have 4 dimensions; got {tuple(pixels.shape)}")
        if pixels.dtype != torch.uint8:
            return pixels
        images, channels = pixels.permute(LAYOUTS[self.layout]), len(self._normalisation(pixels)["mean"])
        if images.shape[1] != channels:
            raise ValueError(
                f"{type(self).__name__}: uint8 pixels must be {self.layout} with {channels} channels, see layout; "
                f"got {tuple(pixels.shape)}"
            )
        return images

    def _normalisation(self, pixels: Tensor) -> dict[str, Any]:
        """mean and std of pixels, for patch_embed: none of floating-point pixels."""
        if pixels.dtype != torch.uint8:
            return {}
        if self.mean is None or self.std is None:
            raise ValueError(
                f"{type(self).__name__}: uint8 pixels need mean and std, given when the stem is made; zeros and ones "
                "only divide by 255"
            )
        return {"mean": self.mean, "std": self.std}

    def _floats(self, images: Tensor, projection: nn.Module) -> Tensor:
        """What the original takes: normalised images (B, C, H, W), of the dtype of what projects them."""
        if images.dtype != torch.uint8:
            return images
        dtypes = (parameter.dtype for parameter in projection.parameters() if parameter.is_floating_point())
        return _patches.normalise(images, dtype=next(dtypes, torch.float32), **self._normalisation(images))

    def _embed(
        self,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        prefix: Tensor | None = None,
        position: Tensor | None = None,
        keep: Tensor | None = None,
        pad: bool = False,
    ) -> Tensor:
        """patch_embed of images (B, C, H, W), of which without pad a convolution leaves out what is no whole patch."""
        normalisation = self._normalisation(images)
        if images.dtype not in (torch.uint8, *DTYPES):
            images = images.to(weight.dtype)
        if not pad:
            rows, columns = _patches.grid(images, weight, pad=False)
            images = images[:, :, : rows * weight.shape[2], : columns * weight.shape[3]]
        return patch_embed(images, weight, bias, prefix=prefix, position=position, keep=keep, pad=pad, **normalisation)


def product_dtype(weight: Tensor) -> torch.dtype:
    """Of what a convolution with this weight returns."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
