from typing import Any

import pytest
import torch
from torch.nn import functional as F

from vlmfast.tasks.zero_shot import ZeroShotClassification, class_embeddings, classify, prompts

# Class 0's prompts agree; class 1's are orthogonal, so that their mean has norm 0.71.
PROMPTS = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
IMAGE = F.normalize(torch.tensor([[0.6, 0.5, 0.5]]), dim=1)


def test_the_mean_is_normalised_again() -> None:
    classes = class_embeddings(PROMPTS, 2)
    torch.testing.assert_close(classes, torch.tensor([[1, 0, 0], [0, 0.5**0.5, 0.5**0.5]]))
    # By the plain mean this image would be of class 0: 0.6 against 0.5. By cosine it is of class 1: 0.6 against 0.71.
    assert (IMAGE @ PROMPTS.view(2, 2, 3).mean(dim=1).T).argmax() == 0
    assert classify(IMAGE, torch.tensor([1]), classes, ["a", "b"]).accuracy == {1: 1.0}


def test_every_template_has_the_same_weight() -> None:
    torch.testing.assert_close(
        class_embeddings(PROMPTS * torch.tensor([[1.0], [2], [9], [1]]), 2), class_embeddings(PROMPTS, 2)
    )


def test_prompts_run_class_by_class_as_class_embeddings_expects() -> None:
    assert prompts(["cat", "{odd}"], ["{}", "a {}."]) == ["cat", "a cat.", "{odd}", "a {odd}."]


def test_scores_of_a_worked_example() -> None:
    classes = torch.eye(6)
    # Nearest first: image 0: 0, 1, ...; image 1: 5, 0, ...; image 2: 0; image 3: 2, last 1.
    images = torch.tensor(
        [
            [0.9, 0.4, 0.3, 0.2, 0.1, 0.0],
            [0.5, 0.4, 0.3, 0.2, 0.1, 0.9],
            [0.9, 0.4, 0.3, 0.2, 0.1, 0.0],
            [0.5, 0.0, 0.9, 0.3, 0.2, 0.1],
        ]
    )
    scores = classify(images, torch.tensor([0, 0, 0, 1]), classes, list("abcdef"), chunk=2)
    assert scores.accuracy == {1: 0.5, 5: 0.75}
    assert scores.chance == {1: 1 / 6, 5: 5 / 6}
    assert scores.majority == 0.75
    assert scores.per_class == {"a": 2 / 3, "b": 0.0}
    assert scores.mean_per_class == pytest.approx(1 / 3)
    expected = torch.zeros(6, 6, dtype=torch.int64)
    expected[0, 0], expected[0, 5], expected[1, 2] = 2, 1, 1
    assert torch.equal(scores.confusion, expected)
    assert scores.num_images == 4


def test_five_classes_or_fewer_have_no_top_5() -> None:
    assert set(classify(torch.eye(5), torch.arange(5), torch.eye(5), list("abcde")).accuracy) == {1}
    assert set(classify(torch.eye(6), torch.arange(6), torch.eye(6), list("abcdef")).accuracy) == {1, 5}


def test_the_first_of_equally_near_classes_wins() -> None:
    scores = classify(torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(3, 3), list("abc"))
    assert scores.confusion[:2, 0].tolist() == [1, 1]
    assert scores.accuracy == {1: 0.5}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: prompts([], ["{}"]), ValueError, "classes: expected at least one"),
        (lambda: prompts(["a", "b", "a"], ["{}"]), ValueError, r"classes: expected distinct names, got \['a'\]"),
        (lambda: prompts(["a"], []), ValueError, "templates: expected at least one"),
        (
            lambda: prompts(["a"], ["a photo"]),
            ValueError,
            "templates: expected '{}' exactly once .*, got 'a photo'",
        ),
        (lambda: prompts(["a"], ["{} {}"]), ValueError, "templates: expected '{}' exactly once"),
        (lambda: class_embeddings(PROMPTS, 3), ValueError, "prompt_features: expected a multiple of 3 rows, got 4"),
        (lambda: classify(IMAGE[:0], torch.arange(0), PROMPTS, list("abcd")), ValueError, "image_features: expected"),
        (lambda: classify(IMAGE, torch.tensor([4]), PROMPTS, list("abcd")), ValueError, r"labels: .* in \[4, 4\]"),
        (lambda: classify(IMAGE, torch.tensor([-1]), PROMPTS, list("abcd")), ValueError, r"labels: .* in \[-1, -1\]"),
        (lambda: classify(IMAGE, torch.tensor([0, 1]), PROMPTS, list("abcd")), ValueError, r"labels: .* got \(2,\)"),
        (lambda: classify(IMAGE, torch.tensor([0.0]), PROMPTS, list("abcd")), TypeError, "labels: expected int64"),
        (lambda: classify(IMAGE, torch.tensor([0]), PROMPTS, list("abc")), ValueError, "classes: expected 4 names"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_task_by_features_and_by_matching(
    model: Any, matching_of: Any, write_pairs: Any, tokenizer: Any, tmp_path: Any
) -> None:
    colours = ("red", "green", "blue", "orange", "cyan", "blue", "yellow")
    write_pairs(*[(colour, colour) for colour in colours])
    source = str(tmp_path / "pairs-000.tar")
    matching = matching_of(model)
    scores = {
        m: ZeroShotClassification().evaluate(m, source, tokenizer, None, batch_size=36) for m in (model, matching)
    }
    assert scores[model].metrics == scores[matching].metrics == {"zero_shot_top-1": 1.0}
    assert max(matching.rows) == 36  # three images beside two names in six prompts
    record = scores[matching].to_dict()["zero_shot"]
    assert (record["majority_class"], record["confusion"]) == (4 / 7, [[4, 0], [0, 3]])
    assert "majority class   57.1%" in scores[matching].table()

    # A model that takes warm for cold has the features, the order of the samples and the labels to be wrong with.
    warm, cold = tokenizer.convert_tokens_to_ids(["warm", "cold"])
    with torch.no_grad():
        model.table[[warm, cold]] = model.table[[cold, warm]]
    assert ZeroShotClassification().evaluate(model, source, tokenizer, None).metrics == {"zero_shot_top-1": 0.0}
    assert ZeroShotClassification().evaluate(matching, source, tokenizer, None).metrics == {"zero_shot_top-1": 0.0}
    scores[model].report(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_one_category_is_refused(model: Any, write_pairs: Any, tokenizer: Any, tmp_path: Any) -> None:
    write_pairs(("red", "red"), ("orange", "orange"))
    with pytest.raises(ValueError, match=r"two categories or more, got \['warm'\]"):
        ZeroShotClassification().evaluate(model, str(tmp_path / "pairs-000.tar"), tokenizer, None)
