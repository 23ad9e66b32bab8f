import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toys import COLOURS, WORDS, Jointly, Toy, fit, ids, joint_model, word_tokenizer, write_records

from vlmfast.data import Collator
from vlmfast.tasks import task_class
from vlmfast.tasks.heads import TaskConfig, TaskModel
from vlmfast.tasks.vqa import VQA, VQAOptions

PROMPT = "question : {} answer :"


class Answerer(Toy):
    """Answers the last question of its prompt from what it sees, and goes on with a question of its own."""

    def prompt_collator(self, options: None, tokenizer: Any) -> Any:
        collator = Collator(tokenizer, max_length=64)
        self.prompts: list[str] = []
        self.shown: list[list[torch.Tensor]] = []

        def collate(samples: Any) -> Any:
            self.prompts += [sample.caption for sample in samples]
            self.shown += [sample.images for sample in samples]
            return collator([replace(sample, caption=sample.caption.rpartition("question")[2]) for sample in samples])

        return collate

    def generate(self, pixel_values: Any, input_ids: Any, attention_mask: Any, **settings: Any) -> torch.Tensor:
        said = []
        for colour, row in zip(self.names(pixel_values), input_ids.tolist(), strict=True):
            asked = [WORDS[token] for token in row]
            answer = colour if "what" in asked else "yes" if colour in asked else "no"
            said.append(f"{answer} question : what colour")
        return ids(*said)


