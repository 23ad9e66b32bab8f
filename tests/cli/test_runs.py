"""vlmfast train and vlmfast eval from start to end: killed, stopped, resumed, on two processes, on faulty data."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import PAIRS, STEPS, assert_same_run, command, logged, run, run_on_two, start, write_pairs
from PIL import Image
from safetensors.torch import load_file

from vlmfast.cli import main
from vlmfast.training import last_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    output_dir = tmp_path_factory.mktemp("finished")
    done = run(command(data, output_dir))
    assert done.returncode == 0, done.stderr
    assert "skipped: nothing" in done.stdout
    return output_dir


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_in_mid_step_and_resumed(data: Path, finished: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(command(data, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: last_checkpoint(tmp_path) is not None, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "model.safetensors").exists()

    refused = run(command(data, tmp_path))
    assert refused.returncode == 1
    assert "pass --resume to go on" in refused.stderr
    other = run(command(data, tmp_path, "--resume", "--seed=7"))
    assert other.returncode == 1
    assert "seed was 42 and is 7" in other.stderr

    resumed = run(command(data, tmp_path, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    assert_same_run(tmp_path, finished)


def test_a_signal_saves_a_checkpoint(data: Path, finished: Path, tmp_path: Path) -> None:
    """Here SIGTERM; the others in tests/training/test_ending.py."""
    number = signal.SIGTERM
    process = subprocess.Popen(
        command(data, tmp_path, "--save-steps=1000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:  # the bar has begun to move
        if f"1/{STEPS}" in line or f"2/{STEPS}" in line:
            break
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name} after step" in output
    resumed = run(command(data, tmp_path, "--save-steps=1000", "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path, finished)


def again(capsys: pytest.CaptureFixture[str], data: Path, output_dir: Path, *extra: str) -> tuple[int, str]:
    """The same command in this process: its exit code, and what it printed."""
    code = main(command(data, output_dir, *extra)[3:])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out + captured.err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_complete_run_is_left_as_it_is(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    before = contents(copy)
    code, text = again(capsys, data, copy, "--resume")
    assert (code, contents(copy)) == (0, before)
    assert "is complete" in text
    (copy / "model.safetensors").write_bytes(b"")  # of the last checkpoint it is made again
    assert again(capsys, data, copy, "--resume")[0] == 0
    assert contents(copy).keys() == before.keys()
    assert_same_run(copy, finished)


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_before(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "files.json").unlink()  # as before the final model was saved
    os.truncate(copy / f"checkpoint-{STEPS}" / "optimizer.pt", 100)
    code, text = again(capsys, data, copy, "--resume")
    assert code == 0
    assert f"checkpoint-{STEPS} is damaged: " in text
    assert "optimizer.pt has 100 bytes" in text
    assert "resuming from" in text
    assert_same_run(copy, finished)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-grad-norm=5"], "max_grad_norm was 1.0 and is 5.0"),
        (["--data-seed=1"], "data_seed was None and is 1"),
        (["--cache-chunk=8"], "cache_chunk was 4 and is 8"),
        (["--optim=sgd"], "optim was 'adamw_torch"),
        ([], "fingerprint was"),
    ],
)
def test_what_decides_the_run_may_not_change(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    caption = data / "007.txt"
    text = caption.read_text()
    try:
        if not options:
            caption.write_text(text.replace("square", "circle"))
        code, printed = again(capsys, data, copy, "--resume", *options)
    finally:
        caption.write_text(text)
    assert code == 1
    assert message in printed


def test_what_decides_nothing_may_change(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    code, _ = again(capsys, data, copy, "--resume", "--logging-steps=5", "--dataloader-num-workers=0")
    assert code == 0


def test_a_run_that_diverges_says_so(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = again(capsys, data, tmp_path, "--learning-rate=1e18", "--warmup-steps=0", "--save-steps=1")
    assert code == 1
    assert "the run has diverged: step " in text
    good = last_checkpoint(tmp_path)
    assert f"last good checkpoint is {good}" in text
    assert all(weight.isfinite().all() for weight in load_file(good / "model.safetensors").values())
    assert not (tmp_path / "model.safetensors").exists()


def halves(data: Path, output_dir: Path, *extra: str) -> list[str]:
    """Of one of two processes on gloo with half the batch each."""
    options = ["--per-device-train-batch-size=4", "--ddp-backend=gloo", "--cache-chunk=2"]
    return command(data, output_dir, *options, *extra)


def test_two_processes_equal_one(data: Path, finished: Path, tmp_path: Path) -> None:
    """The same global batches, so the same losses up to rounding; also when the scheduler stops torchrun halfway."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*torchrun, *halves(data, tmp_path, "--save-steps=1000")[1:]],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if f"2/{STEPS}" in line:
            break
    process.send_signal(signal.SIGTERM)  # which torchrun sends on to the ranks and all their processes
    process.communicate(timeout=120)
    stopped = last_checkpoint(tmp_path)
    assert stopped is not None
    assert stopped.name != f"checkpoint-{STEPS}"

    printed = run_on_two(halves(data, tmp_path, "--save-steps=1000", "--resume"))
    assert f"resuming from {stopped}" in printed
    assert logged(tmp_path) == pytest.approx(logged(finished), rel=1e-4)


