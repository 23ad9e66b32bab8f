"""BERT's masking of tokens, alone or by whole words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_MASKED = -100
SECOND_TEXT = 1 << 32


class TokenMask:
    """BERT's masking: of the tokens chosen, 80 % become the mask token, 10 % a random one and 10 % stay.

    Special tokens are neither chosen nor drawn: a random end-of-text token would move where text towers pool.

    Args:
        tokenizer: a transformers tokenizer with a mask token.
        probability: of a token, or of a word, to be chosen.
    Raises:
        ValueError: the tokenizer has no mask token; probability is not in [0, 1].
    Source: Devlin et al. 2019 (1810.04805), section 3.1; whole words: its released code, of May 2019.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float) -> None:
        if tokenizer.mask_token_id is None:
            raise ValueError(
                "tokenizer: expected one with a mask token, got mask_token None; "
                "tokenizer.add_special_tokens({'mask_token': '<|mask|>'}) adds one, at the end of the vocabulary"
            )
        if not 0 <= probability <= 1:
            raise ValueError(f"mask_probability: expected a probability, got {probability}")
        self.probability = probability
        self.mask_token_id = tokenizer.mask_token_id
        self.ordinary = np.ones(len(tokenizer), dtype=np.bool_)
        self.ordinary[tokenizer.all_special_ids] = False
        self.choices = np.flatnonzero(self.ordinary)

    def __call__(
        self, ids: np.ndarray, generator: np.random.Generator, words: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """ids (L,) to masked ids and labels (L,), the latter -100 where nothing is to be predicted.

        With `words` (L,), the number of each token's word as `word_numbers` gives it, all tokens of a word are chosen
        or none is; what becomes of each is drawn for itself, as in BERT's code.
        """
        places = np.flatnonzero(self.ordinary[ids])  # not padding, so a caption's draws do not depend on its batch
        chosen, fate, other = generator.random((3, len(places)))
        if words is not None:
            _, first, word = np.unique(words[places], return_index=True, return_inverse=True)
            chosen = chosen[first][word]
        masked, labels = ids.copy(), np.full_like(ids, NOT_MASKED)
        predicted = chosen < self.probability
        labels[places[predicted]] = ids[places[predicted]]
        masked[places[predicted & (fate < 0.8)]] = self.mask_token_id
        replaced = predicted & (fate >= 0.8) & (fate < 0.9)
        masked[places[replaced]] = self.choices[(other[replaced] * len(self.choices)).astype(np.int64)]
        return masked, labels


def word_numbers(encoding: Any) -> np.ndarray:
    """The number of each token's word, int64 (B, L), -1 for special tokens and padding.

    Args:
        encoding: what a fast tokenizer of transformers gives for a list of texts, padded to one length.
    Raises:
        ValueError: the tokenizer is a slow one, which does not know words.
    """
    if not encoding.is_fast:
        raise ValueError("encoding: expected one of a fast tokenizer, which knows words, got one of a slow tokenizer")
    rows = [
        # Numbers start again in the second text of a pair.
        [
            -1 if word is None else word + text * SECOND_TEXT
            for word, text in zip(row.word_ids, row.sequence_ids, strict=True)
        ]
        for row in encoding.encodings
    ]
    return np.array(rows, dtype=np.int64)


class BlockMask:
    """BEiT's masking of patches: rectangles of random place, area and shape, until a number of patches is reached.

    A rectangle has between `least` patches and as many as are still missing, and a height / width log-uniform in
    [aspect, 1 / aspect]. One that would hide more patches than are missing, or no new one, is drawn again; after ten
    such draws the mask is left as it is, so it has `count` patches or a few less.

    Args:
        rows, columns: of the grid of patches.
        count: patches to hide; None: 75 of 196, as many of another grid, and at least 1.
        least: patches of a rectangle at least; None: 16 of 196.
        aspect: in (0, 1].
    Raises:
        ValueError: an argument is out of its range; the message names it.
    Source: Bao et al. 2022 (2106.08254), algorithm 1; the numbers are those of BEiT's and FLAVA's code.
    """

    def __init__(
        self, rows: int, columns: int, *, count: int | None = None, least: int | None = None, aspect: float = 0.3
    ) -> None:
        if rows < 1 or columns < 1:
            raise ValueError(f"rows, columns: expected at least 1, got {(rows, columns)}")
        patches = rows * columns
        self.shape = (rows, columns)
        self.count = max(1, round(patches * 75 / 196)) if count is None else count
        self.least = min(self.count, max(1, round(patches * 16 / 196))) if least is None else least
        self.aspect = aspect
        if not 1 <= self.count <= patches:
            raise ValueError(f"count: expected 1 to {patches} patches, got {count}")
        if not 1 <= self.least <= self.count:
            raise ValueError(f"least: expected 1 to count {self.count}, got {least}")
        if not 0 < aspect <= 1:
            raise ValueError(f"aspect: expected a number above 0 and at most 1, got {aspect}")

    def __call__(self, generator: np.random.Generator) -> np.ndarray:
        """bool (rows, columns), True where a patch is hidden."""
        mask = np.zeros(self.shape, dtype=np.bool_)
        failed = 0
        while (missing := self.count - int(mask.sum())) and failed < 10:
            area = generator.uniform(min(self.least, missing), missing)
            widest = abs(float(np.log(self.aspect)))
            shape = np.exp(generator.uniform(-widest, widest))
            height, width = round(float(np.sqrt(area * shape))), round(float(np.sqrt(area / shape)))
            failed += 1
            if not (1 <= height <= self.shape[0] and 1 <= width <= self.shape[1]):
                continue
            top = int(generator.integers(self.shape[0] - height, endpoint=True))
            left = int(generator.integers(self.shape[1] - width, endpoint=True))
            block = mask[top : top + height, left : left + width]
            if 0 < int((~block).sum()) <= missing:
                block[:] = True
                failed = 0
        return mask
