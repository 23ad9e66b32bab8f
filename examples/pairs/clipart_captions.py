"""Titles and keywords of Open Clip Art, as their authors typed them, made into captions. Strings in, strings out."""

import html
import re
import unicodedata
from collections.abc import Iterable

CAPTION_KEYWORDS = 4

# Words of file names that name no thing: authors, icon sets, formats, scales.
_STEM_NOISE = {"aiga", "aj", "bb", "bwh", "dev", "fs", "ganson", "gnome", "md", "openclipart", "sm", "svg", "v0"}

# Titles that, once cleaned, describe a file or a collection and not what is seen.
_NOT_A_SUBJECT = re.compile(
    "untitled|unnamed|unknown|drawing|image|picture|misc|(open)?cliparts?|advertising|base|ppls?|hideaway|"
    "aiga symbol signs|etiquette icons|r15 general|road signs|various cliparts"
)
_NOT_A_KEYWORD = re.compile(
    "hash|unsorted|(open)?clipart|menu|work|subnational|special|miscellany|webpage|(lemon )?theme( icon)?|icons?|svg|"
    "recreation|united nations member|signs and symbols|architetto francesco rollandin|"
    "cuptazzacolazione|burnerobjects|cayennepepperfoodspicyhot"
)

_RESPELLED = {
    "airtravel": "air travel",
    "appicon": "application icon",
    "bodypart": "body part",
    "bullethole": "bullet hole",
    "dirigeur": "conductor",
    "icecream": "ice cream",
    "latinamerica": "latin america",
    "map sym": "map symbol",
    "mapsym": "map symbol",
    "musicstuff": "music",
    "musicsym": "music symbol",
    "networksym": "network symbol",
    "northamerica": "north america",
    "noze": "nose",
    "orchester": "orchestra",
    "religholiday": "religious holiday",
    "roadsign": "road sign",
    "roadtravel": "road travel",
    "rubish": "rubbish",
    "signalflag": "signal flag",
    "unitedstates": "united states",
    "usholiday": "us holiday",
    "vegitable": "vegetable",
    "weathersym": "weather symbol",
    "xmas": "christmas",
}

_SUITS = {"c": "clubs", "d": "diamonds", "h": "hearts", "s": "spades"}
_RANKS = {"2": "two", "3": "three", "4": "four", "5": "five", "6": "six", "7": "seven", "8": "eight", "9": "nine"}
_RANKS |= {"10": "ten", "a": "ace", "j": "jack", "k": "king", "q": "queen"}
_COLLECTION = re.compile(r"^clip ?art by .+? - ", re.IGNORECASE)
# A number that tells files apart, not things: 'tigre04', 'horse#2', 'wedding rings 1', 'circles 1 pattern'.
_GLUED_NUMBER = re.compile(r"(?<=[a-z]{3})#?\d+\b")
_SERIAL_NUMBER = re.compile(
    r"\b0+\d+\b|(?<!flag )(?<!repeat )(?<!route )(?<![.\d])\b\d{1,2}(?= (filled )?pattern$|,|$| \()"
)
_BLACK_AND_WHITE = re.compile(r"\(?\b(b ?(and|&|n)? ?w|bw)\b\)?")
_COLOURS = "black|blue|green|grey|orange|purple|red|seagreen|white|yellow"


def readable(text: str | None) -> str:
    """Undo double encodings: HTML entities, UTF-8 or Windows-1252 bytes read as Latin-1. One line, NFC."""
    text = html.unescape(html.unescape(text or ""))
    for encoding in ("utf-8", "cp1252"):
        if re.search("[\x80-\x9f]|Ã.", text):
            try:
                text = text.encode("latin-1").decode(encoding)
            except UnicodeError:
                continue
    return unicodedata.normalize("NFC", " ".join(text.split()))


def without_address(text: str) -> str:
    """Drop e-mail addresses, with the brackets and the label around them."""
    return re.sub(r"\s*[(<]?(e-?mail: *)?[^\s(<]+@[^\s)>]+[)>]?", "", text, flags=re.IGNORECASE).strip()


def clean_title(title: str, author: str = "") -> str:
    """A title in lower case without collection, author, format and file number: 'Tigre04' gives 'tigre'."""
    text = _COLLECTION.sub("", readable(title))
    text = text.replace(f" {author}", "") if author else text
    text = re.sub(r"\.svg$|-aj\b|[_ ](open)?clip ?arts?\b", "", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=[a-zà-ÿ]{3})(?=[A-Z][a-z])", " ", text)  # FatherChristmas
    text = text.lower().replace("_", " ").replace(" '", "'").replace(" |", ",")
    text = re.sub(r",(?=\w)", ", ", re.sub(r"(?<=\w)- ", " - ", text))
    text = re.sub(r"^0\d (?=[a-z])", "", text)  # 00_moonphases
    text = re.sub(r"^(etiquette|svg) (?!icons)| in svg format$", "", text)
    text = re.sub(rf"-(?={_COLOURS}\b)|(?<=\w)-(?=\w+-)|(?<=\w-)-(?=\w)", " ", text)
    text = _SERIAL_NUMBER.sub("", _GLUED_NUMBER.sub("", _BLACK_AND_WHITE.sub(", black and white", text)))
    text = re.sub(r"\s*\(([^()]*)\)", r", \1", text)  # 'lemon (slice)' gives 'lemon, slice'
    text = re.sub(r"\s+,|,\s*,", ",", " ".join(text.split()))
    return text.strip(" ,.;:-#")


