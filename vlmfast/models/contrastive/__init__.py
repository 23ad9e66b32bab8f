"""Two towers and a contrastive loss."""

from vlmfast.models.contrastive.clip import CLIPConfig, CLIPModel, CLIPOutput

__all__ = ["CLIPConfig", "CLIPModel", "CLIPOutput"]
