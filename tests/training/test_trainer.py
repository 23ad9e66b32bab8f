from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from vlmfast.data import Collator, ImageTextDataset, load_tokenizer, train_transform
from vlmfast.models.contrastive.clip import CLIPConfig, CLIPModel
from vlmfast.training import PretrainingArguments, PretrainingTrainer, last_checkpoint

PAIRS = 40
COLOURS = ("red", "green", "blue", "black", "yellow", "pink", "grey", "brown")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small coloured images with captions."""
    folder = tmp_path_factory.mktemp("pairs")
    for k in range(PAIRS):
        image = Image.new("RGB", (16, 16), COLOURS[k % 8])
        image.putpixel((k % 16, k // 16), (k, 2 * k, 3 * k))
        image.save(folder / f"{k:03}.png")
        (folder / f"{k:03}.txt").write_text(f"{COLOURS[k % 8]} square number {k}")
    return folder


TINY = {"image_size": 16, "patch_size": 8, "vision_width": 64, "vision_layers": 1, "text_width": 64, "text_layers": 1}


def make_trainer(data: Path, output_dir: Path, **options: object) -> PretrainingTrainer:
    options = {"per_device_train_batch_size": 8, "max_steps": 8, "logging_steps": 1, "save_strategy": "no", **options}
    arguments = PretrainingArguments(
        output_dir=str(output_dir), report_to=[], use_cpu=True, disable_tqdm=True, dataloader_num_workers=0, **options
    )
    torch.manual_seed(arguments.seed)
    tokenizer = load_tokenizer()
    config = CLIPConfig.small(
        vocab_size=len(tokenizer), eos_token_id=1, bos_token_id=2, pad_token_id=0, embed_dim=32, **TINY
    )
    config.text_config.attention_dropout = 0.2  # so that the order of random numbers matters
    return PretrainingTrainer(
        model=CLIPModel(config),
        args=arguments,
        train_dataset=ImageTextDataset(str(data), transform=train_transform(16), seed=arguments.seed),
        data_collator=Collator(tokenizer, max_length=16),
    )


def losses(trainer: PretrainingTrainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_cached_training_follows_the_plain_curve(data: Path, tmp_path: Path) -> None:
    def run(chunk: int | None) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
        trainer = make_trainer(data, tmp_path, cache_chunk=chunk, learning_rate=1e-3)
        trainer.model.text_model.config.attention_dropout = 0.0
        for module in trainer.model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        trainer.train()
        return losses(trainer), trainer.model.state_dict()

    plain, plain_weights = run(None)
    cached, cached_weights = run(3)
    assert list(plain) == list(range(1, 9))
    assert plain == pytest.approx(cached, rel=1e-3)
    for name, weight in plain_weights.items():
        torch.testing.assert_close(cached_weights[name], weight, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("cache_chunk", [None, 3])
@pytest.mark.parametrize("stop_at", [3, 5, 7])  # an epoch has 5 steps: in its middle, at its end, in the next
def test_resumed_run_equals_an_uninterrupted_one(
    data: Path, tmp_path: Path, stop_at: int, cache_chunk: int | None
) -> None:
    whole = make_trainer(data, tmp_path / "whole", cache_chunk=cache_chunk)
    whole.train()

    options = {"save_strategy": "steps", "save_steps": stop_at, "cache_chunk": cache_chunk}
    first = make_trainer(data, tmp_path / "part", **options)
    first.add_callback(_StopAt(stop_at))
    first.train()
    checkpoint = last_checkpoint(tmp_path / "part")
    assert checkpoint.name == f"checkpoint-{stop_at}"
    second = make_trainer(data, tmp_path / "part", **options)
    second.train(resume_from_checkpoint=str(checkpoint))

    expected = losses(whole)
    assert losses(second) == expected
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], weight), name


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_every_epoch_has_its_own_order_and_augmentation(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path, max_steps=10)
    seen: list[torch.Tensor] = []
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, n=None: (
        seen.append(inputs["pixel_values"].clone()),
        step(model, inputs, n),
    )[1]
    trainer.train()
    first, second = torch.cat(seen[:5]), torch.cat(seen[5:])
    assert not torch.equal(first, second)
    assert trainer.sampler is not None


def test_no_decay_on_gains_biases_and_logit_scale(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path)
    trainer.create_optimizer()
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.dim() >= 2), name
    assert id(trainer.model.logit_scale) not in decayed
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(
        list(trainer.model.parameters())
    )


def test_logit_scale_is_clamped_after_each_step(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path, max_steps=2, learning_rate=1e3, warmup_steps=0, lr_scheduler_type="constant")
    with torch.no_grad():
        trainer.model.logit_scale.fill_(3.0)
    trainer.train()
    assert trainer.model.logit_scale.item() in (0.0, torch.tensor(math.log(100)).item())


def test_logs_carry_temperature_and_rate(data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(data, tmp_path, max_steps=3)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["temperature"] == pytest.approx(0.07, rel=0.05)
    assert all(entry["pairs_per_second"] > 0 for entry in logs[1:])


def test_bad_chunk() -> None:
    with pytest.raises(ValueError, match="cache_chunk must be at least 1; got 0"):
        PretrainingArguments(output_dir="unused", cache_chunk=0, use_cpu=True)


def test_last_checkpoint_passes_over_half_written_ones(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, state in ((5, "{}"), (10, "{}"), (20, '{"epoch": 1'), (30, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


# The command line, in processes of their own.

STEPS = 12


def command(data: Path, output_dir: Path, *extra: str) -> list[str]:
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    return [
        sys.executable, "-m", "vlmfast", "train", "--data", str(data), "--output-dir", str(output_dir), *sizes,
        "--embed-dim=32", "--per-device-train-batch-size=8", f"--max-steps={STEPS}", "--logging-steps=1",
        "--report-to=none", "--save-steps=3", "--cache-chunk=4", "--dataloader-num-workers=1", "--use-cpu", *extra,
    ]  # fmt: skip


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    output_dir = tmp_path_factory.mktemp("finished")
    done = run(command(data, output_dir))
    assert done.returncode == 0, done.stderr
    assert "skipped: nothing" in done.stdout
    return output_dir


def logged(output_dir: Path, step: int = STEPS) -> dict[int, float]:
    state = json.loads((output_dir / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def assert_same_run(a: Path, b: Path) -> None:
    assert logged(a) == logged(b)
    for name, weight in load_file(a / "model.safetensors").items():
        assert torch.equal(load_file(b / "model.safetensors")[name], weight), name


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_a_checkpoint(data: Path, finished: Path, tmp_path: Path, number: signal.Signals) -> None:
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


def test_two_processes_equal_one(data: Path, finished: Path, tmp_path: Path) -> None:
    """torchrun on gloo with half the batch each: the same global batches, so the same losses up to rounding."""
    arguments = command(data, tmp_path, "--per-device-train-batch-size=4", "--ddp-backend=gloo", "--cache-chunk=2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments[1:]]
    done = run(torchrun)
    assert done.returncode == 0, done.stderr
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
        (["train", "--output-dir=unused", "--data=x", "--use-cpu", "--pretrained=./no/where"], "no config.json"),
        (["eval", "--checkpoint=./nowhere", "--data=x"], "no config.json"),
        (["fly"], "COMMAND must be one of train, eval; got 'fly'"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlmfast", *arguments], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_the_commands() -> None:
    done = run([sys.executable, "-m", "vlmfast", "--help"])
    assert "train" in done.stdout
    assert "eval" in done.stdout
    assert "--cache-chunk" in run([sys.executable, "-m", "vlmfast", "train", "--help"]).stdout


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
