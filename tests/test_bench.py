"""`vlmfast bench`: tiny sizes from end to end, and comparison with an older run."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmfast import bench
from vlmfast.bench import compare, harness, media_attention, sigmoid_loss, step, timing
from vlmfast.bench.report import lines_plot, machine, print_table, to_json
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
    op: str,
    providers: list[str],
    size: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    if op == "step":  # the other one shows that a process is started for it
        monkeypatch.setattr(step, "memory_of", lambda name, *arguments: bench.load(name).memory(*arguments))
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
        assert shlex.join(one.sizes) in printed
        assert shlex.join(one.providers) in printed
        for size in one.sizes:
            one.check(size)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["convolution"],
            f"op must be one of {', '.join(bench.NAMES)}; got 'convolution'",
        ),
        (["info_nce", "--providers", "nobody"], "--providers of info_nce must be of 'vlmfast kept' 'vlmfast streamed'"),
        (
            ["step", "sigmoid_loss", "--providers", "nobody"],
            "of step must be of vlmfast original; of sigmoid_loss must",
        ),
        (
            ["info_nce", "--sizes", "64", "many"],
            "--sizes of info_nce must be like 1024 4096 8192 (it is A or AxB, whole numbers of at least 1); got 'many'",
        ),
        (["info_nce", "--sizes", "-5"], "at least 1); got '-5'"),
        (["sigmoid_loss", "--sizes", "64x16x9"], "at least 1); got '64x16x9'"),
        (["patch_embed", "--sizes", "0"], "at least 1); got '0'"),
        (["patch_embed", "--sizes", "16x0"], "at least 1); got '16x0'"),
        (["patch_embed", "--sizes", "500"], "PATCH must divide 224, the images' width); got '500'"),
        (["info_nce", "step", "--providers", "original", "--sizes", "64"], "must leave an op that knows one of both"),
        (["media_attention", "--sizes", "3 images"], "got '3 images'"),
        (["step", "--sizes", "b32x0"], "got 'b32x0'"),
        (["step", "--rounds", "0"], "--rounds must be at least 1; got 0"),
    ],
)
def test_errors_name_what_was_expected(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_several_ops_are_given_the_names_that_they_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load, asked = bench.load, []

    def fake(name: str) -> harness.Bench:
        return dataclasses.replace(load(name), measure=lambda *given: asked.append((name, *given[:2])) or [])

    monkeypatch.setattr(bench, "load", fake)
    options = ["--providers", "vlmfast", "original", "open_clip", "--sizes", "16x4", "tinyx2", "--dtypes", "float32"]
    assert main(["bench", *options]) == 0
    assert asked == [
        ("info_nce", ["open_clip"], "16x4"),
        ("sigmoid_loss", ["vlmfast", "open_clip"], "16x4"),
        ("patch_embed", ["vlmfast"], "16x4"),
        ("step", ["vlmfast", "original"], "tinyx2"),
    ]
    assert "media_attention: not measured, it knows none of the sizes named" in capsys.readouterr().out


def full(*args: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory\nand more")


def refused(*args: object) -> Any:
    raise RuntimeError("no such kernel")


def measure(op: str, name: str, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Rows of a tiny size of the op, where the provider named is such a function."""
    monkeypatch.setattr(f"vlmfast.bench.{'harness' if op == 'sigmoid_loss' else op}.memory_of", lambda *args: None)
    if op == "sigmoid_loss":
        providers = {**sigmoid_loss.OP.providers, name: harness.Provider(lambda device: function, 6)}
        one = harness.bench_of(dataclasses.replace(sigmoid_loss.OP, providers=providers))
        return one.measure(["vlmfast", "transformers"], "64x16", "float32", 1)
    if op == "media_attention":
        monkeypatch.setitem(media_attention.CASES, "tiny", media_attention.Case(1, 16, 2, "core"))
        monkeypatch.setitem(media_attention.PROVIDERS, name, media_attention.Provider(function))
        return media_attention.measure_case(["vlmfast", "open_flamingo"], "tiny", "float32", 1)
    trainer = step.trainer
    monkeypatch.setattr(step, "trainer", lambda own, *args: function if own == name else trainer(own, *args))
    return step.measure(["vlmfast", "original"], "tinyx2", "float32", 1)


