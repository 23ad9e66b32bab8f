"""Two towers and a contrastive loss."""

from vlmfast.models.contrastive.clip import CLIPConfig, CLIPModel, CLIPOutput
from vlmfast.models.contrastive.declip import DeCLIPConfig, DeCLIPModel, DeCLIPOutput
from vlmfast.models.contrastive.lit import LiTConfig, LiTModel

__all__ = [
    "CLIPConfig",
    "CLIPModel",
    "CLIPOutput",
    "DeCLIPConfig",
    "DeCLIPModel",
    "DeCLIPOutput",
    "LiTConfig",
    "LiTModel",
]
