"""Pairs from Noto Color Emoji: the names and groups of Unicode's emoji-test.txt, the keywords of CLDR."""

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pair import MissingPackageError, Pair, installed, nearly_blank, on_canvas
from PIL import Image, ImageDraw, ImageFont, features

FONT = ("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", "fonts-noto-color-emoji")
EMOJI_TEST = ("/usr/share/unicode/emoji/emoji-test.txt", "unicode-data")
ANNOTATIONS = ("/usr/share/unicode/cldr/common/annotations/en.xml", "unicode-cldr-core")
DERIVED_ANNOTATIONS = ("/usr/share/unicode/cldr/common/annotationsDerived/en.xml", "unicode-cldr-core")

BITMAP_SIZE = 109  # the one size of the font's bitmap strike
GLYPH = (136, 128)  # pixels of a glyph at that size

# A subgroup decides where it is listed, its group otherwise.
CATEGORIES = {
    "Smileys & Emotion": "smileys and emotions",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food and drink",
    "Travel & Places": "places and maps",
    "Activities": "sports and games",
    "Objects": "household objects",
    "Symbols": "signs and symbols",
    "Flags": "flags",
    "hand-fingers-open": "hands and body parts",
    "hand-fingers-partial": "hands and body parts",
    "hand-single-finger": "hands and body parts",
    "hand-fingers-closed": "hands and body parts",
    "hands": "hands and body parts",
    "hand-prop": "hands and body parts",
    "body-parts": "hands and body parts",
    "plant-flower": "plants",
    "plant-other": "plants",
    "place-building": "buildings",
    "place-religious": "buildings",
    "transport-ground": "transportation",
    "transport-water": "transportation",
    "transport-air": "transportation",
    "hotel": "household objects",
    "time": "clocks",
    "sky & weather": "sky and weather",
    "event": "holidays and parties",
    "arts & crafts": "office, school and art supplies",
    "clothing": "clothing",
    "sound": "music",
    "music": "music",
    "musical-instrument": "music",
    "phone": "computers and electronics",
    "computer": "computers and electronics",
    "light & video": "computers and electronics",
    "book-paper": "office, school and art supplies",
    "money": "money",
    "mail": "office, school and art supplies",
    "writing": "office, school and art supplies",
    "office": "office, school and art supplies",
    "lock": "tools and weapons",
    "tool": "tools and weapons",
    "science": "science and medicine",
    "medical": "science and medicine",
    "religion": "religion",
}

_PLAIN_QUOTES = {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}
_PERSONS = {"man", "woman", "person", "boy", "girl"}
_LINE = re.compile(r"^(?P<codes>[0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (?P<name>.+)$")


def joined(words: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def emoji_caption(name: str) -> str:
    """A CLDR short name as a phrase, in lower case: 'flag: Norway' gives 'flag of norway'.

    What follows a colon is a country, a key, persons ('family: man, boy'), or traits ('man: light skin tone, beard').
    """
    name = name.lower().translate(_PLAIN_QUOTES)
    head, colon, tail = name.partition(": ")
    if not colon:
        return name
    if head in ("flag", "keycap"):
        return f"flag of {tail}" if head == "flag" else f"keycap {tail}"
    parts = tail.split(", ")
    persons = [part for part in parts if part in _PERSONS]
    tones = [part.removesuffix(" skin tone") for part in parts if part.endswith(" skin tone")]
    traits = [part for part in parts if part not in persons and not part.endswith(" skin tone")]
    if "bald" in traits:
        traits.remove("bald")
        head = f"bald {head}"
    if persons:
        head += (" of " if head == "family" else ", ") + joined(persons)
    if tones:
        traits.insert(0, f"{joined(tones)} skin tone{'s' * (len(tones) > 1)}")
    return f"{head} with {joined(traits)}" if traits else head


def without_skin_tone(name: str) -> str:
    """The short name all skin tones of one emoji share."""
    head, _, tail = name.partition(": ")
    rest = [part for part in tail.split(", ") if part and not part.endswith(" skin tone")]
    return f"{head}: {', '.join(rest)}" if rest else head


def _annotations() -> dict[str, tuple[str, ...]]:
    keywords: dict[str, tuple[str, ...]] = {}
    for path in (ANNOTATIONS, DERIVED_ANNOTATIONS):
        for node in ElementTree.parse(installed(*path)).iter("annotation"):
            if node.get("type") is None:
                keywords[node.attrib["cp"]] = tuple(word.strip() for word in (node.text or "").split("|"))
    return keywords


def _entries(emoji_test: Path) -> Iterator[tuple[str, str, str, str]]:
    """(sequence, name, group, subgroup) of every fully-qualified emoji, in the file's order."""
    group = subgroup = ""
    for line in emoji_test.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif match := _LINE.match(line):
            yield "".join(chr(int(code, 16)) for code in match["codes"].split()), match["name"], group, subgroup


def emoji_pairs(dropped: Counter[str]) -> Iterator[Pair]:
    """Yield a pair for every fully-qualified emoji that the font draws as one glyph; count the others in `dropped`.

    Raises:
        MissingPackageError: a Debian package is not installed, or Pillow has no raqm layout, without which sequences
            would be drawn as their parts.
    """
    if not features.check("raqm"):
        raise MissingPackageError("Pillow finds no raqm layout: install the Debian package libfribidi0, which it loads")
    font = ImageFont.truetype(installed(*FONT), BITMAP_SIZE, layout_engine=ImageFont.Layout.RAQM)
    one_glyph = font.getlength("\N{GRINNING FACE}")
    keywords = _annotations()
    for sequence, name, group, subgroup in _entries(installed(*EMOJI_TEST)):
        if font.getlength(sequence) > one_glyph:
            dropped["emoji: not a single glyph"] += 1
            continue
        image = Image.new("RGBA", GLYPH)
        ImageDraw.Draw(image).text((0, 0), sequence, font=font, embedded_color=True)
        image = on_canvas(image)
        if nearly_blank(image):
            dropped["emoji: nearly blank"] += 1
            continue
        yield Pair(
            image=image,
            caption=emoji_caption(name),
            category=CATEGORIES.get(subgroup) or CATEGORIES[group],
            source="emoji",
            title=name,
            keywords=keywords.get(sequence.replace("\ufe0f", ""), ()),
            group=group,
            subgroup=subgroup,
        )
