"""Masking by whole words; tests of single tokens are in test_views.py."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vlmfast.data import BlockMask, TokenMask, load_tokenizer, word_numbers
from vlmfast.data.masking import NOT_MASKED

TEXTS = ["embedding of embeddings", "bed"]


@pytest.fixture
def wordpiece():
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "em", "##bed", "##ding", "##s", "of", "bed"]
    backend = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_word_numbers_are_those_of_the_tokenizer(wordpiece):
    words = word_numbers(wordpiece(TEXTS, padding=True))
    assert words.tolist() == [[-1, 0, 0, 0, 1, 2, 2, 2, 2, -1], [-1, 0] + [-1] * 8]
    assert words.dtype == np.int64


def test_words_of_a_second_text_are_others(wordpiece):
    first, second = (word_numbers(wordpiece([pair], [other]))[0] for pair, other in (("bed", "of"), ("of", "embed")))
    assert len({*first[[1, 3]]}) == 2
    assert second[3] == second[4] != second[1]


def test_a_byte_level_tokenizer_knows_words_too():
    tokenizer = load_tokenizer()
    encoding = tokenizer(["a beaming face"])
    words = word_numbers(encoding)[0]
    tokens = encoding.tokens(0)
    assert len(tokens) > 5  # one word has several tokens
    starts = [n == 1 or tokens[n].startswith("Ġ") for n in range(1, len(tokens) - 1)]
    assert (np.diff(words[:-1]) > 0).tolist() == starts


def test_a_word_is_masked_as_a_whole(wordpiece):
    encoding = wordpiece(TEXTS, padding=True)
    ids, words = np.array(encoding["input_ids"]), word_numbers(encoding)
    mask, generator = TokenMask(wordpiece, 0.3), np.random.default_rng(0)
    chosen = np.zeros(3)
    fates: dict[str, int] = dict.fromkeys(("mask", "kept", "other"), 0)
    rounds = 4000
    for _ in range(rounds):
        masked, labels = mask(ids[0], generator, words[0])
        predicted = labels != NOT_MASKED
        assert not predicted[words[0] == -1].any()
        for word in range(3):
            own = predicted[words[0] == word]
            assert own.all() or not own.any()
            chosen[word] += own[0]
        assert (labels[predicted] == ids[0][predicted]).all()
        assert (masked[~predicted] == ids[0][~predicted]).all()
        fates["mask"] += (masked[predicted] == wordpiece.mask_token_id).sum()
        fates["kept"] += (masked[predicted] == ids[0][predicted]).sum()
        fates["other"] += predicted.sum()
    deviation = 5 * np.sqrt(rounds * 0.3 * 0.7)
    assert (abs(chosen - 0.3 * rounds) < deviation).all()
    total = fates["other"]
    assert abs(fates["mask"] / total - 0.8) < 5 * np.sqrt(0.16 / total)
    assert abs(fates["kept"] / total - (0.1 + 0.1 / 6)) < 5 * np.sqrt(0.1 / total)  # one of 6 random ones is the same


def test_without_words_tokens_are_masked_one_by_one(wordpiece):
    ids = np.array(wordpiece(TEXTS[0])["input_ids"])
    mask, parts = TokenMask(wordpiece, 0.5), set()
    for seed in range(50):
        _, labels = mask(ids, np.random.default_rng(seed))
        parts.add(tuple(labels[1:4] != NOT_MASKED))
    assert len(parts) == 8


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_none_and_all(wordpiece, probability):
    encoding = wordpiece(TEXTS, padding=True)
    ids, words = np.array(encoding["input_ids"])[0], word_numbers(encoding)[0]
    _, labels = TokenMask(wordpiece, probability)(ids, np.random.default_rng(0), words)
    assert ((labels != NOT_MASKED) == ((words >= 0) & bool(probability))).all()


def test_a_slow_tokenizer_does_not_know_words():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="encoding: expected one of a fast tokenizer"):
        word_numbers(Slow())


def test_blocks_hide_beits_number_of_patches() -> None:
    """75 of 196 where rectangles fit, never more; every patch is hidden about as often as its place allows."""
    mask, total = BlockMask(14, 14), np.zeros((14, 14))
    counts = []
    for seed in range(400):
        found = mask(np.random.default_rng(seed))
        assert found.shape == (14, 14)
        assert np.array_equal(found, mask(np.random.default_rng(seed)))
        counts.append(int(found.sum()))
        total += found
    assert max(counts) == 75
    assert np.mean(counts) > 72
    middle, corner = total[4:10, 4:10].mean() / 400, total[[0, 0, -1, -1], [0, -1, 0, -1]].mean() / 400
    assert 0.4 < middle < 0.65
    assert 0.02 < corner < 0.3
    # Blocks, not single patches: most hidden patches have a hidden neighbour on the right.
    found = mask(np.random.default_rng(1))
    assert (found[:, 1:] & found[:, :-1]).sum() > 0.6 * found[:, :-1].sum()


def test_a_block_has_the_area_and_shape_that_it_may_have() -> None:
    for seed in range(50):
        rows, columns = np.nonzero(BlockMask(40, 40, count=100, least=100, aspect=1.0)(np.random.default_rng(seed)))
        assert np.ptp(rows) == np.ptp(columns) == 9  # one square
        assert len(rows) == 100


@pytest.mark.parametrize(("rows", "columns", "count"), [(1, 1, 1), (2, 2, 2), (4, 4, 6), (8, 8, 24), (7, 28, 75)])
def test_blocks_on_other_grids(rows: int, columns: int, count: int) -> None:
    assert BlockMask(rows, columns).count == count
    assert all(1 <= BlockMask(rows, columns)(np.random.default_rng(seed)).sum() <= count for seed in range(50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows, columns: expected at least 1"),
        ({"count": 17}, "count: expected 1 to 16 patches, got 17"),
        ({"count": 4, "least": 5}, "least: expected 1 to count 4, got 5"),
        ({"aspect": 0.0}, "aspect: expected a number above 0"),
    ],
)
def test_wrong_blocks_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockMask(**{"rows": 4, "columns": 4, **options})
