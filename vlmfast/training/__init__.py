"""Pretraining on transformers' Trainer: large batches, exact resume, checkpoints that survive a kill."""

from vlmfast.training.checkpoints import last_checkpoint
from vlmfast.training.trainer import PretrainingArguments, PretrainingTrainer

__all__ = ["PretrainingArguments", "PretrainingTrainer", "last_checkpoint"]
