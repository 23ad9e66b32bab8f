"""Every contrastive model under the trainer in mixed precision, in chunks too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import tiny, write_pairs
from torch import nn

from vlmfast.data import EDA, Collator, ImageTextDataset, TwoViewCollator, eval_transform, load_tokenizer, two_views
from vlmfast.models import MODELS, model_class
from vlmfast.models.two_towers import TRAINING
from vlmfast.training import PretrainingArguments, PretrainingTrainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), 24)


def losses(name: str, data: Path, output_dir: Path, **options: object) -> list[float]:
    """Of three steps, the first with the initial weights."""
    args = PretrainingArguments(
        output_dir=str(output_dir), per_device_train_batch_size=8, max_steps=3, logging_steps=1, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, dataloader_num_workers=0,
        **{**TRAINING, "learning_rate": 1e-3, "warmup_steps": 0, **options},
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer, cls = load_tokenizer(), model_class(name)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    small = cls.config_class.small(
        vocab_size=len(tokenizer), eos_token_id=1, bos_token_id=2, pad_token_id=0, **tiny(name, vision_layers=3)
    )
    model = cls(small)
    for module in model.modules():  # chunks draw other numbers than the whole batch
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "probability"):
            module.probability = 0.0
    transform, collator = eval_transform(16), Collator(tokenizer, max_length=12)
    if name == "declip":
        transform, collator = two_views(transform), TwoViewCollator(tokenizer, max_length=12, rewrite=EDA())
    dataset = ImageTextDataset(str(data), transform=transform, seed=0)
    seen = []
    model.text_projection.register_forward_hook(lambda module, given, found: seen.append(found.dtype))
    trainer = PretrainingTrainer(model=model, args=args, train_dataset=dataset, data_collator=collator)
    trainer.train()
    assert set(seen) == {torch.bfloat16 if options.get("bf16") else torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", [name for name in MODELS if model_class(name).strategy == "contrastive"])
def test_losses_are_those_of_float32(name: str, data: Path, tmp_path: Path) -> None:
    exact = losses(name, data, tmp_path)
    assert len(exact) == 3
    mixed = losses(name, data, tmp_path, bf16=True)
    assert mixed == pytest.approx(exact, rel=0.03, abs=0.03)
    if name == "align":  # its batch norms see chunks
        return
    chunks = losses(name, data, tmp_path, bf16=True, cache_chunk=3)
    assert chunks == pytest.approx(mixed, rel=0.02, abs=0.02)
    assert losses(name, data, tmp_path, cache_chunk=3) == pytest.approx(exact, rel=1e-3, abs=1e-3)
