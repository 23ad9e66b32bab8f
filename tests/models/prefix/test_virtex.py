"""VirTex: two directions over one map, one embedding and one output layer; flips that swap sides; its own search."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vlmfast.data import load_tokenizer
from vlmfast.data.dataset import Sample
from vlmfast.models.beam_search import REPEATED, beam_search
from vlmfast.models.caption_batches import swap_sides
from vlmfast.models.prefix.virtex import VirTexConfig, VirTexModel, VirTexOptions, flip_rows
from vlmfast.nn import linear_cross_entropy as losses_module

PAD, BEGIN, END, VOCAB, WIDTH = 0, 1, 2, 40, 32
SMALL = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "embedding_size": 8, "layer_type": "basic",
         "image_size": 64}  # fmt: skip
SIZES = {"vocab_size": VOCAB, "max_position_embeddings": 12, "hidden_size": WIDTH, "num_heads": 4, "num_layers": 2}


def make(**options: Any) -> VirTexModel:
    """All parameters random and large, so that what the model says depends on what it reads; in eval mode."""
    torch.manual_seed(0)
    model = VirTexModel(VirTexConfig(SMALL, **{**SIZES, **options})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or (parameter.dim() == 1 and "bias" in name and "visual." not in name):
                parameter.normal_(std=0.4, generator=generator)
            elif "normalization.weight" in name:
                parameter.fill_(1)
    return model


def pixels(count: int) -> Tensor:
    return torch.randint(256, (count, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


ROWS = ([BEGIN, 5, 9, 11, END], [BEGIN, 6, END], [BEGIN, 12, 13, 5, 9, 8])
"""Captions of three lengths; the last was cut, and has no end."""


def batch(left: bool = False) -> dict[str, Tensor]:
    ids, mask = torch.full((3, 6), 31), torch.zeros(3, 6, dtype=torch.long)
    for k, row in enumerate(ROWS):
        place = slice(6 - len(row), 6) if left else slice(0, len(row))
        ids[k, place], mask[k, place] = torch.tensor(row), 1
    labels = ids.masked_fill((mask == 0) | (ids == BEGIN), -100)
    return {"pixel_values": pixels(3), "input_ids": ids, "attention_mask": mask, "labels": labels}


def alone(row: list[int], k: int) -> dict[str, Tensor]:
    ids = torch.tensor([row])
    labels = ids.clone()
    labels[:, 0] = -100
    return {"pixel_values": pixels(3)[k : k + 1], "input_ids": ids, "labels": labels}


# The honest test of the specification


def test_the_backward_loss_is_the_forward_loss_of_the_other_decoder_on_flipped_tokens() -> None:
    model = make()
    found = model(**batch()).losses
    other = copy.deepcopy(model)
    other.transformer, other.backward_transformer = other.backward_transformer, other.transformer
    counts = torch.tensor([len(row) - 1.0 for row in ROWS])
    for direction, seen in ((0, model), (1, other)):
        each = [seen(**alone(row[:: 1 - 2 * direction], k)).losses[0] for k, row in enumerate(ROWS)]
        torch.testing.assert_close(found[direction], (torch.stack(each) * counts).sum() / counts.sum())
    assert abs(found[0] - found[1]) > 0.1
    torch.testing.assert_close(model(**batch(left=True)).losses, found)


def test_decoders_start_equal_and_part_while_the_rest_is_one() -> None:
    torch.manual_seed(3)
    model = VirTexModel(VirTexConfig(SMALL, **SIZES))
    pairs = list(zip(model.transformer.parameters(), model.backward_transformer.parameters(), strict=True))
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)
    assert sum(a.abs().sum() > 0 for a, _ in pairs) >= len(pairs) / 2
    shared = [model.embedding.words, model.output, model.visual_projection]
    assert model.output.weight is model.embedding.words.weight
    names = [name for name, _ in model.named_parameters() if "words" in name or "output." in name]
    assert names == ["embedding.words.weight", "output.bias"]
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    model(**batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in pairs if a.grad.any())
    assert sum(bool(a.grad.any()) for a, _ in pairs) > len(pairs) / 2
    assert shared == [model.embedding.words, model.output, model.visual_projection]
    assert model.output.weight is model.embedding.words.weight
    for part in (model.visual_projection.weight, model.output.bias, model.embedding.words.weight):
        gradients = [torch.autograd.grad(model(**batch()).losses[k], part)[0] for k in (0, 1)]
        assert all(gradient.any() for gradient in gradients)  # of both directions


@torch.no_grad()
def test_the_order_of_places_in_the_image_is_not_seen() -> None:
    model = make()
    given = batch()
    features = model.image_features(given["pixel_values"])
    assert features.shape == (3, 4, WIDTH)
    order = torch.tensor([2, 0, 3, 1])
    ids, mask = given["input_ids"], given["attention_mask"]
    before = model.decode(model.transformer, ids, mask, features)
    after = model.decode(model.transformer, ids, mask, features[:, order])
    torch.testing.assert_close(before[mask == 1], after[mask == 1], rtol=1e-4, atol=1e-4)
    other = model.decode(model.transformer, ids, mask, features.flip(0))
    assert (before - other)[[0, 2]].abs().max() > 0.1


# Equations


def attention(part: nn.MultiheadAttention, queries: Tensor, keys: Tensor, mask: Tensor | float) -> Tensor:
    weights, biases = part.in_proj_weight.double().chunk(3), part.in_proj_bias.double().chunk(3)
    q, k, v = ((x @ w.T + b).unflatten(-1, (part.num_heads, -1)).transpose(0, 1)
               for x, w, b in zip((queries, keys, keys), weights, biases, strict=True))  # fmt: skip
    mixed = ((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + mask).softmax(-1) @ v).transpose(0, 1).flatten(1)
    return mixed @ part.out_proj.weight.double().T + part.out_proj.bias.double()


def norm(part: nn.LayerNorm, x: Tensor, epsilon: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return centred * scale * part.weight.double() + part.bias.double()


def equations(model: VirTexModel, transformer: Any, ids: Tensor, places: Tensor) -> Tensor:
    """The sum of -log p of one caption's tokens, in float64 from the map of the convolutions on."""
    words, projection = model.embedding.words.weight.double(), model.visual_projection
    memory = places.double() @ projection.weight.double().T + projection.bias.double()
    x = norm(model.embedding.layer_norm, words[ids] + model.embedding.positions.weight[: len(ids)].double(), 1e-8)
    later = torch.full((len(ids), len(ids)), -torch.inf, dtype=torch.float64).triu(1)
    for layer in transformer.layers:  # post-norm
        x = norm(layer.norm1, x + attention(layer.self_attn, x, x, later))
        x = norm(layer.norm2, x + attention(layer.multihead_attn, x, memory, 0.0))
        hidden = x @ layer.linear1.weight.double().T + layer.linear1.bias.double()
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = norm(layer.norm3, x + hidden @ layer.linear2.weight.double().T + layer.linear2.bias.double())
    logits = x @ words.T + model.output.bias.double()
    return (logits.logsumexp(-1)[:-1] - logits[torch.arange(len(ids) - 1), ids[1:]]).sum()


