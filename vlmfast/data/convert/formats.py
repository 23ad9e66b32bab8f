"""One function per published format: annotation files to items. Nothing here opens an image."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vlmfast.data.convert.items import Item, SkipError, inside

Json = dict[str, Any]


def coco_captions(files: list[Path], images: Path) -> list[Item]:
    """captions_*.json of COCO: a sample per image, with all its captions."""
    (path,) = files
    found = _tables(path, "COCO captions", images=("id", "file_name"), annotations=("image_id", "caption"))
    captions: dict[Any, list[str]] = defaultdict(list)
    for annotation in found["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"].strip())
    return [
        Item(_key(image["id"]), (image["file_name"],), {"captions": captions[image["id"]]})
        for image in found["images"]
        if image["id"] in captions
    ]


def coco_instances(files: list[Path], images: Path) -> list[Item]:
    """instances_*.json of COCO: a sample per image, with its boxes; boxes without area are left out."""
    (path,) = files
    found = _tables(
        path,
        "COCO instances",
        images=("id", "file_name"),
        annotations=("image_id", "category_id", "bbox"),
        categories=("id", "name"),
    )
    objects = _objects(found)
    return [
        Item(_key(image["id"]), (image["file_name"],), {"objects": [thing for _, thing in objects[image["id"]]]})
        for image in found["images"]
    ]


def vqav2(files: list[Path], images: Path) -> list[Item]:
    """v2_OpenEnded_*_questions.json and v2_*_annotations.json: a sample per image, with its questions and answers.

    Without the annotations, as of a test split, questions have no answers.
    """
    asked: Json | None = None
    answered: dict[Any, Json] = {}
    for path in files:
        found = _json(path)
        if isinstance(found, dict) and "questions" in found:
            asked = _tables(path, "VQAv2 questions", found, questions=("image_id", "question", "question_id"))
        else:
            rows = _tables(path, "VQAv2 annotations or questions", found, annotations=("question_id", "answers"))
            answered |= {row["question_id"]: row for row in rows["annotations"]}
    if asked is None:
        raise ValueError(f"annotations: {files[0]} has answers only; expected the questions' file too")
    if answered and not any(row["question_id"] in answered for row in asked["questions"]):
        raise ValueError("annotations: no answer is of a question that is there; expected two files of one split")
    questions: dict[Any, list[Json]] = defaultdict(list)
    for row in asked["questions"]:
        entry: Json = {"question": row["question"], "id": row["question_id"]}
        if (answer := answered.get(row["question_id"])) is not None:
            entry["answers"] = [one["answer"] for one in answer["answers"]]
            if "answer_type" in answer:
                entry["type"] = answer["answer_type"]
        questions[row["image_id"]].append(entry)
    subset = asked.get("data_subtype", "")
    return [
        Item(_key(image), (f"COCO_{subset}_{image:012d}.jpg", f"{image:012d}.jpg"), {"questions": rows})
        for image, rows in questions.items()
    ]


def refcoco(files: list[Path], images: Path) -> list[Item]:
    """finetune_refcoco_*.json as MDETR writes it: a sample per expression, whose one phrase is all of it.

    `head` keeps the spans that MDETR aligns with the box.
    """
    (path,) = files
    found = _mdetr(path, "RefCOCO of MDETR", "refcoco")
    objects = _objects(found)
    items = []
    for image in found["images"]:
        annotations, things = zip(*objects[image["id"]], strict=True) if objects[image["id"]] else ((), ())
        head = [span for annotation in annotations for span in annotation["tokens_positive"]]
        caption = image["caption"]
        record = {
            "caption": caption,
            "objects": list(things),
            "phrases": [{"span": [0, len(caption)], "objects": list(range(len(things))), "head": head}],
        }
        items.append(Item(_key(image["id"]), (image["file_name"],), record))
    return items


def flickr30k_entities(files: list[Path], images: Path) -> list[Item]:
    """final_flickr_{separate,merged}GT_*.json as MDETR writes it: a sample per caption, with its phrases and boxes."""
    (path,) = files
    found = _mdetr(path, "Flickr30k Entities of MDETR", "flickr")
    objects = _objects(found, named=False)
    items = []
    for image in found["images"]:
        of: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, (annotation, _) in enumerate(objects[image["id"]]):
            for start, end in annotation["tokens_positive"]:
                if index not in of[start, end]:
                    of[start, end].append(index)
        record = {
            "caption": image["caption"],
            "objects": [thing for _, thing in objects[image["id"]]],
            "phrases": [{"span": list(span), "objects": of[span]} for span in sorted(of)],
        }
        items.append(Item(_key(image["id"]), (image["file_name"],), record))
    return items


def hateful_memes(files: list[Path], images: Path) -> list[Item]:
    """train.jsonl, dev_seen.jsonl and so on of the Hateful Memes Challenge; the label is absent from a test split."""
    (path,) = files
    items = []
    for row in _lines(path, "Hateful Memes", ("id", "img", "text")):
        record: Json = {"text": row["text"]}
        if "label" in row:
            record["label"] = int(row["label"])
        items.append(Item(_key(row["id"]), (row["img"], Path(row["img"]).name), record))
    return items


def vcr(files: list[Path], images: Path) -> list[Item]:
    """train.jsonl, val.jsonl or test.jsonl of VCR: a sample per question; boxes are in the images' folder (vcr1images).

    An object in a sentence becomes its name and its place in `objects`, counted from 1: "is person2 asleep?".
    """
    (path,) = files
    rows = _lines(path, "VCR", ("annot_id", "img_fn", "metadata_fn", "objects", "question", "answer_choices"))
    return [Item(_key(row["annot_id"]), (row["img_fn"],), partial(_vcr_record, row, images)) for row in rows]


def easy_vqa(files: list[Path], images: Path) -> list[Item]:
    """questions.json of easy-VQA, a list of [question, answer, image]: a sample per image, with its questions."""
    (path,) = files
    found = _json(path)
    shape = (str, str, int)
    if not isinstance(found, list) or not all(
        isinstance(row, list) and len(row) == 3 and all(map(isinstance, row, shape)) for row in found
    ):
        raise _other(path, "easy-VQA", "a list of [question, answer, number of the image]")
    questions: dict[int, list[Json]] = defaultdict(list)
    for question, answer, image in found:
        questions[image].append({"question": question, "answers": [answer]})
    return [Item(_key(image), (f"{image}.png",), {"questions": rows}) for image, rows in questions.items()]


class Format(NamedTuple):
    """How a published data set is read.

    Attributes:
        items: (annotation files, folder of images) -> items.
        files: the annotation files, in words; as many, at most, as `most`.
        images: the folder of images, in words.
    """

    read: Callable[[list[Path], Path], list[Item]]
    files: str
    images: str
    most: int = 1

    def items(self, files: list[Path], images: Path) -> list[Item]:
        if not 1 <= len(files) <= self.most:
            raise ValueError(f"annotations: expected {self.files}; got {len(files)} files")
        try:
            return self.read(files, images)
        except (KeyError, TypeError, AttributeError) as error:
            where = ", ".join(map(str, files))
            raise ValueError(f"annotations: {where}: an entry is not as {self.files} has it ({error!r})") from error


FORMATS = {
    "coco-captions": Format(coco_captions, "captions_*.json", "train2017, val2014, ..."),
    "coco-instances": Format(coco_instances, "instances_*.json", "train2017, val2014, ..."),
    "vqav2": Format(vqav2, "v2_OpenEnded_*_questions.json and v2_*_annotations.json", "train2014, val2014, ...", 2),
    "refcoco": Format(refcoco, "finetune_refcoco_*.json of MDETR", "train2014"),
    "flickr30k-entities": Format(flickr30k_entities, "final_flickr_*GT_*.json of MDETR", "flickr30k-images"),
    "hateful-memes": Format(hateful_memes, "train.jsonl, dev_seen.jsonl, ...", "the folder that holds img"),
    "vcr": Format(vcr, "train.jsonl, val.jsonl or test.jsonl", "vcr1images"),
    "easy-vqa": Format(easy_vqa, "questions.json", "images"),
}


def _objects(found: Json, *, named: bool = True) -> dict[Any, list[tuple[Json, Json]]]:
    """Image's id -> (annotation, object) of each box that has an area."""
    names = {category["id"]: category["name"] for category in found["categories"]}
    objects: dict[Any, list[tuple[Json, Json]]] = defaultdict(list)
    for annotation in found["annotations"]:
        x, y, width, height = annotation["bbox"]
        if not (width > 0 and height > 0):
            continue
        # COCO has two decimals; a sum of two has more in binary.
        thing: Json = {"box": [x, y, round(x + width, 4), round(y + height, 4)]}
        if named:
            thing["name"] = names[annotation["category_id"]]
        if annotation.get("iscrowd"):
            thing["crowd"] = True
        objects[annotation["image_id"]].append((annotation, thing))
    return objects


