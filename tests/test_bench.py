"""`vlmfast bench`: tiny sizes from end to end, and comparison with an older run."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from vlmfast import bench
from vlmfast.bench import compare
from vlmfast.bench.report import machine
from vlmfast.cli import main

ROW = {
    "provider": "vlmfast", "size": {"N": 256, "D": 64}, "dtype": "float32", "device": "cpu", "median_s": 1.0,
    "iqr_s": 0.1,
}  # fmt: skip


def row(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(ROW), **changes}


def write(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({"op": "sigmoid_loss", "machine": machine(), "rows": [row()], **changes}))
    return path


@pytest.mark.parametrize(
    ("op", "providers", "size"),
    [
        ("sigmoid_loss", ["vlmfast", "transformers"], "64x16"),
        ("step", ["vlmfast", "original"], "tinyx2"),
    ],
)
def test_tiny_sizes_from_end_to_end(
    op: str, providers: list[str], size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    options = ["--sizes", size, "--dtypes", "float32", "--rounds", "2", "--output", str(tmp_path)]
    assert main(["bench", op, "--providers", *providers, *options]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / f"{op}.json").read_text())
    assert (tmp_path / f"{op}.png").read_bytes().startswith(b"\x89PNG")
    assert found["op"] == op
    assert found["machine"]["threads"] > 0
    assert [one["provider"] for one in found["rows"]] == providers
    for one in found["rows"]:
        assert one["rounds"] == 2
        assert one["median_s"] > 0
        assert one["peak_extra_mb"] is not None
        assert one["error"]["value"] < 1e-4
        assert one["provider"] in printed


def test_flamingo_step_is_patched_and_keeps_its_loss() -> None:
    pytest.importorskip("flamingo_pytorch")
    from vlmfast.bench import step

    losses = []
    for provider in step.PROVIDERS:
        model, batch = step.make(provider, "tiny-flamingox2", "cpu")
        names = {type(module).__module__.split(".")[0] for module in model.modules()}
        assert ("flamingo_pytorch" in names) == (provider == "original")
        losses.append(step.CASES["tiny-flamingo"].loss(model, batch).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_list_names_sizes_and_providers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    for name in bench.NAMES:
        one = bench.load(name)
        assert name in printed
        assert all(size in printed for size in one.sizes)
        for size in one.sizes:
            one.check(size)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["convolution"],
            f"op must be one of {', '.join(bench.NAMES)}; got 'convolution'",
        ),
        (["info_nce", "--providers", "nobody"], "--providers of info_nce must be of vlmfast kept"),
        (["info_nce", "--sizes", "many"], "--sizes of info_nce must be like 1024, 4096, 8192; got 'many'"),
        (["media_attention", "--sizes", "3 images"], "got '3 images'"),
        (["step", "--sizes", "b32x0"], "got 'b32x0'"),
        (["step", "--rounds", "0"], "--rounds must be at least 1; got 0"),
    ],
)
def test_errors_name_what_was_expected(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 1
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("now", "slower"),
    [(1.0, False), (1.19, False), (1.21, True), (0.5, False)],
)
def test_slower_is_beyond_both_runs_noise(now: float, slower: bool) -> None:
    text, found = compare.compare([row()], [row(median_s=now)])
    assert found is slower
    assert ("SLOWER" in text[1]) is slower
    assert f"{now:.2f}" in text[1]


def test_a_steady_run_is_not_slower_by_a_percent() -> None:
    assert not compare.compare([row(iqr_s=0.0)], [row(iqr_s=0.0, median_s=1.02)])[1]
    assert compare.compare([row(iqr_s=0.0)], [row(iqr_s=0.0, median_s=1.05)])[1]


def test_a_row_that_the_old_run_lacks_is_new() -> None:
    text, slower = compare.compare([row()], [row(provider="other", median_s=9.0)])
    assert not slower
    assert text[1].split()[-1] == "new"


def test_exit_code_of_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["bench", "sigmoid_loss", "--providers", "vlmfast", "--sizes", "64x16", "--dtypes", "float32"]
    measured = row(size={"N": 64, "D": 16})
    one = bench.load("sigmoid_loss")
    fake = dataclasses.replace(one, measure=lambda *args: [measured])
    monkeypatch.setattr(bench, "load", lambda name: fake)
    quick = write(tmp_path / "quick.json", rows=[{**measured, "median_s": 0.5}])
    same = write(tmp_path / "same.json", rows=[measured])
    assert main([*options, "--compare", str(same)]) == 0
    assert "SLOWER" not in capsys.readouterr().out
    assert main([*options, "--compare", str(quick)]) == 1
    assert "SLOWER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"machine": {**machine(), "processor": "another"}}, "has processor 'another'; here it is"),
        ({"machine": {**machine(), "threads": 999}}, "has threads 999; here it is"),
        ({"rows": [row(dtype="float16")]}, "has dtypes float16; measured: float32"),
        ({"op": "info_nce"}, "is of info_nce; measured: sigmoid_loss"),
        ({"rows": None}, "must be a JSON that vlmfast bench wrote"),
    ],
)
def test_compare_refuses_what_cannot_be_compared(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path = write(tmp_path / "old.json", **changes)
    with pytest.raises(ValueError, match=expected):
        compare.load(path, machine(), ["sigmoid_loss"], ["float32"])


def test_results_of_the_repository_can_be_read() -> None:
    old = Path(__file__).parents[1] / "bench" / "results" / "media_attention_epyc_zen5_2_cores.json"
    header = json.loads(old.read_text())["machine"]
    found = compare.load(old, header, ["media_attention"], ["float32", "bfloat16"])
    text, slower = compare.compare(found["rows"], found["rows"])
    assert not slower
    assert all(" 1.00" in line for line in text[1:])
