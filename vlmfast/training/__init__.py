"""Pretraining on transformers' Trainer: large contrastive batches, exact resume, checkpoints that survive a kill."""

from vlmfast.training.trainer import PretrainingArguments, PretrainingTrainer, last_checkpoint

__all__ = ["PretrainingArguments", "PretrainingTrainer", "last_checkpoint"]
