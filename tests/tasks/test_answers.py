import pytest

from vlmfast.tasks.answers import accuracy, most_frequent, normalise


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Red  Sign.", "red sign"),
        ("two", "2"),
        ("None", "0"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("black/white", "black white"),
        ("yes, it is!", "yes it is"),
        ("x-ray", "x ray"),
        ("left - right", "left right"),
        ("dont", "don't"),
        ("couldntve", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("a cat\nand\ta dog", "cat and dog"),
        ("lets", "lets"),
        ("an", ""),
    ],
)
def test_normalisation(answer: str, expected: str) -> None:
    assert normalise(answer) == expected


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_of_ten_people(count: int, expected: float) -> None:
    assert accuracy("yes", ["yes"] * count + ["no"] * (10 - count)) == pytest.approx(expected)


def test_accuracy_of_fewer() -> None:
    assert (accuracy("yes", ["yes"]), accuracy("yes", ["no"])) == (1, 0)
    # Two people: against the other one, who said it for one of the two.
    assert accuracy("yes", ["yes", "no"]) == 0.5
    assert accuracy("yes", ["yes"] * 2) == 1
    # Three: 1 of 2 others, 1 of 2, 2 of 2.
    assert accuracy("yes", ["yes", "yes", "no"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="truth: expected at least one answer"):
        accuracy("yes", [])


def test_the_most_frequent_answer_is_that_of_most_questions() -> None:
    assert most_frequent([["a", "a", "z"], ["b"], ["b", "a"], ["c", "c"]]) == ["a", "b", "c"]
    assert most_frequent([["z"], ["z"], ["a"]]) == ["z", "a"]
