from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmfast.cli import bench_data, main

PAIRS = Path(__file__).parents[2] / "examples" / "pairs" / "val-00000.tar"


def test_bench_data_measures_ours_and_open_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("open_clip")
    assert main(["bench", "data", "--images=3", "--rounds=2", "--image-size=64", f"--output={tmp_path}"]) == 0
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "data.json").read_text())
    assert found["size"]["images"] == 3
    rows = {row["provider"]: row for row in found["rows"]}
    assert list(rows) == ["vlmfast train", "open_clip train", "vlmfast eval", "open_clip eval"]
    for name, row in rows.items():
        assert name in text
        assert row["rounds"] == 2
        assert row["images_per_second"] == pytest.approx(1e3 / row["ms"])
    assert rows["open_clip train"]["ratio"] == 1
    assert rows["vlmfast eval"]["ratio"] > 0


def test_bench_data_reads_shards_and_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "data", f"--data={PAIRS}", "--images=5", "--rounds=1", "--image-size=32"]) == 0
    assert "5 images of" in capsys.readouterr().out
    assert main(["bench", "data", f"--data={tmp_path}/none.tar"]) == 2
    assert "none.tar" in capsys.readouterr().err
    assert main(["bench", "data", "--rounds=0"]) == 2
    assert "--rounds: expected at least 1, got 0" in capsys.readouterr().err


def test_images_that_are_made_are_jpegs_of_400_to_800_pixels() -> None:
    for data in islice(bench_data.made_images(), 3):
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "JPEG"
            assert all(400 <= side <= 800 for side in image.size)
            assert 2 < 8 * len(data) / np.prod(image.size) < 4
