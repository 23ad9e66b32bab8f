"""SimVLM: what sees what, per-sample prefixes, patches that convolutions mix, generation with a cache and without."""

from __future__ import annotations

import json
import math
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import write_pairs
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import create_causal_mask
from transformers.models.mbart.modeling_mbart import MBartDecoderLayer, MBartEncoderLayer

from vlmfast.cli import main
from vlmfast.data import load_tokenizer
from vlmfast.data.dataset import Sample
from vlmfast.models.encoder_decoder import Attention, RelativeBias
from vlmfast.models.prefix.simvlm import SimVLMModel
from vlmfast.models.simvlm_config import SimVLMConfig, SimVLMOptions

BEGIN, END, PAD, VOCAB, PATCHES = 1, 2, 0, 40, 4
SMALL = {"hidden_sizes": [8, 16, 16], "depths": [1, 1, 1], "embedding_size": 8, "layer_type": "basic", "image_size": 32}
SIZES = {"vocab_size": VOCAB, "max_position_embeddings": 16, "hidden_size": 32, "num_heads": 4}


@pytest.fixture(scope="module")
def model() -> SimVLMModel:
    """All parameters random and large, so that what the model says depends on what it reads."""
    torch.manual_seed(0)
    ids = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
    made = SimVLMModel(SimVLMConfig(SMALL, **SIZES, **ids, encoder_layers=2, decoder_layers=2)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4, generator=generator)
            elif "normalization.weight" in name:
                parameter.fill_(1)  # the residual branches of the ResNet too
    return made


def pixels(count: int) -> Tensor:
    return torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def batch() -> dict[str, Tensor]:
    """Three images, prefixes of 2, 0 and 3 tokens, of which pads stand before, and suffixes of 3, 4 and 1."""
    ids = torch.tensor([[PAD, 5, 9], [PAD, PAD, PAD], [12, 13, 5]])
    labels = torch.tensor([[11, 8, END, -100], [6, 7, 6, END], [END, -100, -100, -100]])
    return {
        "pixel_values": pixels(3),
        "input_ids": ids,
        "attention_mask": torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1]]),
        "decoder_input_ids": torch.tensor([[BEGIN, 11, 8, PAD], [BEGIN, 6, 7, 6], [BEGIN, PAD, PAD, PAD]]),
        "labels": labels,
    }


