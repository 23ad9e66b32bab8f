"""MAPL: its mapper, what it reads of an image, what stays frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from prefix_models import CAPTIONS, batch, gpt2, llama, make, vit, write_language_model, write_tower
from torch import Tensor

from vlmfast.data import load_tokenizer
from vlmfast.models.prefix.mapl import MAPLConfig, MAPLModel, MAPLOptions, Mapper

K = 4
SMALL = {"mapper_width": 16, "mapper_layers": 1, "mapper_heads": 2, "prefix_length": K}


def test_the_mapper_has_the_published_size() -> None:
    """CLIP ViT-L/14's 257 states of 1024 to 32 embeddings of GPT-J; any number of states gives 32."""
    with torch.device("meta"):
        mapper = Mapper(1024, 4096)
        assert sum(p.numel() for p in mapper.parameters()) == 3_431_680
        assert mapper(torch.empty(2, 257, 1024)).shape == mapper(torch.empty(2, 50, 1024)).shape == (2, 32, 4096)


def test_the_mapper_is_its_formula() -> None:
    """Constants after the states, pre-norm, no norm at the end, the last k."""
    mapper = Mapper(6, 10, 3, hidden=8, layers=2, heads=2).double()
    states = torch.randn(2, 5, 6, dtype=torch.float64)

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    x = torch.cat([states @ mapper.down.weight.T + mapper.down.bias, mapper.constant.expand(2, 3, 8)], 1)
    for layer in mapper.layers:
        attention = layer.self_attn
        q, k, v = (norm(x) @ attention.in_proj_weight.T + attention.in_proj_bias).split(8, dim=-1)
        heads = [
            (q[..., h] @ k[..., h].transpose(1, 2) / 2).softmax(-1) @ v[..., h] for h in (slice(0, 4), slice(4, 8))
        ]
        x = x + torch.cat(heads, -1) @ attention.out_proj.weight.T + attention.out_proj.bias
        x = x + torch.relu(norm(x) @ layer.linear1.weight.T + layer.linear1.bias) @ layer.linear2.weight.T
        x = x + layer.linear2.bias
    expected = x[:, 5:] @ mapper.up.weight.T + mapper.up.bias
    torch.testing.assert_close(mapper(states), expected)
    with torch.no_grad():
        torch.testing.assert_close(mapper.eval()(states), expected)  # where torch has a path of its own


def test_it_reads_all_states_before_the_last_norm_and_trains_the_mapper_alone(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    tower = write_tower(tmp_path / "clip")
    source = write_language_model(tmp_path / "lm", llama(vocab_size=len(tokenizer)))
    options = MAPLOptions(language_model=str(source), vision_tower=str(tower), prefix_length=K, mapper_width=16)
    model = MAPLModel.build(options, tokenizer).train()
    clip = transformers.CLIPModel.from_pretrained(tower).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = clip.vision_model(pixels).last_hidden_state
        normed = clip.vision_model.post_layernorm(expected)
    found = model.image_features(pixels)
    assert found.shape == (2, 5, 32)  # the class token and four patches
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, normed, atol=0.1)

    before = {name: p.clone() for name, p in model.named_parameters()}
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"mapper"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.5)
    given = {**batch(CAPTIONS[:2], K), "pixel_values": pixels}
    losses = []
    for _ in range(8):
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (not name.startswith("mapper.")), name
    model.save_pretrained(tmp_path / "saved")
    loaded = MAPLModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(**given).loss, model.eval()(**given).loss)


def test_a_new_tower_has_no_weight_without_gradient() -> None:
    """DDP stops at one: the norm after `last_hidden_state` is left out."""
    model = make(MAPLModel, gpt2(), **SMALL).train()
    model(**batch(CAPTIONS, K)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_frozen_states_stand_for_the_pixels() -> None:
    model = make(MAPLModel, gpt2(), vision_frozen=True, **SMALL)
    given = batch(CAPTIONS, K)
    loss = model(**given).loss
    features = model.frozen_features(pixel_values=given.pop("pixel_values"))
    torch.testing.assert_close(model(**given, **features).loss, loss)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="mapper_width: expected a multiple of mapper_heads 3, got 16"):
        MAPLConfig(vit(), gpt2(), mapper_width=16, mapper_heads=3)
    with pytest.raises(ValueError, match="prefix_length: expected a positive integer, got 0"):
        MAPLConfig(vit(), gpt2(), prefix_length=0)
