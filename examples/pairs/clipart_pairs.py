"""Pairs from Open Clip Art: Debian's PNG renderings, the titles and keywords of the RDF metadata of the SVG files."""

import struct
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from clipart_captions import (
    clean_keywords,
    clean_stem,
    clean_title,
    clipart_caption,
    flag_title,
    is_subject,
    playing_card,
    readable,
    says_more,
    without_address,
)
from pair import Pair, installed, nearly_blank, on_canvas
from PIL import Image

PNG = ("/usr/share/openclipart/png", "openclipart-png")
SVG = ("/usr/share/openclipart/svg", "openclipart-svg")

# The longest folder that holds a file decides. A folder missing here (shapes, unsorted) is left out of the set.
CATEGORIES = {
    "animals": "animals",
    "buildings": "buildings",
    "buildings/furniture": "household objects",
    "computer": "computers and electronics",
    "containers": "household objects",
    "decorations": "decorative patterns",
    "education": "office, school and art supplies",
    "electronics": "computers and electronics",
    "food": "food and drink",
    "geography": "places and maps",
    "geography/astronomy": "sky and weather",
    "logos": "signs and symbols",
    "office": "office, school and art supplies",
    "office/telephone": "computers and electronics",
    "people": "people",
    "people/bodypart": "hands and body parts",
    "people/clothing": "clothing",
    "people/smilies": "smileys and emotions",
    "plants": "plants",
    "recreation": "sports and games",
    "recreation/art": "office, school and art supplies",
    "recreation/games/cards/bordered": "playing cards",
    "recreation/games/cards/cardbacks": "playing cards",
    "recreation/games/cards/ornamental": "playing cards",
    "recreation/games/cards/simple": "playing cards",
    "recreation/games/cards/white": "playing cards",
    "recreation/holiday": "holidays and parties",
    "recreation/music": "music",
    "recreation/party": "holidays and parties",
    "recreation/religion": "religion",
    "science": "science and medicine",
    "science/astronomy": "sky and weather",
    "signs_and_symbols": "signs and symbols",
    "signs_and_symbols/clocks": "clocks",
    "signs_and_symbols/flags": "flags",
    "signs_and_symbols/money": "money",
    "signs_and_symbols/weather": "sky and weather",
    "special/patterns": "decorative patterns",
    "tools": "tools and weapons",
    "transportation": "transportation",
    "transportation/roadsigns": "signs and symbols",
}
ICON_SETS = {"computer/icons"}
ICON_SET_TITLES = ("blueberry - iconset", "lemon svg theme", "svg buttons")

# A title on this many differently named files or more is taken for the name of their collection.
COLLECTION_SIZE = 3
MAX_PIXELS = 40_000_000  # a handful of posters above this would cost gigabytes to decode
MIN_SIDE = 32  # pixels of the longer side

