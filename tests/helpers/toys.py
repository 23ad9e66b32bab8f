"""Plain-coloured images, a tokenizer of few words, and models whose right score is known, with eyes or without."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from vlmfast.data import Collator, EpochSampler, eval_transform
from vlmfast.models.contract import ImageTextOptions, JointFeatures, Pretrainable

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


def halves(left: str, right: str, size: int = 16) -> bytes:
    """A square image of two colours beside each other."""
    image = Image.new("RGB", (size, size), COLOURS[left])
    image.paste(COLOURS[right], (size // 2, 0, size, size))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


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


class JointlyConfig(PreTrainedConfig):
    """Whether the model has eyes."""

    model_type = "jointly"

    def __init__(self, eyes: bool = True, **kwargs: Any) -> None:
        self.eyes = eyes
        super().__init__(**kwargs)


class Jointly(Pretrainable, PreTrainedModel):
    """Pools the colour that it sees together with the words of the text, each as an embedding."""

    Options = ImageTextOptions
    config_class = JointlyConfig
    max_text_length = 32

    def __init__(self, config: JointlyConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(len(COLOURS) + len(WORDS), 16)
        self.post_init()

    transform, collator = Toy.transform, Toy.collator

    def joint_features(self, pixel_values: Any, input_ids: Any, attention_mask: Any) -> JointFeatures:
        palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
        seen = torch.cdist(pixel_values.float().mean(dim=(1, 2)), palette).argmin(dim=1)
        image = self.table(seen if self.config.eyes else torch.zeros_like(seen))[:, None]
        text = self.table(len(COLOURS) + input_ids) * attention_mask[..., None]
        pooled = torch.cat([image[:, 0], text.sum(dim=1)], dim=1)
        return JointFeatures(pooled, text, image, attention_mask)


def joint_model(eyes: bool) -> Jointly:
    return Jointly(JointlyConfig(eyes=eyes)).eval()


def fit(made: Any, steps: int = 80) -> None:
    """Trains what a task's `trainable` gave, on all samples at once; with the same seed the same each time."""
    loader = DataLoader(
        made.dataset, len(made.dataset), sampler=EpochSampler(len(made.dataset)), collate_fn=made.collator
    )
    optimizer = torch.optim.Adam(made.model.parameters(), 0.02)
    made.model.train()
    for _, batch in zip(range(steps), itertools.cycle(list(loader)), strict=False):
        optimizer.zero_grad()
        made.model(**batch).loss.backward()
        optimizer.step()
    made.model.eval()
