"""Public data sets of two or three samples, written by hand as each format is, with the records that they become."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Png = Callable[..., bytes]


class Published(NamedTuple):
    """Annotation files, the folder of images, and the records that are expected, by key."""

    files: list[Path]
    images: Path
    records: dict[str, dict[str, Any]]
    needs: tuple[str, ...]  # fields that the samples' tasks need


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def draw(folder: Path, png: Png, *names: str) -> Path:
    """Images under these names; PNG whatever the name says, as in data sets of the wild."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))
    return folder


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


COCO = {"info": {"description": "COCO 2017 Dataset", "version": "1.0", "year": 2017}, "licenses": [{"id": 1}]}


def coco_image(number: int, **more: Any) -> dict[str, Any]:
    return {"license": 1, "file_name": f"{number:012d}.jpg", "height": 8, "width": 8, "id": number, **more}


def coco_captions(folder: Path, png: Png) -> Published:
    content = {
        **COCO,
        "images": [coco_image(391895), coco_image(522418), coco_image(184613)],
        "annotations": [
            {"image_id": 391895, "id": 38, "caption": "A man riding on the back of a motorcycle. "},
            {"image_id": 522418, "id": 182, "caption": "A woman wearing a net on her head cutting a cake."},
            {"image_id": 391895, "id": 122, "caption": "A man on a dirt road."},
        ],
    }
    records = {
        "000000391895": {"captions": ["A man riding on the back of a motorcycle.", "A man on a dirt road."]},
        "000000522418": {"captions": ["A woman wearing a net on her head cutting a cake."]},
    }
    images = draw(folder / "val2017", png, *(image["file_name"] for image in content["images"]))
    return Published([write(folder / "captions_val2017.json", content)], images, records, ("caption",))


def coco_instances(folder: Path, png: Png) -> Published:
    def box(number: int, image: int, category: int, bbox: list[float], crowd: int = 0) -> dict[str, Any]:
        shape: Any = {"counts": [8, 8], "size": [8, 8]} if crowd else [[1, 1, 2, 1, 2, 2]]
        sizes = {"area": bbox[2] * bbox[3], "bbox": bbox, "segmentation": shape}
        return {"id": number, "image_id": image, "category_id": category, "iscrowd": crowd, **sizes}

    content = {
        **COCO,
        "images": [coco_image(289343), coco_image(61471)],
        "annotations": [
            box(1768, 289343, 18, [4.73, 3.1, 2.2, 3.05]),
            box(1773, 289343, 1, [0, 0, 8, 4.5], crowd=1),
            box(1774, 289343, 1, [2, 2, 0, 3]),
        ],
        "categories": [
            {"supercategory": "person", "id": 1, "name": "person"},
            {"supercategory": "animal", "id": 18, "name": "dog"},
        ],
    }
    records = {
        "000000289343": {
            "objects": [
                {"box": [4.73, 3.1, 6.93, 6.15], "name": "dog"},
                {"box": [0, 0, 8, 4.5], "name": "person", "crowd": True},
            ]
        },
        "000000061471": {"objects": []},
    }
    images = draw(folder / "val2017", png, *(image["file_name"] for image in content["images"]))
    return Published([write(folder / "instances_val2017.json", content)], images, records, ())


