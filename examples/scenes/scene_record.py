"""What is said of scenes: captions with phrases, questions, choices and labels, all from the tiles' boxes and names.

Scenes come in pairs. Of a pair, "is there ...?" and the labelled text name one thing that is in one of the two scenes
and not in the other, so that neither the words nor the image alone say which answer is right.
"""

from random import Random
from typing import Any

from scene_layout import COLOURS, OPPOSITE, Pool, Scene, arrange, outermost, relation
from scene_names import plural, with_article

NUMBERS = {2: "two", 3: "three"}
WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
FURTHEST = {"left": "furthest left", "right": "furthest right", "up": "highest", "down": "lowest"}
FURTHER = {"left": "further left", "right": "further right", "up": "higher", "down": "lower"}
TEXTS = ("look at this {name}", "nothing beats {a_name}", "who ordered the {name}?", "{a_name} made my day")
CHOICES = 4


def pair_of_scenes(random: Random, pool: Pool) -> list[tuple[Scene, dict[str, Any]]]:
    """Two scenes with their records."""
    scenes = [arrange(random, pool), arrange(random, pool)]
    while set(scenes[0].names) == set(scenes[1].names):
        scenes[1] = arrange(random, pool)
    records = [describe(random, scene, pool) for scene in scenes]
    asked, told = in_one(random, scenes), in_one(random, scenes)
    text = random.choice(TEXTS).format(name=told[0], a_name=with_article(told[0]))
    for record, present in zip(records, asked[1], strict=True):
        question = f"is there {with_article(asked[0])}?"
        record["questions"].append(ask("presence", question, "yes" if present else "no"))
    for record, present in zip(records, told[1], strict=True):
        record["text"], record["label"] = text, int(present)
    return list(zip(scenes, records, strict=True))


def in_one(random: Random, scenes: list[Scene]) -> tuple[str, tuple[bool, bool]]:
    """A name that one of two scenes holds and the other does not, and which holds it."""
    held = [set(scene.names) for scene in scenes]
    first = random.randrange(2)
    if not held[first] - held[1 - first]:
        first = 1 - first
    name = random.choice(sorted(held[first] - held[1 - first]))
    return name, (first == 0, first == 1)


def describe(random: Random, scene: Scene, pool: Pool) -> dict[str, Any]:
    """The record of a scene but for what is said of a pair of scenes."""
    caption, phrases = caption_of(scene)
    return {
        "caption": caption,
        "category": scene.kind,
        "phrases": phrases,
        "objects": [
            {"box": list(tile.box), "name": tile.name, "attributes": [tile.colour], "confidence": 1.0}
            for tile in scene.tiles
        ],
        "questions": questions_of(random, scene),
        **choices_of(random, scene, pool),
    }


def caption_of(scene: Scene) -> tuple[str, list[dict[str, Any]]]:
    """'two dogs, a cook on red left of a flag on blue', and the span and tiles of each thing that is named.

    A name of several tiles comes first. Of the others the largest is named first, and the next from it; where there is
    one other only, it is named from the several, if it lies to the same side of each.
    """
    caption, phrases = "", []

    def point(words: str, tiles: list[int]) -> str:
        phrases.append({"span": [len(caption), len(caption) + len(words)], "objects": tiles})
        return words

    several = next(((name, indices) for name, indices in scene.names.items() if len(indices) > 1), None)
    if several:
        caption += point(f"{NUMBERS[len(several[1])]} {plural(several[0])}", several[1])
        caption += ", "
    first, *rest = scene.singles
    main = scene.tiles[first]
    caption += point(with_article(main.name), [first])
    caption += f" on {main.colour}"
    if several and not rest:
        sides = {relation(main, scene.tiles[index])[0] for index in several[1]}
        if len(sides) == 1:
            caption += f" {WORDS[sides.pop()]} "
            caption += point(f"the {plural(several[0])}", several[1])
    for position, index in enumerate(rest):
        tile = scene.tiles[index]
        if position == 0:
            caption += f" {WORDS[relation(main, tile)[0]]} "
            caption += point(with_article(tile.name), [index])
            caption += f" on {tile.colour}"
        else:
            caption += ", "
            caption += point(with_article(tile.name), [index])
            caption += f" on {tile.colour} {WORDS[relation(tile, main)[0]]} "
            caption += point(f"the {main.name}", [first])
    return caption, phrases


def ask(kind: str, question: str, answer: str) -> dict[str, Any]:
    return {"question": question, "answers": [answer], "type": kind}


def questions_of(random: Random, scene: Scene) -> list[dict[str, Any]]:
    """One question of each type, as far as the scene has an answer to it that is clear."""
    tiles, singles = scene.tiles, scene.singles
    named, sorted_out = random.choice(tiles), random.choice(tiles)
    coloured = tiles[random.choice(singles)]
    # The name that may be there several times; of names that are all there once, any.
    most = max(len(indices) for indices in scene.names.values())
    counted = random.choice([name for name, indices in scene.names.items() if len(indices) == most])
    questions = [
        ask("name", f"what is on {named.colour}?", named.name),
        ask("kind", f"what kind of picture is on {sorted_out.colour}?", sorted_out.kind),
        ask("colour", f"what colour is the {coloured.name} on?", coloured.colour),
        ask("count", f"how many {plural(counted)} are there?", str(most)),
    ]
    clear = [
        (tiles[a], tiles[b], relation(tiles[a], tiles[b])[0])
        for a in singles
        for b in singles
        if a != b and relation(tiles[a], tiles[b])[1]
    ]
    if clear:
        a, b, side = random.choice(clear)
        questions.append(ask("side", f"where is the {a.name} from the {b.name}?", side))
        a, b, side = random.choice(clear)
        right = random.random() < 0.5
        said = side if right else OPPOSITE[side]
        question = f"is the {a.name} {WORDS[said]} the {b.name}?"
        questions.append(ask("relation", question, "yes" if right else "no"))
    return questions


def choices_of(random: Random, scene: Scene, pool: Pool) -> dict[str, Any]:
    """'what is furthest left?' with four names, and four reasons of which one holds: it is on the colour that is there.

    Names and colours of the scene come before others, so that it is not enough to see what the scene holds.
    """
    direction, index = random.choice(sorted(outermost(scene).items()))
    tile = scene.tiles[index]
    choices, answer = shuffled(random, tile.name, list(scene.names), pool.names)
    colours, reason = shuffled(random, tile.colour, [other.colour for other in scene.tiles], list(COLOURS))
    return {
        "question": f"what is {FURTHEST[direction]}?",
        "choices": choices,
        "answer_index": answer,
        "rationale_choices": [f"it is on {colour}, and nothing is {FURTHER[direction]}" for colour in colours],
        "rationale_index": reason,
    }


def shuffled(random: Random, right: str, likely: list[str], others: list[str]) -> tuple[list[str], int]:
    """CHOICES of the words in random order, those of `likely` before others, and the place of the right one."""
    wrong = [word for word in likely if word != right]
    random.shuffle(wrong)
    missing = max(0, CHOICES - 1 - len(wrong))
    wrong += random.sample([word for word in others if word not in likely], missing)
    choices = [right, *wrong[: CHOICES - 1]]
    random.shuffle(choices)
    return choices, choices.index(right)
