import copy
import dataclasses
import json
from typing import Any

import pytest
import torch

from vlmfast.data import Collator
from vlmfast.tasks.retrieval import Retrieval, RetrievalOptions, evaluate

TEMPLATES = ["{}", "a {}"]


def test_a_model_that_knows_the_colours(model: Any, colours: Any, tokenizer: Any) -> None:
    evaluation = evaluate(model, colours, Collator(tokenizer, max_length=4), templates=TEMPLATES, batch_size=4)
    for direction in (evaluation.image_to_text, evaluation.text_to_image):
        assert direction.recall == {1: 1.0, 5: 1.0}  # no R@10 among six pairs
        assert direction.chance == pytest.approx({1: 1 / 6, 5: 5 / 6})
        assert direction.median_rank == 1
    assert evaluation.zero_shot is not None
    assert evaluation.zero_shot.classes == ("cold", "warm")
    assert evaluation.zero_shot.accuracy == {1: 1.0}
    assert evaluation.zero_shot.chance == {1: 0.5}


def test_a_model_that_confuses_two_colours(model: Any, colours: Any, tokenizer: Any) -> None:
    red, blue = tokenizer.convert_tokens_to_ids(["red", "blue"])
    with torch.no_grad():
        model.table[[red, blue]] = model.table[[blue, red]]
    evaluation = evaluate(model, colours, Collator(tokenizer, max_length=4), templates=TEMPLATES)
    assert evaluation.image_to_text.recall[1] == evaluation.text_to_image.recall[1] == pytest.approx(4 / 6)
    assert evaluation.zero_shot is not None  # "warm" and "cold" are as they were
    assert evaluation.zero_shot.accuracy == {1: 1.0}


def test_repeated_captions_under_both_protocols(model: Any, write_pairs: Any, tokenizer: Any) -> None:
    dataset = write_pairs(("blue", "blue"), ("red", "red"), ("red", "red"), ("green", "green"))
    caption = evaluate(model, dataset, Collator(tokenizer, max_length=4), positives="caption")
    single = evaluate(model, dataset, Collator(tokenizer, max_length=4), positives="pair")
    assert caption.text_to_image.recall == caption.image_to_text.recall == {1: 1.0}
    assert single.text_to_image.recall == single.image_to_text.recall == {1: 0.75}  # the second red ties with the first
    assert caption.text_to_image.chance[1] == pytest.approx((1 / 4 + 2 / 4 + 2 / 4 + 1 / 4) / 4)
    assert single.text_to_image.chance[1] == 0.25
    with pytest.raises(ValueError, match="positives: expected 'caption' or 'pair', got 'image'"):
        evaluate(model, dataset, Collator(tokenizer, max_length=4), positives="image")  # type: ignore[arg-type]


def test_no_zero_shot_without_two_categories(model: Any, write_pairs: Any, tokenizer: Any) -> None:
    evaluation = evaluate(model, write_pairs(("red", "red"), ("orange", "orange")), Collator(tokenizer, max_length=4))
    assert evaluation.zero_shot is None
    assert evaluation.to_dict()["zero_shot"] is None
    assert "zero-shot" not in evaluation.table()


def test_samples_without_a_category_are_left_out_of_the_classification(
    model: Any, write_pairs: Any, tokenizer: Any
) -> None:
    # The pair without a category stands in front, so that a mix-up of rows shows.
    dataset = write_pairs(("red", "red"), ("red", "orange"), ("blue", "blue"), uncategorised=1)
    evaluation = evaluate(model, dataset, Collator(tokenizer, max_length=4))
    assert evaluation.zero_shot is not None
    assert evaluation.zero_shot.num_images == 2
    assert evaluation.zero_shot.per_class == {"cold": 1.0, "warm": 1.0}
    assert evaluation.image_to_text.num_queries == 3


def test_the_record_is_json_with_what_reproduces_it(model: Any, colours: Any, tokenizer: Any) -> None:
    evaluation = evaluate(
        model, colours, Collator(tokenizer, max_length=4), batch_size=3, templates=TEMPLATES, autocast=torch.bfloat16
    )
    record = json.loads(json.dumps(evaluation.to_dict()))
    assert record["num_pairs"] == record["num_distinct_captions"] == 6
    assert record["skipped"] == {"corrupt image": 1, "empty caption": 2}
    assert record["image_to_text"]["R@1"] == 1.0
    assert record["image_to_text"]["chance"]["R@1"] == pytest.approx(1 / 6)
    assert record["text_to_image"]["median_rank"] == 1
    zero_shot = record["zero_shot"]
    assert (zero_shot["top-1"], zero_shot["num_classes"], zero_shot["chance"], zero_shot["majority_class"]) == (
        1.0,
        2,
        {"top-1": 0.5},
        0.5,
    )
    assert zero_shot["confusion"] == [[3, 0], [0, 3]]
    assert record["versions"]["torch"] == torch.__version__
    arguments = record["arguments"]
    assert arguments == {
        "max_length": 4,
        "batch_size": 3,
        "device": "cpu",
        "autocast": "torch.bfloat16",
        "templates": TEMPLATES,
        "positives": "caption",
    }
    arguments["autocast"] = getattr(torch, arguments["autocast"].removeprefix("torch."))
    again = evaluate(model, colours, Collator(tokenizer, max_length=arguments.pop("max_length")), **arguments)
    assert again.to_dict() == evaluation.to_dict()


