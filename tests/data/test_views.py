import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vlmfast.data import (
    EDA,
    ImageTextDataset,
    Sample,
    TokenMask,
    TwoViewCollator,
    eval_transform,
    moco_transform,
    two_views,
)
from vlmfast.data.masking import NOT_MASKED

PAD, BOS, EOS, MASK = 0, 1, 2, 3
WORDS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def tokenizer():
    special = {"[PAD]": PAD, "[BOS]": BOS, "[EOS]": EOS, "[MASK]": MASK}
    model = models.WordLevel({**special, **{word: 4 + k for k, word in enumerate(WORDS)}}, unk_token="[PAD]")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", BOS), ("[EOS]", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", mask_token="[MASK]"
    )


def sample(caption, seed=0):
    return Sample(torch.full((2, 4, 4, 3), seed % 256, dtype=torch.uint8), caption, str(seed), None, seed)


def reverse(caption, generator):
    return " ".join(reversed(caption.split()))


def unchanged(caption, generator):
    return caption


def test_a_batch_of_two_views_each(tokenizer):
    collator = TwoViewCollator(tokenizer, max_length=6, rewrite=reverse, mask_probability=0.0)
    batch = collator([sample("a b c", 1), None, sample("d", 2)])
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "pixel_values": (torch.uint8, (2, 2, 4, 4, 3)),
        "input_ids": (torch.int64, (2, 2, 5)),
        "attention_mask": (torch.int64, (2, 2, 5)),
        "mlm_labels": (torch.int64, (2, 5)),
    }
    assert batch["input_ids"].tolist() == [
        [[BOS, 4, 5, 6, EOS], [BOS, 6, 5, 4, EOS]],
        [[BOS, 7, EOS, PAD, PAD], [BOS, 7, EOS, PAD, PAD]],
    ]
    assert batch["attention_mask"].tolist() == [[[1] * 5] * 2, [[1, 1, 1, 0, 0]] * 2]
    assert (batch["mlm_labels"] == NOT_MASKED).all()
    assert batch["pixel_values"][:, 0, 0, 0, 0].tolist() == [1, 2]


def test_masking_touches_the_caption_and_never_the_rewritten_one(tokenizer):
    collator = TwoViewCollator(tokenizer, max_length=12, rewrite=unchanged, mask_probability=1.0)
    batch = collator([sample("a b c d e f g h", seed) for seed in range(50)])
    first, second = batch["input_ids"].unbind(1)
    assert second.tolist() == [[BOS, *range(4, 12), EOS]] * 50
    assert (first[:, 0] == BOS).all()
    assert (first[:, -1] == EOS).all()
    assert batch["mlm_labels"][:, 1:-1].tolist() == [list(range(4, 12))] * 50
    assert (batch["mlm_labels"][:, [0, -1]] == NOT_MASKED).all()


def test_a_sample_is_the_same_in_every_batch(tokenizer):
    collator = pickle.loads(pickle.dumps(TwoViewCollator(tokenizer, max_length=20, rewrite=EDA(0.3))))
    samples = [sample(" ".join(WORDS[:length]), length) for length in (5, 9, 3)]
    together = collator(samples)
    assert not torch.equal(together["input_ids"][:, 0], together["input_ids"][:, 1])
    for row, alone in enumerate(samples):
        batch = collator([alone])
        length = batch["input_ids"].shape[-1]
        assert torch.equal(together["input_ids"][row, :, :length], batch["input_ids"][0])
        assert torch.equal(together["mlm_labels"][row, :length], batch["mlm_labels"][0])
        assert not together["attention_mask"][row, :, length:].any()


def test_an_empty_rewriting_leaves_the_caption(tokenizer):
    collator = TwoViewCollator(tokenizer, max_length=6, rewrite=lambda caption, generator: "", mask_probability=0.0)
    assert collator([sample("a b")])["input_ids"].tolist() == [[[BOS, 4, 5, EOS]] * 2]


def test_fifteen_percent_eighty_ten_ten(tokenizer):
    mask = TokenMask(tokenizer, 0.15)
    ids = np.array([BOS, *[4 + k % 26 for k in range(200)], EOS, PAD, PAD])
    chosen = masked = kept = replaced = 0
    seen = set()
    for seed in range(300):
        output, labels = mask(ids, np.random.default_rng(seed))
        predicted = labels != NOT_MASKED
        assert not predicted[[0, -3, -2, -1]].any()
        np.testing.assert_array_equal(labels[predicted], ids[predicted])
        np.testing.assert_array_equal(output[~predicted], ids[~predicted])
        chosen += predicted.sum()
        masked += (output[predicted] == MASK).sum()
        kept += (output[predicted] == ids[predicted]).sum()
        others = output[predicted & (output != MASK) & (output != ids)]
        replaced += len(others)
        seen.update(others.tolist())
    assert abs(chosen / 60000 - 0.15) < 5 * np.sqrt(0.15 * 0.85 / 60000)
    # A random token is the old one for 1 in 26.
    for count, share in ((masked, 0.8), (kept, 0.1 + 0.1 / 26), (replaced, 0.1 * 25 / 26)):
        assert abs(count / chosen - share) < 5 * np.sqrt(share * (1 - share) / chosen)
    assert seen == set(range(4, 30))


def test_the_dataset_gives_each_pair_and_epoch_its_own_seed(write_tar, png):
    path = write_tar("a.tar", {"0.png": png(0), "0.txt": b"x", "1.png": png(0), "1.txt": b"x"})
    dataset = ImageTextDataset(path, transform=two_views(eval_transform(8)))
    assert dataset[0].image.shape == (2, 8, 8, 3)
    assert dataset[3, 0].seed == ImageTextDataset(path, transform=two_views(eval_transform(8)))[3, 0].seed
    assert len({dataset[position].seed for position in ((0, 0), (1, 0), (0, 1), (1, 1))}) == 4


def test_bad_arguments(tokenizer):
    one_view = Sample(torch.zeros(4, 4, 3, dtype=torch.uint8), "a", "0", None)
    with pytest.raises(ValueError, match=r"samples: expected images of shape \(2, H, W, 3\).* got \(4, 4, 3\)"):
        TwoViewCollator(tokenizer, max_length=6, rewrite=reverse)([one_view])
    with pytest.raises(ValueError, match="mask_probability: expected a probability, got 2"):
        TwoViewCollator(tokenizer, max_length=6, rewrite=reverse, mask_probability=2)
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match=r"tokenizer: expected one with a mask token, .*add_special_tokens"):
        TwoViewCollator(tokenizer, max_length=6, rewrite=reverse)


def test_two_views_differ_as_two_calls_do():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    transform = moco_transform(16)
    views = pickle.loads(pickle.dumps(two_views(transform)))(image, np.random.default_rng(1))
    generator = np.random.default_rng(1)
    assert torch.equal(views[0], transform(image, generator))
    assert torch.equal(views[1], transform(image, generator))
    assert not torch.equal(views[0], views[1])
    assert two_views(transform).min_side == transform.min_side
