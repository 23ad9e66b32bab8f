"""Retrieval and zero-shot evaluation of any model with `get_image_features` and `get_text_features`."""

from vlmfast.evaluation.encode import Features, encode_dataset, encode_texts
from vlmfast.evaluation.report import write_report
from vlmfast.evaluation.retrieval import Recall, caption_groups, match_ranks, recall_at_k, top_k
from vlmfast.evaluation.scores import Evaluation, evaluate
from vlmfast.evaluation.zero_shot import TEMPLATES, ZeroShot, class_embeddings, classify, prompts

__all__ = [
    "TEMPLATES",
    "Evaluation",
    "Features",
    "Recall",
    "ZeroShot",
    "caption_groups",
    "class_embeddings",
    "classify",
    "encode_dataset",
    "encode_texts",
    "evaluate",
    "match_ranks",
    "prompts",
    "recall_at_k",
    "top_k",
    "write_report",
]
