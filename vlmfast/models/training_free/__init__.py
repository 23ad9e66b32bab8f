"""Systems that put trained models together and train nothing of what joins them."""

from transformers import AutoConfig

from vlmfast.models.training_free.asif import ASIFConfig, ASIFModel
from vlmfast.models.training_free.magic import MAGiCModel
from vlmfast.models.training_free.magic_config import MAGiCConfig

# Types that transformers does not know; it reads the tokenizers beside their checkpoints by them.
for _config in (ASIFConfig, MAGiCConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)

__all__ = ["ASIFConfig", "ASIFModel", "MAGiCConfig", "MAGiCModel"]
