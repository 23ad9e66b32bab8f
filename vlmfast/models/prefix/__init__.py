"""Images as a prefix of what a language model reads."""

from transformers import AutoConfig

from vlmfast.models.prefix.clipcap import ClipCapConfig, ClipCapModel

__all__ = ["ClipCapConfig", "ClipCapModel"]

for _config in (ClipCapConfig,):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
