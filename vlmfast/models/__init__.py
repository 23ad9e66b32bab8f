"""Model classes, one package per pretraining strategy and one file per model."""
