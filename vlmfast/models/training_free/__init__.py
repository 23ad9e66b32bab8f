"""Systems that put trained models together and train nothing of what joins them."""

from transformers import AutoConfig

from vlmfast.models.training_free.asif import ASIFConfig, ASIFModel

# Types that transformers does not know; it reads the tokenizers beside their checkpoints by them.
for _config in (ASIFConfig,):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)

__all__ = ["ASIFConfig", "ASIFModel"]
