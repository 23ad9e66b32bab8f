import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import vlmfast
from vlmfast.data import Collator, Sample, load_tokenizer

PAD, EOS, BOS = 0, 1, 2


@pytest.fixture
def tokenizer():
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *"abcdefgh"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def sample(caption, level=0):
    return Sample(torch.full((2, 2, 3), level, dtype=torch.uint8), caption, "key", None)


def test_a_batch_holds_exactly_what_the_model_takes(tokenizer):
    batch = Collator(tokenizer, max_length=8)([sample("a", 1), None, sample("a b c", 2)])
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "pixel_values": (torch.uint8, (2, 2, 2, 3)),
        "input_ids": (torch.int64, (2, 5)),
        "attention_mask": (torch.int64, (2, 5)),
    }
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 2]
    assert batch["input_ids"].tolist() == [[BOS, 4, EOS, PAD, PAD], [BOS, 4, 5, 6, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_truncation_keeps_the_end_token(tokenizer):
    batch = Collator(tokenizer, max_length=5)([sample("a b c d e f g h"), sample("a b c"), sample("a")])
    assert batch["input_ids"].tolist() == [[BOS, 4, 5, 6, EOS], [BOS, 4, 5, 6, EOS], [BOS, 4, EOS, PAD, PAD]]


def test_a_batch_with_nothing_left_raises(tokenizer):
    with pytest.raises(ValueError, match=r"samples: all 3 of the batch were skipped.*dataset\.skipped"):
        Collator(tokenizer, max_length=8)([None, None, None])


def test_max_length_must_leave_room_for_text(tokenizer):
    with pytest.raises(ValueError, match="max_length: expected more than the 2 special tokens, got 2"):
        Collator(tokenizer, max_length=2)


def test_a_tokenizer_without_padding_is_refused(tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="tokenizer: expected one with a padding token"):
        Collator(tokenizer, max_length=8)


def test_a_collator_pickles(tokenizer):
    collator = pickle.loads(pickle.dumps(Collator(tokenizer, max_length=5)))
    assert collator([sample("a b c d e")])["input_ids"].tolist() == [[BOS, 4, 5, 6, EOS]]


def test_a_saved_tokenizer_is_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("b a")["input_ids"] == [BOS, 5, 4, EOS]


def test_the_bundled_tokenizer():
    tokenizer = load_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (PAD, EOS, BOS)
    batch = Collator(tokenizer, max_length=6)([sample("grinning face with big eyes " * 5), sample("cat")])
    assert batch["input_ids"].shape == (2, 6)
    assert batch["input_ids"][:, 0].tolist() == [BOS, BOS]
    assert (batch["input_ids"] == EOS).sum(1).tolist() == [1, 1]
    assert batch["input_ids"][0, -1] == EOS


@pytest.mark.parametrize("name", ["no-such-organisation/no-such-tokenizer", "./no/such/folder"])
def test_an_unknown_tokenizer_is_named(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"name_or_path: no tokenizer at '{name}'; expected a folder"):
        load_tokenizer(name)


def test_importing_the_package_imports_torch_numpy_and_pil_only():
    others = {"transformers", "tokenizers", "webdataset", "torchvision", "pandas"}
    code = f"import sys, vlmfast.data; print(*{others} & set(sys.modules))"
    root = Path(vlmfast.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout == "\n"
