"""Answers to questions: the normalisation and the accuracy of the VQA challenge.

Source: Antol et al. 2015 (1505.00468) and the challenge's evaluation code, whose normalisation is repeated here but for
two things. It is always applied, where the challenge leaves answers alone when all people agree. And the contractions
are those that the code lists, not one more by its slips, such as "somebody'd" without its apostrophe.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence

MARKS = ';/[]"{}()=+\\_-><@`,?!'
NAMES = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(value) for value, word in enumerate(NAMES.split())}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
FULL = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't must've needn't
not've o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've somebody's someone's something's that's
there'd there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
NOT_CONTRACTED = {"lets"}  # a word of its own, which the code leaves alone too


def _contractions() -> dict[str, str]:
    """'couldntve', "couldn'tve" and "couldnt've" -> "couldn't've"."""
    found = {}
    for word in FULL.split():
        parts = word.split("'")
        for marks in itertools.product(("", "'"), repeat=len(parts) - 1):
            found["".join(map("".join, zip(parts, (*marks, ""), strict=True)))] = word
    return {short: word for short, word in found.items() if short not in NOT_CONTRACTED}


CONTRACTIONS = _contractions()


def normalise(answer: str) -> str:
    """Lower case, without punctuation and articles, numbers up to ten as digits, contractions with their apostrophe.

    A mark between two words becomes a space, beside a space nothing; commas within a number are left out. A full stop
    stays only before a digit.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", answer)
    text = answer
    for mark in MARKS:
        apart = thousands or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if apart else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, truth: Sequence[str]) -> float:
    """The challenge's accuracy of an answer to which several people gave theirs, all of them normalised.

    Averaged over the people, each left out once: min(1, how many of the others gave this answer / 3). With ten people
    an answer of one is worth 0.3, of two 0.6, of three 0.9 and of four 1. With fewer than four, all the others take the
    place of three; with one person it is 1 for the same answer and else 0.

    Raises:
        ValueError: there is no answer to compare with.
    """
    if not truth:
        raise ValueError("truth: expected at least one answer, got none")
    count, others = truth.count(answer), len(truth) - 1
    if others == 0:
        return float(count)
    needed = min(3, others)
    left_out = count * min(1.0, (count - 1) / needed) + (len(truth) - count) * min(1.0, count / needed)
    return left_out / len(truth)


def most_frequent(answers: Sequence[Sequence[str]]) -> list[str]:
    """The answers that are most people's for some question, the most frequent first, then in alphabetical order."""
    best = Counter(_first(Counter(several)) for several in answers)
    return sorted(best, key=lambda answer: (-best[answer], answer))


def _first(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))
