"""Easy data augmentation of captions (EDA): another text view of the same image, for DeCLIP."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np

OPERATIONS = ("replace", "insert", "swap", "delete")


def read_synonyms(path: str | PathLike[str]) -> dict[str, list[str]]:
    """The synonyms of a JSON file, {"car": ["automobile", "auto"], ...}, for `EDA`.

    Raises:
        ValueError: the file holds something else, or no word; the message names it.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"synonyms: expected a JSON file of words and their synonyms, {path} is none") from error
    fits = isinstance(found, dict) and all(
        isinstance(others, list) and others and all(isinstance(other, str) for other in others)
        for others in found.values()
    )
    if not fits or not found:
        raise ValueError(f"synonyms: expected words and a list of strings for each in {path}, got something else")
    return found


class EDA:
    """One random operation on the words of a caption; randomness comes from the generator that is passed in.

    With n = max(1, round(alpha * words)):

    - replace: n words that have synonyms become one of them;
    - insert: n times, a synonym of a random word, or the word itself where it has none, goes to a random place;
    - swap: n times, two words change places;
    - delete: each word goes with probability alpha; one always stays.

    Departures: the paper reads synonyms from WordNet, which is not bundled, and spares stop words; here `synonyms`
    decides both, for a word that it lacks is not replaced. DeCLIP's released code draws from replace, swap and delete;
    so does this class by default, without replace where no synonyms are given.

    Args:
        alpha: share of the words that change, in (0, 1].
        synonyms: lower-case word to its synonyms.
        operations: any of "replace", "insert", "swap" and "delete", one of which is drawn for each caption.
    Raises:
        ValueError: alpha is out of range; operations is empty, names another or asks for "replace" without synonyms;
            a word's list of synonyms is empty.
    Source: Wei and Zou 2019 (1901.11196), section 2.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        *,
        synonyms: Mapping[str, Sequence[str]] | None = None,
        operations: Sequence[str] | None = None,
    ) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha: expected a share in (0, 1], got {alpha}")
        if operations is None:
            operations = ("replace", "swap", "delete") if synonyms else ("swap", "delete")
        if not operations or not set(operations) <= set(OPERATIONS):
            raise ValueError(f"operations: expected some of {', '.join(OPERATIONS)}, got {operations!r}")
        if "replace" in operations and not synonyms:
            raise ValueError("operations: 'replace' needs synonyms, got none")
        if empty := [word for word, others in (synonyms or {}).items() if not others]:
            raise ValueError(f"synonyms: expected at least one for each word, got none for {empty[0]!r}")
        self.alpha = alpha
        self.synonyms = {word.lower(): list(others) for word, others in (synonyms or {}).items()}
        self.operations = tuple(operations)

    def __call__(self, caption: str, generator: np.random.Generator) -> str:
        """The caption's words after one operation, joined by single spaces."""
        words = caption.split()
        if not words:
            return ""
        operation = self.operations[int(generator.integers(len(self.operations)))]
        times = max(1, round(self.alpha * len(words)))
        if operation == "delete":
            return " ".join(self._delete(words, generator))
        if operation == "replace":
            known = [place for place, word in enumerate(words) if word.lower() in self.synonyms]
            for place in generator.permutation(known)[:times]:
                words[place] = self._synonym(words[place], generator)
            return " ".join(words)
        for _ in range(times):
            if operation == "insert":
                word = words[int(generator.integers(len(words)))]
                words.insert(int(generator.integers(len(words) + 1)), self._synonym(word, generator))
            elif len(words) > 1:
                i, j = generator.choice(len(words), 2, replace=False)
                words[i], words[j] = words[j], words[i]
        return " ".join(words)

    def _delete(self, words: list[str], generator: np.random.Generator) -> list[str]:
        draws = generator.random(len(words))
        return [word for word, draw in zip(words, draws, strict=True) if draw >= self.alpha or draw == draws.max()]

    def _synonym(self, word: str, generator: np.random.Generator) -> str:
        others = self.synonyms.get(word.lower(), [word])
        return others[int(generator.integers(len(others)))]
