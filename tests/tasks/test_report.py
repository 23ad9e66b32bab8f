import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from vlmfast.data import Collator
from vlmfast.tasks.page import DPI, RIGHT, WRONG
from vlmfast.tasks.report import HEADER, write_report
from vlmfast.tasks.retrieval import evaluate


def share(path: Path, colour: str) -> float:
    """Share of the picture's pixels in exactly this colour."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return float((pixels == ImageColor.getrgb(colour)).all(axis=2).mean())


@pytest.fixture
def pairs(write_pairs: Any) -> Any:
    return write_pairs(("red", "red"), ("yellow", "yellow"), ("cyan", "cyan"), ("blue", "blue"), ("green", "green"))


def test_right_and_wrong_matches_are_marked(model: Any, write_pairs: Any, tokenizer: Any, tmp_path: Path) -> None:
    # One caption for all: every answer is right under the caption protocol, four of five wrong under the other.
    alike = write_pairs(*[(colour, "red") for colour in ("red", "yellow", "cyan", "blue", "green")])
    paths = {}
    for positives in ("caption", "pair"):
        paths[positives] = tmp_path / f"{positives}.png"
        evaluation = evaluate(model, alike, Collator(tokenizer, max_length=4), positives=positives)
        write_report(paths[positives], evaluation, alike)
    assert share(paths["caption"], WRONG) == 0
    assert 0 < share(paths["pair"], RIGHT) < share(paths["caption"], RIGHT)
    assert share(paths["pair"], WRONG) > 0


def test_the_picture_repeats_and_the_seed_picks_the_queries(
    model: Any, pairs: Any, tokenizer: Any, tmp_path: Path
) -> None:
    evaluation = evaluate(model, pairs, Collator(tokenizer, max_length=4))
    for name, seed in (("a", 0), ("b", 0), ("c", 3)):
        write_report(tmp_path / name, evaluation, pairs, num_queries=2, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    below_header = slice(int(HEADER * DPI), None)  # which names the seed
    first, third = (np.asarray(Image.open(tmp_path / name))[below_header] for name in ("a", "c"))
    assert not np.array_equal(first, third)


def test_a_wrong_match_further_down_is_shown_with_its_rank(
    model: Any, write_pairs: Any, tokenizer: Any, tmp_path: Path
) -> None:
    colours = ("red", "orange", "yellow", "green", "cyan", "blue")
    dataset = write_pairs(*[(colour, colour) for colour in colours])
    red, cyan = tokenizer.convert_tokens_to_ids(["red", "cyan"])
    with torch.no_grad():
        model.table[[red, cyan]] = model.table[[cyan, red]]
    evaluation = evaluate(model, dataset, Collator(tokenizer, max_length=4))
    assert evaluation.text_to_image.recall[5] < 1  # so that the rank is drawn
    write_report(tmp_path / "a.png", evaluation, dataset)
    assert share(tmp_path / "a.png", RIGHT) > 0


@pytest.mark.parametrize(
    "caption", ["cost $5 or $x_1$", r"$\frac{$", "x" * 500, "a very long caption " * 40, "%s {} \\"]
)
def test_any_caption_can_be_drawn(model: Any, write_pairs: Any, tokenizer: Any, tmp_path: Path, caption: str) -> None:
    dataset = write_pairs(("red", caption))
    write_report(tmp_path / "a.png", evaluate(model, dataset, Collator(tokenizer, max_length=4)), dataset)
    assert Image.open(tmp_path / "a.png").size[0] > 1000


def test_num_queries_is_checked(model: Any, pairs: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_queries: expected at least 1, got 0"):
        write_report(
            tmp_path / "a.png", evaluate(model, pairs, Collator(tokenizer, max_length=4)), pairs, num_queries=0
        )


def test_matplotlib_is_imported_by_write_report_alone() -> None:
    code = "import sys, vlmfast.tasks.retrieval; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
