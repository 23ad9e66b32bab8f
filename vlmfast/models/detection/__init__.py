"""Detectors, which give other models their regions."""

from transformers import AutoConfig

from vlmfast.models.detection.config import FasterRCNNConfig, FasterRCNNOptions
from vlmfast.models.detection.faster_rcnn import FasterRCNNModel, FasterRCNNOutput

AutoConfig.register(FasterRCNNConfig.model_type, FasterRCNNConfig, exist_ok=True)

__all__ = ["FasterRCNNConfig", "FasterRCNNModel", "FasterRCNNOptions", "FasterRCNNOutput"]
