"""Captions to token ids, samples to batches."""

import json
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmfast.data.dataset import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED = Path(__file__).parent / "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class Collator:
    """A list of samples to one batch; skipped samples (None) are left out.

    The batch is the model's keyword arguments and nothing else: the samples' images, where they have any, as a rule
    `pixel_values` uint8 (B, H, W, 3); their features (B, ...), each under its own name; `input_ids` int64 (B, L) and
    `attention_mask` int64 (B, L), where L is the longest caption of the batch and at most `max_length`.
    What a longer caption loses are text tokens: the special tokens that the tokenizer adds, such as the end token
    whose position text towers pool, stay.

    Args:
        tokenizer: a transformers tokenizer with a padding token.
        max_length: limit on tokens per caption, special tokens included.
        images: the model's name for the images; "locked_features" where the dataset's `features` stand for them.
    Raises:
        ValueError: the tokenizer has no padding token; max_length leaves no room for a text token; in a call, when
            every sample of the batch was skipped, or a feature has another shape in each, see `pad_features`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, max_length: int, images: str = "pixel_values") -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: expected one with a padding token, got pad_token None")
        special = tokenizer.num_special_tokens_to_add()
        if max_length <= special:
            raise ValueError(f"max_length: expected more than the {special} special tokens, got {max_length}")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.images = images

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        kept = usable(samples)
        batch = {name: _stacked(kept, name) for name in kept[0].features or {}}
        images = [sample.image for sample in kept if sample.image is not None]
        if images:
            batch[self.images] = torch.stack(images)
        return batch | self.tokens([sample.caption for sample in kept])

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` of the captions, padded to the longest."""
        tokens: Any = self.tokenizer(
            list(captions),
            padding="longest",
            padding_side="right",  # many a tokenizer_config.json says left
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def usable(samples: Sequence[Sample | None]) -> list[Sample]:
    """The samples of a batch that were not skipped; ValueError when none is left."""
    kept = [sample for sample in samples if sample is not None]
    if not kept:
        raise ValueError(
            f"samples: all {len(samples)} of the batch were skipped; expected a usable one, see `dataset.skipped()`"
        )
    return kept


def pad_features(samples: Sequence[Sample], name: str) -> tuple[Tensor, Tensor]:
    """Features with a different number of rows in each sample, as one tensor.

    Args:
        samples: B samples whose `features[name]` is (R_i, ...).
    Returns:
        features (B, R, ...), R the largest R_i, zeros behind the rows of a sample; and a mask bool (B, R), True where
        there is a row.
    Raises:
        ValueError: a sample lacks the feature.
    """
    rows = [_feature(sample, name) for sample in samples]
    mask = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
    for present, own in zip(mask, rows, strict=True):
        present[: len(own)] = True
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask


def _stacked(samples: Sequence[Sample], name: str) -> Tensor:
    rows = [_feature(sample, name) for sample in samples]
    if len(shapes := {tuple(row.shape) for row in rows}) > 1:
        raise ValueError(f"features: expected {name!r} of one shape, got {sorted(shapes)}; see pad_features")
    return torch.stack(rows)


def _feature(sample: Sample, name: str) -> Tensor:
    if sample.features is None or name not in sample.features:
        raise ValueError(f"features: expected {name!r} of sample {sample.key!r}, got {list(sample.features or {})}")
    return sample.features[name]


def load_tokenizer(name_or_path: str | PathLike[str] | None = None) -> "PreTrainedTokenizerBase":
    """A transformers tokenizer by folder or hub name; None gives the bundled byte-level BPE.

    A folder that holds one .gguf file gives that file's tokenizer.

    Raises:
        ValueError: there is no tokenizer of that name, a file of it is damaged, or it needs code of its own, which is
            not run.
    """
    from transformers import AutoTokenizer

    name = BUNDLED if name_or_path is None else name_or_path
    for file in TOKENIZER_FILES:
        path = Path(fspath(name)) / file
        try:
            if path.is_file() and not isinstance(json.loads(path.read_bytes()), dict):
                raise ValueError("expected a JSON object")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    try:
        gguf = gguf_file(name)
        settings = {} if gguf is None else {"gguf_file": gguf}
        return AutoTokenizer.from_pretrained(fspath(name), trust_remote_code=False, **settings)
    except Exception as error:  # the tokenizers library raises just that
        raise ValueError(
            f"name_or_path: no tokenizer at {fspath(name)!r}; expected a folder that save_pretrained wrote, a name on "
            "the Hugging Face hub (cached when offline), or None for the bundled tokenizer"
        ) from error


def gguf_file(folder: str | PathLike[str]) -> str | None:
    """The name of the one .gguf file of a folder that has no config.json; None where there is no such file.

    Raises:
        ValueError: there are several.
    """
    path = Path(fspath(folder))
    if (path / "config.json").is_file() or (path / "tokenizer.json").is_file():
        return None
    names = sorted(file.name for file in path.glob("*.gguf"))
    if len(names) > 1:
        raise ValueError(f"{path}: expected one .gguf file, got {names}")
    return names[0] if names else None
