"""DeCLIP and LiT under the trainer: resumed runs, the bank in checkpoints, chunks, and cached features."""

from pathlib import Path

import pytest
import torch
import transformers
from command_line import TINY, write_pairs
from safetensors.torch import load_file
from transformers import TrainerCallback

from vlmfast.data import (
    EDA,
    Collator,
    ImageTextDataset,
    TwoViewCollator,
    cache_features,
    eval_transform,
    load_tokenizer,
    moco_transform,
    two_views,
)
from vlmfast.models.contrastive.declip import DeCLIPConfig, DeCLIPModel
from vlmfast.models.contrastive.lit import LiTConfig, LiTModel
from vlmfast.models.two_towers import TRAINING
from vlmfast.training import PretrainingArguments, PretrainingTrainer, last_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), 24)


def arguments(output_dir: Path, **options: object) -> PretrainingArguments:
    settings = {"per_device_train_batch_size": 8, "max_steps": 5, "logging_steps": 1, "save_strategy": "no"}
    options = {**TRAINING, **settings, **options}
    return PretrainingArguments(
        output_dir=str(output_dir), report_to=[], use_cpu=True, disable_tqdm=True, dataloader_num_workers=0, **options
    )


def declip_trainer(data: Path, output_dir: Path, weights: dict[str, float], **options: object) -> PretrainingTrainer:
    args = arguments(output_dir, **options)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    special = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    config = DeCLIPConfig.small(vocab_size=len(tokenizer), **special, **TINY)
    config.bank_size, config.ssl_dim, config.ssl_hidden_dim = 30, 32, 16
    config.text_config.attention_dropout = 0.2  # so that the order of random numbers matters
    for name, value in weights.items():
        setattr(config, name, value)
    return PretrainingTrainer(
        model=DeCLIPModel(config),
        args=args,
        train_dataset=ImageTextDataset(str(data), transform=two_views(moco_transform(16)), seed=args.seed),
        data_collator=TwoViewCollator(tokenizer, max_length=12, rewrite=EDA()),
    )


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def losses(trainer: PretrainingTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(data: Path, tmp_path: Path, chunk: int | None) -> None:
    """The bank of 30 has wrapped around when the run stops; without it the losses that follow would differ."""
    weights = DeCLIPConfig.RELEASED_WEIGHTS
    whole = declip_trainer(data, tmp_path / "whole", weights, cache_chunk=chunk)
    whole.train()
    options = {"save_strategy": "steps", "save_steps": 2, "cache_chunk": chunk}
    first = declip_trainer(data, tmp_path / "part", weights, **options)
    first.add_callback(_StopAt(2))
    first.train()
    checkpoint = last_checkpoint(tmp_path / "part")
    assert load_file(checkpoint / "model.safetensors")["bank.pushed"] == 32
    second = declip_trainer(data, tmp_path / "part", weights, **options)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert len(losses(whole)) == 5
    assert losses(second) == losses(whole)
    torch.testing.assert_close(second.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    assert whole.model.bank.pushed == 80


def lit_trainer(data: Path, output_dir: Path, *, cached: bool, **options: object) -> PretrainingTrainer:
    args = arguments(output_dir, **options)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer()
    vision = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 32], depths=[1, 1], layer_type="basic")
    small = LiTConfig.small(vocab_size=len(tokenizer), eos_token_id=1, bos_token_id=2, pad_token_id=0, **TINY)
    model = LiTModel(LiTConfig(vision_config=vision, text_config=small.text_config))
    dataset = ImageTextDataset(str(data), transform=eval_transform(16), seed=args.seed)
    if cached:
        dataset.features = cache_features(
            output_dir / "cache", dataset, model.encode_locked, model.frozen_fingerprint(), batch_size=8
        )
        model.vision_model.register_forward_hook(lambda *_: pytest.fail("the locked tower was run"))
    images = "locked_features" if cached else "pixel_values"
    return PretrainingTrainer(
        model=model, args=args, train_dataset=dataset, data_collator=Collator(tokenizer, max_length=12, images=images)
    )


@pytest.mark.parametrize("chunk", [None, 3])
def test_cached_features_train_as_pixels_do(data: Path, tmp_path: Path, chunk: int | None) -> None:
    runs = [lit_trainer(data, tmp_path / str(cached), cached=cached, cache_chunk=chunk) for cached in (False, True)]
    locked = {name: value.clone() for name, value in runs[0].model.vision_model.state_dict().items()}
    for run in runs:
        torch.manual_seed(0)  # of dropout in the text tower
        run.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)
    torch.testing.assert_close(runs[0].model.vision_model.state_dict(), locked, rtol=0, atol=0)
    trained = {id(p) for group in runs[0].optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in runs[0].model.vision_model.parameters()}
    assert losses(runs[0])[-1] < losses(runs[0])[0]


def test_a_resumed_lit_run_equals_an_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    whole = lit_trainer(data, tmp_path / "whole", cached=True)
    whole.train()
    options = {"save_strategy": "steps", "save_steps": 2}
    first = lit_trainer(data, tmp_path / "part", cached=True, **options)
    first.add_callback(_StopAt(2))
    first.train()
    second = lit_trainer(data, tmp_path / "part", cached=True, **options)
    second.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "part")))
    assert losses(second) == losses(whole)
    torch.testing.assert_close(second.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
