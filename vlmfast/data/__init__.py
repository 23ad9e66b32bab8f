"""Image-text pairs: tar shards, tables and folders, to batches of uint8 pixels and token ids.

Imports torch, numpy and PIL only; transformers is imported by `load_tokenizer`.
"""

from vlmfast.data.dataset import ImageTextDataset, Sample
from vlmfast.data.eda import EDA, read_synonyms
from vlmfast.data.feature_cache import FeatureCache, cache_features
from vlmfast.data.sampler import EpochSampler
from vlmfast.data.text import Collator, load_tokenizer
from vlmfast.data.transforms import Transform, eval_transform, moco_transform, train_transform, two_views
from vlmfast.data.views import TokenMask, TwoViewCollator

__all__ = [
    "EDA",
    "Collator",
    "EpochSampler",
    "FeatureCache",
    "ImageTextDataset",
    "Sample",
    "TokenMask",
    "Transform",
    "TwoViewCollator",
    "cache_features",
    "eval_transform",
    "load_tokenizer",
    "moco_transform",
    "read_synonyms",
    "train_transform",
    "two_views",
]
