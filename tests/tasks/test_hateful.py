import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toys import fit, joint_model, word_tokenizer, write_records

from vlmfast.tasks.hateful import Hateful, scores_of
from vlmfast.tasks.heads import TaskModel

PAIRS = [(image, text) for image in ("red", "blue", "green") for text in ("red", "blue", "green")]


def write(path: Path) -> str:
    """Label 1 where the text names the image's colour; each text and each image twice with 1, twice with 0."""
    samples: list[tuple[str, dict[str, Any]]] = []
    for image, text in PAIRS:
        samples += [(image, {"text": f"this is {text}", "label": int(image == text)})] * (2 if image == text else 1)
    samples[3:3] = [("x", {"text": "this is red", "label": 1}), ("red", {"text": "this is red"})]
    return write_records(path, *samples)


def test_a_head_with_eyes_is_right_and_one_without_is_at_chance(tmp_path: Path) -> None:
    source, task = write(tmp_path / "data.tar"), Hateful()
    rows = {}
    for eyes in (True, False):
        torch.manual_seed(0)
        made = task.trainable(joint_model(eyes), source, word_tokenizer(), None)
        fit(made)
        scores = task.evaluate(made.model, source, word_tokenizer(), None, batch_size=4)
        rows[eyes] = scores.rows
        if eyes:
            made.model.save_pretrained(tmp_path / "run")
            loaded = TaskModel.from_pretrained(tmp_path / "run")
            again = task.evaluate(loaded, source, word_tokenizer(), None, batch_size=4)
            assert again.rows == scores.rows
            assert scores.skipped == {"corrupt image": 1, "missing label": 1}
            scores.report(tmp_path / "report.png")
            assert Image.open(tmp_path / "report.png").width > 1000
            assert json.loads(json.dumps(scores.to_dict()))["labels"] == {"0": 6, "1": 6}
    assert rows[True]["model"] == {"AUROC": 1.0, "accuracy": 1.0}
    assert rows[True]["blind"]["AUROC"] < 0.8
    # Every text stands as often with 1 as with 0: without eyes all scores are those of the text alone.
    assert rows[False]["model"] == rows[False]["blind"]
    assert rows[False]["model"]["AUROC"] == 0.5
    assert rows[False]["majority"] == {"AUROC": 0.5, "accuracy": 0.5}


def test_scores_of_a_worked_example() -> None:
    """Of four pairs of a 1 and a 0, three are in order; three of four are on the right side of one half."""
    found = scores_of(torch.tensor([0.9, 0.4, 0.3, 0.45]), torch.tensor([1, 1, 0, 0]))
    assert found == {"AUROC": 0.75, "accuracy": 0.75}
    with pytest.raises(ValueError, match=r"label: expected samples with 0 and with 1, got \[1\] alone"):
        scores_of(torch.tensor([0.9]), torch.tensor([1]))


def test_other_labels_and_models_without_a_head_are_refused(tmp_path: Path) -> None:
    source = write_records(tmp_path / "data.tar", ("red", {"text": "red", "label": 2}))
    made = Hateful().trainable(joint_model(True), source, word_tokenizer(), None)
    with pytest.raises(ValueError, match="label: expected 0 or 1, got 2 of sample '000'"):
        made.collator([made.dataset[0]])
    with pytest.raises(TypeError, match="Jointly lacks logits; `vlmfast train MODEL --task hateful` makes"):
        Hateful().evaluate(joint_model(True), source, word_tokenizer(), None)
