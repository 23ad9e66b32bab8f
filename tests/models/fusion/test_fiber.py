"""FIBER, coarse stage: fusion inside the towers, losses with a queue, captions, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from processes import run_processes
from torch import Tensor

from vlmfast.data import load_tokenizer
from vlmfast.data.dataset import Sample
from vlmfast.models.checkpoints import load
from vlmfast.models.fusion.fiber import FIBERModel
from vlmfast.models.fusion.fiber_config import FIBERConfig, FIBEROptions
from vlmfast.models.fusion.fiber_parts import text_layer
from vlmfast.models.matching import draw_negatives

LAYERS, FUSED, SIDE, QUEUE = 4, 3, 32, 6


def config(**settings: Any) -> FIBERConfig:
    """The last three of four text layers; of blocks the last of stage 1 and both of stage 2, one of them shifted."""
    text = transformers.RobertaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=20, pad_token_id=1, type_vocab_size=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    vision = transformers.SwinConfig(
        image_size=SIDE, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[1, 2], window_size=2, drop_path_rate=0.0
    )
    sizes = {"hidden_size": 24, "num_fused_layers": FUSED, "queued_pairs": QUEUE, "queued_tokens": 9}
    return FIBERConfig(vision, text, **{**sizes, **settings})


def make(alpha: float | None = 0.6, **settings: Any) -> FIBERModel:
    """Weights far from what they start at, and open gates."""
    torch.manual_seed(0)
    model = FIBERModel(config(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "alpha" in name:
                parameter.fill_(0 if alpha is None else alpha)
            elif parameter.dim():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def batch(pairs: int = 4, seed: int = 1, *, training: bool = True) -> dict[str, Tensor]:
    """Padded texts; the first two pairs have one image."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 59, (pairs, 7), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate([7, 4, 6, 3, 5][:pairs]):
        ids[row, length:], mask[row, length:] = 1, 0
    given = {
        "pixel_values": torch.randint(0, 256, (pairs, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8),
        "input_ids": ids,
        "attention_mask": mask,
    }
    if not training:
        return given
    labels = torch.full_like(ids, -100)
    labels[:, 2] = ids[:, 2]
    labels[0, 4] = ids[0, 4]
    return {
        **given,
        "mlm_input_ids": torch.where(labels == -100, ids, 59),
        "mlm_labels": labels,
        "draws": torch.rand(pairs, 2, generator=generator),
        "image_ids": 10 * seed + torch.tensor([0, 0, 1, 2, 3])[:pairs],
    }


def encoded(model: FIBERModel, given: dict[str, Tensor]) -> tuple[Any, Any]:
    image = model.towers.encode_image(given["pixel_values"])
    return image, model.towers.encode_text(given["input_ids"], given["attention_mask"])


def test_without_gates_each_tower_is_what_it_is_alone() -> None:
    """Bit for bit, but for the last norms, which the fused pass does not have; and alone it is transformers' model."""
    model, given = make(alpha=None), batch(training=False)
    towers = model.towers
    with torch.no_grad():
        image, text = encoded(model, given)
        alone_image, alone_text = towers.alone(image=image), towers.alone(text=text)
        texts, images = towers.fuse(image, text)
        last = towers.text_model.encoder.layer[-1].output.LayerNorm
        assert torch.equal(last(texts), alone_text)
        assert not torch.equal(texts, alone_text)
        assert torch.equal(towers.vision_model.layernorm(images), alone_image)
        assert not torch.equal(images, alone_image)
        seen = given["attention_mask"].bool()
        theirs = towers.text_model(given["input_ids"], given["attention_mask"]).last_hidden_state
        torch.testing.assert_close(alone_text[seen], theirs[seen], rtol=1e-5, atol=1e-5)
        mean, std = torch.tensor(model.config.image_mean), torch.tensor(model.config.image_std)
        pixels = ((given["pixel_values"] / 255 - mean) / std).permute(0, 3, 1, 2)
        theirs = towers.vision_model(pixels).last_hidden_state
        torch.testing.assert_close(alone_image, theirs, rtol=1e-5, atol=1e-5)


def test_a_fused_pair_of_layers_is_the_formula() -> None:
    """Written out with transformers' own parts; image tokens without windows, though the block has shifted ones."""
    model, given = make(), batch(training=False)
    towers = model.towers
    block = towers.vision_model.encoder.layers[1].blocks[1]
    assert block.shift_size > 0
    captured: list[Tensor] = []
    block.layernorm_after.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    layer, t2i, i2t = towers.text_model.encoder.layer[-2], towers.t2i[1], towers.i2t[2]
    with torch.no_grad():
        image, text = encoded(model, given)
        x = image._replace(states=torch.randn(4, 16, 32), size=(4, 4))
        block(x.states, x.size)
        inside = captured[0] - x.states  # proj(window attention), windows put back
        towers._block(3, x, i2t, text)
        heads = inside.shape[-1] // 2
        q = i2t.qkv_i2t(i2t.norm_i2t_i(inside)).unflatten(-1, (2, heads)).transpose(1, 2)
        k, v = (t.unflatten(-1, (2, heads)).transpose(1, 2) for t in i2t.qkv_text_i2t(text.states).chunk(2, -1))
        hidden = given["attention_mask"][:, None, None] == 0
        weights = (q @ k.transpose(2, 3) / heads**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        read = i2t.proj_i2t((weights @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(captured[1], x.states + inside + 0.6 * read, rtol=1e-4, atol=1e-5)
        states, additive = text.states, torch.where(hidden, torch.finfo(torch.float32).min, 0.0)
        a = layer.attention.output.dense(layer.attention.self(states, additive)[0])
        own = t2i.crossattention_t2i["self"]
        q, k, v = (
            own[name](s).unflatten(-1, (2, 16)).transpose(1, 2)
            for name, s in (("query", a), ("key", x.states), ("value", x.states))
        )
        c = t2i.crossattention_t2i["output"]["dense"](
            ((q @ k.transpose(2, 3) / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)
        )
        h = layer.attention.output.LayerNorm(a + 0.6 * c + states)
        expected = layer.output.dense(layer.intermediate(h)) + h
        mask = ~hidden
        found = text_layer(layer, states, mask, t2i, x.states, last_norm=False)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            text_layer(layer, states, mask, t2i, x.states), layer.output.LayerNorm(expected), rtol=1e-4, atol=1e-5
        )


def test_either_reads_the_other_from_before_the_pair() -> None:
    """The last text layer reads no output of the last block, the last block none of the last text layer."""
    model, given = make(), batch(training=False)
    towers = model.towers
    texts, images = towers.fuse(*encoded(model, given))

    def reached(loss: Tensor, module: Any) -> bool:
        weights = [p for p in module.parameters() if p.dim() == 2]
        found = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
        return any(g is not None and bool(g.abs().sum() > 0) for g in found)

    blocks, layers = towers.vision_model.encoder.layers, towers.text_model.encoder.layer
    text, image = texts.square().sum(), images.square().sum()
    assert not reached(text, blocks[1].blocks[1])
    assert not reached(text, towers.i2t[2])
    assert reached(text, blocks[1].blocks[0])
    assert reached(text, towers.i2t[1])
    assert reached(text, blocks[0].downsample)
    assert not reached(image, layers[3])
    assert not reached(image, towers.t2i[2])
    assert reached(image, layers[2])
    assert reached(image, towers.t2i[1])
    assert torch.equal(towers.fuse(*encoded(model, given), text_only=True)[0], texts)
    assert len(towers.t2i) == len(towers.i2t) == FUSED  # and none for the layers before
    assert [fusion.qkv_i2t.in_features for fusion in towers.i2t] == [16, 32, 32]


def filled(model: FIBERModel, *seeds: int) -> FIBERModel:
    """The model after it was trained on batches, weights unchanged."""
    model.train()
    with torch.no_grad():
        for seed in seeds:
            model(**batch(seed=seed))
    return model.eval()


def test_losses_are_the_formulas_with_a_queue_that_has_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(make(), 2, 3)  # eight pairs into six places: the first two of seed 2 are gone
    assert model.queue is not None
    assert model.queue.filled() == QUEUE
    by_place = [(3, 2), (3, 3), (2, 2), (2, 3), (3, 0), (3, 1)]  # the pair that came as number k is at k % 6
    for place, (seed, row) in enumerate(by_place):
        assert torch.equal(model.queue.pixel_values[place], batch(seed=seed)["pixel_values"][row])
        assert torch.equal(model.queue.input_ids[place, :7], batch(seed=seed)["input_ids"][row])

    given = batch()
    given["input_ids"][2], given["attention_mask"][2] = model.queue.input_ids[4, :7], model.queue.attention_mask[4, :7]
    permitted: list[Tensor] = []

    def drawing(scores: Tensor, allowed: Tensor, uniform: Tensor) -> Tensor:
        permitted.append(allowed)
        return draw_negatives(scores, allowed, uniform)

    monkeypatch.setattr("vlmfast.models.fusion.fiber.draw_negatives", drawing)
    out = model(**given)
    shown = {name: given[name] for name in ("input_ids", "attention_mask")}
    stored = {name: getattr(model.queue, name) for name in shown}
    images = torch.cat([given["pixel_values"], model.queue.pixel_values])
    texts = {name: torch.cat([torch.nn.functional.pad(shown[name], (0, 2)), stored[name]]) for name in shown}
    with torch.no_grad():
        image = model.get_image_features(images).double()
        text = model.get_text_features(**texts).double()
        to_text, to_image = image[:4] @ text.T / 0.07, text[:4] @ image.T / 0.07
        itc = -(to_text.log_softmax(1)[range(4), range(4)] + to_image.log_softmax(1)[range(4), range(4)]).mean() / 2
        torch.testing.assert_close(out.itc_loss.double(), itc, rtol=1e-5, atol=1e-5)

        ids = torch.cat([given["image_ids"], model.queue.image_ids])
        allowed = ids[:4, None] != ids
        allowed[2, 4 + 4] = False  # the queue's pair with the same caption
        assert all(torch.equal(each, allowed) for each in permitted)
        pairs = [(k, k, 1) for k in range(4)]
        for scores, draws, wrong in (
            (to_image, given["draws"][:, 0], "image"),
            (to_text, given["draws"][:, 1], "text"),
        ):
            sums = scores.masked_fill(~allowed, -torch.inf).softmax(1).cumsum(1).numpy()
            for k, (row, u) in enumerate(zip(sums, draws.numpy(), strict=True)):
                drawn = int(np.searchsorted(row, u, side="right"))
                assert allowed[k, drawn]
                pairs.append((drawn, k, 0) if wrong == "image" else (k, drawn, 0))
        assert any(max(i, t) >= 4 for i, t, label in pairs if not label)  # some of the queue
        terms = [
            -model.itm_score(model(images[i : i + 1], **{n: v[t : t + 1] for n, v in texts.items()}).pooled)
            .log_softmax(1)[0, label]
            for i, t, label in pairs
        ]  # fmt: skip
        torch.testing.assert_close(out.itm_loss, torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)

        masked = model(given["pixel_values"], given["mlm_input_ids"], given["attention_mask"]).text_states
        labels = given["mlm_labels"]
        words = model.mlm_score(masked)[labels != -100].log_softmax(-1)
        mlm = -words[range(len(words)), labels[labels != -100]].mean()
        torch.testing.assert_close(out.mlm_loss, mlm, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss, out.mlm_loss + out.itm_loss + out.itc_loss)
    out.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert int(model.queue.pushed) == 8  # not in eval mode


def test_an_empty_queue_is_no_negative_and_checkpoints_hold_a_full_one(tmp_path: Path) -> None:
    model, without = make(objective="matching"), make(objective="matching", queued_pairs=0)
    missing = without.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not missing
    assert torch.equal(model(**batch()).loss, without(**batch()).loss)
    model = filled(model, 2, 3)
    model.save_pretrained(tmp_path)
    again = load(FIBERModel, str(tmp_path))
    assert torch.equal(model(**batch()).loss, again(**batch()).loss)
    assert not torch.equal(model(**batch()).loss, without(**batch()).loss)
    filled(model, 4)
    filled(again, 4)
    assert torch.equal(model.queue.input_ids, again.queue.input_ids)
    assert torch.equal(model(**batch()).loss, again(**batch()).loss)
    captions = load(FIBERModel, str(tmp_path), may_be_new=True, objective="captioning")
    captions.save_pretrained(tmp_path / "captions")
    again = load(FIBERModel, str(tmp_path / "captions"), may_be_new=True, objective="matching")
    own = captions.state_dict()
    kept = {name: weight for name, weight in again.state_dict().items() if name in own}
    assert any("t2i" in name for name in kept)
    assert all(torch.equal(weight, own[name]) for name, weight in kept.items())
    contrast = load(FIBERModel, str(tmp_path), may_be_new=True, objective="contrast")
    assert torch.equal(contrast(**batch()).loss, load(FIBERModel, str(tmp_path))(**batch()).itc_loss)
    assert not any("2t" in name.split(".")[1] for name, _ in contrast.named_parameters() if name.startswith("towers"))
    with pytest.raises(TypeError, match=r"pixel_values: expected uint8, which the queue keeps, got torch\.float32"):
        model.train()(**{**batch(), "pixel_values": torch.zeros(4, 3, SIDE, SIDE)})


def own_part(rank: int, world_size: int, model: Any, folder: str) -> None:
    sizes = [3, 2]
    for seed in (5, 6):
        part = {name: value.split(sizes)[rank] for name, value in batch(5, seed).items()}
        longest = int(part["attention_mask"].sum(1).max())
        part = {
            name: value[:, :longest] if value.ndim == 2 and name != "draws" else value for name, value in part.items()
        }
        loss = model(**part).loss
    loss.backward()
    whole = torch.load(f"{folder}/whole.pt")
    values = torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())])
    torch.distributed.all_reduce(values)
    torch.testing.assert_close(values / world_size, whole["values"], rtol=1e-4, atol=1e-5)
    for name, buffer in model.queue.named_buffers():
        if name == "input_ids":  # what stands in the padding is each batch's own
            buffer = buffer * model.queue.attention_mask
            whole["queue"][name] *= whole["queue"]["attention_mask"]
        torch.testing.assert_close(buffer, whole["queue"][name], rtol=1e-5, atol=1e-5, msg=name)


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Loss, gradients and the queue, across its wrap."""
    model = make().train()
    whole = copy.deepcopy(model)
    for seed in (5, 6):
        loss = whole(**batch(5, seed)).loss
    loss.backward()
    values = torch.cat([loss.detach()[None], *(p.grad.flatten() for p in whole.parameters())])
    torch.save({"values": values, "queue": dict(whole.queue.named_buffers())}, tmp_path / "whole.pt")
    run_processes(own_part, 2, model, str(tmp_path))


def test_captions_are_causal_and_written_greedily() -> None:
    model, given = make(objective="captioning"), batch(training=False)
    model.config.text_config.eos_token_id = 57
    out = model.train()(**given)
    out.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    model.eval()

    def logits(ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        states = model._decoded(model._memory(pixels), ids, mask)
        return model.mlm_score(model.cross_modal_text_transform(states))

    with torch.no_grad():
        ids, mask, pixels = given["input_ids"], given["attention_mask"], given["pixel_values"]
        found = logits(ids, mask, pixels)
        later = ids.clone()
        later[:, 3:] = 40
        changed = logits(later, mask, pixels)
        torch.testing.assert_close(found[:, :3], changed[:, :3])
        assert (found[0, 3:] - changed[0, 3:]).abs().max() > 0.01
        assert (found - logits(ids, mask, pixels.flip(0))).abs().max() > 0.01
        scored = found[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        torch.testing.assert_close(out.loss, -scored[mask[:, 1:] == 1].mean(), rtol=1e-5, atol=1e-5)

        written = model.generate(**given, max_new_tokens=4)
        for row in range(4):
            text = ids[row : row + 1, : int(mask[row].sum())]
            for step in range(written.shape[1]):
                token = logits(text, torch.ones_like(text), pixels[row : row + 1])[0, -1].argmax()
                assert token == written[row, step]
                text = torch.cat([text, token.view(1, 1)], 1)
        model.config.text_config.eos_token_id = int(written[1, 1])
        ended = model.generate(**given, max_new_tokens=4)
        assert ended[1].tolist() == [*written[1, :2].tolist(), 1, 1][: ended.shape[1]]
        # As many beams as words: the best of all pairs of words but a word twice.
        one = {name: value[1:2, :3] if name != "pixel_values" else value[1:2] for name, value in given.items()}
        words = torch.arange(60)
        text = torch.cat([one["input_ids"].expand(60, -1), words[:, None]], 1)
        first = logits(one["input_ids"], one["attention_mask"], pixels[1:2])[0, -1].log_softmax(0)
        second = logits(text, torch.ones_like(text), pixels[1:2].expand(60, -1, -1, -1))[:, -1].log_softmax(1)
        sums = first[:, None] + second.fill_diagonal_(-torch.inf)
        end = model.config.text_config.eos_token_id
        sums[end] = -torch.inf
        sums[end, end] = first[end]
        best = divmod(int(sums.argmax()), 60)
        assert tuple(model.generate(**one, max_new_tokens=2, num_beams=60)[0].tolist()) == best
    with pytest.raises(ValueError, match="objective captioning: has no matching; another --objective has"):
        model.match_scores(**given)
    assert not hasattr(make(), "generate")


def test_pretrained_towers_are_taken_whole(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    tokenizer.add_special_tokens(FIBERModel.special_tokens)
    model = make(alpha=None)
    swin = transformers.SwinModel(model.config.vision_config).eval()
    text_config = copy.deepcopy(model.config.text_config)
    text_config.vocab_size = len(tokenizer) - 1
    roberta = transformers.RobertaForMaskedLM(text_config).eval()
    swin.save_pretrained(tmp_path / "swin")
    roberta.save_pretrained(tmp_path / "roberta")
    options = FIBEROptions(vision_tower=str(tmp_path / "swin"), text_tower=str(tmp_path / "roberta"), max_length=9)
    model = FIBERModel.build(options, tokenizer)
    given = batch(training=False)
    pixels = torch.randn(4, 3, SIDE, SIDE)
    with torch.no_grad():
        image = model.towers.alone(image=model.towers.encode_image(pixels))
        torch.testing.assert_close(image, swin(pixels).last_hidden_state, rtol=1e-5, atol=1e-5)
        text = {name: given[name] for name in ("input_ids", "attention_mask")}
        theirs, seen = roberta.roberta(**text).last_hidden_state, given["attention_mask"].bool()
        found = model.towers.alone(text=model.towers.encode_text(**text))
        torch.testing.assert_close(found[seen], theirs[seen], rtol=1e-5, atol=1e-5)
    assert model.vocabulary == len(tokenizer) == len(model.mlm_score.bias)
    assert all(gate.item() == 0 for name, gate in model.named_parameters() if "alpha" in name)
    with pytest.raises(ValueError, match="--vision-tower: expected a SwinModel, got RobertaModel"):
        FIBERModel.build(FIBEROptions(vision_tower=str(tmp_path / "roberta")), tokenizer)


def test_fusions_and_what_follows_learn_faster() -> None:
    model = make()
    groups = model.parameter_groups(1e-5, 0.01)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    rates = {name: found[id(p)] for name, p in model.named_parameters()}
    assert len(found) == len(rates) == sum(len(group["params"]) for group in groups)
    assert rates["towers.text_model.encoder.layer.0.attention.self.query.weight"] == (1e-5, 0.01)
    for name in ("towers.t2i.0.crossattention_t2i.self.key", "towers.i2t.1.proj_i2t", "cross_modal_text_transform_itc"):
        assert rates[f"{name}.weight"] == pytest.approx((5e-5, 0.01)), name
    assert rates["towers.i2t.0.alpha_i2t"] == pytest.approx((5e-5, 0.0))
    assert rates["mlm_score.decoder.weight"] == rates["itm_score.weight"] == (1e-5, 0.01)
    with torch.no_grad():
        model.temperature.fill_(3)
    model.after_optimizer_step()
    assert model.metrics() == pytest.approx({"temperature": 1.0, "alpha_t2i": 0.6, "alpha_i2t": 0.6})


def test_prompts_lose_their_end() -> None:
    tokenizer = load_tokenizer()
    tokenizer.add_special_tokens(FIBERModel.special_tokens)
    options = FIBEROptions(objective="captioning", width=64, swin_width=32, layers=2, swin_depths="1,1", fused_layers=1)
    model = FIBERModel.build(options, tokenizer)
    image = torch.zeros(64, 64, 3, dtype=torch.uint8)
    samples = [Sample(image, text, "k", None) for text in ("", "a cat")]
    given = model.prompt_collator(options, tokenizer)(samples)
    words = tokenizer("a cat", add_special_tokens=False).input_ids
    assert given["input_ids"][1].tolist() == [tokenizer.bos_token_id, *words]
    assert given["attention_mask"].tolist() == [[1] + [0] * len(words), [1] * (1 + len(words))]
    assert given["input_ids"][0, 0] == tokenizer.bos_token_id
    assert model.generate(**given, max_new_tokens=3).shape[0] == 2


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="objective: expected one of pretraining, matching, contrast, captioning"):
        config(objective="caption")
    with pytest.raises(ValueError, match="num_fused_layers: expected 1 to 3, fewer than a tower has layers; got 4"):
        config(num_fused_layers=4)
    with pytest.raises(ValueError, match="windows of at most the last stage's 4 tokens, got 7"):
        FIBERConfig({**config().vision_config.to_dict(), "window_size": 7}, config().text_config, num_fused_layers=2)
    with pytest.raises(ValueError, match="--layers 3 has no effect beside --text-tower x"):
        FIBEROptions(layers=3, text_tower="x").check()
    with pytest.raises(ValueError, match="--swin-depths: expected numbers like 2,4, got 'two'"):
        FIBERModel.build(FIBEROptions(swin_depths="two"), load_tokenizer())
    with pytest.raises(ValueError, match="mlm_labels: missing"):
        make()(**{**batch(), "mlm_labels": None})
    with pytest.raises(ValueError, match="objective contrast: has no fused states"):
        make(objective="contrast")(**batch(training=False))
