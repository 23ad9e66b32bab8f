"""What holds for every contrastive model alike: chunks, processes, checkpoints, bytes, mixed precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_processes
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from vlmfast.models import model_class
from vlmfast.training.grad_cache import forward_backward

NAMES = ("clip", "cloob", "align", "siglip")
"""DeCLIP, whose batches have two views, and LiT have files of their own for what differs."""
ALL = (*NAMES, "declip", "lit")
EOS, PAD, VOCAB, LENGTHS = 1, 0, 50, (12, 7, 3, 5, 9)
ROWS = [3, 2]


def make(name: str) -> nn.Module:
    """In training mode, but for what depends on the rest of the batch or on chance: batch norms and dropout."""
    cls = model_class(name)
    config = cls.config_class.small(
        vocab_size=VOCAB, eos_token_id=EOS, pad_token_id=PAD, image_size=16, vision_width=64, vision_layers=3,
        text_width=64, text_layers=1, max_length=12,
    )  # fmt: skip
    torch.manual_seed(1)
    model = cls(config).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:  # statistics of some batch, else features are nearly 0
        model.get_image_features(torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8))
    for norm in norms:
        norm.eval()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = nn.Identity() if isinstance(module.dropout, nn.Module) else 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def batch(rows: int = len(LENGTHS)) -> dict[str, Tensor]:
    lengths = torch.tensor(LENGTHS)[:rows]
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(3, VOCAB, mask.shape)
    ids[torch.arange(rows), lengths - 1] = EOS
    pixels = torch.randint(0, 256, (rows, 16, 16, 3), dtype=torch.uint8)
    return {"pixel_values": pixels, "input_ids": ids.where(mask == 1, PAD), "attention_mask": mask}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_chunks_give_the_gradients_of_the_whole_batch(name: str) -> None:
    whole, cached, inputs = make(name), make(name), batch()
    expected = whole(**inputs).loss
    expected.backward()

    def encode(chunk: dict[str, Tensor]) -> dict[str, Tensor]:
        output = cached(**chunk, return_loss=False)
        return {key: value for key, value in output.items() if isinstance(value, Tensor)}

    loss = forward_backward(encode, lambda features: cached.loss(**features), inputs, 2)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradients(cached), gradients(whole), rtol=1e-3, atol=2e-5)


def _step_on_each_rank(rank: int, world_size: int, name: str, inputs: dict[str, Tensor], path: Path) -> None:
    model = make(name)
    wrapped = DistributedDataParallel(model)
    loss = wrapped(**{key: value.split(ROWS)[rank] for key, value in inputs.items()}).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.save((mean / world_size, gradients(model)), path / f"{rank}.pt")


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_with_unequal_shards_equal_one(name: str, tmp_path: Path) -> None:
    inputs, model = batch(), make(name)
    run_processes(_step_on_each_rank, 2, name, inputs, tmp_path)
    loss = model(**inputs).loss
    loss.backward()
    for rank in range(2):
        rank_loss, rank_gradients = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(rank_loss, loss.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank_gradients, gradients(model), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision(name: str) -> None:
    model, inputs = make(name), batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    assert output.image_features.dtype == output.text_features.dtype == output.loss.dtype == torch.float32
    expected = model(**inputs).loss
    torch.testing.assert_close(output.loss, expected, rtol=0.05, atol=0.05)
    output.loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("name", ALL)
def test_checkpoints_are_bit_equal(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert not loaded.training


@pytest.mark.parametrize("name", ALL)
def test_bytes_are_normalised(name: str) -> None:
    model, pixels = make(name).eval(), batch()["pixel_values"]
    mean, std = (torch.tensor(values) for values in (model.config.image_mean, model.config.image_std))
    floats = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(model.get_image_features(pixels), model.get_image_features(floats), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_feature_does_not_depend_on_the_others_of_its_batch(name: str) -> None:
    """Padding and batch-mates, in evaluation."""
    model, inputs = make(name).eval(), batch()
    images, texts = (
        model.get_image_features(inputs["pixel_values"]),
        model.get_text_features(inputs["input_ids"], inputs["attention_mask"]),
    )
    for row, length in enumerate(LENGTHS):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        torch.testing.assert_close(model.get_image_features(one["pixel_values"])[0], images[row])
        alone = model.get_text_features(one["input_ids"][:, :length], one["attention_mask"][:, :length])
        torch.testing.assert_close(alone[0], texts[row])


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name: str) -> None:
    model, inputs = make(name), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hasattr(model, "after_optimizer_step"):
            model.after_optimizer_step()
        losses.append(loss.item())
    output = model.eval()(**inputs)
    similarity = output.image_features @ output.text_features.T
    assert losses[-1] < losses[0]
    assert (similarity.argmax(1) == torch.arange(len(similarity))).all()
