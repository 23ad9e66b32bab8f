import io
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from vlmfast.data import Collator, ImageTextDataset
from vlmfast.tasks.encode import encode_dataset, encode_texts

NAMES = ["red", "orange", "yellow", "green", "cyan", "blue"]


def test_rows_are_the_readable_pairs_in_order(
    model: Any, colours: ImageTextDataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    features = encode_dataset(model, colours, Collator(tokenizer, max_length=4), batch_size=4)
    assert features.captions == NAMES
    assert features.keys == ["0", "1", "2", "3", "4", "5"]
    assert features.indices == [0, 2, 3, 6, 7, 8]
    assert features.categories == ["warm"] * 3 + ["cold"] * 3
    assert features.skipped == {"corrupt image": 1, "empty caption": 2}
    for row, index in enumerate(features.indices):
        sample = colours[index]
        assert sample is not None
        image = torch.nn.functional.normalize(sample.image[0, 0] / 127.5 - 1, dim=0)
        torch.testing.assert_close(features.image[row], image)
    # The model reads the text's colour from its table, the image's from the pixels: pairs agree only if rows do.
    torch.testing.assert_close(features.image, features.text)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batch_size_and_workers_change_nothing(
    model: Any, colours: ImageTextDataset, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    one = encode_dataset(model, colours, Collator(tokenizer, max_length=4), batch_size=3)
    # At batch size 1 whole batches are skipped; with a worker the count of the skipped crosses processes.
    other = encode_dataset(model, colours, Collator(tokenizer, max_length=4), batch_size=batch_size, num_workers=1)
    torch.testing.assert_close(one.image, other.image)
    torch.testing.assert_close(one.text, other.text)
    assert (one.captions, one.indices, one.skipped) == (other.captions, other.indices, other.skipped)


def test_features_can_train_a_probe(model: Any, colours: ImageTextDataset, tokenizer: PreTrainedTokenizerFast) -> None:
    features = encode_dataset(model, colours, Collator(tokenizer, max_length=4))
    probe = torch.nn.Linear(3, 1)
    probe(features.image).sum().backward()
    assert probe.weight.grad is not None
    assert not features.text.requires_grad


def modes(model: torch.nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_every_module_gets_its_own_mode_back(
    model: Any, colours: ImageTextDataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = modes(model)
    assert set(before) == {True, False}
    encode_dataset(model, colours, Collator(tokenizer, max_length=4))
    assert modes(model) == before
    encode_texts(model, ["red"], Collator(tokenizer, max_length=4))
    assert modes(model) == before

    class BrokenError(Exception):
        pass

    def fail(*args: Any) -> torch.Tensor:
        assert modes(model) == [False] * len(before)
        assert torch.is_inference_mode_enabled()
        raise BrokenError

    model.get_text_features = fail
    with pytest.raises(BrokenError):
        encode_dataset(model, colours, Collator(tokenizer, max_length=4))
    assert modes(model) == before
    with pytest.raises(BrokenError):
        encode_texts(model, ["red"], Collator(tokenizer, max_length=4))
    assert modes(model) == before
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_autocast_is_an_option_and_features_stay_unit_float32(
    model: Any, colours: ImageTextDataset, tokenizer: PreTrainedTokenizerFast, autocast: torch.dtype | None
) -> None:
    seen = set()
    projection = torch.nn.Linear(3, 16)
    plain = model.get_image_features

    def project(pixel_values: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = projection(plain(pixel_values))
        seen.add(features.dtype)
        return features

    model.get_image_features = project
    features = encode_dataset(model, colours, Collator(tokenizer, max_length=4), autocast=autocast)
    assert seen == {autocast or torch.float32}
    assert features.image.dtype == torch.float32
    torch.testing.assert_close(features.image.norm(dim=1), torch.ones(6), rtol=1e-6, atol=0)


def test_texts_are_encoded_as_captions_are(
    model: Any, colours: ImageTextDataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    features = encode_dataset(model, colours, Collator(tokenizer, max_length=4))
    # Of different lengths, hence padded, and the last one truncated to the two tokens that count.
    texts = ["red", "<unk> orange", "yellow <unk> <unk>", "green", "cyan", "blue blue red red"]
    torch.testing.assert_close(
        encode_texts(model, texts, Collator(tokenizer, max_length=2), batch_size=4), features.text
    )


def test_a_dataset_without_a_readable_pair_raises(model: Any, write_dataset: Any, tokenizer: Any) -> None:
    dataset = write_dataset([("a.png", b"no image"), ("a.txt", b"red"), ("b.png", b""), ("b.txt", b"blue")])
    with pytest.raises(ValueError, match=r"one readable pair, got 2 samples, skipped \{'corrupt image': 2\}"):
        encode_dataset(model, dataset, Collator(tokenizer, max_length=4))
    with pytest.raises(ValueError, match="texts: expected at least one"):
        encode_texts(model, [], Collator(tokenizer, max_length=4))


def test_broken_weights_are_reported(model: Any, colours: ImageTextDataset, tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.no_grad():
        model.table[2:4] = torch.nan
    with pytest.raises(ValueError, match="expected finite text features, got NaN or infinity in 2 rows"):
        encode_dataset(model, colours, Collator(tokenizer, max_length=4))


def test_progress_bar_only_on_a_terminal(
    model: Any, colours: ImageTextDataset, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, progress, shown in ((Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        monkeypatch.setattr("sys.stderr", stream)
        encode_dataset(model, colours, Collator(tokenizer, max_length=4), progress=progress)
        assert ("encode" in stream.getvalue()) == shown
