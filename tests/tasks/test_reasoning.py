import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toys import COLOURS, WORDS, Toy, fit, joint_model, word_tokenizer, write_records

from vlmfast.cli import main
from vlmfast.tasks.reasoning import Reasoning

THREE = ("red", "green", "blue")


class Matcher(Toy):
    """A caption belongs to an image if its last colour is the one that it sees."""

    def match_scores(self, pixel_values: Any, input_ids: Any, attention_mask: Any) -> torch.Tensor:
        last = [[WORDS[token] for token in row if WORDS[token] in COLOURS][-1] for row in input_ids.tolist()]
        return torch.tensor([float(a == b) for a, b in zip(self.names(pixel_values), last, strict=True)])


def record(colour: str, turn: int) -> dict[str, Any]:
    """Two or three answers and three rationales, the right one in another place each time."""
    answers = [name for name in THREE if name != colour][: 1 + turn % 2]
    answers.insert(turn % 2, colour)
    reasons = list(THREE[turn % 3 :] + THREE[: turn % 3])
    return {
        "question": "what colour is this ?",
        "choices": answers,
        "answer_index": answers.index(colour),
        "rationale_choices": [f"this is a {name} sign" for name in reasons],
        "rationale_index": reasons.index(colour),
    }


def write(path: Path, even: bool = False) -> str:
    samples = [(colour, record(colour, 1 if even else turn)) for turn, colour in enumerate(THREE * 2)]
    samples[2:2] = [("x", record("red", 0)), ("red", {"question": "what colour is this ?"})]
    return write_records(path, *samples)


def test_by_match_scores(tmp_path: Path) -> None:
    source, task = write(tmp_path / "data.tar"), Reasoning()
    right = task.evaluate(Matcher(), source, word_tokenizer(), None, batch_size=9)
    wrong = task.evaluate(Matcher(eyes=False), source, word_tokenizer(), None)
    assert right.skipped == {"corrupt image": 1, "missing choices": 1}
    assert right.rows["model"] == {"answer": 1.0, "rationale": 1.0, "both": 1.0}
    assert right.rows["blind"]["both"] < 0.6
    # Always red where it is offered, else the first: right of the two red images' rationales, and of no other.
    assert wrong.rows["model"] == wrong.rows["blind"]
    assert wrong.rows["model"]["rationale"] == pytest.approx(2 / 6)
    # Two answers half of the time and three the other half.
    chance = {"answer": (1 / 2 + 1 / 3) / 2, "rationale": 1 / 3, "both": (1 / 2 + 1 / 3) / 2 / 3}
    assert right.rows["chance"] == pytest.approx(chance)
    assert set(right.rows["majority"].values()) != {1.0}
    assert right.details["form"] == "match_scores"
    json.dumps(right.to_dict())
    wrong.report(tmp_path / "report.png")
    assert Image.open(tmp_path / "report.png").width > 1000


def test_both_counts_what_is_right_in_both(tmp_path: Path) -> None:
    """Answers ranked by what is seen, rationales against it: nothing is right in both."""

    class Contrary(Matcher):
        def match_scores(self, pixel_values: Any, input_ids: Any, attention_mask: Any) -> torch.Tensor:
            scores = super().match_scores(pixel_values, input_ids, attention_mask)
            return torch.where((input_ids == WORDS.index("sign")).any(dim=1), -scores, scores)

    source = write(tmp_path / "data.tar")
    rows = Reasoning().evaluate(Contrary(), source, word_tokenizer(), None).rows
    assert rows["model"] == {"answer": 1.0, "rationale": 0.0, "both": 0.0}


def test_a_head_learns_both(tmp_path: Path) -> None:
    source, task = write(tmp_path / "data.tar", even=True), Reasoning()
    rows = {}
    for eyes in (True, False):
        torch.manual_seed(0)
        made = task.trainable(joint_model(eyes), source, word_tokenizer(), None)
        assert len(made.dataset) == 16
        fit(made)
        rows[eyes] = task.evaluate(made.model, source, word_tokenizer(), None).rows
    assert rows[True]["model"] == {"answer": 1.0, "rationale": 1.0, "both": 1.0}
    assert rows[False]["model"] == rows[False]["blind"]
    # All three colours are always offered. Rationales come with the right answer, so that words alone tell them.
    assert rows[False]["model"]["answer"] == pytest.approx(1 / 3)


def test_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write(tmp_path / "data.tar", even=True), tmp_path / "run"
    run = ["train", "visual_bert", "--task=reasoning", f"--data={data}", f"--output-dir={out}", "--max-steps=2"]
    small = ["--text-width=64", "--text-layers=1", "--tower-width=16", "--image-size=32", "--grid=2"]
    batches = ["--per-device-train-batch-size=2", "--dataloader-num-workers=0", "--use-cpu", "--disable-tqdm=true"]
    assert main([*run, *small, *batches]) == 0
    scores = tmp_path / "scores.json"
    assert main(["eval", f"--checkpoint={out}", f"--data={data}", "--num-workers=0", f"--output={scores}"]) == 0
    assert {"answer", "rationale", "both"} == set(json.loads(scores.read_text())["scores"]["model"])
    # The data decide the course of a run, also behind a task's own samples.
    write(tmp_path / "data.tar")
    assert main([*run, *small, *batches, "--resume"]) == 1
    assert "fingerprint was" in capsys.readouterr().err


def test_batches_of_the_head(tmp_path: Path) -> None:
    made = Reasoning().trainable(joint_model(True), write(tmp_path / "data.tar", even=True), word_tokenizer(), None)
    batch = made.collator(made.dataset.__getitems__([(0, 0), (0, 1)]))
    assert batch["input_ids"].shape[0] == len(batch["pixel_values"]) == 6
    assert batch["labels"].tolist() == [1, 2]
    uneven = Reasoning().trainable(joint_model(True), write(tmp_path / "uneven.tar"), word_tokenizer(), None)
    with pytest.raises(ValueError, match=r"choices: expected the same number for every question, got \[2, 3\]"):
        uneven.collator(uneven.dataset.__getitems__([0, 2]))


def test_a_place_that_there_is_not_is_an_error(tmp_path: Path) -> None:
    bad = {**record("red", 0), "answer_index": 3}
    source = write_records(tmp_path / "data.tar", ("red", bad))
    with pytest.raises(ValueError, match="answer_index: expected 0 to 1, got 3"):
        Reasoning().evaluate(Matcher(), source, word_tokenizer(), None)