_DC = "{http://purl.org/dc/elements/1.1/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_CC = "{http://web.resource.org/cc/}"


@dataclass(frozen=True)
class Work:
    """The metadata of one file. `path` is relative to the collection's root, without a suffix."""

    path: PurePosixPath
    title: str
    keywords: tuple[str | None, ...]
    author: str
    licence: str


def category_folder(folder: str) -> str | None:
    """The folder of CATEGORIES that `folder` ('animals/birds') belongs to, or None when it is left out."""
    parts = folder.split("/")
    prefixes = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    if ICON_SETS.intersection(prefixes):
        return None
    return next((prefix for prefix in prefixes if prefix in CATEGORIES), None)


def read_work(svg: Path, path: PurePosixPath) -> Work:
    """Read title, keywords, author and licence from the RDF block of `svg`."""
    work = ElementTree.parse(svg).find(f".//{_CC}Work")
    if work is None:
        return Work(path, "", (), "", "")
    subjects = tuple(node.text for node in work.findall(f"{_DC}subject/{_RDF}Bag/{_RDF}li"))
    licence = work.find(f"{_CC}license")
    return Work(
        path=path,
        title=readable(work.findtext(f"{_DC}title")),
        keywords=subjects,
        author=without_address(readable(work.findtext(f"{_DC}creator/{_CC}Agent/{_DC}title"))),
        licence="" if licence is None else licence.get(f"{_RDF}resource", ""),
    )


def png_size(png: Path) -> tuple[int, int]:
    """(width, height) from the header alone: Pillow refuses to open the largest files of the collection."""
    with png.open("rb") as file:
        width, height = struct.unpack(">II", file.read(24)[16:])
    return width, height


def without_margin(image: Image.Image) -> Image.Image:
    """Crop a transparent margin: many drawings lie small on a whole page. An opaque image is left as it is."""
    image = image.convert("RGBA")
    return image.crop(image.getchannel("A").getbbox())


def _works(dropped: Counter[str]) -> Iterator[Work]:
    png, svg = installed(*PNG), installed(*SVG)
    for file in sorted(png.rglob("*.png")):
        if file.is_symlink():  # the collection links one drawing into several folders
            continue
        path = PurePosixPath(file.relative_to(png).as_posix()).with_suffix("")
        if category_folder(str(path.parent)) is None:
            dropped["clip art: folder of shapes, icon sets or unsorted files"] += 1
            continue
        work = read_work(svg / f"{path}.svg", path)
        if "publicdomain" not in work.licence.lower():
            dropped["clip art: not declared public domain in its own metadata"] += 1
        elif work.title.lower().startswith(ICON_SET_TITLES):
            dropped["clip art: member of an icon set"] += 1
        else:
            yield work


def is_flag(work: Work) -> bool:
    """Whether a file in the folders of signs is a flag: some lie outside the folder of flags, and not all in it are."""
    words = {(keyword or "").strip().lower() for keyword in work.keywords}
    return work.path.parts[0] == "signs_and_symbols" and not words.isdisjoint({"flag", "flags"})


def category_of(work: Work) -> str:
    """The category of a file that is not left out."""
    folder = category_folder(str(work.path.parent))
    if folder is None:
        raise ValueError(f"work.path: expected a path in a folder of CATEGORIES, got {work.path}")
    return "flags" if is_flag(work) else CATEGORIES[folder]


def subject_of(work: Work, files_of_title: int) -> str:
    """What `work` shows: the cleaned title; the file name when that says more and the title is a collection's; or ''.

    `files_of_title` is the number of files with this title.
    """
    folder = str(work.path.parent)
    if folder.startswith("recreation/games/cards/") and (card := playing_card(work.path.name)):
        return card
    if work.title and not without_address(work.title):  # the file name is then made of the address too
        return ""
    title, stem = clean_title(without_address(work.title), work.author), clean_stem(work.path.name, work.author)
    candidates = [title, stem]
    if files_of_title >= COLLECTION_SIZE and says_more(stem, title):
        candidates.reverse()
    subject = next((text for text in candidates if is_subject(text, work.author)), "")
    if subject and is_flag(work):
        return flag_title(subject, place="miscellany" not in folder and "pirates" not in folder)
    return subject


def clipart_pairs(dropped: Counter[str]) -> Iterator[Pair]:
    """Yield the pairs of the collection in the order of their paths; count what is left out in `dropped`.

    Raises:
        MissingPackageError: a Debian package is not installed.
    """
    works = list(_works(dropped))
    files_of_title = Counter(work.title.lower() for work in works)
    for work in works:
        folder = str(work.path.parent)
        subject = subject_of(work, files_of_title[work.title.lower()])
        if not subject:
            dropped["clip art: no title that names a subject"] += 1
            continue
        png = Path(PNG[0]) / f"{work.path}.png"
        width, height = png_size(png)
        if width * height > MAX_PIXELS:
            dropped[f"clip art: over {MAX_PIXELS // 10**6} megapixels"] += 1
            continue
        if max(width, height) < MIN_SIDE:
            dropped[f"clip art: under {MIN_SIDE} pixels"] += 1
            continue
        with Image.open(png) as opened:
            image = on_canvas(without_margin(opened))
        if nearly_blank(image):
            dropped["clip art: nearly blank"] += 1
            continue
        keywords = clean_keywords(work.keywords, work.author)
        group, _, subgroup = folder.partition("/")
        yield Pair(
            image=image,
            caption=clipart_caption(subject, keywords),
            category=category_of(work),
            source="openclipart",
            title=without_address(work.title),
            keywords=keywords,
            group=group,
            subgroup=subgroup,
            author=work.author or None,
        )