def _vcr_record(row: Json, images: Path) -> Json:
    try:
        path = inside(images, row["metadata_fn"])
        if path is None:
            raise SkipError("missing boxes")
        metadata = json.loads(path.read_bytes())
        boxes = [(box[:4], box[4]) for box in metadata["boxes"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise SkipError("damaged boxes") from error
    names = row["objects"]
    if len(boxes) != len(names):
        raise SkipError("boxes of other objects")
    say = partial(_vcr_sentence, names=names)
    record: Json = {"question": say(row["question"]), "choices": [say(words) for words in row["answer_choices"]]}
    if "answer_label" in row:
        record["answer_index"] = row["answer_label"]
    if "rationale_choices" in row:
        record["rationale_choices"] = [say(words) for words in row["rationale_choices"]]
    if "rationale_label" in row:
        record["rationale_index"] = row["rationale_label"]
    record["objects"] = [
        {"box": box, "name": name, "confidence": score} for (box, score), name in zip(boxes, names, strict=True)
    ]
    return record


def _vcr_sentence(words: list[str | list[int]], names: list[str]) -> str:
    said = [
        " and ".join(f"{names[index]}{index + 1}" for index in word) if isinstance(word, list) else word
        for word in words
    ]
    return re.sub(r" (?=[.,;:!?]|'(?:s|re|ve|ll|d|m)\b|n't\b)", "", " ".join(said))


def _mdetr(path: Path, name: str, data_set: str) -> Json:
    found = _tables(
        path,
        name,
        images=("id", "file_name", "caption", "dataset_name"),
        annotations=("image_id", "category_id", "bbox", "tokens_positive"),
        categories=("id", "name"),
    )
    for number, image in enumerate(found["images"]):
        if not image["dataset_name"].startswith(data_set):  # refcoco, refcoco+ and refcocog
            got = f"images[{number}] has {image['dataset_name']!r}"
            raise _other(path, name, f"a dataset_name that starts with {data_set}", got)
    return found


def _key(number: int | str) -> str:
    """A key without dots: whole numbers with twelve digits, as COCO writes them."""
    return f"{number:012d}" if isinstance(number, int) else re.sub(r"[^\w@-]", "_", number)


def _tables(path: Path, name: str, found: Any = None, **tables: tuple[str, ...]) -> Json:
    """A JSON object whose named lists hold objects with the named fields; each is looked at."""
    found = _json(path) if found is None else found
    expected = ", ".join(f"{table} (each with {', '.join(fields)})" for table, fields in tables.items())
    if not isinstance(found, dict):
        raise _other(path, name, f"an object with the lists {expected}")
    for table, fields in tables.items():
        rows = found.get(table)
        if not isinstance(rows, list):
            raise _other(path, name, f"an object with the lists {expected}", f"it has {', '.join(found) or 'nothing'}")
        for number, row in enumerate(rows):
            _check(row, fields, path, name, f"{table}[{number}]")
    return found


def _lines(path: Path, name: str, fields: tuple[str, ...]) -> list[Json]:
    """The objects of a file with one JSON object a line."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _other(path, name, "one JSON object a line", f"line {number}: {error}") from error
        _check(row, fields, path, name, f"line {number}")
        rows.append(row)
    return rows


def _check(row: Any, fields: tuple[str, ...], path: Path, name: str, place: str) -> None:
    missing = [field for field in fields if field not in row] if isinstance(row, dict) else list(fields)
    if missing:
        raise _other(path, name, f"{', '.join(fields)} in each entry", f"{place} has no {', '.join(missing)}")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"annotations: {path} is no JSON file ({error}); expected one JSON document") from error


def _other(path: Path, name: str, expected: str, got: str = "") -> ValueError:
    return ValueError(f"annotations: {path} is no file of {name}; expected {expected}{got and f'; {got}'}")
