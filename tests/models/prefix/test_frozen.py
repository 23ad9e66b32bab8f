"""Frozen: what is trained through a frozen language model, two positions an image, prompts of several images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import write_pairs
from prefix_models import CAPTIONS, LANGUAGE, batch, gpt2, llama, make, write_language_model, write_tower

from vlmfast.cli import main
from vlmfast.data import load_tokenizer
from vlmfast.models.language_model import last_hidden_states
from vlmfast.models.prefix.frozen import FrozenModel, FrozenOptions

K = 2


def test_one_step_moves_the_encoder_and_nothing_of_the_language_model(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    source = write_language_model(tmp_path, gpt2(vocab_size=len(tokenizer)))
    sizes = {"image_size": 16, "vision_width": 64, "vision_layers": 1}
    model = FrozenModel.build(FrozenOptions(language_model=str(source), **sizes), tokenizer).train()
    assert model.config.stop_token_id == tokenizer.eos_token_id
    assert model.vision.training
    assert not model.language_model.training
    before = {name: p.clone() for name, p in model.named_parameters()}
    given = batch(CAPTIONS, K)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    first = model(**given).loss
    first.backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("language_model."), name
        assert (p.grad is None) == name.startswith("language_model."), name
    assert model(**given).loss < first
    pixels = torch.randn(3, 3, 16, 16, requires_grad=True)
    model(**{**given, "pixel_values": pixels}).loss.backward()
    assert all(pixels.grad.flatten(1).norm(dim=1) > 0)


def test_the_mapper_is_one_linear_map_of_one_feature() -> None:
    model = make(FrozenModel, gpt2(), prefix_length=K)
    pixels = batch(CAPTIONS, K)["pixel_values"]
    feature = model.vision.tower(pixels).pooler_output
    linear = model.mapper.linear
    torch.testing.assert_close(
        model.mapper(model.image_features(pixels)), (feature @ linear.weight.T + linear.bias).view(3, 2, 32)
    )


@pytest.mark.parametrize("language", LANGUAGE)
def test_positions_are_relative_only_where_the_language_model_has_such(language: str) -> None:
    """A prefix further on means the same to rotary positions, and something else to absolute ones."""
    model = make(FrozenModel, LANGUAGE[language](), prefix_length=K)
    given = batch(CAPTIONS[:1], K, labels=False)
    with torch.no_grad():
        embeddings, mask, places, _ = model._assemble(given["input_ids"], None, None, given["pixel_values"], None)
        assert places[0].tolist() == list(range(K + 4))
        near, far = (last_hidden_states(model.language_model, embeddings, mask, places + shift) for shift in (0, 9))
    assert torch.allclose(near, far, rtol=1e-3, atol=1e-4) == (language == "llama")


def test_every_image_takes_two_positions_and_is_read_where_it_stands() -> None:
    model = make(FrozenModel, llama(), prefix_length=K)
    given = batch([[None, [5], None, [6, 9], None, [7]], [None, [5]]], K, labels=False)
    assert given["attention_mask"].sum(1).tolist() == [3 * K + 4, K + 1]
    with torch.no_grad():
        before = model(**given).hidden_states
        pixels = given["pixel_values"].clone()
        pixels[1] = 255 - pixels[1]  # the second image of the first row
        after = model(**{**given, "pixel_values": pixels}).hidden_states
    moved = (before - after).abs().amax(-1) > 1e-6
    assert moved[0].tolist() == [False] * 3 + [True] * 7
    assert not moved[1].any()


def test_a_pretrained_tower_is_trained_and_saved(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    options = FrozenOptions(vision_tower=str(write_tower(tmp_path / "clip")), text_width=64, text_layers=1)
    model = FrozenModel.build(options, tokenizer)
    assert model.frozen_parts() == ()
    assert model.config.vision_tower is None
    ids = batch(CAPTIONS, K)
    loss = model.eval()(**ids).loss
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(FrozenModel.from_pretrained(tmp_path / "saved")(**ids).loss, loss)


def test_questions_are_answered_with_examples_in_the_prompt(tmp_path: Path) -> None:
    """By the command line, trained a step; the prompt shows three images."""
    data = tmp_path / "data"
    data.mkdir()
    for path in sorted(write_pairs(data, 8).glob("*.txt")):
        colour = path.read_text().split()[0]
        record = {"caption": path.read_text(), "questions": [{"question": "what colour?", "answers": [colour]}]}
        path.with_suffix(".json").write_text(json.dumps(record))
        path.unlink()
    out = tmp_path / "out"
    assert main([
        "train", "frozen", f"--data={data}", f"--output-dir={out}", "--image-size=16", "--vision-width=64",
        "--vision-layers=1", "--text-width=64", "--text-layers=1", "--per-device-train-batch-size=4", "--max-steps=1",
        "--report-to=none", "--use-cpu", "--dataloader-num-workers=0", "--disable-tqdm=true",
    ]) == 0  # fmt: skip
    scores = tmp_path / "scores.json"
    assert main([
        "eval", f"--checkpoint={out}", f"--data={data}", "--task=vqa", "--shots=2", f"--train-data={data}",
        "--max-new-tokens=2", "--device=cpu", "--num-workers=0", f"--output={scores}",
    ]) == 0  # fmt: skip
    assert json.loads(scores.read_text())