def row(given: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """One sample alone, without pads."""
    seen, told = given["attention_mask"][k] == 1, given["labels"][k] != -100
    return {
        "pixel_values": given["pixel_values"][k : k + 1],
        "input_ids": given["input_ids"][k : k + 1, seen],
        "decoder_input_ids": given["decoder_input_ids"][k : k + 1, told],
        "labels": given["labels"][k : k + 1, told],
    }


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer()


def samples(count: int, caption: str = "a red square above a green one on the left") -> list[Sample]:
    images = pixels(count)
    return [Sample(images[k], caption, str(k), None, seed=17 * k + 3) for k in range(count)]


# The honest test of the specification


@torch.no_grad()
def test_patches_see_the_text_of_the_prefix(model: SimVLMModel) -> None:
    given = {name: batch()[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    before, _ = model.encode(**given)
    given["input_ids"][0, 2] = 30
    after, _ = model.encode(**given)
    moved = (before - after)[:, :PATCHES].abs().amax(-1) > 1e-4
    assert moved.tolist() == [[True] * PATCHES, [False] * PATCHES, [False] * PATCHES]


@torch.no_grad()
def test_a_token_of_the_suffix_changes_nothing_before_it(model: SimVLMModel) -> None:
    given = batch()
    del given["labels"]
    before = model(**given)
    given["decoder_input_ids"][1, 2] = 30
    after = model(**given)
    assert torch.equal(before.encoder_last_hidden_state, after.encoder_last_hidden_state)
    assert torch.equal(before.logits[:, :2], after.logits[:, :2])
    assert (before.logits != after.logits).any(-1).tolist() == [[False] * 4, [False, False, True, True], [False] * 4]


def test_every_sample_has_its_own_prefix_and_only_what_follows_it_is_predicted(tokenizer: Any) -> None:
    options = SimVLMOptions(image_size=32, text_width=64, max_length=12)
    model = SimVLMModel.build(options, tokenizer)
    caption = "a red square above a green one on the left"
    whole = [*tokenizer.encode(caption, add_special_tokens=False), tokenizer.eos_token_id][:12]
    given = model.collator(options, tokenizer, train=True)(samples(64))
    lengths = given["attention_mask"].sum(1)
    terms = (given["labels"] != -100).sum(1)
    assert terms.tolist() == (len(whole) - lengths).tolist()
    assert set(lengths.tolist()) == set(range(len(whole)))  # T_p from 0 to T - 1
    for k in range(64):
        one = row(given, k)
        assert one["input_ids"][0].tolist() + one["labels"][0].tolist() == whole
        assert one["decoder_input_ids"][0].tolist() == [tokenizer.bos_token_id, *one["labels"][0, :-1].tolist()]
    again = model.collator(options, tokenizer, train=True)(samples(64)[5:6])
    assert again["input_ids"].tolist() == row(given, 5)["input_ids"].tolist()
    options.whole = 0.5
    half = model.collator(options, tokenizer, train=True)(samples(64))["attention_mask"].sum(1)
    assert 20 < (half == 0).sum() < 48
    assert len(set(half.tolist())) > 6
    still = model.collator(options, tokenizer, train=False)(samples(3))
    assert still["input_ids"].shape == (3, 0)
    assert still["labels"].tolist() == [whole] * 3


@torch.no_grad()
def test_convolutions_mix_patches_before_any_attention(model: SimVLMModel) -> None:
    before = pixels(1)
    after = before.clone()
    after[0, 2, 3] = 255 - after[0, 2, 3]  # in patch (0, 0) of 16 x 16 pixels
    first, second = (model.image_projection(model.conv(image)) for image in (before, after))
    assert first.shape == (1, PATCHES, 32)
    assert (first - second)[0, 1].abs().max() > 1e-4  # patch (0, 1)


def test_the_relative_bias_is_of_pairs_of_patches_alone(model: SimVLMModel) -> None:
    assert RelativeBias(14, 14, 12).table.shape == (27**2, 12)
    assert SimVLMConfig().grid == (14, 14)
    given, masks = batch(), []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda _, inputs: masks.append(inputs[1]))
        for layer in model.encoder.layers
    ]
    model.zero_grad()
    model(**given).loss.backward()
    for hook in hooks:
        hook.remove()
    read = torch.cat([torch.ones(3, PATCHES), given["attention_mask"]], dim=1) == 1
    for layer, mask in zip(model.encoder.layers, masks, strict=True):
        table = layer.relative_bias.table
        assert (table.grad.abs().sum(1) > 0).all()
        expected = torch.zeros(3, 4, PATCHES + 3, PATCHES + 3)
        for q in range(PATCHES):
            for k in range(PATCHES):
                down, right = q // 2 - k // 2, q % 2 - k % 2
                expected[:, :, q, k] = table[(down + 1) * 3 + right + 1]
        expected = expected.masked_fill(~read[:, None, None], -math.inf)
        assert torch.equal(mask, expected)
    model.zero_grad()
    with torch.no_grad():  # a text alone has no patches to compare
        text = {name: given[name] for name in ("input_ids", "attention_mask")}
        tables = [layer.relative_bias.table for layer in model.encoder.layers]
        before = model.encode(**text)[0]
        kept = [table.clone() for table in tables]
        for table in tables:
            table.add_(1 + table)
        assert torch.equal(before, model.encode(**text)[0])
        for table, old in zip(tables, kept, strict=True):
            table.copy_(old)


# Equations and parity


def attention(part: Attention, queries: Tensor, keys: Tensor, bias: Tensor | float) -> Tensor:
    heads = part.heads
    q, k, v = (
        F.linear(x, p.weight.double(), p.bias.double()).unflatten(-1, (heads, -1)).transpose(0, 1)
        for x, p in ((queries, part.q_proj), (keys, part.k_proj), (keys, part.v_proj))
    )
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + bias
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return F.linear(mixed, part.out_proj.weight.double(), part.out_proj.bias.double())


def norm(part: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * part.weight.double() + part.bias.double()


def mlp(layer: Any, x: Tensor) -> Tensor:
    hidden = F.linear(norm(layer.final_layer_norm, x), layer.fc1.weight.double(), layer.fc1.bias.double())
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return F.linear(hidden, layer.fc2.weight.double(), layer.fc2.bias.double())


def equations(model: SimVLMModel, one: dict[str, Tensor]) -> Tensor:
    """The sum of -log p of one sample's suffix, in float64 from the map of the convolutions on."""
    places = model.conv(one["pixel_values"])[0].double()
    projection = model.image_projection
    images = F.linear(places, projection.weight.double(), projection.bias.double())
    images = images + model.image_positions.weight.double()
    ids, begun, labels = one["input_ids"][0], one["decoder_input_ids"][0], one["labels"][0]
    words, table = model.words.weight.double(), model.text_positions.weight.double()
    x = torch.cat([images, words[ids] + table[: len(ids)]])
    for layer in model.encoder.layers:
        bias = torch.zeros(4, len(x), len(x), dtype=torch.float64)
        bias[:, :PATCHES, :PATCHES] = layer.relative_bias().double()
        normed = norm(layer.self_attn_layer_norm, x)
        x = x + attention(layer.self_attn, normed, normed, bias)
        x = x + mlp(layer, x)
    memory = norm(model.encoder.layer_norm, x)
    y = words[begun] + table[: len(begun)]
    later = torch.full((len(y), len(y)), -math.inf, dtype=torch.float64).triu(1)
    for layer in model.decoder.layers:
        normed = norm(layer.self_attn_layer_norm, y)
        y = y + attention(layer.self_attn, normed, normed, later)
        y = y + attention(layer.encoder_attn, norm(layer.encoder_attn_layer_norm, y), memory, 0.0)
        y = y + mlp(layer, y)
    logits = norm(model.decoder.layer_norm, y) @ words.T
    return (logits.logsumexp(-1) - logits[torch.arange(len(labels)), labels]).sum()


def test_the_loss_and_its_gradients_are_those_of_the_equations(model: SimVLMModel) -> None:
    """Of a batch with pads, whatever stands there."""
    given = batch()
    names = ["words.weight", "text_positions.weight", "image_positions.weight", "image_projection.weight"]
    names += ["encoder.layers.0.relative_bias.table", "decoder.layers.1.encoder_attn.k_proj.weight"]
    parameters = [dict(model.named_parameters())[name] for name in names]
    expected = torch.stack([equations(model, row(given, k)) for k in range(3)]).sum() / 8
    wanted = torch.autograd.grad(expected, parameters)
    given["input_ids"][given["attention_mask"] == 0] = 31
    found = model(**given).loss
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    for name, a, b in zip(names, torch.autograd.grad(found, parameters), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()), msg=name)


def test_what_depends_on_what_is_paligemmas_mask(model: SimVLMModel) -> None:
    """Patches and prefix as its prefix, the begin token and what follows as its suffix."""
    if "block_sequence_ids" not in signature(create_causal_mask).parameters:
        pytest.skip("transformers of this version has no such mask")
    prefix, suffix = PATCHES + 2, 3
    torch.manual_seed(0)
    places = torch.randn(1, prefix, 32, requires_grad=True)
    tokens = torch.randn(1, suffix, 32, requires_grad=True)
    read = torch.ones(1, prefix, dtype=torch.bool)
    memory = model.encoder(places, read, PATCHES)
    states = torch.cat([memory, model.decoder(tokens, memory, read)], dim=1)[0]
    reached = []
    for state in states:
        gradients = torch.autograd.grad(state.square().sum(), (places, tokens), retain_graph=True, allow_unused=True)
        rows = [torch.zeros(suffix, 32) if g is None else g[0] for g in gradients]
        reached.append(torch.cat(rows).any(dim=1))
    length = prefix + suffix
    config = transformers.GemmaConfig(attn_implementation="eager")
    blocks = torch.tensor([[0] * prefix + [-1] * suffix])
    mask = create_causal_mask(
        config=config, inputs_embeds=torch.zeros(1, length, 8), attention_mask=torch.ones(1, length, dtype=torch.long),
        past_key_values=None, position_ids=torch.arange(length)[None], block_sequence_ids=blocks,
    )  # fmt: skip
    assert torch.equal(torch.stack(reached), mask[0, 0] == 0)
    assert torch.equal(mask[0, 0] == 0, torch.ones(length, length).tril().bool() | (torch.arange(length) < prefix))


def test_layers_compute_what_mbarts_do(model: SimVLMModel) -> None:
    sizes = {"d_model": 32, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_attention_heads": 4}
    config = transformers.MBartConfig(**sizes, decoder_attention_heads=4, attn_implementation="sdpa")
    torch.manual_seed(0)
    states, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    theirs = MBartEncoderLayer(config).eval()
    ours = model.encoder.layers[0]
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("relative_bias")})
    keys = torch.zeros(2, 1, 1, 5)
    keys[0, ..., 3:] = -math.inf
    mask = (keys + F.pad(ours.relative_bias(), (0, 1, 0, 1))).detach()
    torch.testing.assert_close(ours(states, keys, 4), theirs(states, mask), rtol=1e-4, atol=1e-4)
    theirs = MBartDecoderLayer(config, layer_idx=0).eval()
    ours = model.decoder.layers[0]
    theirs.load_state_dict(ours.state_dict())
    keys = torch.zeros(2, 1, 1, 7)
    keys[1, ..., 4:] = -math.inf
    causal = torch.full((5, 5), -math.inf).triu(1)[None, None].expand(2, 1, 5, 5)
    expected = theirs(states, causal, memory, keys.expand(2, 1, 5, 7), use_cache=False)
    torch.testing.assert_close(ours(states, memory, keys), expected, rtol=1e-4, atol=1e-4)


