"""Plain-coloured images captioned with their colour, and a model that knows the colours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toys import COLD, COLOURS, WARM, WORDS, Member, png, word_tokenizer, write_tar
from transformers import PreTrainedTokenizerFast

from vlmfast.data import Collator, ImageTextDataset, eval_transform


def pair(key: str, colour: str, caption: str, *, categorised: bool = True) -> list[Member]:
    record = {"caption": caption}
    if categorised:
        record["category"] = "warm" if colour in WARM else "cold"
    return [(f"{key}.png", png(COLOURS[colour])), (f"{key}.json", json.dumps(record).encode())]


class ColourModel(nn.Module):
    """Features are centred colours; `table` gives each token its colour, zero to words that name none."""

    def __init__(self) -> None:
        super().__init__()
        rows = [COLOURS.get(word, (127.5, 127.5, 127.5)) for word in WORDS]
        self.table = nn.Parameter(self.centre(torch.tensor(rows)))
        with torch.no_grad():
            for name, members in (("warm", WARM), ("cold", COLD)):
                self.table[WORDS.index(name)] = self.table[[WORDS.index(word) for word in members]].mean(dim=0)
        self.frozen = nn.Dropout(0.5).eval()
        self.dropout = nn.Dropout(0.5)

    def transform(self, options: None, *, train: bool) -> Any:
        return eval_transform(8)

    def collator(self, options: None, tokenizer: Any, *, train: bool) -> Collator:
        return Collator(tokenizer, max_length=4)

    @staticmethod
    def centre(colours: torch.Tensor) -> torch.Tensor:
        return colours.float() / 127.5 - 1

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        assert pixel_values.dtype == torch.uint8
        return self.dropout(nn.functional.normalize(self.centre(pixel_values).mean(dim=(1, 2)), dim=-1))

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize((self.table[input_ids] * attention_mask[..., None]).sum(dim=1), dim=-1)


class Matching(nn.Module):
    """Only the cosine of an image and a caption, never features of one."""

    def __init__(self, colours: Any) -> None:
        super().__init__()
        colours.eval()
        self.colours = [colours]  # not a submodule
        self.transform, self.collator = colours.transform, colours.collator
        self.rows: list[int] = []

    def match_scores(self, pixel_values: Any, input_ids: Any, attention_mask: Any) -> torch.Tensor:
        self.rows.append(len(pixel_values))
        image = self.colours[0].get_image_features(pixel_values)
        return (image * self.colours[0].get_text_features(input_ids, attention_mask)).sum(dim=1)


@pytest.fixture
def matching_of() -> Any:
    """A model of the cosines that a model of colours has."""
    return Matching


@pytest.fixture
def model() -> ColourModel:
    return ColourModel()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[[list[Member]], ImageTextDataset]:
    def write(members: list[Member]) -> ImageTextDataset:
        path = write_tar(tmp_path / "pairs-000.tar", members)
        return ImageTextDataset(path, transform=eval_transform(8))

    return write


@pytest.fixture
def write_pairs(write_dataset: Callable[[list[Member]], ImageTextDataset]) -> Callable[..., ImageTextDataset]:
    """write_pairs((colour, caption), ...); the first `uncategorised` of them carry no category."""

    def write(*pairs: tuple[str, str], uncategorised: int = 0) -> ImageTextDataset:
        return write_dataset(
            [
                member
                for index, (colour, caption) in enumerate(pairs)
                for member in pair(f"{index:02}", colour, caption, categorised=index >= uncategorised)
            ]
        )

    return write


@pytest.fixture
def colours(write_dataset: Callable[[list[Member]], ImageTextDataset]) -> ImageTextDataset:
    """One pair of each colour, three samples among them that cannot be used."""
    members = [member for index, colour in enumerate(COLOURS) for member in pair(f"{index}", colour, colour)]
    broken = pair("0b", "red", "red")
    broken[0] = ("0b.png", png(COLOURS["red"])[:40])
    empty = pair("2b", "red", "") + pair("2c", "red", " ")
    return write_dataset(members[:2] + broken + members[2:6] + empty + members[6:])
