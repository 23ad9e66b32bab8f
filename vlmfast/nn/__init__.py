"""Modules that drop into existing training code: constructor, call and parameter names of what they replace.

`vlmfast.nn.transformers`, `vlmfast.nn.transformers_cross_attention` and `vlmfast.nn.open_clip` import those libraries,
and are imported by who uses them.
"""

from vlmfast.nn._stem import reason_not_eligible
from vlmfast.nn.clip_loss import ClipLoss
from vlmfast.nn.fiber import ImageToTextFusion, TextToImageFusion
from vlmfast.nn.gated_cross_attention import GatedCrossAttentionBlock, MaskedCrossAttention, MediaCache
from vlmfast.nn.linear_cross_entropy import LinearCrossEntropy, language_model_loss
from vlmfast.nn.patch_dropout import PatchDropout
from vlmfast.nn.patch_embed import PatchEmbed
from vlmfast.nn.perceiver_resampler import PerceiverAttention, PerceiverResampler
from vlmfast.nn.position import interpolate_position, interpolate_position_per_image
from vlmfast.nn.siglip_loss import SigLipLoss
from vlmfast.nn.srau import SelfResurrectingGate

__all__ = [
    "ClipLoss",
    "GatedCrossAttentionBlock",
    "ImageToTextFusion",
    "LinearCrossEntropy",
    "MaskedCrossAttention",
    "MediaCache",
    "PatchDropout",
    "PatchEmbed",
    "PerceiverAttention",
    "PerceiverResampler",
    "SelfResurrectingGate",
    "SigLipLoss",
    "TextToImageFusion",
    "interpolate_position",
    "interpolate_position_per_image",
    "language_model_loss",
    "reason_not_eligible",
]
