"""Plain-coloured images, a tokenizer of few words, and models whose right score is known, with eyes or without."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from vlmfast.data import Collator, eval_transform

COLOURS = {
    "red": (255, 30, 0),
    "orange": (255, 130, 20),
    "yellow": (255, 255, 40),
    "green": (10, 200, 60),
    "cyan": (0, 220, 255),
    "blue": (20, 40, 255),
}
WARM, COLD = ("red", "orange", "yellow"), ("green", "cyan", "blue")
SAID = ["here", "is", "a", "sign", "of", "what", "colour", "yes", "no", "this", "not", "question", "answer", ":", "?"]
WORDS = ["<pad>", "<unk>", *COLOURS, "warm", "cold", *SAID]

Member = tuple[str, bytes]


def png(colour: tuple[int, int, int], size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[Member]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def write_records(path: Path, *samples: tuple[str, dict[str, Any]]) -> str:
    """A shard of plain images, each a colour beside its record; a colour that there is not makes a corrupt image."""
    members = []
    for index, (colour, record) in enumerate(samples):
        members.append((f"{index:03}.png", png(COLOURS[colour]) if colour in COLOURS else b"no image"))
        members.append((f"{index:03}.json", json.dumps(record).encode()))
    return write_tar(path, members)


def word_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


class Toy(nn.Module):
    """The contract without a task's method. With eyes it sees the colour of an image, without them always red."""

    def __init__(self, eyes: bool = True) -> None:
        super().__init__()
        self.eyes = eyes
        self.register_buffer("palette", torch.tensor(list(COLOURS.values()), dtype=torch.float32))

    def transform(self, options: None, *, train: bool) -> Any:
        return eval_transform(8)

    def collator(self, options: None, tokenizer: Any, *, train: bool) -> Collator:
        return Collator(tokenizer, max_length=32)

    def prompt_collator(self, options: None, tokenizer: Any) -> Collator:
        return Collator(tokenizer, max_length=64)

    def see(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Places (B,) of the colours among COLOURS."""
        assert not self.training
        found = torch.cdist(pixel_values.float().mean(dim=(1, 2)), self.palette).argmin(dim=1)
        return found if self.eyes else torch.zeros_like(found)

    def names(self, pixel_values: torch.Tensor) -> list[str]:
        return [list(COLOURS)[place] for place in self.see(pixel_values).tolist()]


def ids(*texts: str) -> torch.Tensor:
    """Token ids (B, L), padded on the right."""
    rows = [torch.tensor([WORDS.index(word) for word in text.split()], dtype=torch.int64) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)