def test_the_loss_and_its_gradients_are_those_of_the_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of both directions, not their mean, from one call of linear_cross_entropy."""
    calls = []
    real = losses_module.linear_cross_entropy
    monkeypatch.setattr(losses_module, "linear_cross_entropy", lambda *a, **k: calls.append(a) or real(*a, **k))
    model = make()
    names = ["embedding.words.weight", "output.bias", "visual_projection.weight", "embedding.positions.weight"]
    names += ["transformer.layers.0.self_attn.in_proj_weight", "backward_transformer.layers.1.linear2.weight"]
    parameters = [dict(model.named_parameters())[name] for name in names]
    places, counted = model.visual(pixels(3)), sum(len(row) - 1 for row in ROWS)
    terms = [
        equations(model, transformer, torch.tensor(row[::step]), places[k])
        for k, row in enumerate(ROWS)
        for transformer, step in ((model.transformer, 1), (model.backward_transformer, -1))
    ]
    expected = torch.stack(terms).sum() / counted
    wanted = torch.autograd.grad(expected, parameters)
    found = model(**batch()).loss
    assert [len(call[0]) for call in calls] == [2 * 3 * 6]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    for name, a, b in zip(names, torch.autograd.grad(found, parameters), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()), msg=name)
    half = model(**{name: value[:1] for name, value in batch().items()}, num_items_in_batch=counted).loss
    rest = model(**{name: value[1:] for name, value in batch().items()}, num_items_in_batch=counted).loss
    torch.testing.assert_close(half + rest, found)


def test_the_row_of_pads_has_a_gradient_through_the_output_layer_alone() -> None:
    model = make()
    given = batch()
    given["input_ids"][given["attention_mask"] == 0] = PAD
    output = model(**given)
    (gradient,) = torch.autograd.grad(output.loss, model.output.weight)
    count = (given["labels"] != -100).sum()
    hidden = torch.cat([output.hidden_states[:, :-1], output.backward_hidden_states[:, :-1]])
    scored = torch.cat([given["attention_mask"][:, 1:]] * 2) == 1
    probability = model.output(hidden).softmax(-1)[..., PAD]
    expected = (probability[..., None] * hidden)[scored].sum(0) / count
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient[PAD], expected, rtol=1e-3, atol=1e-6)


def test_embeddings_of_pads_are_zero_and_epsilon_is_small() -> None:
    model = make()
    assert model.embedding.layer_norm.eps == 1e-8
    given = batch()
    found = model.embedding(given["input_ids"], given["attention_mask"] == 0)
    assert not found[given["attention_mask"] == 0].any()
    assert found[given["attention_mask"] == 1].any(-1).all()
    fresh = VirTexModel(VirTexConfig(SMALL, **SIZES))
    assert not fresh.embedding.words.weight[PAD].any()
    assert make(norm_first=True)(**batch()).loss.isfinite()
    assert isinstance(make(norm_first=True).transformer.norm, nn.LayerNorm)
    assert model.transformer.norm is None


def test_rows_are_flipped_before_their_pads() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    rows = torch.tensor([[1, 5, 2, 9], [1, 6, 7, 2], [1, 8, 9, 7]])
    assert flip_rows(rows, mask).tolist() == [[2, 5, 1, 9], [2, 7, 6, 1], [1, 8, 9, 7]]


# Samples


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer()


def test_sides_are_swapped_with_the_image_in_training_alone(tokenizer: Any) -> None:
    assert swap_sides("a bright cat left of a leftover, Right of it RIGHT") == (
        "a bright cat right of a leftover, Left of it LEFT"
    )
    options = VirTexOptions(image_size=64, text_width=64)
    assert options.flip == 0.5
    model = VirTexModel.build(options, tokenizer)
    image, caption = pixels(1)[0], "a cat on the left"
    samples = [Sample(image, caption, str(k), None, seed=k) for k in range(40)]
    given = model.collator(options, tokenizer, train=True)(samples)
    texts = tokenizer.batch_decode(given["input_ids"], skip_special_tokens=True)
    flips = ["right" in text for text in texts]
    assert 8 < sum(flips) < 32
    for found, flip in zip(given["pixel_values"], flips, strict=True):
        assert torch.equal(found, image.flip(1) if flip else image)
    again = model.collator(options, tokenizer, train=True)(samples[7:8])
    assert torch.equal(again["pixel_values"][0], given["pixel_values"][7])
    assert torch.equal(
        model.collator(options, tokenizer, train=False)(samples)["pixel_values"], torch.stack([image] * 40)
    )
    # What crops the image leaves it as it is, else left and right would be wrong.
    options.flip, options.crop_scale = 1.0, 1.0
    picture = Image.fromarray(image.numpy())
    shown = model.transform(options, train=True)(picture, np.random.default_rng(0))
    bright = (shown.float() - image.float()).abs().mean() < (shown.float() - image.flip(1).float()).abs().mean()
    assert bright


def test_a_long_caption_is_cut_and_has_no_end(tokenizer: Any) -> None:
    options = VirTexOptions(image_size=64, text_width=64, max_length=8, flip=0.0)
    model = VirTexModel.build(options, tokenizer)
    image = pixels(1)[0]
    samples = [Sample(image, text, text, None) for text in ("a red cat", "a red cat on a green mat by a blue hat")]
    given = model.collator(options, tokenizer, train=True)(samples)
    whole = [tokenizer.encode(sample.caption, add_special_tokens=False) for sample in samples]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    first, second = given["input_ids"].tolist()
    assert first[: len(whole[0]) + 2] == [begin, *whole[0], end]
    assert second == [begin, *whole[1][:7]]
    assert flip_rows(given["input_ids"], given["attention_mask"])[1, 0] == whole[1][6]  # in the middle of the caption
    assert given["labels"][:, 0].tolist() == [-100, -100]
    assert ((given["labels"] != -100).sum(1) == given["attention_mask"].sum(1) - 1).all()
    prompt = model.prompt_collator(options, tokenizer)([Sample(image, "", "0", None), samples[0]])
    assert prompt.keys() == {"pixel_values", "input_ids", "attention_mask"}
    assert prompt["attention_mask"].sum(1).tolist() == [1, 1 + len(whole[0])]


# Search


def plain_search(step: Any, row: int, beams: int, per_node: int, steps: int, end: int) -> tuple[list[int], float]:
    """The search with lists, one row at a time."""

    def scored(tokens: list[int]) -> list[float]:
        return step(torch.tensor([tokens], dtype=torch.long), torch.tensor([row]))[0].log_softmax(-1).tolist()

    first = scored([])
    kept = sorted((([t], p) for t, p in enumerate(first)), key=lambda pair: -pair[1])[:beams]
    while len(kept[0][0]) < steps and not all(tokens[-1] == end for tokens, _ in kept):
        candidates = []
        for tokens, total in kept:
            if tokens[-1] == end:
                candidates.append(([*tokens, end], total))
                continue
            following = scored(tokens)
            following[tokens[-1]] = REPEATED
            best = sorted(range(len(following)), key=lambda t: -following[t])[:per_node]
            candidates += [([*tokens, t], total + following[t]) for t in best]
        kept = sorted(candidates, key=lambda pair: -pair[1])[:beams]
    return kept[0]


@pytest.mark.parametrize(("beams", "per_node"), [(5, 2), (1, 2), (3, 3)])
def test_the_search_is_that_of_its_rule(beams: int, per_node: int) -> None:
    generator = torch.Generator().manual_seed(beams)
    table = 2 * torch.randn(4, 13, 12, generator=generator)
    table[:, torch.arange(12), torch.arange(12)] += 3  # likes to repeat itself

    def step(tokens: Tensor, rows: Tensor) -> Tensor:
        last = tokens[:, -1] if tokens.shape[1] else torch.full((len(rows),), 12)
        return table[rows, last]

    found, scores = beam_search(step, 4, beams=beams, per_node=per_node, max_steps=9, end=END)
    for k in range(4):
        tokens, total = plain_search(step, k, beams, per_node, 9, END)
        assert found[k, : len(tokens)].tolist() == tokens
        assert set(found[k, len(tokens) :].tolist()) <= {END}
        assert float(scores[k]) == pytest.approx(total, rel=1e-5)
        ended = tokens.index(END) if END in tokens else len(tokens)
        assert all(a != b for a, b in itertools.pairwise(tokens[:ended]))
    repeated = [int(table[k, 12].argmax()) for k in range(4)]
    assert any(int(table[k, token].argmax()) == token for k, token in enumerate(repeated))  # the rule had work


def test_a_wide_search_finds_the_likeliest_of_all() -> None:
    table = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(9))

    def step(tokens: Tensor, rows: Tensor) -> Tensor:
        return table[rows, tokens[:, -1] if tokens.shape[1] else 4]

    def total(tokens: tuple[int, ...]) -> float:
        found, last = 0.0, 4
        for token in tokens:
            if last == 3:
                found += 0.0 if token == 3 else -torch.inf
            else:
                found += float(table[0, last].log_softmax(-1)[token]) if token != last else REPEATED
                last = token
        return found

    best = max(itertools.product(range(4), repeat=3), key=total)
    found, scores = beam_search(step, 1, beams=4, per_node=4, max_steps=3, end=3)
    assert tuple(found[0].tolist()) == best
    assert float(scores) == pytest.approx(total(best), rel=1e-5)
    with pytest.raises(ValueError, match="num_beams: expected at most the 4 tokens, got 5"):
        beam_search(step, 1, beams=5, per_node=2, max_steps=3, end=3)
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
        beam_search(step, 1, beams=2, per_node=2, max_steps=0, end=3)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 5])
def test_captions_of_unequal_prompts_are_those_of_a_recomputation(beams: int) -> None:
    """Each row alone, its begin token and prompt computed anew for each token."""
    model = make()
    prompts = [[BEGIN], [BEGIN, 6, 11], [BEGIN, 12, 13, 5]]
    ids, mask = torch.full((3, 4), 31), torch.zeros(3, 4, dtype=torch.long)
    for k, row in enumerate(prompts):
        place = slice(0, len(row)) if k else slice(3, 4)  # pads on either side
        ids[k, place], mask[k, place] = torch.tensor(row), 1
    found = model.generate(pixels(3), ids, mask, max_new_tokens=7, num_beams=beams)

    def step(tokens: Tensor, rows: Tensor) -> Tensor:
        k = int(rows)
        whole = torch.tensor([[*prompts[k], *tokens[0].tolist()]])
        return model.output(model(pixels(3)[k : k + 1], whole).hidden_states[:, -1])

    for k in range(3):
        tokens, _ = plain_search(step, k, beams, 2, 7, END)
        assert found[k, : len(tokens)].tolist() == tokens
        assert set(found[k, len(tokens) :].tolist()) <= {END}
    assert len({tuple(row) for row in found.tolist()}) == 3
    assert model.generate(pixels(3), ids, mask, max_new_tokens=30, num_beams=beams).shape[1] <= 12 - 4 + 1


# Checkpoints, and what is refused


def test_a_checkpoint_holds_both_directions(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    loaded = VirTexModel.from_pretrained(tmp_path)
    assert loaded.output.weight is loaded.embedding.words.weight
    torch.testing.assert_close(loaded(**batch()).losses, model(**batch()).losses)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_wrong_input_is_named(tokenizer: Any) -> None:
    model = make()
    with pytest.raises(ValueError, match="input_ids: expected at most 12 tokens, got 13"):
        model(pixels(1), torch.ones(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="input_ids: expected a prompt of at most 12 tokens, got 13"):
        model.generate(pixels(1), torch.ones(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="dropout: expected a number in"):
        VirTexConfig(SMALL, dropout=1.0)
    with pytest.raises(ValueError, match="vision_config: expected a ResNet, got 'vit'"):
        VirTexConfig({"model_type": "vit"})
    with pytest.raises(ValueError, match="hidden_size: expected a multiple of num_heads 5, got 32"):
        VirTexConfig(SMALL, hidden_size=32, num_heads=5)
    with pytest.raises(ValueError, match="--text-width: expected a multiple of 64"):
        VirTexModel.build(VirTexOptions(text_width=100), tokenizer)
    with pytest.raises(ValueError, match="--vision-width: expected a multiple of 8, got 100"):
        VirTexModel.build(VirTexOptions(vision_width=100), tokenizer)
    with pytest.raises(ValueError, match="--max-length: expected at most the model's 12 positions, got 32"):
        model.collator(VirTexOptions(), tokenizer, train=True)
    collator = model.collator(VirTexOptions(max_length=12), tokenizer, train=True)
    with pytest.raises(ValueError, match="samples: expected an image of each, got 0 of 1"):
        collator([Sample(None, "a cat", "0", None)])
