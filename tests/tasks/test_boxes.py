"""Boxes: overlap and pixels; grounding and detection of two coloured halves."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from toys import COLOURS, WORDS, Toy, halves, ids, word_tokenizer, write_tar

from vlmfast.data import FeatureCache, ImageTextDataset, eval_transform
from vlmfast.data.phrases import phrase_mask
from vlmfast.tasks.boxes import from_model, overlap, stretched, to_model
from vlmfast.tasks.detection import Detection, DetectionOptions, average_precision, objects_of
from vlmfast.tasks.grounding import Grounding, phrases_of

NAMES = list(COLOURS)
LEFT, RIGHT = [0.0, 0, 8, 16], [8.0, 0, 16, 16]


class Pointer(Toy):
    """Scores the left and the right half of the image for each phrase; without eyes the left one for all."""

    def phrase_scores(
        self, pixel_values: Any, input_ids: Any, attention_mask: Any, phrase_mask: Any, boxes: Any = None
    ) -> torch.Tensor:
        scores = torch.zeros(*phrase_mask.shape[:2], 3)
        for row, half in enumerate(sides(self, pixel_values)):
            for place, mask in enumerate(phrase_mask[row]):
                asked = {WORDS[token] for token in input_ids[row][mask].tolist()}
                for region, name in enumerate(half if self.eyes else ("red",)):
                    scores[row, place, region] = float(name in asked or not self.eyes)
        scores[..., 2] = 9 if boxes is None else scores[..., 2]  # of padding, where there are two objects
        return scores


class Finder(Toy):
    """Finds both halves by name, of any names that it is asked for; without eyes all of them, in one box."""

    open_vocabulary = True
    without_eyes = (0.0, 0, 8, 8)

    def detect(self, image: Any, phrases: Any = None, tokenizer: Any = None) -> list[dict[str, torch.Tensor]]:
        found = []
        boxes = torch.tensor([[0.0, 0, 4, 8], [4, 0, 8, 8]])
        for row, half in enumerate(sides(self, image)):
            asked = phrases[row] if phrases is not None else NAMES
            pairs = [(box, n) for box, name in zip(boxes, half, strict=True) for n, p in enumerate(asked) if name in p]
            if not self.eyes:
                pairs = [(torch.tensor(self.without_eyes), n) for n, _ in enumerate(asked)]
            found.append(
                {
                    "boxes": torch.stack([box for box, _ in pairs]) if pairs else torch.zeros(0, 4),
                    "scores": torch.ones(len(pairs)),
                    "labels": torch.tensor([label for _, label in pairs], dtype=torch.int64),
                }
            )
        return found


class LeftFinder(Finder):
    """Without eyes on the left; the whole image would overlap either half by one half, which is enough."""

    without_eyes = (0.0, 0, 4, 8)


def sides(model: Toy, pixels: torch.Tensor) -> list[tuple[str, ...]]:
    eyes, model.eyes = model.eyes, True
    left, right = model.names(pixels[:, :, :3]), model.names(pixels[:, :, 5:])
    model.eyes = eyes
    return list(zip(left, right, strict=True))


def write(path: Path, *pairs: tuple[str, str]) -> str:
    members = [("a.png", b"no image"), ("a.json", json.dumps(record("red", "blue")).encode())]
    for number, (left, right) in enumerate(pairs):
        members.append((f"b{number}.png", halves(left, right)))
        members.append((f"b{number}.json", json.dumps(record(left, right)).encode()))
    return write_tar(path, members)


def record(left: str, right: str) -> dict[str, Any]:
    """The phrase of the right half comes first; a third names no object."""
    caption = f"a {right} sign : a {left} sign here"
    start = caption.index(":") + 2
    return {
        "caption": caption,
        "objects": [{"box": LEFT, "name": left}, {"box": RIGHT, "name": right}],
        "phrases": [
            {"span": [0, len(f"a {right} sign")], "objects": [1]},
            {"span": [start, start + len(f"a {left} sign")], "objects": [0]},
            {"span": [len(caption) - 4, len(caption)], "objects": []},
        ],
    }


PAIRS = [("red", "blue"), ("green", "orange"), ("cyan", "yellow"), ("blue", "green")]


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write(tmp_path / "val.tar", *PAIRS)


@pytest.mark.parametrize("model", [Pointer, LeftFinder])
def test_grounding(model: type[Toy], source: str, tmp_path: Path) -> None:
    right = Grounding().evaluate(model(), source, word_tokenizer(), None, batch_size=3)
    wrong = Grounding().evaluate(model(eyes=False), source, word_tokenizer(), None)
    assert right.skipped == {"corrupt image": 1}
    assert right.details["num_phrases"] == 8
    assert right.rows["model"] == right.rows["upper bound"] == {"accuracy": 1.0}
    assert right.rows["blind"]["accuracy"] < 0.7
    assert wrong.rows["model"] == wrong.rows["blind"]
    assert wrong.rows["model"]["accuracy"] == 0.5  # always the left half
    assert right.rows["chance"] == {"accuracy": 0.5 if model is Pointer else 1.0}
    json.dumps(right.to_dict())
    wrong.report(tmp_path / "report.png")
    assert Image.open(tmp_path / "report.png").width > 1000


def test_regions_come_from_features_and_move_with_the_image(source: str, tmp_path: Path) -> None:
    """Three boxes a sample, the third too narrow; the upper bound is what they allow."""
    dataset = ImageTextDataset(source, transform=eval_transform(8))
    cache = FeatureCache(tmp_path / "regions", {"data": dataset.image_fingerprint(), "model": "by hand"}, len(dataset))
    boxes = torch.tensor([LEFT, [8.0, 0, 16, 7], [0, 0, 1, 16]])  # of the right half less than one half
    cache.write(0, [{"boxes": boxes} for _ in range(len(dataset))])
    scores = Grounding().evaluate(Pointer(), source, word_tokenizer(), None, features=tmp_path / "regions")
    assert scores.rows["upper bound"] == scores.rows["model"] == {"accuracy": 0.5}
    assert scores.rows["majority"] == {"accuracy": 0.5}
    assert scores.rows["chance"]["accuracy"] == pytest.approx(1 / 6)


class PaddedFinder(Finder):
    """Sees whole images, 8 pixels high, in the corner of what it is given: its boxes are in pixels of that corner."""

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Any:
        collate = super().collator(options, tokenizer, train=train)

        def padded(samples: Any) -> dict[str, torch.Tensor]:
            batch = collate(samples)
            pixels = batch["pixel_values"]
            batch["pixel_values"] = torch.nn.functional.pad(pixels, (0, 0, 0, 7, 0, 3))
            return batch | {"image_sizes": torch.tensor([[8, 8]] * len(pixels))}

        return padded

    def detect(
        self, image: Any, phrases: Any = None, image_sizes: Any = None, tokenizer: Any = None
    ) -> list[dict[str, torch.Tensor]]:
        assert image_sizes is not None
        return super().detect(image[:, :8, :8], phrases)


class OwnRegions(PaddedFinder):
    """Finds both halves itself, in the corner of what it is given, and one region that is padding."""

    def phrase_scores(
        self, pixel_values: Any, input_ids: Any, attention_mask: Any, phrase_mask: Any, image_sizes: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.zeros(*phrase_mask.shape[:2], 3)
        scores[..., 0] = -torch.inf
        for row, half in enumerate(sides(self, pixel_values[:, :8, :8])):
            for place, mask in enumerate(phrase_mask[row]):
                asked = {WORDS[token] for token in input_ids[row][mask].tolist()}
                for region, name in enumerate(half):
                    scores[row, place, 1 + region] = float(name in asked)
        boxes = torch.tensor([[0.0, 0, 0, 0], [0, 0, 4, 8], [4, 0, 8, 8]])
        return scores, boxes.expand(len(scores), 3, 4)


def test_a_model_that_finds_regions_itself(source: str) -> None:
    scores = Grounding().evaluate(OwnRegions(), source, word_tokenizer(), None, batch_size=3)
    assert scores.rows["model"] == scores.rows["upper bound"] == {"accuracy": 1.0}
    assert scores.rows["chance"] == {"accuracy": 0.5}  # padding is no region
    assert scores.rows["blind"]["accuracy"] < 0.7
    with pytest.raises(TypeError, match="task grounding: OwnRegions finds regions itself; train it without --task"):
        Grounding().trainable(OwnRegions(), source, word_tokenizer(), None)


def test_boxes_of_padded_images(source: str) -> None:
    right = Detection().evaluate(PaddedFinder(), source, word_tokenizer(), None, batch_size=3)
    assert Grounding().evaluate(PaddedFinder(), source, word_tokenizer(), None).rows["model"] == {"accuracy": 1.0}
    assert right.rows["model"] == pytest.approx({"mAP": 1, "mAP50": 1}, abs=1e-6)


def test_detection(source: str, tmp_path: Path) -> None:
    train = write(tmp_path / "train.tar", ("red", "blue"), ("green", "cyan"))
    task = Detection(DetectionOptions(train_data=train))
    right = task.evaluate(Finder(), source, word_tokenizer(), None, batch_size=3)
    assert right.num_samples == 4
    assert right.rows["model"] == pytest.approx(
        {"mAP": 1, "mAP50": 1, "mAP train names": 1, "mAP held out": 1}, abs=1e-6
    )
    assert right.details["held_out"] == ["orange", "yellow"]
    assert right.details["by_name"] == pytest.approx(dict.fromkeys(COLOURS, 1.0))
    assert right.rows["blind"]["mAP"] < 0.3
    wrong = task.evaluate(Finder(eyes=False), source, word_tokenizer(), None)
    assert wrong.rows["model"] == wrong.rows["blind"]
    assert wrong.rows["model"]["mAP"] < 0.2
    assert right.rows["majority"]["mAP50"] < 1
    assert 0 < right.rows["chance"]["mAP"] < 0.7  # the boxes of the model, their names changed
    right.report(tmp_path / "report.png")
    assert Image.open(tmp_path / "report.png").width > 1000


def test_a_closed_vocabulary_has_names_of_its_own(source: str) -> None:
    """Labels are the model's; a name that no sample has is left out."""
    model = Finder()
    model.open_vocabulary = False
    model.config = SimpleNamespace(id2label=dict(enumerate(NAMES)))
    assert Detection().evaluate(model, source, word_tokenizer(), None).rows["model"]["mAP"] == pytest.approx(1)
    model.config.id2label[NAMES.index("blue")] = "navy"
    assert Detection().evaluate(model, source, word_tokenizer(), None).rows["model"]["mAP"] == pytest.approx(5 / 6)


