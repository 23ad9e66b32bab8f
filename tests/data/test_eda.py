import json
import pickle
from collections import Counter

import numpy as np
import pytest

from vlmfast.data import EDA, read_synonyms

CAPTION = "a small red fox jumps over the lazy dog today"
SYNONYMS = {"small": ["little", "tiny"], "Dog": ["hound"]}


def draws(augment, caption=CAPTION, number=400):
    return [augment(caption, np.random.default_rng(seed)) for seed in range(number)]


def test_a_caption_depends_on_the_generator_only():
    augment = pickle.loads(pickle.dumps(EDA(0.3, synonyms=SYNONYMS)))
    first = draws(augment, number=20)
    np.random.seed(3)
    assert draws(augment, number=20) == first
    assert len(set(first)) > 10


def test_swap_keeps_the_words_and_moves_two():
    words = CAPTION.split()
    for text in draws(EDA(operations=["swap"])):
        assert sorted(text.split()) == sorted(words)
        assert sum(a != b for a, b in zip(text.split(), words, strict=True)) == 2
    moved = Counter(k for text in draws(EDA(operations=["swap"])) for k in range(10) if text.split()[k] != words[k])
    assert set(moved) == set(range(10))


def test_delete_takes_each_word_with_probability_alpha_and_keeps_the_order():
    texts = draws(EDA(0.3, operations=["delete"]), number=2000)
    words = CAPTION.split()
    for text in texts:
        kept = iter(words)
        assert all(word in kept for word in text.split())
    for word in words:
        share = sum(word not in text.split() for text in texts) / len(texts)
        assert abs(share - 0.3) < 5 * np.sqrt(0.3 * 0.7 / len(texts))


def test_delete_leaves_one_word_at_random():
    assert Counter(draws(EDA(1.0, operations=["delete"]), "a b", 100)).keys() == {"a", "b"}


def test_replace_changes_as_many_known_words_as_asked():
    one = draws(EDA(0.1, synonyms=SYNONYMS, operations=["replace"]))
    changes = (("small", "little"), ("small", "tiny"), ("dog", "hound"))
    assert set(one) == {CAPTION.replace(*change) for change in changes}
    both = draws(EDA(0.2, synonyms=SYNONYMS, operations=["replace"]))
    assert set(both) == {CAPTION.replace("small", word).replace("dog", "hound") for word in ("little", "tiny")}
    assert EDA(synonyms=SYNONYMS, operations=["replace"])("no such word", np.random.default_rng(0)) == "no such word"


def test_insert_adds_a_synonym_or_the_word_itself():
    words = CAPTION.split()
    for text in draws(EDA(0.2, synonyms=SYNONYMS, operations=["insert"])):
        added = Counter(text.split()) - Counter(words)
        assert added.total() == 2
        assert set(added) <= {*words, "little", "tiny", "hound"} - {"small", "dog"}
        kept = iter(text.split())
        assert all(word in kept for word in words)


def test_operations_are_drawn_evenly_and_default_to_those_of_declip():
    assert EDA().operations == ("swap", "delete")
    augment = EDA(0.1, synonyms={word: ["X"] for word in CAPTION.split()})
    assert augment.operations == ("replace", "swap", "delete")
    texts = draws(augment, number=900)
    replaced = sum("X" in text for text in texts)
    swapped = sum(sorted(text.split()) == sorted(CAPTION.split()) and text != CAPTION for text in texts)
    for count in (replaced, swapped):
        assert abs(count - 300) < 5 * np.sqrt(900 * 2 / 9)


@pytest.mark.parametrize("operation", ["swap", "delete", "insert", "replace"])
@pytest.mark.parametrize("caption", ["", "   ", "one", "one  two"])
def test_short_captions_are_left_with_words(operation, caption):
    for text in draws(EDA(1.0, synonyms={"one": ["uno"]}, operations=[operation]), caption, 20):
        assert bool(text) == bool(caption.strip())
        assert text == " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0}, "alpha: expected a share in .0, 1., got 0"),
        ({"operations": []}, "operations: expected some of replace, insert, swap, delete, got "),
        ({"operations": ["swap", "fly"]}, "operations: expected some of .* got .*fly"),
        ({"operations": ["replace"]}, "operations: 'replace' needs synonyms, got none"),
        ({"synonyms": {"red": []}}, "synonyms: expected at least one for each word, got none for 'red'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        EDA(**arguments)


def test_synonyms_of_a_file(tmp_path):
    path = tmp_path / "synonyms.json"
    path.write_text(json.dumps(SYNONYMS))
    assert read_synonyms(path) == SYNONYMS
    assert draws(EDA(synonyms=read_synonyms(str(path)))) == draws(EDA(synonyms=SYNONYMS))
    with pytest.raises(FileNotFoundError):
        read_synonyms(tmp_path / "nowhere.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"a": "b"}', '{"a": []}', '{"a": [1]}'])
def test_a_file_of_something_else_is_named(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"synonyms: expected .*other\.json"):
        read_synonyms(tmp_path / "other.json")