def test_parts_of_a_batch_add_up(model: SimVLMModel) -> None:
    """As with gradient accumulation, or processes: sums divided by the tokens of all."""
    given = batch()
    whole = model(**given).loss
    parts = [model(**{name: value[k] for name, value in given.items()}, num_items_in_batch=8).loss
             for k in (slice(0, 1), slice(1, 3))]  # fmt: skip
    torch.testing.assert_close(sum(parts), whole)


# Generation


def recomputed(model: SimVLMModel, one: dict[str, Tensor], steps: int, end: int) -> list[int]:
    """Greedy, all of a row computed anew for each token."""
    found = [BEGIN]
    for _ in range(steps):
        logits = model(**one, decoder_input_ids=torch.tensor([found])).logits
        found.append(int(logits[0, -1].argmax()))
        if found[-1] == end:
            break
    return found[1:]


def prompts() -> dict[str, Tensor]:
    """Prompts of 0 to 4 tokens, pads on either side."""
    ids = torch.tensor([[5, 9, PAD, PAD], [PAD, PAD, PAD, PAD], [12, 13, 5, 31], [PAD, PAD, PAD, 30], [8, 20, 21, PAD]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 0]])
    return {"pixel_values": pixels(5), "input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_greedy_tokens_are_those_of_a_recomputation(model: SimVLMModel) -> None:
    given, steps = prompts(), 9
    alone = [
        {
            "pixel_values": given["pixel_values"][k : k + 1],
            "input_ids": given["input_ids"][k : k + 1, given["attention_mask"][k] == 1],
        }
        for k in range(5)
    ]
    end = recomputed(model, alone[2], steps, END)[3]  # a token that one row says, so that it ends before the others
    found = model.generate(**given, max_new_tokens=steps, eos_token_id=end)
    expected = [recomputed(model, one, steps, end) for one in alone]
    assert found.tolist() == [row + [PAD] * (steps - len(row)) for row in expected]
    assert min(map(len, expected)) < steps
    assert len(set(map(tuple, expected))) == 5


@torch.no_grad()
def test_beams_with_a_cache_are_those_without(model: SimVLMModel) -> None:
    given = prompts()
    greedy = model.generate(**given, max_new_tokens=9)
    searched = model.generate(**given, max_new_tokens=9, num_beams=3)
    assert searched.tolist() == model.generate(**given, max_new_tokens=9, num_beams=3, use_cache=False).tolist()
    assert searched.tolist() != greedy.tolist()
    for k in range(5):
        ids = given["input_ids"][k : k + 1, given["attention_mask"][k] == 1]
        alone = model.generate(ids, pixel_values=given["pixel_values"][k : k + 1], max_new_tokens=9, num_beams=3)
        assert searched[k, : alone.shape[1]].tolist() == alone[0].tolist()
        assert set(searched[k, alone.shape[1] :].tolist()) <= {PAD, END}  # transformers takes a pad token 0 for none


@torch.no_grad()
def test_steps_of_several_tokens_go_on_from_a_cache(model: SimVLMModel) -> None:
    given = {**batch()}
    del given["labels"]
    expected = model(**given).logits
    past = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    ids = given.pop("decoder_input_ids")
    first = model(**given, decoder_input_ids=ids[:, :1], past_key_values=past).logits
    rest = model(**given, decoder_input_ids=ids[:, 1:], past_key_values=past).logits
    torch.testing.assert_close(torch.cat([first, rest], dim=1), expected, rtol=1e-4, atol=1e-4)


# Texts without images, prompts


def test_texts_without_images_come_with_every_batch(tokenizer: Any, tmp_path: Path) -> None:
    lines = [f"document {name} of words" for name in ("one", "two", "three")]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    options = SimVLMOptions(image_size=32, text_width=64, text_data=str(tmp_path / "text.txt"), text_batch=5)
    model = SimVLMModel.build(options, tokenizer)
    collator = model.collator(options, tokenizer, train=True)
    given = collator(samples(4))
    assert given["pixel_values"].shape == (4, 32, 32, 3)
    assert given["image_mask"].tolist() == [True] * 4 + [False] * 5
    known = {(*tokenizer.encode(line, add_special_tokens=False), tokenizer.eos_token_id) for line in lines}
    images = torch.zeros(9, 32, 32, 3, dtype=torch.uint8)
    found = [row({**given, "pixel_values": images}, k) for k in range(4, 9)]
    texts = [tuple(one["input_ids"][0].tolist() + one["labels"][0].tolist()) for one in found]
    assert set(texts) <= known
    assert len(set(texts)) > 1
    assert len({one["input_ids"].shape[1] for one in found}) > 1
    again = collator(samples(4))
    assert all(torch.equal(value, again[name]) for name, value in given.items())
    others = [sample for sample in samples(8) if sample.seed > samples(4)[-1].seed]
    assert not torch.equal(collator(others)["labels"][4:], given["labels"][4:])
    assert "image_mask" not in model.collator(options, tokenizer, train=False)(samples(4))
    loss = model(**given).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_text_beside_images_is_a_text_alone(model: SimVLMModel) -> None:
    """Its places of patches are not read; where nothing is, the decoder reads zeros."""
    given = batch()
    given["pixel_values"] = given["pixel_values"][[0]]
    given["image_mask"] = torch.tensor([False, False, True])
    hidden = model(**given).hidden_states
    text = {name: given[name][:1] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    torch.testing.assert_close(hidden[:1], model(**text).hidden_states, rtol=1e-4, atol=1e-4)
    ids = given["decoder_input_ids"][1:2]
    y = model.words(ids) + model.text_positions.weight[:4]
    for layer in model.decoder.layers:  # without what the encoder says: the bias of the output layer is all
        normed = layer.self_attn_layer_norm(y)
        y = y + layer.self_attn.attend(normed, *layer.self_attn.keys_values(normed), None, causal=True)
        y = y + layer.encoder_attn.out_proj.bias
        y = y + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(y))))
    torch.testing.assert_close(hidden[1:2], model.decoder.layer_norm(y), rtol=1e-4, atol=1e-4)