def test_average_precision_of_a_worked_example() -> None:
    """One of two objects is found, and above it something that is not there: precision 1/2 up to recall 1/2."""
    found = {
        "boxes": torch.tensor([[50.0, 50, 60, 60], LEFT]),
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.tensor([0, 0]),
    }
    truth = {"boxes": torch.tensor([LEFT, RIGHT]), "labels": torch.tensor([0, 0])}
    scores, each = average_precision([found], [truth])
    assert scores["mAP50"] == pytest.approx(0.5 * 51 / 101)
    assert each == pytest.approx({0: 0.5 * 51 / 101})


def test_a_crowd_need_not_be_found() -> None:
    """Of a crowd COCO counts neither that it was missed nor what was found within it."""
    person = {"box": [0, 0, 4, 4], "name": "person"}
    boxes, names, crowd = objects_of({"objects": [person, {**person, "box": [6, 0, 16, 10], "crowd": True}]})
    assert (names, crowd.tolist()) == (["person", "person"], [0, 1])
    truth = {"boxes": boxes.float(), "labels": torch.zeros(2, dtype=torch.int64), "iscrowd": crowd}
    found = {"boxes": boxes[:1].float(), "scores": torch.ones(1), "labels": torch.zeros(1, dtype=torch.int64)}
    scores, _ = average_precision([found], [truth])
    assert scores["mAP"] == pytest.approx(1.0)
    missed, _ = average_precision([found], [{**truth, "iscrowd": torch.zeros(2, dtype=torch.int64)}])
    assert missed["mAP"] < 0.6


