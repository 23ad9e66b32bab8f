"""open_clip's vision transformer with its stem in one op, from uint8 or floating-point pixels.

To put it into a model::

    from vlmfast.nn.open_clip import VisionTransformer

    visual = model.visual
    model.visual = VisionTransformer.from_original(visual, mean=visual.image_mean, std=visual.image_std)
"""

from __future__ import annotations

from typing import Any

from open_clip import transformer
from torch import Tensor, nn

from vlmfast.nn._sizes import arguments_of, check_divides, check_integers, check_patch_fits, check_side
from vlmfast.nn._stem import Stem, product_dtype, reason_to_call
from vlmfast.nn.patch_dropout import sample_patches


class VisionTransformer(Stem, transformer.VisionTransformer):
    """open_clip's VisionTransformer; all but the stem (patches, class token, positions, patch dropout) is open_clip's.

    Patches to drop are drawn before they are embedded, on the device, and never embedded.

    `forward_intermediates` reads the size of images off its input: give it uint8 pixels with layout "NCHW", permuted
    (strides are free), or floats.

    A size below 1 raises ValueError that names it, one that is no integer TypeError.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name, given = "VisionTransformer", arguments_of(transformer.VisionTransformer.__init__, args, kwargs)
        check_integers(name, **{argument: given[argument] for argument in ("width", "layers", "heads", "output_dim")})
        for argument in ("image_size", "patch_size"):
            check_side(name, argument, given[argument])
        check_patch_fits(name, given["image_size"], given["patch_size"])
        check_divides(name, "heads", given["heads"], "width", given["width"])
        super().__init__(*args, **kwargs)

    def _projection(self) -> nn.Module:
        return self.conv1

    def _embeds(self, x: Tensor) -> Tensor:
        images, dropout = self._images(x), self.patch_dropout
        if self.reason_not_eligible():
            return super()._embeds(self._floats(images, self.conv1))
        weight, keep = self.conv1.weight, None
        drops = not reason_to_call(dropout, transformer.PatchDropout) and dropout.exclude_first_token
        if drops and dropout.training and dropout.prob > 0:
            patches = self.positional_embedding.shape[0] - 1
            keep = sample_patches(images.shape[0], patches, dropout.prob, images.device)
        dtype = product_dtype(weight)
        tokens = self._embed(
            images,
            weight,
            self.conv1.bias,
            prefix=self.class_embedding.to(dtype)[None],
            position=self.positional_embedding.to(dtype),
            keep=keep,
        )
        return self.ln_pre(tokens if drops else dropout(tokens))
