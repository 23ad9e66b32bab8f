"""Scenes: what their records say is true of the boxes, and neither words nor image alone give an answer away."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scenes import SCENES, build_scenes, scenes_module

from vlmfast.data import ImageTextDataset, eval_transform

COUNTS = {"train": 8000, "val": 800, "val-open": 200}
Box = list[int]


@pytest.fixture(scope="module")
def said() -> dict[str, list[tuple[Any, dict[str, Any]]]]:
    """Every scene of the default build with its record, nothing drawn."""
    build = scenes_module()
    return {
        split: [
            (scene, record) for _, scene, record in build.scenes(split, build.pool_of(split, build.PAIRS), 0, count)
        ]
        for split, count in COUNTS.items()
    }


@pytest.fixture(scope="module")
def names() -> dict[str, str]:
    """Name -> kind."""
    scenes_module()
    from scene_names import KIND

    return KIND


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_scenes(tmp_path_factory.mktemp("scenes"), train=16, val=8, val_open=8)


def records(said: dict[str, list[tuple[Any, dict[str, Any]]]], split: str | None = None) -> list[dict[str, Any]]:
    return [record for name, found in said.items() if split in (None, name) for _, record in found]


def centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def where(a: Box, b: Box) -> str:
    """From b, a lies ... along the axis on which they are further apart."""
    (ax, ay), (bx, by) = centre(a), centre(b)
    if abs(ax - bx) > abs(ay - by):
        return "left" if ax < bx else "right"
    return "above" if ay < by else "below"


def boxes(record: dict[str, Any], name: str) -> list[Box]:
    return [thing["box"] for thing in record["objects"] if thing["name"] == name]


def only(found: list[Any]) -> Any:
    assert len(found) == 1, found
    return found[0]


def on(record: dict[str, Any], colour: str) -> str:
    return only([thing["name"] for thing in record["objects"] if thing["attributes"] == [colour]])


def singular(word: str, names: dict[str, str]) -> str:
    from scene_names import plural

    return only([name for name in names if plural(name) == word])


def answer(record: dict[str, Any], asked: dict[str, Any], names: dict[str, str]) -> str:
    """The answer to a question, from its words and the objects alone."""
    question = asked["question"].removesuffix("?")
    if match := re.fullmatch("what is on (.+)", question):
        return on(record, match[1])
    if match := re.fullmatch("what kind of picture is on (.+)", question):
        return names[on(record, match[1])]
    if match := re.fullmatch("what colour is the (.+) on", question):
        return only([thing["attributes"][0] for thing in record["objects"] if thing["name"] == match[1]])
    if match := re.fullmatch("how many (.+) are there", question):
        return str(len(boxes(record, singular(match[1], names))))
    if match := re.fullmatch("is there an? (.+)", question):
        return "yes" if boxes(record, match[1]) else "no"
    if match := re.fullmatch("where is the (.+) from the (.+)", question):
        return where(only(boxes(record, match[1])), only(boxes(record, match[2])))
    match = re.fullmatch("is the (.+?) (left of|right of|above|below) the (.+)", question)
    assert match, question
    side = where(only(boxes(record, match[1])), only(boxes(record, match[3])))
    return "yes" if match[2].removesuffix(" of") == side else "no"


class TestRecords:
    def test_tiles_are_inside_and_apart(self, said: dict[str, Any]) -> None:
        for scene, record in (pair for found in said.values() for pair in found):
            found = np.array([thing["box"] for thing in record["objects"]])
            assert found.min() >= 0
            assert found.max() <= scene.side
            assert 2 <= len(found) <= 5
            for k, a in enumerate(found):
                for b in found[:k]:
                    overlap = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
                    assert overlap.min() < 0
            assert len({thing["attributes"][0] for thing in record["objects"]}) == len(found)

    def test_phrases_are_the_names_of_their_objects(self, said: dict[str, Any], names: dict[str, str]) -> None:
        for record in records(said):
            spoken = set()
            for phrase in record["phrases"]:
                start, end = phrase["span"]
                determiner, noun = record["caption"][start:end].split(" ", 1)
                of = {record["objects"][index]["name"] for index in phrase["objects"]}
                plural = len(phrase["objects"]) > 1
                assert of == {singular(noun, names) if plural else noun}
                many = {1: ("a", "an", "the"), 2: ("two", "the"), 3: ("three", "the")}[len(phrase["objects"])]
                assert determiner in many
                assert len(phrase["objects"]) == len(boxes(record, of.pop()))
                spoken |= set(phrase["objects"])
            assert spoken == set(range(len(record["objects"])))

    def test_captions_say_colours_and_relations_that_hold(self, said: dict[str, Any], names: dict[str, str]) -> None:
        relations: Counter[str] = Counter()
        for record in records(said):
            for clause in record["caption"].split(", "):
                if re.match("(two|three) ", clause):
                    continue
                match = re.fullmatch(
                    r"an? (.+?) on (\w+)(?: (left|right|above|below)(?: of)? (?:(an?) (.+?) on (\w+)|the (.+)))?",
                    clause,
                )
                assert match, clause
                assert on(record, match[2]) == match[1]
                if not match[3]:
                    continue
                relations[match[3]] += 1
                if match[4]:
                    assert on(record, match[6]) == match[5]
                    others = boxes(record, match[5])
                else:
                    others = boxes(record, match[7]) or boxes(record, singular(match[7], names))
                assert {where(only(boxes(record, match[1])), other) for other in others} == {match[3]}
        assert min(relations.values()) > 0.2 * relations.total()

    def test_answers_are_right(self, said: dict[str, Any], names: dict[str, str]) -> None:
        types: Counter[str] = Counter()
        for record in records(said):
            for asked in record["questions"]:
                assert asked["answers"] == [answer(record, asked, names)], (asked, record["objects"])
                types[asked["type"]] += 1
        assert set(types) == {"name", "kind", "colour", "count", "presence", "side", "relation"}

    def test_sides_that_are_asked_for_are_clear(self, said: dict[str, Any]) -> None:
        for record in records(said):
            for asked in record["questions"]:
                if match := re.fullmatch(r"where is the (.+) from the (.+)\?", asked["question"]):
                    a, b = (np.array(centre(only(boxes(record, name)))) for name in match.groups())
                    smaller, larger = np.sort(np.abs(a - b))
                    assert larger >= 1.5 * smaller

    def test_the_right_choice_and_reason(self, said: dict[str, Any]) -> None:
        axis = {"left": (0, min), "right": (0, max), "highest": (1, min), "lowest": (1, max)}
        for record in records(said):
            index, end = axis[record["question"].removesuffix("?").split(" ")[-1]]
            furthest = end(record["objects"], key=lambda thing: centre(thing["box"])[index])
            assert record["choices"][record["answer_index"]] == furthest["name"]
            assert len(boxes(record, furthest["name"])) == 1
            assert len(set(record["choices"])) == 4
            reasons = [reason.split(" ")[3].removesuffix(",") for reason in record["rationale_choices"]]
            assert [reasons[record["rationale_index"]]] == furthest["attributes"]
            assert len(set(reasons)) == 4
            assert len({reason.split(",")[1] for reason in record["rationale_choices"]}) == 1

    def test_the_label_says_whether_the_named_thing_is_there(self, said: dict[str, Any], names: dict[str, str]) -> None:
        for record in records(said):
            told = only([name for name in names if re.search(rf"\b{name}\b", record["text"])])
            assert record["label"] == int(bool(boxes(record, told)))

    def test_the_category_covers_most(self, said: dict[str, Any], names: dict[str, str]) -> None:
        for record in records(said):
            area: Counter[str] = Counter()
            for thing in record["objects"]:
                x1, y1, x2, y2 = thing["box"]
                area[names[thing["name"]]] += (x2 - x1) * (y2 - y1)
            assert area[record["category"]] == max(area.values())


class TestSplits:
    def test_no_picture_of_train_is_in_val(self, said: dict[str, Any]) -> None:
        keys = {
            split: {tile.picture.key for scene, _ in found for tile in scene.tiles} for split, found in said.items()
        }
        pixels = {
            split: {tile.picture.webp for scene, _ in found for tile in scene.tiles} for split, found in said.items()
        }
        for found in (keys, pixels):
            assert not found["train"] & (found["val"] | found["val-open"])

    def test_held_out_names_are_nowhere_in_train_and_val(self, said: dict[str, Any]) -> None:
        from scene_names import HELD_OUT, plural

        words = [*HELD_OUT, *map(plural, HELD_OUT)]
        text = json.dumps(records(said, "train") + records(said, "val"))
        assert not set(re.findall("[a-z]+", text)) & set(words)
        held = [{thing["name"] for thing in record["objects"]} & set(HELD_OUT) for record in records(said, "val-open")]
        assert all(held)
        assert set().union(*held) == set(HELD_OUT)

    def test_train_and_val_have_the_same_names(self, said: dict[str, Any]) -> None:
        found = {split: {thing["name"] for r in records(said, split) for thing in r["objects"]} for split in COUNTS}
        assert found["train"] == found["val"]
        assert len(found["train"]) == 52


class TestNothingIsGivenAway:
    def test_presence_and_label_have_both_answers_equally_often_for_each_wording(self, said: dict[str, Any]) -> None:
        for split in COUNTS:
            balance: dict[str, int] = defaultdict(int)
            for record in records(said, split):
                balance[record["text"]] += 1 if record["label"] else -1
                question, right = only(
                    [(q["question"], q["answers"]) for q in record["questions"] if q["type"] == "presence"]
                )
                balance[question] += 1 if right == ["yes"] else -1
            assert not any(balance.values())

    def test_the_image_s_content_does_not_tell_the_label(self, said: dict[str, Any]) -> None:
        """Labels by what a model could know of the image without its text: number of tiles, names, and category."""
        for split, slack in (("train", 0.1), ("val", 0.25)):
            by: dict[Any, list[int]] = defaultdict(list)
            for record in records(said, split):
                for trait in (len(record["objects"]), record["category"]):
                    by[trait].append(record["label"])
            assert all(abs(np.mean(labels) - 0.5) < slack for labels in by.values() if len(labels) > 50)

    def test_words_alone_stay_near_chance(self, said: dict[str, Any]) -> None:
        """The README's table: the most frequent answer of train to a type, and to a question."""
        to_type: dict[str, Counter[str]] = defaultdict(Counter)
        to_words: dict[str, Counter[str]] = defaultdict(Counter)
        for record in records(said, "train"):
            for asked in record["questions"]:
                to_type[asked["type"]][asked["answers"][0]] += 1
                to_words[asked["question"]][asked["answers"][0]] += 1
        right: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
        for record in records(said, "val"):
            for asked in record["questions"]:
                majority = to_type[asked["type"]].most_common(1)[0][0]
                words = to_words[asked["question"]].most_common(1)
                guesses = majority, words[0][0] if words else majority
                right[asked["type"]].append(tuple(guess == asked["answers"][0] for guess in guesses))
        table = re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) \| ([\d.]+) \|$", (SCENES / "README.md").read_text(), re.M)
        shown = {kind: (float(majority), float(words)) for kind, majority, words in table}
        scores = {kind: tuple(100 * np.mean(found, axis=0)) for kind, found in right.items()}
        assert shown.keys() == scores.keys()
        for kind, found in scores.items():
            assert found == pytest.approx(shown[kind], abs=0.051)
        # Nine of the 52 names are of the largest kind.
        chance = {
            "name": 2,
            "kind": 100 * 9 / 52,
            "colour": 17,
            "count": 33,
            "presence": 50,
            "side": 25,
            "relation": 50,
        }
        assert all(max(scores[kind]) < chance[kind] + 5 for kind in chance)

    def test_choices_alone_stay_near_chance(self, said: dict[str, Any]) -> None:
        """Picking the name, the colour or the place that was most often right in train."""
        for choices, right in (("choices", "answer_index"), ("rationale_choices", "rationale_index")):
            seen: Counter[str] = Counter()
            good: Counter[str] = Counter()
            places: Counter[int] = Counter()
            for record in records(said, "train"):
                seen.update(record[choices])
                good[record[choices][record[right]]] += 1
                places[record[right]] += 1
            val = records(said, "val")
            picked = [max(range(4), key=lambda k: good[r[choices][k]] / max(1, seen[r[choices][k]])) for r in val]
            assert np.mean([k == record[right] for k, record in zip(picked, val, strict=True)]) < 0.32
            place = places.most_common(1)[0][0]
            assert np.mean([record[right] == place for record in val]) < 0.32


