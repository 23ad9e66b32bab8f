import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toys import COLOURS, Toy, ids, word_tokenizer, write_records

from vlmfast.tasks import caption_metrics, captioning
from vlmfast.tasks.caption_metrics import caption_scores, has_java, tokenize
from vlmfast.tasks.captioning import Captioning, CaptioningOptions


class Teller(Toy):
    """Says what it sees, behind whatever it was asked."""

    def generate(self, pixel_values: Any, input_ids: Any, attention_mask: Any, **settings: Any) -> torch.Tensor:
        self.asked = (input_ids, settings)
        return ids(*(f"here is a {name} sign" for name in self.names(pixel_values)))


def caption(colour: str) -> dict[str, Any]:
    return {"caption": f"Here is a {colour} sign.", "captions": [f"Here is a {colour} sign.", f"This is {colour}"]}


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Six colours; among them a broken image and a record without caption, so that a mix-up of rows shows."""
    samples = [(colour, caption(colour)) for colour in COLOURS]
    samples[2:2] = [("no colour", caption("red")), ("red", {"category": "warm"})]
    return write_records(tmp_path / "val.tar", *samples)


def score(model: Toy, source: str, batch_size: int = 2, **options: Any) -> Any:
    task = Captioning(CaptioningOptions(java=False, **options))
    return task.evaluate(model, source, word_tokenizer(), None, batch_size=batch_size)


def test_with_eyes_all_is_right_and_without_it_equals_its_blind_score(source: str) -> None:
    right, wrong = score(Teller(), source), score(Teller(eyes=False), source)
    assert right.num_samples == 6
    assert right.skipped == {"corrupt image": 1, "missing caption": 1}
    best = right.rows["model"]
    assert best["BLEU-4"] == pytest.approx(1)
    assert best["ROUGE-L"] == pytest.approx(1)
    assert best["CIDEr"] > 5 > right.rows["blind"]["CIDEr"]
    assert right.rows["blind"]["BLEU-4"] < 0.5
    assert right.rows["chance"]["BLEU-4"] < 0.5
    assert wrong.rows["model"] == wrong.rows["blind"]
    assert wrong.rows["model"]["CIDEr"] < best["CIDEr"] / 2
    assert right.metrics["CIDEr"] == best["CIDEr"]
    assert right.metrics["CIDEr_blind"] == right.rows["blind"]["CIDEr"]


def test_the_nearest_training_image_has_the_caption_of_its_colour(source: str, tmp_path: Path) -> None:
    # Of red and blue only; the thumbnails of other colours are nearest to one of these.
    train = write_records(tmp_path / "train.tar", ("blue", caption("blue")), ("red", caption("red")))
    val = write_records(tmp_path / "two.tar", ("x", caption("red")), ("red", caption("red")), ("blue", caption("blue")))
    scores = score(Teller(eyes=False), val, train_data=train)
    assert scores.rows["nearest"]["BLEU-4"] == pytest.approx(1)
    assert score(Teller(), source, train_data=train).rows["nearest"]["BLEU-4"] < 0.9


def test_the_prompt_and_the_search_reach_the_model(source: str) -> None:
    model = Teller()
    score(model, source, batch_size=8, prompt="a sign of", beams=3, max_new_tokens=7)
    tokens, settings = model.asked
    assert tokens.tolist() == ids(*["a sign of"] * 6).tolist()
    assert settings == {"num_beams": 3, "max_new_tokens": 7}
    with pytest.raises(ValueError, match="--beams: expected at least 1, got 0"):
        CaptioningOptions(beams=0)


def test_the_record_and_the_picture(source: str, tmp_path: Path) -> None:
    scores = score(Teller(), source)
    record = json.loads(json.dumps(scores.to_dict()))
    assert record["tokenizer"] == "regular expression"
    assert [entry["generated"] for entry in record["captions"]] == [f"here is a {name} sign" for name in COLOURS]
    assert "words by regular expression; 6 samples; skipped: 1 corrupt image, 1 missing caption" in scores.table()
    scores.report(tmp_path / "report.png")
    assert Image.open(tmp_path / "report.png").width > 1000


def test_tokenizer_without_java() -> None:
    texts = ["A dog's bowl, on\nthe flag!", "", "x-ray: 3.5 m -- `so'"]
    assert tokenize(texts, java=False) == ["a dog 's bowl on the flag", "", "x-ray 3.5 m so"]


def test_java_is_used_where_it_is_and_asked_for(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioning, "has_java", lambda: False)
    plain = Captioning().evaluate(Teller(), source, word_tokenizer(), None)
    assert plain.details["tokenizer"] == "regular expression"
    with pytest.raises(ValueError, match="--meteor needs Java"):
        Captioning(CaptioningOptions(meteor=True)).evaluate(Teller(), source, word_tokenizer(), None)
    monkeypatch.undo()
    if not has_java():
        pytest.skip("no Java")
    java = Captioning().evaluate(Teller(), source, word_tokenizer(), None)
    assert java.details["tokenizer"] == "Penn Treebank"
    assert java.rows == plain.rows


@pytest.mark.skipif(not has_java(), reason="no Java")
def test_the_treebank_tokenizer_keeps_every_line() -> None:
    texts = ["", "A dog's bowl, on the U.S. flag.", "\u2028 \x85 ", "", "two cats\rsit", ""]
    expected = ["", "a dog 's bowl on the u.s. flag", "", "", "two cats sit", ""]
    assert tokenize(texts, java=True) == expected
    # The wrapper itself is not run: it writes into the folder of the package.
    assert set(_wrapper().PUNCTUATIONS) == caption_metrics.PUNCTUATION


def _wrapper() -> Any:
    import pycocoevalcap.tokenizer.ptbtokenizer as wrapper

    return wrapper


def test_scores_of_a_worked_example() -> None:
    """By hand: of 'a b c d' against 'a b c e', the longest common subsequence is 3 words of 4."""
    scores, each = caption_scores(["a b c d", "x y z w"], [["a b c e"], ["x y z w"]])
    assert scores["ROUGE-L"] == pytest.approx((0.75 + 1) / 2)
    # 1- to 4-grams: 7 of 8, 5 of 6, 3 of 4, 1 of 2.
    assert scores["BLEU-4"] == pytest.approx((7 / 8 * 5 / 6 * 3 / 4 * 1 / 2) ** 0.25)
    assert each[1] == pytest.approx(10)
    assert scores["CIDEr"] == pytest.approx(sum(each) / 2)
