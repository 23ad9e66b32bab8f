"""Images with text: tar shards, streams, tables and folders, to batches of uint8 pixels, features and token ids.

Imports torch, numpy and PIL only; transformers is imported by `load_tokenizer`, webdataset by `StreamingDataset`.
"""

from vlmfast.data.dataset import ImageTextDataset, Sample
from vlmfast.data.eda import EDA, read_synonyms
from vlmfast.data.feature_cache import FeatureCache, cache_features, open_features
from vlmfast.data.masking import BlockMask, TokenMask, word_numbers
from vlmfast.data.mixture import ImagesAlone, Mixture, TextsAlone
from vlmfast.data.record_boxes import RecordBoxes
from vlmfast.data.records import is_stream
from vlmfast.data.sampler import EpochSampler
from vlmfast.data.streaming import StreamingDataset, StreamLoader
from vlmfast.data.text import Collator, load_tokenizer, pad_features
from vlmfast.data.transforms import Transform, eval_transform, moco_transform, train_transform, two_views
from vlmfast.data.views import TwoViewCollator

__all__ = [
    "EDA",
    "BlockMask",
    "Collator",
    "EpochSampler",
    "FeatureCache",
    "ImageTextDataset",
    "ImagesAlone",
    "Mixture",
    "RecordBoxes",
    "Sample",
    "StreamLoader",
    "StreamingDataset",
    "TextsAlone",
    "TokenMask",
    "Transform",
    "TwoViewCollator",
    "cache_features",
    "eval_transform",
    "is_stream",
    "load_tokenizer",
    "moco_transform",
    "open_features",
    "pad_features",
    "read_synonyms",
    "train_transform",
    "two_views",
    "word_numbers",
]