class TestShards:
    def test_the_same_bytes_whatever_the_number_of_processes(self, folder: Path, tmp_path: Path) -> None:
        scenes_module().build(tmp_path, train=16, val=8, val_open=8, workers=2)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
        assert set(files) == {"train-00000.tar", "val-00000.tar", "val-open-00000.tar", "names.json"}

    def test_boxes_are_where_the_pictures_are(self, folder: Path) -> None:
        """The pixels of each box: the colour of the tile round the edge, the picture within."""
        build = scenes_module()
        drawn = 0
        with tarfile.open(folder / "val-00000.tar") as tar:
            for key, scene, _ in build.scenes("val", build.pool_of("val", build.PAIRS), 0, 8):
                image = Image.open(io.BytesIO(tar.extractfile(f"{key}.webp").read()))  # type: ignore[union-attr]
                record = json.loads(tar.extractfile(f"{key}.json").read())  # type: ignore[union-attr]
                assert image.size == (scene.side, scene.side)
                pixels = np.asarray(image.convert("RGB"), dtype=float)
                for thing, tile in zip(record["objects"], scene.tiles, strict=True):
                    x1, y1, x2, y2 = thing["box"]
                    crop = pixels[y1:y2, x1:x2]
                    colour = np.array(build.COLOURS[thing["attributes"][0]])
                    edge = np.concatenate([crop[0, 4:-4], crop[-1, 4:-4], crop[4:-4, 0], crop[4:-4, -1]])
                    assert np.abs(edge - colour).mean() < 30
                    border = round(build.BORDER * (x2 - x1))
                    inner = crop[border:-border, border:-border].mean(-1)[2:-2, 2:-2]
                    source = Image.open(io.BytesIO(tile.picture.webp)).convert("RGB")
                    source = source.resize((x2 - x1 - 2 * border,) * 2, Image.Resampling.BICUBIC)
                    expected = np.asarray(source, dtype=float).mean(-1)[2:-2, 2:-2]
                    assert np.abs(inner - expected).mean() < 8
                    drawn += 1
        assert drawn >= 16

    def test_the_dataset_reads_them(self, folder: Path) -> None:
        dataset = ImageTextDataset(str(folder / "train-00000.tar"), transform=eval_transform(64))
        samples = [dataset[index] for index in range(len(dataset))]
        assert len(samples) == 16
        assert not dataset.skipped()
        assert all(sample is not None and sample.caption and sample.image.shape == (64, 64, 3) for sample in samples)

    def test_names_json(self, folder: Path, names: dict[str, str]) -> None:
        about = json.loads((folder / "names.json").read_text())
        assert {name: kind for kind, found in about["names"].items() for name in found} == names
        assert len(names) == 60
        assert len(about["held_out"]) == 8

    def test_a_second_build_replaces_the_first(self, tmp_path: Path) -> None:
        build_scenes(tmp_path, train=4, val=2, val_open=2)
        build_scenes(tmp_path, train=2, val=0)
        assert {path.name for path in tmp_path.iterdir()} == {"train-00000.tar", "names.json"}

    def test_odd_numbers_and_other_pairs_are_refused(self, tmp_path: Path) -> None:
        build = scenes_module().build
        with pytest.raises(ValueError, match="val_open: expected an even number of scenes, got 3"):
            build(tmp_path, val_open=3)
        with pytest.raises(ValueError, match=r"pairs: .* holds no train picture of firefighter"):
            build(tmp_path, pairs=tmp_path)