def test_a_prompt_is_the_prefix_of_training_and_of_generation(tokenizer: Any) -> None:
    options = SimVLMOptions(image_size=32, text_width=64)
    model = SimVLMModel.build(options, tokenizer)
    (sample,) = samples(1)
    question = "question: what colour? answer:"
    asked = Sample(sample.image, f"{question} red", "0", None, prompt=question)
    prompt = Sample(sample.image, question, "0", None)
    trained = model.collator(options, tokenizer, train=True)([asked])
    given = model.prompt_collator(options, tokenizer)([prompt])
    assert given.keys() == {"pixel_values", "input_ids", "attention_mask"}
    assert torch.equal(trained["input_ids"], given["input_ids"])
    assert tokenizer.decode(trained["labels"][0], skip_special_tokens=True).strip() == "red"
    assert trained["labels"][0, -1] == tokenizer.eos_token_id
    long = Sample(sample.image, "a word " * 100, "long", None)
    with pytest.raises(ValueError, match="prompt of sample 'long': expected at most the model's 64 positions"):
        model.prompt_collator(options, tokenizer)([long])
    several = Sample(sample.image, "", "7", None, images=[sample.image, sample.image])
    with pytest.raises(ValueError, match="sample '7': expected one image, got 2"):
        model.prompt_collator(options, tokenizer)([several])


