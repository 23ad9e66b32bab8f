"""Runs over bad data: they go on, and a resumed one equals one that was never stopped."""

from pathlib import Path

import pytest
import torch
from command_line import TINY
from transformers import TrainerCallback

from vlmfast.data import Collator, ImageTextDataset, load_tokenizer, train_transform
from vlmfast.models.contrastive.cloob import CLOOBConfig, CLOOBModel
from vlmfast.training import PretrainingArguments, PretrainingTrainer


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.fixture
def damaged(tmp_path: Path, png) -> Path:
    """Five pairs, of which two are damaged: batches of two are of two, of one or of nothing usable, the last of one."""
    (tmp_path / "data").mkdir()
    for n in range(5):
        (tmp_path / "data" / f"{n}.png").write_bytes(png(n) if n % 3 else b"damaged")
        (tmp_path / "data" / f"{n}.txt").write_text(f"caption {n}")
    return tmp_path / "data"


def train(data: Path, output_dir: Path, stop_at: int | None = None, resume: str | None = None) -> PretrainingTrainer:
    arguments = PretrainingArguments(
        output_dir=str(output_dir), report_to=[], use_cpu=True, disable_tqdm=True, dataloader_num_workers=0,
        per_device_train_batch_size=2, max_steps=12, logging_steps=1, save_strategy="steps", save_steps=stop_at or 100,
        dataloader_drop_last=False,
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    config = CLOOBConfig.small(vocab_size=len(tokenizer), eos_token_id=1, bos_token_id=2, pad_token_id=0, **TINY)
    trainer = PretrainingTrainer(
        model=CLOOBModel(config),
        args=arguments,
        train_dataset=ImageTextDataset(str(data), transform=train_transform(16), min_batch=2),
        data_collator=Collator(tokenizer, max_length=8),
    )
    if stop_at is not None:
        trainer.add_callback(StopAt(stop_at))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_run_over_damaged_pairs_goes_on_and_resumes_bit_for_bit(damaged: Path, tmp_path: Path) -> None:
    stop_at = 4  # in the middle of the second epoch
    whole = train(damaged, tmp_path / "whole")
    assert whole.state.global_step == 12
    assert whole.train_dataset.skipped() == {"corrupt image": 2}
    assert whole.train_dataset.stand_ins() > 0
    train(damaged, tmp_path / "part", stop_at=stop_at)
    resumed = train(damaged, tmp_path / "part", resume=str(tmp_path / "part" / f"checkpoint-{stop_at}"))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name