def record(colour: str) -> dict[str, Any]:
    answers = [colour] * 8 + ["warm", "cold"]
    return {
        "questions": [
            {"question": "what colour is this ?", "answers": answers, "type": "colour"},
            {"question": "is this red ?", "answers": ["yes" if colour == "red" else "no"], "type": "yes/no"},
            {"question": "not answered"},
        ]
    }


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Two questions about each of six colours, a broken image among them, and one record with a question of its own."""
    samples = [(colour, record(colour)) for colour in COLOURS]
    samples[5:5] = [("no colour", record("red"))]
    samples.append(("blue", {"question": "what colour is this?", "answers": ["Blue."]}))
    return write_records(tmp_path / "val.tar", *samples)


def score(model: Any, source: str, batch_size: int = 3, **options: Any) -> Any:
    task = VQA(VQAOptions(**{"prompt": PROMPT, **options}))
    return task.evaluate(model, source, word_tokenizer(), None, batch_size=batch_size)


def test_with_eyes_all_is_right_and_without_it_equals_its_blind_score(source: str) -> None:
    right, wrong = score(Answerer(), source), score(Answerer(eyes=False), source)
    assert right.num_samples == 13
    assert right.skipped == {"corrupt image": 1, "question without answer": 7}
    assert right.rows["model"] == {"accuracy": 1.0}
    # Always red: right for red twice, and for nobody else; "no" is never said.
    assert wrong.rows["model"] == wrong.rows["blind"] == {"accuracy": pytest.approx(2 / 13)}
    # With another image the colour is wrong but for blue, of which there are two; "no" is right of most.
    assert right.rows["blind"]["accuracy"] < 0.6
    assert right.rows["majority"] == {"accuracy": pytest.approx(5 / 13)}  # "no"
    # Eight answers occur as some question's best: six colours, yes, no. Each question has one of them.
    assert right.rows["chance"] == {"accuracy": pytest.approx(1 / 8)}
    assert right.details["types"]["yes/no"]["majority"] == pytest.approx(5 / 6)
    assert right.details["types"]["colour"] == {
        "count": 6, "model": 1.0, "blind": pytest.approx(right.details["types"]["colour"]["blind"]), "majority": 0.0,
    }  # fmt: skip


def test_the_blind_score_can_be_left_out(source: str) -> None:
    task = VQA(VQAOptions(prompt=PROMPT))
    scores = task.evaluate(Answerer(), source, word_tokenizer(), None, blind=False)
    assert set(scores.rows) == {"model", "majority", "chance"}


def test_examples_in_the_prompt(source: str, tmp_path: Path) -> None:
    train = write_records(tmp_path / "train.tar", ("green", record("green")), ("x", record("red")))
    models = {seed: Answerer() for seed in (0, 0.5, 1)}
    scores = {
        seed: score(model, source, shots=2, shots_seed=int(seed), train_data=train) for seed, model in models.items()
    }
    assert scores[0].rows["model"] == {"accuracy": 1.0}
    model = models[0]
    for prompt, images in zip(model.prompts, model.shown, strict=True):
        *examples, asked = prompt.split("\n")
        assert len(examples) == 2
        for example in examples:  # of green alone: the other image is broken
            assert example in (
                "<image>question : what colour is this ? answer : green",
                "<image>question : is this red ? answer : no",
            )
        assert asked.startswith("<image>question : ")
        assert asked.endswith(" answer :")
        assert [image.shape for image in images] == [(8, 8, 3)] * 3
        assert model.eval().names(torch.stack(images[:2])) == ["green", "green"]
    assert model.prompts == models[0.5].prompts
    assert model.prompts != models[1].prompts
    # What training data alone tell: "green" and "no" to these very questions.
    assert scores[0].rows["question"]["accuracy"] == pytest.approx((1 + 5) / 13)
    with pytest.raises(ValueError, match="--shots 2 needs --train-data"):
        VQAOptions(shots=2)
    with pytest.raises(ValueError, match=r"--prompt: expected '{}' exactly once"):
        VQAOptions(prompt="answer:")


def test_examples_like_the_image_that_is_asked_about(source: str, tmp_path: Path) -> None:
    """The most similar last, one question of each image; of shuffled images for the blind score."""

    class Comparer(Answerer):
        def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return pixel_values.float().mean(dim=(1, 2))[:, None].expand(-1, 4, -1)  # of four patches

    colours = ["yellow", "red", "blue", "green"]
    samples = [(colour, record(colour)) for colour in colours]
    train = write_records(tmp_path / "train.tar", *samples, ("x", record("red")))
    palette = torch.nn.functional.normalize(torch.tensor([COLOURS[name] for name in colours]).float(), dim=1)
    task = VQA(VQAOptions(prompt=PROMPT, shots=2, rices=True, train_data=train))
    for blind in (True, False):
        model = Comparer()
        found = task.evaluate(model, source, word_tokenizer(), None, batch_size=3, blind=blind)
        assert found.rows["model"] == {"accuracy": 1.0}
        assert len(model.shown) == 13
        for images in model.shown:
            *examples, asked = model.eval().names(torch.stack(images))
            nearest = palette @ torch.tensor(COLOURS[asked]).float()
            best = [colours[k] for k in nearest.argsort(descending=True)[:2].tolist()]
            assert examples == best[::-1]
    with pytest.raises(TypeError, match="--rices: expected a model with image_features, Answerer has none"):
        score(Answerer(), source, shots=2, rices=True, train_data=train)
    with pytest.raises(ValueError, match="--rices has no effect without --shots"):
        VQAOptions(rices=True)


def test_a_head_learns_to_choose_is_saved_and_loaded(source: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = VQA(VQAOptions())
    rows = {}
    for eyes in (True, False):
        model = joint_model(eyes)
        before = model.state_dict()["table.weight"].clone()
        made = task.trainable(model, source, word_tokenizer(), None)
        assert torch.equal(model.state_dict()["table.weight"], before)  # a new head leaves the model as it was
        assert made.model.config.outputs == ["no", "blue", "red", "yes", "cyan", "green", "orange", "yellow"]
        fit(made)
        rows[eyes] = task.evaluate(made.model, source, word_tokenizer(), None, batch_size=5).rows
        if eyes:
            made.model.save_pretrained(tmp_path / "run")
    assert rows[True]["model"] == {"accuracy": 1.0}
    assert rows[True]["blind"]["accuracy"] < 0.7
    # Without eyes it knows the questions: "no" to one of them, blue to the other.
    assert rows[False]["model"] == rows[False]["blind"]
    assert rows[False]["model"]["accuracy"] == pytest.approx((5 + 2) / 13)

    loaded = TaskModel.from_pretrained(tmp_path / "run")
    assert isinstance(loaded.model, Jointly)
    assert task.evaluate(loaded, source, word_tokenizer(), None).rows == rows[True]


def test_labels_are_soft_and_the_answers_the_most_frequent(source: str) -> None:
    made = VQA(VQAOptions(num_answers=2)).trainable(joint_model(True), source, word_tokenizer(), None)
    assert made.model.config.outputs == ["no", "blue"]
    batch = made.collator([made.dataset[place] for place in range(4)])
    assert batch["labels"].tolist() == [[0, 0], [0, 0], [0, 0], [1, 0]]
    made = VQA().trainable(joint_model(True), source, word_tokenizer(), None)
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "labels"}
    sample = made.dataset[0]
    answers = replace(sample.record["question"], answers=("red", "red", *["warm"] * 8))
    labels = made.collator([replace(sample, record={"question": answers})])["labels"]
    assert labels[0, made.model.config.outputs.index("red")] == pytest.approx(0.6)


def test_in_training_the_next_question_stands_in_for_a_broken_image(source: str) -> None:
    made = VQA().trainable(joint_model(True), source, word_tokenizer(), None)
    assert made.dataset[10] is None
    assert made.dataset.__getitems__([10]) == [None]
    (stand_in,) = made.dataset.__getitems__([(0, 10)])
    assert stand_in.key == made.dataset[12].key


def test_a_model_that_generates_learns_prompt_and_answer(source: str) -> None:
    made = VQA(VQAOptions(prompt=PROMPT)).trainable(Answerer(), source, word_tokenizer(), None)
    assert isinstance(made.model, Answerer)
    assert made.dataset[0, 0].caption == "question : what colour is this ? answer : red"
    assert made.dataset[0, 0].prompt == "question : what colour is this ? answer :"
    assert made.dataset.__getitems__([(0, 1)])[0].caption == "question : is this red ? answer : yes"
    with pytest.raises(TypeError, match="expected a model with generate and prompt_collator or logits; Toy lacks"):
        VQA().trainable(Toy(), source, word_tokenizer(), None)


def test_the_record_and_the_picture(source: str, tmp_path: Path) -> None:
    scores = score(Answerer(eyes=False), source)
    record = json.loads(json.dumps(scores.to_dict()))
    assert record["form"] == "generated"
    assert record["answers"][1] == {"question": "is this red ?", "answer": "yes", "accuracy": 1.0}
    scores.report(tmp_path / "report.png")
    assert Image.open(tmp_path / "report.png").width > 1000


@pytest.mark.parametrize("answers", ["red", 5, {"red": 3}, []])
def test_answers_that_are_no_list_are_none(answers: Any, tmp_path: Path) -> None:
    """The letters of a word are no answers."""
    unlisted = {"question": "what colour is it?", "answers": answers}
    source = write_records(tmp_path / "val.tar", ("red", unlisted), ("blue", record("blue")))
    scores = score(Answerer(), source)
    assert scores.num_samples == 2
    assert scores.skipped == {"question without answer": 2}
    assert scores.rows["model"] == {"accuracy": 1.0}


def test_a_head_needs_an_image_that_can_be_read(tmp_path: Path) -> None:
    source = write_records(tmp_path / "train.tar", ("no colour", record("red")))
    with pytest.raises(ValueError, match=r"source: no sample of 2 could be used; .*corrupt image"):
        VQA(VQAOptions()).trainable(joint_model(True), source, word_tokenizer(), None)


def test_no_question_is_an_error(tmp_path: Path) -> None:
    nothing = write_records(tmp_path / "none.tar", ("red", {"caption": "red"}), ("red", {"question": "what?"}))
    with pytest.raises(ValueError, match="none of 2 samples has a question with answers"):
        task_class("vqa")().evaluate(Answerer(), nothing, word_tokenizer(), None)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("this:Zen", "this:Zen, which is not vlmfast's; import it first"),
        ("json:loads", "expected a model of transformers with joint_features"),
        ("vlmfast.models.contract:Pretrainable", "expected a model of transformers with joint_features"),
    ],
)
def test_a_checkpoint_runs_no_code_that_it_names(place: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskModel(TaskConfig(task="vqa", model=place))
