"""Images and texts joined by cross-attention."""

from transformers import AutoConfig

from vlmfast.models.fusion.fiber import FIBERModel
from vlmfast.models.fusion.fiber_config import FIBERConfig
from vlmfast.models.fusion.fiber_fine import FIBERFineModel
from vlmfast.models.fusion.fiber_fine_config import FIBERFineConfig
from vlmfast.models.fusion.vc_gpt import VCGPTConfig, VCGPTModel
from vlmfast.models.fusion.visualgpt import VisualGPTConfig, VisualGPTModel

# Types that transformers does not know; it reads the tokenizers beside their checkpoints by them.
for _config in (FIBERConfig, FIBERFineConfig, VCGPTConfig, VisualGPTConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)

__all__ = [
    "FIBERConfig",
    "FIBERFineConfig",
    "FIBERFineModel",
    "FIBERModel",
    "VCGPTConfig",
    "VCGPTModel",
    "VisualGPTConfig",
    "VisualGPTModel",
]
