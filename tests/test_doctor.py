"""`vlmfast doctor`: what it says, that it finds a broken backend, and the half that needs a GPU, rehearsed on a CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from vlmfast import doctor
from vlmfast.cli import main
from vlmfast.cli.doctor import lines

OPS = {"info_nce", "sigmoid_loss", "linear_cross_entropy", "patch_embed", "media_attention", "gated_residual"}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")


def test_every_op_that_has_backends_has_a_problem() -> None:
    assert doctor.implementations().keys() == doctor.MAKERS.keys() == OPS


@without_gpu
def test_report_in_terminal_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "doctor.json"
    assert main(["doctor", "--json", str(path)]) == 0
    printed, found = capsys.readouterr().out, json.loads(path.read_text())
    assert found.keys() == {"machine", "backends", "kernels", "checks", "not_checked", "passed"}
    assert found["passed"] is True
    assert {"vlmfast", "torch", "triton", "transformers", "processor", "threads", "core", "gpus"} <= set(
        found["machine"]
    )
    asked = {(row["op"], row["backend"], row["dtype"]) for row in found["checks"]}
    for op, impls in doctor.implementations().items():
        assert found["backends"]["cpu"][op].keys() == found["backends"]["cuda"][op].keys() == impls.keys()
        assert found["backends"]["cuda"][op]["torch"] is None
        assert "cuda" in found["backends"]["cuda"][op]["cpu"]
        runs = {name for name in impls if found["backends"]["cpu"][op][name] is None}
        assert {(op, name, dtype) for name in runs for dtype in doctor.DTYPES} <= asked
        assert op in printed
    outputs = next(row["outputs"] for row in found["checks"] if row["op"] == "media_attention")
    assert outputs.keys() == {"output", "q gradient", "k gradient", "v gradient"}
    assert outputs["output"].keys() == {"error", "eager", "bound"}
    missing = (
        "not checked: every op on CUDA tensors, bandwidth, matrix products, shares of the roofline: needs a CUDA GPU"
    )
    assert missing in printed
    assert "on cpu tensors" in printed.split("not checked: ")[1]


@pytest.mark.parametrize("op", sorted(OPS))
def test_a_wrong_backend_is_found(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    impls = doctor.implementations()[op]
    right = impls["torch"]

    def gradients(*args: object) -> object:
        found = right.backward(*args)
        return type(found)(t * 1.001 for t in found)

    assert doctor.check(op, "torch", torch.float32, "cpu")["passed"]
    monkeypatch.setitem(impls, "torch", dataclasses.replace(right, backward=gradients))
    row = doctor.check(op, "torch", torch.float32, "cpu")
    assert not row["passed"]
    assert any("gradient" in failure for failure in row["failures"])


@without_gpu
def test_a_broken_backend_makes_the_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    impls = doctor.implementations()["gated_residual"]

    def broken(*args: object) -> object:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(impls, "torch", dataclasses.replace(impls["torch"], forward=broken))
    monkeypatch.setattr(doctor, "implementations", lambda: {"gated_residual": impls})
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: no such kernel" in printed
    assert "3 wrong" in printed


@without_gpu
def test_a_gpu_that_is_of_no_use_leaves_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "devices", lambda: ["cpu", "cuda"])
    asked = []

    def reasons(device: str) -> doctor.Reasons:
        asked.append(device)
        return {"gated_residual": {"torch": None}}

    monkeypatch.setattr(doctor, "reasons", reasons)
    found = doctor.report()
    assert asked == ["cpu", "cuda"]  # once each, before the checks
    assert [row["passed"] for row in found["checks"]] == [True] * 3 + [False] * 3
    assert not found["passed"]
    assert "bandwidth, matrix products, shares of the roofline: " in found["not_checked"][0]
    assert "6 checks, 3 wrong" in lines(found)


def test_a_problem_that_cannot_be_made_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> doctor.Problem:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(doctor, "runnable", lambda device: [("gated_residual", "torch")])
    monkeypatch.setattr(doctor, "make_problem", full)
    assert doctor.check("gated_residual", "torch", torch.float32, "cpu")["failures"] == ["OutOfMemoryError: no memory"]
    timed = doctor.timings("cpu", {})
    assert [row["failure"] for row in timed] == ["OutOfMemoryError: no memory"] * 3


def test_a_file_that_cannot_be_written_is_said_before_the_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "report", lambda: pytest.fail("checks ran"))
    assert main(["doctor", "--json", str(tmp_path)]) == 2
    assert f"--json must be a file that can be written; got {tmp_path}" in capsys.readouterr().err


def test_numbers_that_are_not_finite_have_a_line() -> None:
    outputs = {"output": {"error": None, "eager": 0.0, "bound": 1.0}}
    check = {"op": "info_nce", "backend": "torch", "device": "cpu", "dtype": "float32", "passed": False}
    found = {"machine": {}, "backends": {}, "kernels": {}, "not_checked": []}
    text = lines({**found, "checks": [{**check, "outputs": outputs, "failures": []}]})
    assert next(line for line in text if "info_nce" in line).split()[-2:] == ["WRONG", "inf"]


def test_backends_are_asked_whatever_is_forced_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = doctor.reasons("cpu")
    monkeypatch.setenv("VLMFAST_BACKEND", "cuda")
    assert doctor.reasons("cpu") == expected


def test_speed_as_on_a_gpu_rehearsed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton, whose interpreter takes a second for what is repeated here."""
    timed_here = [(op, backend) for op, backend in doctor.runnable("cpu") if backend != "triton"]
    assert {op for op, _ in timed_here} == OPS
    monkeypatch.setattr(doctor, "runnable", lambda device: timed_here)
    rates = doctor.rates("cpu", side=64, copied=1 << 16, rounds=1)
    assert rates.keys() == {"bandwidth", "float32 ieee", *doctor.DTYPES}
    assert min(rates.values()) > 0
    timed = doctor.timings("cpu", rates, large=False, rounds=1)
    assert [(row["op"], row["backend"]) for row in timed[::3]] == timed_here
    for row in timed:
        assert row["share"] == pytest.approx(row["roofline_seconds"] / row["seconds"])
    found = {"machine": doctor.facts(), "backends": {}, "kernels": {}, "checks": [], "not_checked": []}
    text = "\n".join(lines({**found, "rates": rates, "timings": timed}))
    assert "GB/s; matrix products, TFLOP/s: float16" in text
    assert "info_nce, torch" in text


def test_the_roofline_is_the_longer_of_products_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "runnable", lambda device: [("info_nce", "torch")])
    problem = doctor.make_problem("info_nce", torch.float32, "cpu")
    slow_products = dict.fromkeys(doctor.DTYPES, 1.0) | {"bandwidth": 1e30}
    slow_memory = dict.fromkeys(doctor.DTYPES, 1e30) | {"bandwidth": 1.0}
    for peak, expected in ((slow_products, problem.operations), (slow_memory, problem.bytes)):
        row = doctor.timings("cpu", peak, large=False, rounds=1)[0]
        assert row["roofline_seconds"] == pytest.approx(expected)
