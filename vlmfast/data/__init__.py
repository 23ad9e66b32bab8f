"""Image-text pairs: tar shards, tables and folders, to batches of uint8 pixels and token ids.

Imports torch, numpy and PIL only; transformers is imported by `load_tokenizer`.
"""

from vlmfast.data.dataset import ImageTextDataset, Sample
from vlmfast.data.sampler import EpochSampler
from vlmfast.data.text import Collator, load_tokenizer
from vlmfast.data.transforms import Transform, eval_transform, train_transform

__all__ = [
    "Collator",
    "EpochSampler",
    "ImageTextDataset",
    "Sample",
    "Transform",
    "eval_transform",
    "load_tokenizer",
    "train_transform",
]