def test_table(model: Any, colours: Any, tokenizer: Any) -> None:
    evaluation = evaluate(model, colours, Collator(tokenizer, max_length=4))
    assert evaluation.zero_shot is not None
    zero_shot = dataclasses.replace(
        evaluation.zero_shot, accuracy={1: 0.5, 5: 0.987}, chance={1: 0.1, 5: 0.5}, majority=0.25, mean_per_class=0.456
    )
    recall = dataclasses.replace(evaluation.image_to_text, recall={1: 0.05, 5: 0.333}, median_rank=7.5)
    assert dataclasses.replace(evaluation, image_to_text=recall, zero_shot=zero_shot).table() == (
        "retrieval         R@1     R@5  median rank\n"
        "image -> text    5.0%   33.3%          7.5\n"
        "text -> image  100.0%  100.0%            1\n"
        "chance          16.7%   83.3%\n"
        "\n"
        "zero-shot       top-1  top-5  mean per class\n"
        "image -> class  50.0%  98.7%           45.6%\n"
        "chance          10.0%  50.0%           10.0%\n"
        "majority class  25.0%                  10.0%\n"
        "\n"
        "6 pairs, 6 distinct captions; 6 images in 2 classes; skipped: 1 corrupt image, 2 empty caption"
    )


def test_a_bad_template_is_reported_before_the_work(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="templates"):
        evaluate(model, None, Collator(tokenizer, max_length=4), templates=["a photo"])


def test_by_matching_alone_a_gallery_is_drawn(
    model: Any, matching_of: Any, colours: Any, tokenizer: Any, tmp_path: Any
) -> None:
    source = str(tmp_path / "pairs-000.tar")
    red, blue = tokenizer.convert_tokens_to_ids(["red", "blue"])
    with torch.no_grad():
        model.table[[red, blue]] = model.table[[blue, red]]
    matching = matching_of(model)
    scores = Retrieval().evaluate(matching, source, tokenizer, None, batch_size=4)
    by_features = Retrieval().evaluate(model, source, tokenizer, None)
    assert scores.metrics == {
        name: value for name, value in by_features.metrics.items() if not name.startswith("zero_shot")
    }
    assert scores.image_to_text.median_rank == by_features.image_to_text.median_rank
    assert max(matching.rows) == 4  # six captions to an image, four pairs at a time
    assert scores.to_dict()["num_pairs"] == scores.to_dict()["arguments"]["gallery"] == 6
    assert scores.to_dict()["skipped"] == {"corrupt image": 1, "empty caption": 2}
    scores.report(tmp_path / "report.png")
    few = Retrieval(RetrievalOptions(gallery=5)).evaluate(matching, source, tokenizer, None)
    assert 1 <= few.to_dict()["num_pairs"] < 6


def test_ranking_again_mends_what_is_among_the_nearest(
    model: Any, matching_of: Any, colours: Any, tokenizer: Any, tmp_path: Any
) -> None:
    """Features take red for orange and blue for red, matching knows all of them."""
    source = str(tmp_path / "pairs-000.tar")
    model.match_scores = matching_of(copy.deepcopy(model)).match_scores
    red, orange = tokenizer.convert_tokens_to_ids(["red", "orange"])
    with torch.no_grad():
        model.table[[red, orange]] = model.table[[orange, red]]
    plain = Retrieval().evaluate(model, source, tokenizer, None)
    assert plain.metrics["image_to_text_R@1"] == pytest.approx(4 / 6)
    again = Retrieval(RetrievalOptions(rerank=2)).evaluate(model, source, tokenizer, None)
    assert again.metrics["image_to_text_R@1"] == again.metrics["text_to_image_R@1"] == 1.0
    assert again.zero_shot is not None
    # One candidate has nothing to be ranked against.
    one = Retrieval(RetrievalOptions(rerank=1)).evaluate(model, source, tokenizer, None)
    assert one.metrics["image_to_text_R@1"] == pytest.approx(4 / 6)
    del model.match_scores
    with pytest.raises(TypeError, match="--rerank: expected a model with match_scores; ColourModel lacks it"):
        Retrieval(RetrievalOptions(rerank=2)).evaluate(model, source, tokenizer, None)
