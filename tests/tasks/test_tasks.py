"""What all tasks share: the registry, what a model must have, blind datasets, the function for a trainer."""

from typing import Any

import pytest
import torch
from toys import write_records

from vlmfast.data import Sample
from vlmfast.tasks import TASKS, default_task, evaluator, task_class
from vlmfast.tasks.batches import Blind


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_named_by_its_file_and_says_what_it_needs(name: str) -> None:
    task = task_class(name)()
    assert task.name == name
    with pytest.raises(TypeError, match=rf"task {name}: expected a model with .*; Linear lacks {task.methods[0][0]}"):
        task.evaluate(torch.nn.Linear(1, 1), "nowhere", None, None)


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"task: expected one of retrieval, .*; got 'sorting'"):
        task_class("sorting")
    with pytest.raises(ValueError, match="Linear names none of its own"):
        default_task(torch.nn.Linear)


def test_the_samples_of_a_trainer_s_scores_are_opened_at_once_and_once(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluator("retrieval", str(tmp_path / "nowhere.tar"), None, None)
    source = write_records(tmp_path / "a.tar", ("red", {"caption": "red"}), ("blue", {"label": 1}))
    task = task_class("retrieval")()
    opened = task.open(source)
    assert task.open(opened) is opened
    assert [opened[0] is None, opened[1] is None] == [False, True]  # the second has no caption


def test_a_trainer_gets_scores_by_name(model: Any, colours: Any, tokenizer: Any, tmp_path: Any) -> None:
    score = evaluator("retrieval", str(tmp_path / "pairs-000.tar"), tokenizer, None, batch_size=4)
    assert score(model) == {
        "image_to_text_R@1": 1.0,
        "image_to_text_R@5": 1.0,
        "text_to_image_R@1": 1.0,
        "text_to_image_R@5": 1.0,
        "zero_shot_top-1": 1.0,
    }
    with torch.no_grad():
        model.table.zero_()
    assert score(model)["text_to_image_R@1"] == pytest.approx(1 / 6)


class Numbers:
    """Sample i shows i."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Sample:
        return Sample(torch.tensor(index), f"caption {index}", str(index), None)


def test_blind_datasets_show_another_image_and_keep_the_words() -> None:
    kept = [0, 2, 3, 5, 8]
    blind = Blind(Numbers(), kept)
    assert [index for index in range(9) if blind[index] is not None] == kept
    assert [blind[index].caption for index in kept] == [f"caption {index}" for index in kept]
    shown = [int(blind[index].image) for index in kept]
    assert sorted(shown) == kept
    assert all(image != index for image, index in zip(shown, kept, strict=True))
    assert shown == [int(Blind(Numbers(), kept)[index].image) for index in kept]
    assert shown != [int(Blind(Numbers(), kept, seed=1)[index].image) for index in kept]
