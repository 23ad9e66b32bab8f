"""Text that a model generates, for the tasks that score it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vlmfast.tasks.batches import Collate, evaluating
from vlmfast.tasks.task import Options, Run


@dataclass
class GenerationOptions(Options):
    """How text is generated."""

    beams: int | None = field(
        default=None, metadata={"help": "Beams of the search; 1 is greedy. By default what the model itself does."}
    )
    max_new_tokens: int = field(default=30, metadata={"help": "Tokens that are generated at most."})

    def __post_init__(self) -> None:
        for name, least in (("beams", self.beams), ("max-new-tokens", self.max_new_tokens)):
            if least is not None and least < 1:
                raise ValueError(f"--{name}: expected at least 1, got {least}")


def generate(
    run: Run, dataset: Any, options: GenerationOptions, prompt: Callable[[Any], str] | str
) -> tuple[list[str], list[int], list[Any]]:
    """What the model's `generate` says to each sample, the indices of the samples in the dataset, and the samples.

    Args:
        dataset: `dataset[index]` is a sample or None.
        prompt: for all samples, or a function of a sample; it stands for the sample's caption.
    Raises:
        ValueError: no sample could be used.
    """
    settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens}
    if options.beams is not None:
        settings["num_beams"] = options.beams
    collator = Prompted(run.model.prompt_collator(run.model_options, run.tokenizer), prompt)
    texts, seen, kept = [], [], []
    with evaluating(run.model):
        for batch, indices, samples in run.batches(dataset, collator, "generate"):
            tokens = run.model.generate(**batch, **settings)
            texts += decode(run.tokenizer, tokens)
            seen += indices
            kept += samples
    return run.some(texts), seen, kept


def decode(tokenizer: Any, tokens: torch.Tensor) -> list[str]:
    """Token ids (B, L) as texts without special tokens."""
    return [text.strip() for text in tokenizer.batch_decode(tokens.cpu(), skip_special_tokens=True)]


class Prompted:
    """A collator that reads a prompt in the place of every sample's caption."""

    def __init__(self, collator: Collate, prompt: Callable[[Any], str] | str) -> None:
        self.collator = collator
        self.prompt = prompt

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        prompts = [self.prompt(sample) if callable(self.prompt) else self.prompt for sample in samples]
        return self.collator([replace(sample, caption=p) for sample, p in zip(samples, prompts, strict=True)])
