"""Modules that drop into existing training code: constructor, call and parameter names of what they replace.

`vlmfast.nn.transformers` and `vlmfast.nn.open_clip` import those libraries, and are imported by who uses them.
"""

from vlmfast.nn._stem import reason_not_eligible
from vlmfast.nn.clip_loss import ClipLoss
from vlmfast.nn.patch_dropout import PatchDropout
from vlmfast.nn.patch_embed import PatchEmbed
from vlmfast.nn.position import interpolate_position, interpolate_position_per_image
from vlmfast.nn.siglip_loss import SigLipLoss

__all__ = [
    "ClipLoss",
    "PatchDropout",
    "PatchEmbed",
    "SigLipLoss",
    "interpolate_position",
    "interpolate_position_per_image",
    "reason_not_eligible",
]