def test_answers_are_trained_behind_their_questions(tmp_path: Path) -> None:
    """By the command line, in a few steps to the answers of colours."""
    data = tmp_path / "data"
    data.mkdir()
    for path in sorted(write_pairs(data, 24).glob("*.txt")):
        colour = path.read_text().split()[0]
        record = {"caption": path.read_text(), "questions": [{"question": "what colour?", "answers": [colour]}]}
        path.with_suffix(".json").write_text(json.dumps(record))
        path.unlink()
    out, scores = tmp_path / "out", tmp_path / "scores.json"
    assert main([
        "train", "simvlm", "--task=vqa", f"--data={data}", f"--output-dir={out}", "--image-size=16",
        "--vision-width=32", "--vision-layers=1", "--text-width=64", "--text-layers=1", "--learning-rate=0.003",
        "--per-device-train-batch-size=24", "--max-steps=90", "--crop-scale=1", "--report-to=none", "--use-cpu",
        "--dataloader-num-workers=0", "--disable-tqdm=true", "--save-steps=90",
    ]) == 0  # fmt: skip
    assert main([
        "eval", f"--checkpoint={out}", f"--data={data}", "--task=vqa", "--max-new-tokens=3", "--device=cpu",
        "--num-workers=0", f"--output={scores}",
    ]) == 0  # fmt: skip
    rows = json.loads(scores.read_text())["scores"]
    assert rows["model"]["accuracy"] > 0.9
    assert rows["blind"]["accuracy"] < 0.5


