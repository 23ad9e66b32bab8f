"""What the pictures of the bundled pairs are called in scenes, and the pictures of each name."""

import json
import re
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

PERSON = "(?:person|man|woman) "
ROLE = "(?:wo)?(?:man )?"  # "firefighter", "man firefighter", "woman firefighter"

# kind -> name -> (the pairs' category, pattern of the whole caption without skin tones). A name is here when the val
# pairs hold a picture of it; patterns leave out what a person would not call so ("dog" is no "hot dog").
NAMES: dict[str, dict[str, tuple[str, str]]] = {
    "work": {
        name: ("people", ROLE + name)
        for name in (
            *("firefighter", "police officer", "judge", "cook", "artist", "singer", "detective"),
            *("astronaut", "guard"),
        )
    },
    "sport": {
        "golfer": ("people", PERSON + "golfing"),
        "surfer": ("people", PERSON + "surfing"),
        "swimmer": ("people", PERSON + "swimming"),
        "climber": ("people", PERSON + "climbing"),
        "cyclist": ("people", PERSON + "(?:mountain )?biking"),
        "rower": ("people", PERSON + "rowing boat"),
        "handballer": ("people", PERSON + "playing handball"),
        "gymnast": ("people", PERSON + "cartwheeling"),
        "yogi": ("people", PERSON + "in lotus position"),
    },
    "character": {
        "mage": ("people", ROLE + "mage"),
        "fairy": ("people", ROLE + "fairy"),
        "superhero": ("people", ROLE + "superhero"),
        "mermaid": ("people", "mer(?:maid|man|person)"),
        "santa": ("people", r"(?:mx|santa|mrs\.?) claus"),
        "stickman": ("people", "(?:stick|blue) man.*"),
        "vampire": ("people", ROLE + "vampire"),
    },
    "gesture": {
        "kiss": ("people", "kiss, .*"),
        "couple": ("people", ".*holding hands"),
        "handshake": ("hands and body parts", "handshake"),
        "shrug": ("people", PERSON + "shrugging"),
        "facepalm": ("people", PERSON + "facepalming"),
        "fist": ("hands and body parts", ".*fist"),
        "thumb": ("hands and body parts", "thumbs (?:up|down)"),
        "bow": ("people", PERSON + "bowing"),
    },
    "sign": {
        "card": ("playing cards", ".* playing card, .*"),
        "flag": ("flags", "flag of .*"),
        "semaphore": ("flags", "naval semaphore .*"),
        "arrow": (
            "signs and symbols|computers and electronics",
            r"(?!.*(?:s\b|phone)).*arrow(?!s).*|arrow .*, buttons",
        ),
        "warning": ("signs and symbols", "(?!.*(?:biohazard|symbol)).*(?:warning, sign|warning)"),
        "ban": ("signs and symbols|transportation", "no (?!entrance).*"),
        "led": ("signs and symbols", "led .*"),
        "pattern": ("decorative patterns", ".* pattern"),
        "smiley": ("smileys and emotions", "smiley.*"),
    },
    "nature": {
        "bird": (
            "animals",
            r"(?!.*(?:wing|bat|platter|contour|duck, yellow ii|tux, penguin, linux))"
            ".*(?:bird|penguin|duck|owl|swan|dove).*|parrot|rooster|eagle|turkey|flamingo|chicken",
        ),
        "tree": (
            "plants|signs and symbols|holidays and parties",
            r"(?!.*(?:leaf|balls|pruner|saw|fern|scene)).*\btree\b.*|palmtree, .*",
        ),
        "flower": ("plants", r"(?!.*tree).*(?:flower|\brose\b|tulip|daisy|hyacinth|fiori|daffodil).*"),
        "moon": ("sky and weather", r"(?!.*phases,? science).*\bmoon\b.*"),
        "cat": ("animals", r"(?!.*(?:toy|dog)).*(?:\bcat\b|feline|felin[io]|tiger|lion).*"),
        "dog": ("animals", r"(?!.*cat).*\bdog\b.*"),
        "insect": ("animals", r"(?!lumaca|mostri).*(?:\binsect\b).*|ant|beetle|spider|butterfly"),
    },
    "thing": {
        "clock": ("clocks", r"(?!minute).*\bclock\b.*|.*o'clock|.*-thirty"),
        "book": ("office, school and art supplies", r"(?!newspaper).*\bbooks?\b.*"),
        "hat": ("clothing", r"(?!.*crown).*\b(?:hat|fedora|cap|sombrero)\b.*"),
        "shoe": ("clothing", r"(?!.*print).*\b(?:shoes?|boot|sandal)\b.*"),
        "house": ("buildings", r".*\b(?:house|hotel)\b.*"),
        "car": (
            "transportation",
            r"(?!road runner|.*(?:railway|tram|light|blueprint)).*(?:\bcar\b|redcar|automobile|truck|jeep|celebi?r).*",
        ),
        "ice cream": ("food and drink", ".*(?:glace|ice cream).*"),
        "apple": ("food and drink", r"(?!.*(?:juice|pie|eris)).*\bapple\b.*"),
        "globe": ("places and maps", r".*\bglobe\b.*"),
        "violin": ("music", r".*\b(?:violin|cello)\b.*"),
        "candy": ("food and drink", r"(?!pudim|candied|marsh).*(?:candy|lollipop).*"),
    },
}  # fmt: skip
HELD_OUT = ("astronaut", "guard", "vampire", "smiley", "insect", "globe", "violin", "candy")
KIND = {name: kind for kind, names in NAMES.items() for name in names}

TONE = r"(?:medium-light|medium-dark|light|medium|dark)"
SKIN_TONE = re.compile(rf" with {TONE}(?: and {TONE})? skin tones?")


class Picture(NamedTuple):
    key: str
    webp: bytes


def name_of(pair: dict[str, Any]) -> str | None:
    """The name that a pair's picture has in scenes, or None."""
    caption = SKIN_TONE.sub("", pair["caption"])
    for names in NAMES.values():
        for name, (categories, pattern) in names.items():
            if pair["category"] in categories.split("|") and re.fullmatch(pattern, caption):
                return name
    return None


@cache
def read_pictures(pairs: Path, split: str) -> dict[str, list[Picture]]:
    """Name -> pictures of the pairs' own split 'train' or 'val', in the order of the shards."""
    found: dict[str, list[Picture]] = {name: [] for name in KIND}
    for pair, picture in read_pairs(pairs, split):
        name = name_of(pair)
        if name is not None:
            found[name].append(picture)
    missing = [name for name, pictures in found.items() if not pictures]
    if missing:
        raise ValueError(f"pairs: {pairs} holds no {split} picture of {', '.join(missing)}; expected the bundled pairs")
    return found


def read_pairs(pairs: Path, split: str) -> Iterator[tuple[dict[str, Any], Picture]]:
    """Every pair of a split: its JSON and its picture."""
    for path in sorted(pairs.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, data in content.items():
            key, extension = name.split(".")
            if extension == "webp":
                yield json.loads(content[f"{key}.json"]), Picture(key, data)


def plural(name: str) -> str:
    if name.endswith(("s", "sh", "ch")):
        return f"{name}es"
    if name.endswith("y") and name[-2] not in "aeo":
        return f"{name[:-1]}ies"
    return {"stickman": "stickmen", "superhero": "superheroes"}.get(name, f"{name}s")


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
