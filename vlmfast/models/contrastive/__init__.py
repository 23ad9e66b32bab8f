"""Two towers and a contrastive loss."""

from transformers import AutoConfig

from vlmfast.models.contrastive.align import ALIGNConfig, ALIGNModel, ALIGNOutput
from vlmfast.models.contrastive.clip import CLIPConfig, CLIPModel, CLIPOutput
from vlmfast.models.contrastive.cloob import CLOOBConfig, CLOOBModel
from vlmfast.models.contrastive.declip import DeCLIPConfig, DeCLIPModel, DeCLIPOutput
from vlmfast.models.contrastive.lit import LiTConfig, LiTModel
from vlmfast.models.contrastive.siglip import SigLIPConfig, SigLIPModel, SigLIPOutput

# Types that transformers does not know; it reads the tokenizers beside their checkpoints by them.
for _config in (CLOOBConfig, DeCLIPConfig, LiTConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)

__all__ = [
    "ALIGNConfig",
    "ALIGNModel",
    "ALIGNOutput",
    "CLIPConfig",
    "CLIPModel",
    "CLIPOutput",
    "CLOOBConfig",
    "CLOOBModel",
    "DeCLIPConfig",
    "DeCLIPModel",
    "DeCLIPOutput",
    "LiTConfig",
    "LiTModel",
    "SigLIPConfig",
    "SigLIPModel",
    "SigLIPOutput",
]