@pytest.mark.parametrize("op", ["sigmoid_loss", "media_attention", "step"])
def test_a_provider_that_fails_has_no_row_and_the_others_have(
    op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if op == "step":
        pytest.importorskip("transformers")
    other = {"sigmoid_loss": "transformers", "media_attention": "open_flamingo", "step": "original"}[op]
    with monkeypatch.context() as changed:
        assert [one["provider"] for one in measure(op, "vlmfast", full, changed)] == [other]
    assert "  vlmfast: no row (OutOfMemoryError: CUDA out of memory)\n" in capsys.readouterr().out
    with monkeypatch.context() as changed:
        assert [one["provider"] for one in measure(op, other, refused, changed)] == ["vlmfast"]
    assert f"  {other}: no row (RuntimeError: no such kernel)\n" in capsys.readouterr().out
    with monkeypatch.context() as changed, pytest.raises(RuntimeError, match="no such kernel"):
        measure(op, "vlmfast", refused, changed)


def test_memory_that_is_full_in_a_later_round_leaves_the_others() -> None:
    calls = iter([None, None])
    functions = {"vlmfast": lambda: full() if next(calls, "no more") else None, "other": lambda: None}
    measured, _ = harness.interleave(functions, {}, 3, "cpu")
    assert measured.keys() == {"other"}
    assert len(measured["other"]) == 3


@pytest.mark.parametrize(("first", "counted"), [(0.06, 1), (0.02, 2), (0.001, 20)])
def test_the_first_call_of_a_turn_tells_how_many_are_timed(
    monkeypatch: pytest.MonkeyPatch, first: float, counted: int
) -> None:
    clock, calls = [0.0], 0

    def call() -> None:
        nonlocal calls
        clock[0] += first if calls % (1 + counted) == 0 else 0.005 * (calls % (1 + counted))
        calls += 1

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    times = harness.interleave({"peer": call}, {}, 3, "cpu")[0]["peer"]
    assert times == pytest.approx([0.005 * (1 + counted) / 2] * 3)
    assert calls == 3 * (1 + counted)


def test_errors_relative_to_zero_are_numbers() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert harness.relative(torch.zeros(3), zero) == 0
    assert harness.relative(torch.tensor([0.0, 1.5]), torch.tensor([0.0, 1.0]).double()) == 0.5


def test_json_has_null_where_a_number_is_not_finite() -> None:
    found = {"rows": [{"a": math.nan, "b": (math.inf, 1.5, 2)}]}
    assert json.loads(to_json(found)) == {"rows": [{"a": None, "b": [None, 1.5, 2]}]}


def test_plot_and_table_of_rows_without_some_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    measured = {"rounds": 1, "gflops": 1.0, "gemm_gflops": {"library": 1.0}, "share_of_gemm": 1.0}
    absent = {"peak_extra_mb": None, "error": {"value": None, "gradient": math.nan}}
    rows = [row(size={"N": n, "D": d}, **measured, **absent) for d in (16, 32) for n in (64, 128)]
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    lines_plot(rows, machine(), "sigmoid_loss", tmp_path / "two.png")
    time, memory, error = pyplot.gcf().axes
    assert [line.get_label() for line in time.get_lines()] == ["vlmfast, D 16", "vlmfast, D 32"]
    assert [list(line.get_xdata()) for line in time.get_lines()] == [[64, 128]] * 2
    assert not [*memory.get_lines(), *error.get_lines()]
    print_table("sigmoid_loss", "open_clip", rows)
    assert capsys.readouterr().out.count("nan") == 3 * len(rows)


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


def test_a_row_that_is_no_more_is_gone() -> None:
    text, slower = compare.compare([row(), row(provider="other")], [row()])
    assert not slower
    assert text[2].split() == ["other,", "N", "256", "D", "64,", "float32", "gone"]


def test_rows_that_a_run_would_have_too() -> None:
    rows = [row(), row(provider="other"), row(dtype="float16"), row(size={"N": 1, "D": 1}), row(case="tinyx2")]
    assert compare.asked(rows, None, ["N 256 D 64"], ["float32"]) == rows[:2]
    assert compare.asked(rows, ["vlmfast"], ["N 256 D 64", "tinyx2"], ["float32"]) == [rows[0], rows[4]]


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
    fake = dataclasses.replace(one, measure=lambda *args: [])
    assert main([*options, "--compare", str(same)]) == 2
    printed = capsys.readouterr()
    assert printed.out.split()[-1] == "gone"
    assert f"{same} has no row in common with this run of sigmoid_loss" in printed.err
    fake = dataclasses.replace(one, measure=refused)
    other = write(tmp_path / "other.json")
    assert main([*options, "--compare", str(other)]) == 2
    assert f"{other} has no row of the providers, sizes and dtypes" in capsys.readouterr().err
    assert main(options) == 2
    assert "RuntimeError: no such kernel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"machine": {**machine(), "processor": "another"}}, "has processor 'another'; here it is"),
        ({"machine": {**machine(), "threads": 999}}, "has threads 999; here it is"),
        ({"rows": [row(dtype="float16")]}, "has dtypes float16; measured: float32"),
        ({"op": "info_nce"}, "is of info_nce; measured: sigmoid_loss"),
        ({"rows": None}, "must be a JSON that vlmfast bench wrote"),
        ({"machine": "here"}, "must be a JSON that vlmfast bench wrote"),
        ({"rows": [row(), row(size=None, rows=256)]}, "row 1 of .* has no size or case"),
        ({"rows": [row(provider=None, median_s=0, iqr_s=None)]}, "row 0 of .* has no provider, median_s, iqr_s"),
        ({"rows": [1]}, "every row must have provider, size or case, dtype, .*; row 0 of .* has no keys"),
    ],
)
def test_compare_refuses_what_cannot_be_compared(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path = write(tmp_path / "old.json", **changes)
    with pytest.raises(ValueError, match=expected):
        compare.load(path, machine(), ["sigmoid_loss"], ["float32"])


# Of `vlmfast bench`, which names them by the op; other scripts of bench/ write files of their own kind there.
RESULTS = [
    path
    for path in sorted((Path(__file__).parents[1] / "bench" / "results").glob("*.json"))
    if path.stem.startswith(bench.NAMES)
]


@pytest.mark.parametrize("old", RESULTS, ids=lambda path: path.stem)
def test_results_of_the_repository_can_be_read(old: Path) -> None:
    written = json.loads(old.read_text())
    op = next(name for name in bench.NAMES if old.stem.startswith(name))
    dtypes = sorted({one["dtype"] for one in written["rows"]})
    found = compare.load(old, written["machine"], [op], dtypes)
    text, slower = compare.compare(found["rows"], found["rows"])
    assert not slower
    assert all(" 1.00" in line for line in text[1:])