def test_objects_without_names_are_an_error(tmp_path: Path) -> None:
    objects = json.dumps({"objects": [{"box": [0, 0, 4, 4]}]}).encode()
    nameless = write_tar(tmp_path / "nameless.tar", [("a.png", halves("red", "blue")), ("a.json", objects)])
    with pytest.raises(ValueError, match="source: no object of 1 samples has a box and a name"):
        Detection().evaluate(Finder(), nameless, word_tokenizer(), None)


def test_overlap() -> None:
    a = torch.tensor([[0.0, 0, 4, 4], [0, 0, 0, 0], [4, 4, 2, 2]])
    b = torch.tensor([[2.0, 2, 6, 6], [0, 0, 4, 4], [0, 0, 0, 0]])
    expected = [[4 / 28, 1, 0], [0, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(overlap(a, b), torch.tensor(expected))


def test_pixels_of_the_model_and_of_the_file() -> None:
    """A picture of 40 x 20, its shorter side scaled to 8 and its centre cut: 16 x 8, of which columns 4 to 12."""
    size, seen = (40, 20), (8, 8)
    image = torch.zeros(20, 40, 3, dtype=torch.uint8)
    image[5:15, 15:25] = 255
    view = eval_transform(8)(Image.fromarray(image.numpy()), None)  # type: ignore[arg-type]
    rows, columns = (view[..., 0] > 127).nonzero(as_tuple=True)
    box = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]])
    assert from_model(box, seen, size).tolist() == [[15, 5, 25, 15]]
    assert to_model(torch.tensor([[15, 5, 25, 15]]), seen, size).tolist() == box.tolist()
    assert stretched(torch.tensor([[10, 5, 20, 10]]), size, (80, 80)).tolist() == [[20, 20, 40, 40]]


def test_phrases_and_their_tokens() -> None:
    own = record("red", "blue")
    assert [phrase.span for phrase in phrases_of(own)] == [(0, 11), (14, 24)]
    assert phrases_of({"objects": [{"name": "no box"}], "phrases": [{"span": [0, 3], "objects": [0, 7]}]}) == []
    captions = [own["caption"], "a red sign"]
    mask = phrase_mask(word_tokenizer(), captions, [[(0, 11), (14, 24)], [(2, 5)]], ids(*captions))
    assert mask.shape == (2, 2, 8)
    assert [row.nonzero()[:, 0].tolist() for row in mask.view(4, 8)] == [[0, 1, 2], [4, 5, 6], [1], []]
    with pytest.raises(ValueError, match="expected the tokens of 'a red sign' from column 0"):
        phrase_mask(word_tokenizer(), ["a red sign"], [[(2, 5)]], ids("red sign a"))
