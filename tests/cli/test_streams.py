"""vlmfast train on streams: resumed, on damaged shards, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from command_line import COLOURS, STEPS, assert_same_run, command, logged, run
from PIL import Image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of ten coloured squares."""
    made = tmp_path_factory.mktemp("shards")
    for shard in range(4):
        with tarfile.open(made / f"{shard}.tar", "w") as tar:
            for k in range(10 * shard, 10 * shard + 10):
                image, file = Image.new("RGB", (16, 16), COLOURS[k % 8]), io.BytesIO()
                image.putpixel((k % 16, 0), (k, 2 * k, 3 * k))
                image.save(file, "PNG")
                for name, data in ((f"{k}.png", file.getvalue()), (f"{k}.txt", f"{COLOURS[k % 8]} {k}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return made


def arguments(source: object, output_dir: Path, *extra: str) -> list[str]:
    given = [option for option in command(Path(str(source)), output_dir) if not option.startswith("--max-steps")]
    given[given.index("--data") + 1] = str(source)
    return [*given, f"--train-samples={8 * STEPS}", "--shuffle-buffer=7", *extra]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_one_that_was_not_stopped(workers: int, folder: Path, tmp_path: Path) -> None:
    """What a killed run leaves behind is its folder at the last checkpoint."""
    source, own = f"pipe:cat {folder}/{{0..3}}.tar", f"--dataloader-num-workers={workers}"
    done = run(arguments(source, tmp_path / "whole", own))
    assert done.returncode == 0, done.stderr
    assert "a stream of 4 shards, batch 8" in done.stdout
    assert "skipped: nothing" in done.stdout
    assert list(logged(tmp_path / "whole")) == list(range(1, STEPS + 1))

    (tmp_path / "killed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-9", tmp_path / "killed" / "checkpoint-9")
    shutil.copy(tmp_path / "whole" / "run.json", tmp_path / "killed")
    if workers == 0:
        other = run(arguments(source, tmp_path / "killed", "--resume", "--dataloader-num-workers=2"))
        assert "stream_0.json, state: workers was 1 and is 2" in other.stderr
        refused = run(arguments(source, tmp_path / "killed", "--resume", own, "--shuffle-buffer=8"))
        assert "shuffle_buffer was 7 and is 8" in refused.stderr
    resumed = run(arguments(source, tmp_path / "killed", own, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert "checkpoint-9" in resumed.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_what_is_skipped_is_in_the_log_and_told_at_the_end(folder: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "1.tar").write_bytes((folder / "1.tar").read_bytes()[:2000])
    done = run(arguments(damaged / "*.tar", tmp_path / "run", "--streaming"))
    assert done.returncode == 0, done.stderr
    assert "broken shard" in done.stdout.splitlines()[-2]
    assert f"{damaged}/1.tar: the archive is cut short or damaged; given up after one attempt" in done.stdout
    state = json.loads((tmp_path / "run" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert max(entry.get("broken_shards", 0) for entry in state["log_history"]) >= 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--task=vqa",), "--task vqa reads samples by index"),
        (("--features=objects",), "--features objects reads samples by index"),
        (("--cache-features=x",), "--cache-features x reads samples by index"),
        (("--val-data=pipe:cat x",), "--val-data pipe:cat x: expected files on a local disk"),
        (("--shuffle-buffer=0",), "--shuffle-buffer: expected at least 1, got 0"),
        (("--max-steps=5",), "train_samples: 96 make 12 steps; max_steps is 5"),
        (("--dataloader-num-workers=5",), "4 shards for 1 processes of 5 workers"),
    ],
)
def test_flags_that_a_stream_has_no_use_for(extra: tuple[str, ...], message: str, folder: Path, tmp_path: Path) -> None:
    done = run(arguments(f"pipe:cat {folder}/{{0..3}}.tar", tmp_path, *extra))
    assert done.returncode != 0
    assert message in done.stderr


def test_a_stream_has_no_epochs_and_no_evaluation(folder: Path, tmp_path: Path) -> None:
    source = f"pipe:cat {folder}/{{0..3}}.tar"
    given = [option for option in arguments(source, tmp_path) if not option.startswith("--train-samples")]
    assert "--train-samples is needed" in run(given).stderr
    done = run([*given[:3], "eval", "--checkpoint", str(tmp_path), "--data", source])
    assert done.returncode != 0
    assert "--data pipe:cat" in done.stderr
