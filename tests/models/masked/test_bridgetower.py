"""BridgeTower: bridges, losses, parity with transformers, checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import math
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
from vlmfast.models.masked.bridgetower import BridgeTowerConfig, BridgeTowerForPreTraining
from vlmfast.models.masked.bridgetower_config import BridgeTowerOptions
from vlmfast.models.masked_pairs import MaskedPairCollator

LAYERS, CROSS = 4, 3


def config(**settings: Any) -> BridgeTowerConfig:
    text = transformers.BridgeTowerTextConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=20, pad_token_id=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    vision = transformers.BridgeTowerVisionConfig(hidden_size=64, num_hidden_layers=LAYERS, patch_size=8, image_size=16)
    sizes = {"hidden_size": 64, "num_hidden_layers": CROSS, "num_attention_heads": 2, "projection_dim": 8}
    return BridgeTowerConfig(text, vision, **{**sizes, **settings})


def make(**settings: Any) -> BridgeTowerForPreTraining:
    """Weights far from what they start at, so that every part counts."""
    torch.manual_seed(0)
    model = BridgeTowerForPreTraining(config(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(pairs: int = 4, *, training: bool = True) -> dict[str, Tensor]:
    """Padded texts, all different; the first two pairs have one image."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 59, (pairs, 7), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate([7, 4, 6, 3, 5][:pairs]):
        ids[row, length:], mask[row, length:] = 1, 0
    given = {
        "pixel_values": torch.randn(pairs, 3, 16, 16, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
    }
    if not training:
        return given
    labels = torch.full_like(ids, -100)
    labels[:, 2] = ids[:, 2]
    labels[0, 4] = ids[0, 4]
    draws = torch.tensor([[0.7, 0.6], [0.2, 0.1], [0.4, 0.9], [0.9, 0.3], [0.1, 0.5]])[:pairs]
    return {
        **given,
        "mlm_input_ids": torch.where(labels == -100, ids, 59),
        "mlm_labels": labels,
        "draws": draws,
        "image_ids": torch.tensor([7, 7, 8, 9, 4])[:pairs],
    }


def public(cls: Any, model: BridgeTowerForPreTraining, folder: Path) -> Any:
    """transformers' model of the same weights, read from our checkpoint."""
    model.save_pretrained(folder)
    found, report = cls.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert all("pooler" in name and "text_model" in name for name in report["missing_keys"])
    return found.train()


def test_losses_and_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    """Of padded batches: the masked text with its image, and the text with an image of another pair."""
    model = make().train()
    given = batch()
    out = model(**given)
    out.loss.backward()
    masked = public(transformers.BridgeTowerForMaskedLM, model, tmp_path / "one")
    common = {"attention_mask": given["attention_mask"]}
    mlm = masked(given["mlm_input_ids"], pixel_values=given["pixel_values"], labels=given["mlm_labels"], **common).loss
    mlm.backward()
    torch.testing.assert_close(out.mlm_loss, mlm, rtol=1e-5, atol=1e-5)

    matching = public(transformers.BridgeTowerForImageAndTextRetrieval, model, tmp_path / "two")
    # Rows 1 and 2 have draws below a half: of 2 and 3, the only ones with another image, and of 0, 1 and 3.
    images, labels = torch.tensor([0, 2, 3, 3]), torch.tensor([1, 0, 0, 1])
    itm = matching(
        given["input_ids"], pixel_values=given["pixel_values"][images], labels=labels, **common
    )  # fmt: skip
    itm.loss.backward()
    torch.testing.assert_close(out.itm_loss, itm.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss, mlm + itm.loss)

    gradients = [dict(each.named_parameters()) for each in (masked, matching)]
    for name, parameter in model.named_parameters():
        theirs = [own[name].grad for own in gradients if name in own and own[name].grad is not None]
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, torch.stack(theirs).sum(0), rtol=1e-3, atol=2e-5, msg=name)

    model.eval()
    with torch.no_grad():
        shown = {name: given[name] for name in ("pixel_values", "input_ids", "attention_mask")}
        logits = matching.eval()(**shown).logits
        torch.testing.assert_close(model.match_scores(**shown), logits.log_softmax(1)[:, 1], rtol=1e-4, atol=1e-5)
        theirs = masked.eval().bridgetower(**shown)
        joint = model.joint_features(**shown)
        torch.testing.assert_close(joint.pooled, theirs.pooler_output, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(joint.image, theirs.image_features, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(joint.text, theirs.text_features, rtol=1e-4, atol=1e-4)


def test_a_bridge_adds_before_its_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LN(a) + b in place of LN(a + b) is another model than transformers'."""
    model, given = make().eval(), batch(training=False)
    theirs = public(transformers.BridgeTowerModel, model, tmp_path).eval()(**given).pooler_output
    with torch.no_grad():
        assert (model(**given).pooled - theirs).abs().max() < 1e-4
        for link in model.bridgetower.cross_modal_text_link_tower:
            link.forward = lambda hidden, cross, mask, norm=link.LayerNorm: norm(hidden) + cross  # type: ignore[misc]
        assert (model(**given).pooled - theirs).abs().max() > 0.01


def test_bridges_carry_the_towers_layers() -> None:
    """Each counts, and the last tower layer reaches MLM through the last bridge alone."""
    model, given = make().train(), batch()
    trunk = model.bridgetower
    assert len(trunk.cross_modal_text_link_tower) == len(trunk.cross_modal_image_link_tower) == CROSS - 1
    assert len(trunk.cross_modal_text_layers) == len(trunk.cross_modal_image_layers) == CROSS
    text = trunk.encode_text(given["input_ids"], given["attention_mask"])
    image = trunk.encode_image(given["pixel_values"])
    assert len(text.layers) == len(image.layers) == CROSS
    whole = torch.cat(trunk.fuse(text, image), 1)
    for number in range(CROSS):
        for stream in (text, image):
            kept = stream.layers[number]
            stream.layers[number] = torch.zeros_like(kept)
            assert (torch.cat(trunk.fuse(text, image), 1) - whole).abs().max() > 1e-3
            stream.layers[number] = kept

    def reaches(cut: bool) -> list[bool]:
        """Whether MLM has a gradient for the last layer of each tower, with the last bridge cut off or not."""
        last = [trunk.text_model.encoder.layer[-1], trunk.vision_model.visual.transformer.resblocks[-1]]
        streams = [trunk.encode_text(given["input_ids"], None), trunk.encode_image(given["pixel_values"])]
        if cut:
            streams = [one._replace(layers=[*one.layers[:-1], one.layers[-1].detach()]) for one in streams]
        loss = trunk.fuse(*streams, keep="text")[0].square().sum()
        weights = [next(p for p in layer.parameters() if p.dim() == 2) for layer in last]
        return [g is not None for g in torch.autograd.grad(loss, weights, allow_unused=True)]

    assert reaches(False) == [True, True]
    assert reaches(True) == [False, False]


def test_no_stream_is_causal_and_less_is_read_of_the_last_layer_without_a_difference() -> None:
    """Image tokens in another order give states in that order."""
    model, given = make().eval(), batch(training=False)
    trunk = model.bridgetower
    text, image = (
        trunk.encode_text(given["input_ids"], given["attention_mask"]),
        trunk.encode_image(given["pixel_values"]),
    )
    with torch.no_grad():
        texts, images = trunk.fuse(text, image)
        order = torch.tensor([3, 0, 4, 2, 1])
        moved = image._replace(layers=[layer[:, order] for layer in image.layers])
        for found, expected in zip(trunk.fuse(text, moved), (texts, images[:, order]), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trunk.fuse(text, image, keep="text")[0], texts, rtol=1e-4, atol=1e-5)
        for found, expected in zip(trunk.fuse(text, image, keep="first"), (texts, images), strict=True):
            torch.testing.assert_close(found, expected[:, :1], rtol=1e-4, atol=1e-5)


def test_contrast_and_hard_negatives_are_the_formulas() -> None:
    """ITC in float64 with two texts of one image; ITM on drawn pairs, never of one image or one caption."""
    model = make(objectives=["itm", "itc"]).train()
    given = batch(5)
    given["input_ids"][4], given["attention_mask"][4] = given["input_ids"][2], given["attention_mask"][2]
    out = model(**given)
    shown = {name: given[name] for name in ("input_ids", "attention_mask")}
    images = model.get_image_features(given["pixel_values"]).detach().double()
    texts = model.get_text_features(**shown).detach().double()
    logits = images @ texts.T / 0.07
    same = given["image_ids"][:, None] == given["image_ids"]
    targets = same / same.sum(1, keepdim=True)
    itc = -((targets * logits.log_softmax(1)).sum(1).mean() + (targets * logits.T.log_softmax(1)).sum(1).mean()) / 2
    torch.testing.assert_close(out.itc_loss.double(), itc, rtol=1e-5, atol=1e-6)

    allowed = ~same
    allowed[2, 4] = allowed[4, 2] = False
    drawn = []
    for scores, numbers in ((logits.T, given["draws"][:, 0]), (logits, given["draws"][:, 1])):
        sums = scores.masked_fill(~allowed, -torch.inf).softmax(1).cumsum(1).numpy()
        drawn.append([int(np.searchsorted(row, u, side="right")) for row, u in zip(sums, numbers.numpy(), strict=True)])
    pairs = [(k, k, 1) for k in range(5)] + [(drawn[0][k], k, 0) for k in range(5)] + [
        (k, drawn[1][k], 0) for k in range(5)
    ]  # fmt: skip
    assert all(allowed[i, t] for i, t, label in pairs if not label)
    terms = []
    for i, t, label in pairs:
        pooled = model(given["pixel_values"][i : i + 1], **{name: value[t : t + 1] for name, value in shown.items()})
        terms.append(-model.itm_score(pooled.pooled).log_softmax(1)[0, label])
    torch.testing.assert_close(out.itm_loss, torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, out.itc_loss + out.itm_loss)
    out.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_half_of_the_pairs_are_wrong_without_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where all captions are the same, none is."""
    seen: list[Tensor] = []
    model = make(objectives=["itm"]).eval()
    monkeypatch.setattr(
        "vlmfast.models.masked.bridgetower.matching_loss",
        lambda logits, labels: seen.append(labels) or logits.sum(),  # type: ignore[func-returns-value]
    )
    given = batch()
    for step in range(60):
        given["draws"] = torch.rand(4, 2, generator=torch.Generator().manual_seed(step))
        model(**given)
    assert abs(torch.stack(seen).float().mean() - 0.5) < 4 * 0.5 / math.sqrt(240)
    seen.clear()
    model(**{**given, "input_ids": given["input_ids"][:1].expand(4, -1), "attention_mask": None})
    assert seen[0].tolist() == [1] * 4


def own_part(rank: int, world_size: int, model: Any, given: dict[str, Tensor], folder: str) -> None:
    sizes = [3, 2]
    part = {name: value.split(sizes)[rank] for name, value in given.items()}
    longest = int(part["attention_mask"].sum(1).max())
    part = {k: v[:, :longest] if k.endswith(("_ids", "mask", "labels")) and v.ndim == 2 else v for k, v in part.items()}
    loss = model(**part).loss
    loss.backward()
    whole = torch.load(f"{folder}/whole.pt")
    values = torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())])
    torch.distributed.all_reduce(values)
    torch.testing.assert_close(values / world_size, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objectives", [["mlm", "itm"], ["mlm", "itm", "itc"]], ids=len)
def test_two_processes_are_one(objectives: list[str], tmp_path: Path) -> None:
    """Loss and gradients, with pairs drawn from the other process's batch, of unequal parts and lengths."""
    model, given = make(objectives=objectives).train(), batch(5)
    whole = copy.deepcopy(model)
    loss = whole(**given).loss
    loss.backward()
    torch.save(torch.cat([loss.detach()[None], *(p.grad.flatten() for p in whole.parameters())]), tmp_path / "whole.pt")
    run_processes(own_part, 2, model, given, str(tmp_path))


def test_checkpoints_of_transformers_load_and_what_they_lack_is_new(tmp_path: Path) -> None:
    model, given = make().eval(), batch(training=False)
    for kind in ("BridgeTowerForMaskedLM", "BridgeTowerForImageAndTextRetrieval", "BridgeTowerModel"):
        theirs = public(getattr(transformers, kind), model, tmp_path / kind)
        theirs.save_pretrained(tmp_path / f"{kind}-own")
        loaded = load(BridgeTowerForPreTraining, str(tmp_path / f"{kind}-own"), may_be_new=True)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**given).pooled, model(**given).pooled)
        kept = {
            "mlm_score": torch.equal(loaded.mlm_score.decoder.weight, model.mlm_score.decoder.weight),
            "itm_score": torch.equal(loaded.itm_score.fc.weight, model.itm_score.fc.weight),
        }
        assert kept == {"mlm_score": kind == "BridgeTowerForMaskedLM", "itm_score": "Retrieval" in kind}
        with pytest.raises(ValueError, match="lacks"):
            load(BridgeTowerForPreTraining, str(tmp_path / f"{kind}-own"))
    model.save_pretrained(tmp_path / "ours")
    again = load(BridgeTowerForPreTraining, str(tmp_path / "ours"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    tuned = load(BridgeTowerForPreTraining, str(tmp_path / "ours"), may_be_new=True, objectives=["itm", "itc"])
    assert tuned.mlm_score is None
    assert float(tuned.temperature.detach()) == pytest.approx(0.07)


def test_pretrained_towers_are_those_of_clip_and_roberta(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    tokenizer.add_special_tokens(BridgeTowerForPreTraining.special_tokens)
    clip = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=1,
            intermediate_size=256,
            image_size=16,
            patch_size=8,
        )
    ).eval()
    roberta = transformers.RobertaModel(
        transformers.RobertaConfig(
            vocab_size=len(tokenizer) - 1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=20, type_vocab_size=1,
        )
    ).eval()  # fmt: skip
    for tower in (clip, roberta):
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    clip.save_pretrained(tmp_path / "clip")
    roberta.save_pretrained(tmp_path / "roberta")
    options = BridgeTowerOptions(
        vision_tower=str(tmp_path / "clip"),
        text_tower=str(tmp_path / "roberta"),
        cross_layers=1,
        objectives="mlm,itm,itc",
    )
    model = BridgeTowerForPreTraining.build(options, tokenizer)
    given = batch(training=False)
    with torch.no_grad():
        states = clip(given["pixel_values"]).last_hidden_state
        expected = (
            clip.post_layernorm(states) if hasattr(clip, "post_layernorm") else clip.vision_model.post_layernorm(states)
        )
        torch.testing.assert_close(
            model.bridgetower.encode_image(given["pixel_values"]).last, expected, rtol=1e-4, atol=1e-4
        )
        text = {name: given[name] for name in ("input_ids", "attention_mask")}
        expected, seen = roberta(**text).last_hidden_state, given["attention_mask"].bool()
        torch.testing.assert_close(
            model.bridgetower.encode_text(**text).last[seen], expected[seen], rtol=1e-4, atol=1e-4
        )
    larger = BridgeTowerForPreTraining.build(dataclasses.replace(options, image_size=32), tokenizer)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = clip(pixels, interpolate_pos_encoding=True).last_hidden_state
        theirs = getattr(clip, "vision_model", clip).post_layernorm(theirs)
        torch.testing.assert_close(larger.bridgetower.encode_image(pixels).last, theirs, rtol=1e-4, atol=1e-4)
    assert larger.image_size(dataclasses.replace(options, image_size=32)) == 32
    assert model.vocabulary == len(tokenizer) == len(model.mlm_score.bias)
    assert model.max_text_length == 18


def test_cross_modal_layers_and_heads_learn_faster() -> None:
    model = make(objectives=["mlm", "itm", "itc"])
    groups = model.parameter_groups(1e-5, 0.01)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    rates = {name: found[id(p)] for name, p in model.named_parameters()}
    assert len(found) == len(rates) == sum(len(group["params"]) for group in groups)
    assert rates["bridgetower.text_model.encoder.layer.0.attention.self.query.weight"] == (1e-5, 0.01)
    assert rates["bridgetower.cross_modal_text_link_tower.0.LayerNorm.weight"] == pytest.approx((5e-5, 0.0))
    assert rates["bridgetower.cross_modal_image_transform.weight"] == pytest.approx((5e-5, 0.01))
    for head in ("mlm_score.decoder", "itm_score.fc", "image_projection", "text_projection"):
        assert rates[f"{head}.weight"] == pytest.approx((5e-5, 0.01)), head
    assert rates["temperature"] == (1e-5, 0.0)
    with torch.no_grad():
        model.temperature.fill_(0.9)
    model.after_optimizer_step()
    assert model.metrics() == {"temperature": pytest.approx(0.5)}


def test_a_batch_is_a_function_of_its_samples_seeds() -> None:
    tokenizer = load_tokenizer()
    tokenizer.add_special_tokens(BridgeTowerForPreTraining.special_tokens)
    model = BridgeTowerForPreTraining.build(BridgeTowerOptions(layers=2, width=64, cross_layers=1), tokenizer)
    assert not hasattr(model, "get_image_features")
    image = torch.zeros(64, 64, 3, dtype=torch.uint8)
    samples = [
        Sample(image, f"a small cat number {k}", f"{k}", None, seed=k, record={"image_id": k // 2}) for k in range(4)
    ]
    collator = model.collator(BridgeTowerOptions(), tokenizer, train=True)
    whole, part = collator(samples), collator(samples[2:])
    assert torch.equal(whole["draws"][2:], part["draws"])
    assert torch.equal(whole["mlm_labels"][2:], part["mlm_labels"])
    assert whole["image_ids"][0] == whole["image_ids"][1] != whole["image_ids"][2]
    loss = model.train()(**whole).loss
    loss.backward()
    assert loss.isfinite()


def test_several_captions_of_an_image_are_pairs_of_it() -> None:
    tokenizer = load_tokenizer()
    tokenizer.add_special_tokens(BridgeTowerForPreTraining.special_tokens)
    collator = MaskedPairCollator(tokenizer, max_length=12, captions_per_image=3)
    image = torch.zeros(16, 16, 3, dtype=torch.uint8)
    records = [{"captions": ["a cat", "one cat", "cats", "the cat"]}, {"captions": ["a dog"]}]
    samples = [
        Sample(image + k, r["captions"][0], f"{k}", None, seed=100 * k + 7, record=r) for k, r in enumerate(records)
    ]
    given = collator(samples)
    texts = tokenizer.batch_decode(given["input_ids"], skip_special_tokens=True)
    assert len(texts) == len(set(texts)) == 4
    assert texts[0] == "a cat"
    assert texts[3] == "a dog"
    assert set(texts) <= {"a cat", "one cat", "cats", "the cat", "a dog"}
    assert given["image_ids"][:3].unique().numel() == 1
    assert given["image_ids"][3] != given["image_ids"][0]
    assert given["pixel_values"][:, 0, 0, 0].tolist() == [0, 0, 0, 1]
    assert given["draws"].unique().numel() == given["draws"].numel()
    again = collator(samples)
    assert all(torch.equal(value, again[name]) for name, value in given.items())


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="objectives: expected some of mlm, itm, itc, itm among them"):
        config(objectives=["mlm"])
    with pytest.raises(ValueError, match="num_hidden_layers: expected at most 4, the layers of a tower; got 5"):
        config(num_hidden_layers=5)
    with pytest.raises(ValueError, match="share_link_tower_layers: not supported"):
        config(share_link_tower_layers=True)
    with pytest.raises(ValueError, match="hidden_size: expected the text tower's 64, got 32"):
        config(hidden_size=32)
    with pytest.raises(ValueError, match="vision_config: expected as many layers as the text tower's 4, got 12"):
        BridgeTowerConfig(config().text_config, {"hidden_size": 64}, hidden_size=64)
    with pytest.raises(ValueError, match="--objectives: expected some of mlm, itm, itc, got 'itn'"):
        BridgeTowerOptions(objectives="mlm,itn").check()
    with pytest.raises(ValueError, match="--layers 3 has no effect beside --text-tower x"):
        BridgeTowerOptions(layers=3, text_tower="x").check()
    with pytest.raises(ValueError, match="mlm_labels: missing"):
        make()(**{**batch(), "mlm_labels": None})