def vqav2(folder: Path, png: Png) -> Published:
    asked = [
        (262148000, 262148, "Where is he looking?", "other", ["down"] * 9 + ["at table"]),
        (262148001, 262148, "What are the people doing?", "other", ["spectating"] * 6 + ["watching"] * 4),
        (393225000, 393225, "Is this soup?", "yes/no", ["yes"] * 10),
    ]
    head = {"info": {"year": 2017}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    questions = [{"image_id": image, "question": text, "question_id": q} for q, image, text, _, _ in asked]
    annotations = [
        {
            "question_type": text.split(" ")[0].lower(),
            "multiple_choice_answer": answers[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                for number, answer in enumerate(answers, start=1)
            ],
            "image_id": image,
            "answer_type": kind,
            "question_id": q,
        }
        for q, image, text, kind, answers in asked
    ]
    files = [
        write(
            folder / "v2_OpenEnded_mscoco_val2014_questions.json",
            {**head, "task_type": "Open-Ended", "questions": questions},
        ),
        write(folder / "v2_mscoco_val2014_annotations.json", {**head, "annotations": annotations}),
    ]
    # The older names of COCO's images, and those of 2017.
    images = draw(folder / "val2014", png, "COCO_val2014_000000262148.jpg", "000000393225.jpg")
    records: dict[str, Any] = {"000000262148": {"questions": []}, "000000393225": {"questions": []}}
    for q, image, text, kind, answers in asked:
        entry = {"question": text, "id": q, "answers": answers, "type": kind}
        records[f"{image:012d}"]["questions"].append(entry)
    return Published(files, images, records, ("questions",))


def refcoco(folder: Path, png: Png) -> Published:
    name = "COCO_train2014_000000581857.jpg"
    common = {"file_name": name, "height": 427, "width": 640, "original_id": 581857, "dataset_name": "refcoco"}
    annotation = {"area": 12.5, "iscrowd": 0, "category_id": 1, "original_id": 1719310}
    content = {
        "info": {},
        "licenses": [],
        "images": [
            {**common, "id": 0, "caption": "the lady with the blue shirt", "tokens_negative": [[14, 28]]},
            {**common, "id": 1, "caption": "woman left", "tokens_negative": [[0, 10]]},
        ],
        "annotations": [
            {
                **annotation,
                "image_id": 0,
                "id": 0,
                "bbox": [103.93, 299.99, 134.22, 177.42],
                "tokens_positive": [[0, 8]],
            },
            {**annotation, "image_id": 1, "id": 1, "bbox": [5.0, 6.0, 7.5, 8.25], "tokens_positive": [[0, 5]]},
        ],
        "categories": [{"supercategory": "person", "id": 1, "name": "person"}],
    }
    records = {
        "000000000000": {
            "caption": "the lady with the blue shirt",
            "objects": [{"box": [103.93, 299.99, 238.15, 477.41], "name": "person"}],
            "phrases": [{"span": [0, 28], "objects": [0], "head": [[0, 8]]}],
        },
        "000000000001": {
            "caption": "woman left",
            "objects": [{"box": [5.0, 6.0, 12.5, 14.25], "name": "person"}],
            "phrases": [{"span": [0, 10], "objects": [0], "head": [[0, 5]]}],
        },
    }
    images = draw(folder / "train2014", png, name)
    file = write(folder / "finetune_refcoco_val.json", content)
    return Published([file], images, records, ("caption", "phrases", "objects"))


def flickr30k_entities(folder: Path, png: Png) -> Published:
    first = "Two men in green shirts watch a man ."
    second = "Several people outside ."
    common = {"file_name": "1000092795.jpg", "height": "500", "width": "333", "dataset_name": "flickr"}

    def box(number: int, image: int, bbox: list[float], spans: list[list[int]]) -> dict[str, Any]:
        named = {"iscrowd": 0, "image_id": image, "category_id": 1, "id": number}
        return {"area": bbox[2] * bbox[3], **named, "bbox": bbox, "tokens_positive": spans}

    content = {
        "info": [],
        "licenses": [],
        "images": [
            {
                **common,
                "id": 0,
                "caption": first,
                "tokens_negative": [[0, len(first)]],
                "sentence_id": 0,
                "original_img_id": 1000092795,
                "tokens_positive_eval": [[[0, 7]], [[11, 23]], [[30, 35]]],
            },
            {
                **common,
                "id": 1,
                "caption": second,
                "tokens_negative": [[0, len(second)]],
                "sentence_id": 1,
                "original_img_id": 1000092795,
                "tokens_positive_eval": [[[0, 14]]],
            },
        ],
        "annotations": [
            box(0, 0, [1.0, 2.0, 30.0, 40.0], [[0, 7]]),
            # One box of two entities: "green shirts" and "Two men".
            box(1, 0, [50.0, 2.0, 30.0, 41.0], [[11, 23], [0, 7]]),
            box(2, 0, [90.0, 2.0, 10.0, 42.0], [[30, 35]]),
            box(3, 1, [1.0, 2.0, 30.0, 40.0], [[0, 14]]),
        ],
        "categories": [{"supercategory": "object", "id": 1, "name": "object"}],
    }
    records = {
        "000000000000": {
            "caption": first,
            "objects": [
                {"box": [1.0, 2.0, 31.0, 42.0]},
                {"box": [50.0, 2.0, 80.0, 43.0]},
                {"box": [90.0, 2.0, 100.0, 44.0]},
            ],
            "phrases": [
                {"span": [0, 7], "objects": [0, 1]},
                {"span": [11, 23], "objects": [1]},
                {"span": [30, 35], "objects": [2]},
            ],
        },
        "000000000001": {
            "caption": second,
            "objects": [{"box": [1.0, 2.0, 31.0, 42.0]}],
            "phrases": [{"span": [0, 14], "objects": [0]}],
        },
    }
    images = draw(folder / "flickr30k-images", png, "1000092795.jpg")
    file = write(folder / "final_flickr_separateGT_val.json", content)
    return Published([file], images, records, ("caption", "phrases", "objects"))


def hateful_memes(folder: Path, png: Png) -> Published:
    content = lines(
        {"id": 42953, "img": "img/42953.png", "label": 0, "text": "its their character not their color that matters"},
        {"id": 8291, "img": "img/08291.png", "label": 1, "text": "don't be afraid to love again"},
    )
    records = {
        "000000042953": {"text": "its their character not their color that matters", "label": 0},
        "000000008291": {"text": "don't be afraid to love again", "label": 1},
    }
    images = draw(folder, png, "img/42953.png", "img/08291.png")
    return Published([write(folder / "train.jsonl", content)], images, records, ("text", "label"))


def vcr(folder: Path, png: Png) -> Published:
    name = "lsmdc_3015_CHARLIE_ST_CLOUD/3015_CHARLIE_ST_CLOUD_00.23.57.935-00.24.00.783@0"
    row = {
        "movie": "3015_CHARLIE_ST_CLOUD",
        "objects": ["person", "person", "person", "car"],
        "interesting_scores": [0],
        "answer_likelihood": "possible",
        "img_fn": f"{name}.jpg",
        "metadata_fn": f"{name}.json",
        "answer_orig": "No she does not",
        "question_orig": "Does 3 feel comfortable?",
        "rationale_orig": "She is standing with her arms crossed and looks disturbed",
        "question": ["Does", [2], "feel", "comfortable", "?"],
        "answer_match_iter": [3, 0, 2, 1],
        "answer_sources": [3287, 0, 10184, 2260],
        "answer_choices": [
            ["Yes", "because", [0, 1], "are", "smiling", "."],
            ["No", ",", "she", "does", "n't", "."],
            ["Yes", ",", [2], "'s", "car", "is", [3], "."],
            ["Yes", ",", "she", "is", "cold", "."],
        ],
        "answer_label": 1,
        "rationale_choices": [["a", "."], ["b", "."], ["c", "."], [[2], "is", "in", "bed", "."]],
        "rationale_sources": [1921, 0, 9750, 25743],
        "rationale_match_iter": [3, 0, 2, 1],
        "rationale_label": 3,
        "img_id": "train-0",
        "question_number": 0,
        "annot_id": "train-0",
        "match_fold": "train-0",
        "match_index": 0,
    }
    boxes = [
        [1.0, 2.0, 3.0, 4.0, 0.99],
        [2.0, 2.0, 4.0, 4.0, 0.98],
        [0.0, 0.0, 8.0, 8.0, 0.9],
        [5.0, 5.0, 7.0, 7.0, 0.5],
    ]
    images = draw(folder / "vcr1images", png, row["img_fn"])
    metadata = {"boxes": boxes, "segms": [[], [], [], []], "names": row["objects"], "width": 8, "height": 8}
    write(images / row["metadata_fn"], metadata)
    record = {
        "question": "Does person3 feel comfortable?",
        "choices": [
            "Yes because person1 and person2 are smiling.",
            "No, she doesn't.",
            "Yes, person3's car is car4.",
            "Yes, she is cold.",
        ],
        "answer_index": 1,
        "rationale_choices": ["a.", "b.", "c.", "person3 is in bed."],
        "rationale_index": 3,
        "objects": [
            {"box": box[:4], "name": name, "confidence": box[4]}
            for box, name in zip(boxes, ["person", "person", "person", "car"], strict=True)
        ],
    }
    file = write(folder / "train.jsonl", lines(row))
    return Published([file], images, {"train-0": record}, ("question", "choices", "answer_index", "objects"))


def easy_vqa(folder: Path, png: Png) -> Published:
    content = [
        ["what is the red shape?", "triangle", 0],
        ["does the image contain a circle?", "no", 0],
        ["what is the color of the shape?", "teal", 10],
    ]
    records = {
        "000000000000": {
            "questions": [
                {"question": "what is the red shape?", "answers": ["triangle"]},
                {"question": "does the image contain a circle?", "answers": ["no"]},
            ]
        },
        "000000000010": {"questions": [{"question": "what is the color of the shape?", "answers": ["teal"]}]},
    }
    images = draw(folder / "images", png, "0.png", "10.png")
    return Published([write(folder / "questions.json", content)], images, records, ("questions",))


PUBLISHED: dict[str, Callable[[Path, Png], Published]] = {
    "coco-captions": coco_captions,
    "coco-instances": coco_instances,
    "vqav2": vqav2,
    "refcoco": refcoco,
    "flickr30k-entities": flickr30k_entities,
    "hateful-memes": hateful_memes,
    "vcr": vcr,
    "easy-vqa": easy_vqa,
}
