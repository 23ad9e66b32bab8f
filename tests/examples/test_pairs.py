"""The bundled pairs: the committed shards against their README, the tokenizer, and the build script's own functions."""

import hashlib
import importlib
import io
import json
import re
import sys
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
PAIRS = ROOT / "examples" / "pairs"
TOKENIZER = ROOT / "vlmfast" / "data" / "tokenizer"


@dataclass(frozen=True)
class Committed:
    key: str
    image: Image.Image
    text: dict[str, Any]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.image.convert("RGB").tobytes()).hexdigest()


def read_shards(pattern: str) -> list[Committed]:
    found = []
    for path in sorted(PAIRS.glob(pattern)):
        with tarfile.open(path) as tar:
            contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name, content in contents.items():
            key, suffix = name.split(".")
            if suffix == "webp":
                image = Image.open(io.BytesIO(content))
                image.load()
                found.append(Committed(key, image, json.loads(contents[f"{key}.json"])))
    return found


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Committed]]:
    return {"train": read_shards("train-*.tar"), "val": read_shards("val-*.tar")}


@pytest.fixture(scope="module")
def readme_rows() -> dict[str, list[int]]:
    """The numbers of every table row of the README that has only numbers after its first cell."""
    rows = re.findall(r"^\| ([^|]+) ((?:\| \d+ )+)\|$", (PAIRS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {name: [int(number) for number in re.findall(r"\d+", cells)] for name, cells in rows}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The build scripts: they import each other as a script's siblings, so their folder has to be on the path."""
    monkeypatch.syspath_prepend(str(PAIRS))
    names = ("pair", "clipart_captions", "clipart_pairs", "emoji_pairs", "build", "train_tokenizer")
    saved = {name: sys.modules.pop(name, None) for name in names}
    yield {name: importlib.import_module(name) for name in names}
    for name, module in saved.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


class TestShards:
    def test_counts_are_the_readme_s(
        self, splits: dict[str, list[Committed]], readme_rows: dict[str, list[int]]
    ) -> None:
        for split, samples in splits.items():
            sources = Counter(sample.text["source"] for sample in samples)
            assert [sources["emoji"], sources["openclipart"], len(samples)] == readme_rows[split]

    def test_categories_are_the_readme_s(
        self, splits: dict[str, list[Committed]], readme_rows: dict[str, list[int]]
    ) -> None:
        counts = {split: Counter(sample.text["category"] for sample in samples) for split, samples in splits.items()}
        stated = {name: row for name, row in readme_rows.items() if len(row) == 2}
        assert {name: [counts["train"][name], counts["val"][name]] for name in counts["train"]} == stated
        assert set(counts["val"]) <= set(stated)

    def test_distinct_captions_are_the_readme_s(self, splits: dict[str, list[Committed]]) -> None:
        distinct = {split: len({sample.text["caption"] for sample in samples}) for split, samples in splits.items()}
        readme = " ".join((PAIRS / "README.md").read_text(encoding="utf-8").split())
        val, train = (len(splits[split]) for split in ("val", "train"))
        assert f"{distinct['val']} distinct among the {val} of val, {distinct['train']} among the {train}" in readme

    def test_siblings_are_the_readme_s(
        self, splits: dict[str, list[Committed]], modules: dict[str, ModuleType]
    ) -> None:
        def family(sample: Committed) -> tuple[str, ...]:
            if sample.text["source"] == "openclipart":
                return "openclipart", sample.text["caption"]
            parts = re.split(": |, ", sample.text["title"])
            return "emoji", *(part for part in parts if not part.endswith("skin tone"))

        seen = {family(sample) for sample in splits["train"]}
        count = Counter(sample.text["source"] for sample in splits["val"] if family(sample) in seen)
        readme = " ".join((PAIRS / "README.md").read_text(encoding="utf-8").split())
        assert f"{count['emoji']} have the same emoji in another skin tone in train" in readme
        assert f"{count['openclipart']} have a train pair with the same caption" in readme

    def test_no_image_is_in_both_splits_or_twice_in_one(self, splits: dict[str, list[Committed]]) -> None:
        digests = [sample.digest for samples in splits.values() for sample in samples]
        assert len(digests) == len(set(digests)) == 7107

    def test_images_are_64_rgb_and_named_by_their_pixels(self, splits: dict[str, list[Committed]]) -> None:
        for samples in splits.values():
            for sample in samples:
                assert (sample.image.format, sample.image.mode, sample.image.size) == ("WEBP", "RGB", (64, 64))
                assert sample.key == sample.digest[:16]

    def test_split_is_the_hash_s(self, splits: dict[str, list[Committed]], modules: dict[str, ModuleType]) -> None:
        for split, samples in splits.items():
            assert {modules["build"].split_of(sample.digest) for sample in samples} == {split}

    def test_texts(self, splits: dict[str, list[Committed]]) -> None:
        for samples in splits.values():
            for text in (sample.text for sample in samples):
                assert text["caption"].strip() == text["caption"] == text["caption"].lower() != ""
                assert text["category"]
                assert "@" not in text["caption"] + text["title"] + text.get("author", "")

    def test_sources_are_mixed(self, splits: dict[str, list[Committed]]) -> None:
        sources = [sample.text["source"] == "emoji" for sample in splits["train"]]
        for start in range(0, len(sources) - 500, 500):
            assert 0.4 < np.mean(sources[start : start + 500]) < 0.6

    def test_members_carry_no_trace_of_the_build(self) -> None:
        for path in PAIRS.glob("*.tar"):
            with tarfile.open(path) as tar:
                traces = {(m.mode, m.mtime, m.uid, m.gid, m.uname, m.gname, m.type) for m in tar}
            assert traces == {(0o644, 0, 0, 0, "", "", tarfile.REGTYPE)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


class TestTokenizer:
    def test_special_tokens(self, tokenizer: Any) -> None:
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 0)
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 1)
        assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|startoftext|>", 2)
        assert len(tokenizer) <= 4096
        assert tokenizer.padding_side == "right"

    def test_every_caption_comes_back(self, tokenizer: Any, splits: dict[str, list[Committed]]) -> None:
        captions = [sample.text["caption"] for samples in splits.values() for sample in samples]
        ids = tokenizer(captions)["input_ids"]
        assert all(row[0] == 2 and row[-1] == 1 for row in ids)
        assert tokenizer.batch_decode(ids, skip_special_tokens=True) == captions

    @pytest.mark.parametrize("text", ["A Red APPLE", "日本語 🦄", "\t\n\x00\x7f", "".join(map(chr, range(1, 0x250)))])
    def test_any_text_comes_back_up_to_case(self, tokenizer: Any, text: str) -> None:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == unicodedata.normalize("NFC", text).lower()

    def test_batches_are_padded_on_the_right(self, tokenizer: Any) -> None:
        batch = tokenizer(["cat", "a much longer caption than that"], padding=True)
        assert batch["input_ids"][0][-1] == 0
        assert batch["attention_mask"][0][:3] == [1, 1, 1]
        assert batch["attention_mask"][0][-1] == 0

    def test_training_again_gives_the_committed_file(self, modules: dict[str, ModuleType], tmp_path: Path) -> None:
        train_tokenizer = modules["train_tokenizer"]
        train_tokenizer.train(train_tokenizer.captions(PAIRS)).save_pretrained(tmp_path)
        ours, committed = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path, TOKENIZER))
        assert ours["model"]["vocab"] == committed["model"]["vocab"]
        assert ours["model"]["merges"] == committed["model"]["merges"]

    def test_missing_shards_are_named(self, modules: dict[str, ModuleType], tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
            modules["train_tokenizer"].captions(tmp_path)


EMOJI_CAPTIONS = [
    ("grinning face", "grinning face"),
    ("flag: Côte d\N{RIGHT SINGLE QUOTATION MARK}Ivoire", "flag of côte d'ivoire"),
    ("keycap: #", "keycap #"),
    ("Japanese \N{LEFT DOUBLE QUOTATION MARK}here\N{RIGHT DOUBLE QUOTATION MARK} button", 'japanese "here" button'),
    ("waving hand: light skin tone", "waving hand with light skin tone"),
    ("man: medium-dark skin tone, bald", "bald man with medium-dark skin tone"),
    ("woman: light skin tone, red hair", "woman with light skin tone and red hair"),
    ("family: man, woman, girl, boy", "family of man, woman, girl and boy"),
    ("kiss: woman, man, dark skin tone, light skin tone", "kiss, woman and man with dark and light skin tones"),
]

TITLES = [
    ("Tigre04", "tigre"),
    ("horse#2", "horse"),
    ("circles 1 pattern", "circles pattern"),
    ("M16", "m16"),
    ("Route 66", "route 66"),
    ("Probability from 0.0 to 1.0", "probability from 0.0 to 1.0"),
    ("international maritime signal flag 3", "international maritime signal flag 3"),
    ("Croissant (B &amp; W)", "croissant, black and white"),
    ("Lemon (Slice)", "lemon, slice"),
    ("FatherChristmas", "father christmas"),
    ("Clipart by Steve Hall - United States - Alabama", "united states - alabama"),
    ("L&Atilde;&copy;zard", "lézard"),
    ("Mikol\xe1\x9a Ale\x9a", "mikoláš aleš"),
    ("arrow-up-blue", "arrow up blue"),
    ("05_fullmoon_openclipart", "fullmoon"),
]


class TestCaptions:
    @pytest.mark.parametrize(("name", "caption"), EMOJI_CAPTIONS)
    def test_emoji(self, modules: dict[str, ModuleType], name: str, caption: str) -> None:
        assert modules["emoji_pairs"].emoji_caption(name) == caption

    def test_skin_tones_share_a_name(self, modules: dict[str, ModuleType]) -> None:
        without = modules["emoji_pairs"].without_skin_tone
        assert without("man: medium-dark skin tone, beard") == without("man: beard") == "man: beard"
        assert without("handshake: light skin tone, dark skin tone") == "handshake"

    @pytest.mark.parametrize(("title", "cleaned"), TITLES)
    def test_title(self, modules: dict[str, ModuleType], title: str, cleaned: str) -> None:
        assert modules["clipart_captions"].clean_title(title) == cleaned

    @pytest.mark.parametrize(
        ("stem", "author", "cleaned"),
        [
            ("apple_wedge_bw", "Gerald G.", "apple wedge, black and white"),
            ("aiga_stairs_up1", "Jean-Victor Balin", "stairs up"),
            ("bullet_hole_linda_kim_ac", "Linda Kim", "bullet hole"),
            ("stylized_yoga_person_ger_01", "Gerald G.", "stylized yoga person"),
            ("azalea_0_symbol_1m_bwh", "Bryce W. Harrington", "azalea map symbol"),
        ],
    )
    def test_file_name(self, modules: dict[str, ModuleType], stem: str, author: str, cleaned: str) -> None:
        assert modules["clipart_captions"].clean_stem(stem, author) == cleaned

    @pytest.mark.parametrize(
        ("text", "author", "expected"),
        [
            ("apple", "", True),
            ("cd", "", True),
            ("untitled", "", False),
            ("sm 001", "", False),
            ("70a005", "", False),
            ("someone@example.org", "", False),
            ("francesco rollandin", "Architetto Francesco Rollandin", False),
        ],
    )
    def test_subject(self, modules: dict[str, ModuleType], text: str, author: str, expected: bool) -> None:
        assert modules["clipart_captions"].is_subject(text, author) is expected

    def test_playing_card(self, modules: dict[str, ModuleType]) -> None:
        card = modules["clipart_captions"].playing_card
        assert card("white_d_6") == "six of diamonds playing card"
        assert card("bordered_s_k") == "king of spades playing card"
        assert card("simple_jk_r") == "simple joker playing card, red"
        assert card("two_cats_tess_brady_01") is None

    def test_flag(self, modules: dict[str, ModuleType]) -> None:
        flag = modules["clipart_captions"].flag_title
        assert flag("canada - alberta", place=True) == "flag of alberta, canada"
        assert flag("historic - imperial china", place=True) == "historic flag of imperial china"
        assert flag("kansasflag", place=True) == "kansas flag"
        assert flag("nato", place=False) == "nato flag"

    def test_keywords(self, modules: dict[str, ModuleType]) -> None:
        keywords = [
            None,
            "",
            "hash(0x8a09f34)",
            "HASH",
            "Icecream",
            "food",
            "Food",
            "http://a.b",
            "Ann Lee",
            "new_york",
        ]
        cleaned = modules["clipart_captions"].clean_keywords(keywords, "Ann Lee")
        assert cleaned == ("ice cream", "food", "new york")

    def test_caption_says_no_word_twice(self, modules: dict[str, ModuleType]) -> None:
        caption = modules["clipart_captions"].clipart_caption
        assert caption("red apple", ("apples", "fruit", "red fruit", "food")) == "red apple, fruit, food"
        assert caption("bus", ("transport", "transportation")) == "bus, transport"
        assert caption("hat", ("alpha", "beta", "gamma", "delta", "epsilon")) == "hat, alpha, beta, gamma, delta"

    def test_collection_title_gives_way_to_the_file_name(self, modules: dict[str, ModuleType]) -> None:
        clipart = modules["clipart_pairs"]
        title = "Clipart by Nicu Buculei - nosmoke"
        work = clipart.Work(PurePosixPath("signs_and_symbols/awards/trophy"), title, (), "Nicu Buculei", "")
        assert clipart.subject_of(work, files_of_title=11) == "trophy"
        assert clipart.subject_of(work, files_of_title=1) == "nosmoke"
        assert clipart.subject_of(replace(work, title="ann@example.org"), files_of_title=1) == ""


class TestBuild:
    def pair(self, modules: dict[str, ModuleType], caption: str, colour: str) -> Any:
        return modules["pair"].Pair(
            image=Image.new("RGB", (64, 64), colour), caption=caption, category="flags", source="emoji",
            title=caption, keywords=(), group="Flags", subgroup="flag",
        )  # fmt: skip

    def test_split_depends_on_the_last_32_bits(self, modules: dict[str, ModuleType]) -> None:
        split_of = modules["build"].split_of
        assert split_of("f" * 56 + f"{69:08x}") == split_of("0" * 56 + f"{1069:08x}") == "val"
        assert split_of("f" * 56 + f"{70:08x}") == split_of("0" * 56 + f"{999:08x}") == "train"

    def test_of_identical_images_the_shortest_caption_stays(self, modules: dict[str, ModuleType]) -> None:
        build = modules["build"]
        captions = ["flag of bouvet island", "flag of norway", "flag of svalbard"]
        dropped: Counter[str] = Counter()
        samples = [build.encode(self.pair(modules, caption, "red")) for caption in captions]
        samples.append(build.encode(self.pair(modules, "blue", "blue")))
        kept = build.distinct(samples, dropped)
        assert sorted(sample.pair.caption for sample in kept) == ["blue", "flag of norway"]
        assert dropped == {"emoji: same pixels as another pair": 2}

    def test_transparency_is_white_and_the_aspect_ratio_stays(self, modules: dict[str, ModuleType]) -> None:
        image = Image.new("RGBA", (100, 50), (255, 0, 0, 255))
        image.paste((0, 0, 0, 0), (50, 0, 100, 50))
        pixels = np.asarray(modules["pair"].on_canvas(image))
        assert pixels.shape == (64, 64, 3)
        assert pixels[32, 5].tolist() == [255, 0, 0]
        assert pixels[32, 60].tolist() == pixels[5, 5].tolist() == [255, 255, 255]

    def test_nearly_blank(self, modules: dict[str, ModuleType]) -> None:
        image = Image.new("RGB", (64, 64), "white")
        assert modules["pair"].nearly_blank(image)
        image.paste("black", (0, 0, 8, 8))
        assert not modules["pair"].nearly_blank(image)

    def test_missing_package_is_named(
        self, modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:  # fmt: skip
        font = (str(tmp_path / "absent.ttf"), "fonts-noto-color-emoji")
        monkeypatch.setattr(modules["emoji_pairs"], "FONT", font)
        monkeypatch.setattr("sys.argv", ["build.py", "--output", str(tmp_path / "out")])
        assert modules["build"].main() == 1
        assert "install the Debian package fonts-noto-color-emoji" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_two_builds_of_a_subset_give_the_same_bytes(self, modules: dict[str, ModuleType], tmp_path: Path) -> None:
        build = modules["build"]
        contents = []
        for folder in (tmp_path / "first", tmp_path / "second"):
            dropped: Counter[str] = Counter()
            try:
                pairs = list(islice(modules["emoji_pairs"].emoji_pairs(dropped), 150))
                pairs += islice(modules["clipart_pairs"].clipart_pairs(dropped), 30)
            except modules["pair"].MissingPackageError as error:
                pytest.skip(str(error))
            build.write_shards(build.distinct(map(build.encode, pairs), dropped), folder)
            contents.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
        assert contents[0] == contents[1]
        assert list(contents[0]) == [*(f"train-{shard:05d}.tar" for shard in range(8)), "val-00000.tar"]