def clean_stem(stem: str, author: str) -> str:
    """What a file name says of its subject: 'apple_wedge_bw' gives 'apple wedge, black and white'."""
    text = re.sub(r"_\d_symbol_\d+c?m_bwh$", "_map_symbol", stem)
    text = re.sub(r"[_.\-]+", "_", text).strip("_")
    text = re.sub(r"(?<=[a-z])\d$", "", text)  # aiga_stairs_up1
    slug = re.sub(r"[^a-z0-9]+", "_", author.lower()).strip("_")
    # Upstream's file names end in the author's name, cut off at 24 characters, and a serial number or letter.
    for length in range(len(slug), 2, -1):
        cut, found = re.subn(rf"_{slug[:length].strip('_')}(_\w{{1,2}})?$", "", text, flags=re.IGNORECASE)
        if found:
            text = cut
            break
    text = clean_title(text.replace("_", " "))
    return " ".join(word for word in text.split() if len(word) > 1 and word not in _STEM_NOISE)


def says_more(stem: str, title: str) -> bool:
    """Whether the cleaned file name has a word that no word of the cleaned title begins with, nor the reverse."""
    known = re.findall(r"\w+", title)
    return any(
        not any(word.startswith(other) or other.startswith(word) for other in known)
        for word in re.findall(r"[^\W\d_]{3,}", stem)
    )


def playing_card(stem: str) -> str | None:
    """'white_d_6' gives 'six of diamonds playing card'; None when `stem` is not such a name."""
    if re.fullmatch(r"back\d+", stem):
        return "playing card back"
    style, _, rest = stem.partition("_")
    suit, _, rank = rest.partition("_")
    if suit == "jk":
        return f"{style} joker playing card, {'red' if rank == 'r' else 'black'}"
    return f"{_RANKS[rank]} of {_SUITS[suit]} playing card" if suit in _SUITS and rank in _RANKS else None


def is_subject(text: str, author: str = "") -> bool:
    """Whether a cleaned title or file name names something.

    It does when it has a word of three letters or more with a vowel, and is neither an address nor the name of a file,
    of a set, or of the author.
    """
    words = re.findall(r"[^\W\d_]+", text)
    names = re.findall(r"[^\W\d_]+", author.lower())
    of_author = all(any(name.startswith(word) for name in names) for word in words)
    if _NOT_A_SUBJECT.fullmatch(text) or "@" in text or of_author:
        return False
    return any(word in ("cd", "tv") or (len(word) >= 3 and re.search("[aeiouyà-ÿ]", word)) for word in words)


def flag_title(title: str, *, place: bool) -> str:
    """'Canada - Alberta' gives 'flag of alberta, canada'. `place` is False for organisations and movements."""
    if re.search(r"flag|dannebrog|semaphore", title):
        return re.sub(r"(?<=[a-z])flag\b", " flag", title)
    match = re.match(r"historic\s*-\s*(.+)", title)
    historic, title = ("historic ", match[1]) if match else ("", title)
    if not place:
        return f"{title} flag"
    whole, dash, part = title.partition(" - ")
    return f"{historic}flag of {part}, {whole}" if dash else f"{historic}flag of {title}"


def clean_keywords(keywords: Iterable[str | None], author: str) -> tuple[str, ...]:
    """Keywords in lower case, in order, each once, without addresses, hashes, file paths and the author's own name."""
    kept: dict[str, None] = {}
    for keyword in keywords:
        text = readable(keyword).lower().replace("_", " ").strip(" .,;:")
        text = _RESPELLED.get(text, text)
        if not 3 <= len(text) <= 24 or _NOT_A_KEYWORD.fullmatch(text) or text == author.lower():
            continue
        if re.search(r"[^\w '&-]|[\d_]", text):  # addresses, hashes, mangled encodings
            continue
        kept[text] = None
    return tuple(kept)


def _same(word: str, other: str) -> bool:
    """One word, or forms of one: 'cat' and 'cats', 'transport' and 'transportation'."""
    short, long = sorted((word, other), key=len)
    return long in (short, short + "s") or (len(short) > 3 and long.startswith(short))


def clipart_caption(title: str, keywords: Iterable[str]) -> str:
    """The title, then the first CAPTION_KEYWORDS keywords that say new words only: 'red apple, fruit, food'."""
    title = title.replace(" - ", ", ").replace(" -", " ")
    said = re.findall(r"\w+", title)
    parts = [title]
    for keyword in keywords:
        words = re.findall(r"\w+", keyword)
        known = any(_same(word, other) for word in words for other in said) or keyword in title.replace(" ", "")
        if known or (keyword == "sign" and "flag" in said):
            continue
        said += words
        parts.append(keyword)
        if len(parts) > CAPTION_KEYWORDS:
            break
    return ", ".join(parts)