# Checkpoints, and what is refused


def test_a_checkpoint_holds_all(model: SimVLMModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = SimVLMModel.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.words.weight
    torch.testing.assert_close(loaded(**batch()).loss, model(**batch()).loss)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_residual_branches_and_relative_places_start_at_zero() -> None:
    made = SimVLMModel(SimVLMConfig({**SMALL, "depths": [2, 1, 1]}, **SIZES, encoder_layers=1, decoder_layers=1))
    assert not made.encoder.layers[0].relative_bias.table.any()
    branches = [block.layer[-1].normalization.weight for stage in made.conv.resnet.encoder.stages
                for block in stage.layers]  # fmt: skip
    assert len(branches) == 4
    assert not torch.cat(branches).any()
    assert made.conv.resnet.embedder.embedder.normalization.weight.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_batch": 3}, "--text-batch 3 needs --text-data"),
        ({"whole": 2.0}, "--whole: expected a probability, got 2.0"),
        ({"text_width": 100}, "--text-width: expected a multiple of 64"),
        ({"vision_width": 90}, "--vision-width: expected a multiple of 4, got 90"),
        ({"pretrained": "x", "text_layers": 2}, "--text-layers 2 has no effect beside --pretrained"),
    ],
)
def test_wrong_flags_are_named(options: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        SimVLMModel.build(SimVLMOptions(**options), tokenizer)


def test_wrong_input_is_named(model: SimVLMModel, tokenizer: Any, tmp_path: Path) -> None:
    given = batch()
    with pytest.raises(ValueError, match="image_mask: needed for 2 images of 3 rows"):
        model(**{**given, "pixel_values": pixels(2)})
    with pytest.raises(ValueError, match="image_mask: expected 3 values, True for 2 images"):
        model(**{**given, "pixel_values": pixels(2), "image_mask": torch.tensor([True, False, False])})
    with pytest.raises(ValueError, match=r"input_ids: expected \(B, L\), L at most 16, got shape \(3, 17\)"):
        model(**{**given, "input_ids": torch.ones(3, 17, dtype=torch.long)})
    with pytest.raises(ValueError, match="max_new_tokens: expected at most the model's 16 positions, got 17"):
        model.generate(given["input_ids"], max_new_tokens=17)
    with pytest.raises(ValueError, match="vision_config: expected depths and hidden_sizes of 3 stages"):
        SimVLMConfig({"depths": [1, 1, 1, 1]})
    with pytest.raises(ValueError, match="hidden_size: expected a multiple of num_heads 5, got 32"):
        SimVLMConfig(SMALL, hidden_size=32, num_heads=5)
    with pytest.raises(ValueError, match="--max-length: expected at most the model's 16 positions, got 32"):
        model.collator(SimVLMOptions(), tokenizer, train=True)
    (tmp_path / "empty.txt").write_text("\n \n")
    options = SimVLMOptions(max_length=8, text_data=str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="expected a line of text at least, got none"):
        model.collator(options, tokenizer, train=True)