def test_evaluates_what_was_trained(data: Path, finished: Path, tmp_path: Path) -> None:
    scores, report = tmp_path / "scores.json", tmp_path / "report.png"
    done = run([
        sys.executable, "-m", "vlmfast", "eval", "--checkpoint", str(finished), "--data", str(data),
        "--output", str(scores), "--report", str(report), "--device=cpu",
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "image -> text" in done.stdout
    assert json.loads(scores.read_text())["num_pairs"] == PAIRS
    assert Image.open(report).width > 500


def test_faults_are_counted_and_reported(data: Path, tmp_path: Path) -> None:
    faulty = tmp_path / "faulty"
    faulty.mkdir()
    for path in data.iterdir():
        (faulty / path.name).write_bytes(path.read_bytes())
    (faulty / "003.png").write_bytes(b"not an image")
    (faulty / "004.txt").write_text("  ")
    done = run(command(faulty, tmp_path / "out", "--max-steps=5"))
    assert done.returncode == 0, done.stderr
    assert "1 corrupt image" in done.stdout
    assert "1 empty caption" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--output-dir=unused"], "--data is needed"),
        (["train", "--output-dir=unused", "--data=missing-*.tar", "--use-cpu"], "missing-*.tar"),
        (["train", "--output-dir=unused", "--data=x", "--use-cpu", "--pretrained=./no/where"], "no tokenizer_config"),
        (["eval", "--checkpoint=./nowhere", "--data=x"], "no config.json"),
        (["fly"], "doctor; got 'fly'"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) in (1, 2)
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_errors_are_the_programs_exit_code() -> None:
    done = start([sys.executable, "-m", "vlmfast", "eval", "--checkpoint=./nowhere", "--data=x"])
    assert done.returncode == 1
    assert "no config.json" in done.stderr


def test_help_lists_the_commands() -> None:
    done = run([sys.executable, "-m", "vlmfast", "--help"])
    assert "train" in done.stdout
    assert "eval" in done.stdout
    assert "--cache-chunk" in run([sys.executable, "-m", "vlmfast", "train", "clip", "--help"]).stdout


def test_scores_during_training(data: Path, tmp_path: Path) -> None:
    """--eval-strategy with --val-data logs retrieval scores beside the loss."""
    done = run(
        command(data, tmp_path, "--max-steps=4", "--eval-strategy=steps", "--eval-steps=2", f"--val-data={data}")
    )
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    scores = {entry["step"]: entry["eval_image_to_text_R@1"] for entry in history if "eval_image_to_text_R@1" in entry}
    assert set(scores) == {2, 4}
    assert all(0 <= score <= 1 for score in scores.values())
