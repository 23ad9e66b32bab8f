"""Modules that drop into existing training code: constructor, call and parameter names of what they replace."""

from vlmfast.nn.clip_loss import ClipLoss
from vlmfast.nn.siglip_loss import SigLipLoss

__all__ = ["ClipLoss", "SigLipLoss"]
