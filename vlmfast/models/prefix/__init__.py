"""Images as a prefix of what a language model reads."""

from transformers import AutoConfig

from vlmfast.models.prefix.clipcap import ClipCapConfig, ClipCapModel
from vlmfast.models.prefix.flamingo import FlamingoModel
from vlmfast.models.prefix.flamingo_config import FlamingoConfig
from vlmfast.models.prefix.frozen import FrozenConfig, FrozenModel
from vlmfast.models.prefix.mapl import MAPLConfig, MAPLModel
from vlmfast.models.prefix.simvlm import SimVLMModel
from vlmfast.models.prefix.virtex import VirTexConfig, VirTexModel
from vlmfast.models.simvlm_config import SimVLMConfig

# Types that transformers does not know; it reads the tokenizers beside their checkpoints by them.
for _config in (ClipCapConfig, FlamingoConfig, FrozenConfig, MAPLConfig, SimVLMConfig, VirTexConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)

__all__ = [
    "ClipCapConfig",
    "ClipCapModel",
    "FlamingoConfig",
    "FlamingoModel",
    "FrozenConfig",
    "FrozenModel",
    "MAPLConfig",
    "MAPLModel",
    "SimVLMConfig",
    "SimVLMModel",
    "VirTexConfig",
    "VirTexModel",
]
