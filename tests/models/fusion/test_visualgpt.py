"""VisualGPT against its equations, GPT-2's checkpoints, generation, regions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from captioners import CAPTIONS, captions, check_generation, make, pixels, regions
from command_line import COLOURS, write_pairs
from numerics import take_gradients
from prefix_models import gpt2, llama, write_language_model, write_tower
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from vlmfast.cli import main
from vlmfast.data import FeatureCache, ImageTextDataset, Sample, load_tokenizer
from vlmfast.models.captioner_batches import CaptionCollator
from vlmfast.models.fusion.visualgpt import VisualGPTConfig, VisualGPTModel, VisualGPTOptions


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, hidden: Tensor) -> Tensor:
    """(L, D) from (L, D) and (R, D) twice; hidden (L, R) is True where a query does not see a key."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
    scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def by_the_equations(model: VisualGPTModel, features: Tensor, ids: Tensor) -> Tensor:
    """The decoder's last states (L, D) of one caption and one image's features (R, W), neither with pads."""
    w = dict(model.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def conv(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = norm(F.gelu(linear(features, "project"), approximate="tanh"), "norm")
    all_seen = torch.zeros(len(x), len(x), dtype=torch.bool)
    levels = []
    for k in range(3):
        name = f"encoder.{k}"
        packed = x @ w[f"{name}.self_attn.in_proj_weight"].T + w[f"{name}.self_attn.in_proj_bias"]
        x = norm(
            x + linear(attention(*packed.chunk(3, -1), 4, all_seen), f"{name}.self_attn.out_proj"), f"{name}.norm1"
        )
        x = norm(x + linear(linear(x, f"{name}.linear1").relu(), f"{name}.linear2"), f"{name}.norm2")
        levels.append(x)
    h = w["decoder.transformer.wte.weight"][ids] + w["decoder.transformer.wpe.weight"][: len(ids)]
    later = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for k in range(2):
        name = f"decoder.transformer.h.{k}"
        packed = conv(norm(h, f"{name}.ln_1"), f"{name}.attn.c_attn")
        a = h + conv(attention(*packed.chunk(3, -1), 4, later), f"{name}.attn.c_proj")
        q = conv(norm(a, f"{name}.ln_1"), f"{name}.crossattention.q_attn")
        mixed = torch.zeros_like(a)
        for i, level in enumerate(levels, 1):
            keys, values = conv(norm(level, f"{name}.ln_1"), f"{name}.crossattention.c_attn").chunk(2, -1)
            seen = torch.zeros(len(q), len(keys), dtype=torch.bool)
            e = conv(attention(q, keys, values, 4, seen), f"{name}.crossattention.c_proj")
            s = linear(torch.cat([a, e], -1), f"{name}.cross_gate.fc_alpha{i}").sigmoid()
            tau = model.config.tau
            mixed = mixed + s * (s > tau) * a + (1 - s) * (1 - s > tau) * e
        mixed = mixed / math.sqrt(3)
        inner = F.gelu(conv(norm(mixed, f"{name}.ln_2"), f"{name}.mlp.c_fc"), approximate="tanh")
        h = mixed + conv(inner, f"{name}.mlp.c_proj")
    return norm(h, "decoder.transformer.ln_f")


def test_states_loss_and_gradients_are_the_equations() -> None:
    """In float64, with pads among regions and in captions; each image alone and without pads in the equations."""
    model = make(VisualGPTModel, region_dim=20).double()
    given, text = regions(), captions()
    features = given["image_features"].double()
    with torch.no_grad():
        images = model.image_states(None, features, given["image_mask"])
    assert images.shape == (3, 4, 3 * 32)
    text_given = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
    (found,) = model(**text_given, image_features=features, image_mask=given["image_mask"]).hidden_states
    total, wanted = torch.zeros(()), torch.zeros(())
    for k, row in enumerate(CAPTIONS):
        alone = by_the_equations(model, features[k, : int(given["image_mask"][k].sum())], torch.tensor(row))
        torch.testing.assert_close(found[k, : len(row)], alone, rtol=1e-9, atol=1e-9)
        logits = alone @ model.decoder.lm_head.weight.T
        wanted = wanted + F.cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="sum")
        total = total + len(row) - 1
    (wanted / total).backward()
    expected = take_gradients(model)
    model.float()
    loss = model(**text, **given).loss
    loss.backward()
    torch.testing.assert_close(loss, (wanted / total).float().detach())
    ours = take_gradients(model)
    assert ours.keys() == expected.keys() == dict(model.named_parameters()).keys()
    assert {"decoder.transformer.h.1.cross_gate.fc_alpha3.weight", "encoder.0.linear1.weight"} <= ours.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name].float(), rtol=1e-3, atol=1e-5, msg=name)


def gates(model: VisualGPTModel) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of every block what its gate reads, and s of each level."""
    found = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        text, visual = (t.detach() for t in inputs)
        levels = [torch.cat([text, visual[:, i]], -1) @ fc.weight.T + fc.bias for i, fc in enumerate(module.children())]
        found.append((text, output.detach(), torch.stack(levels, 1).sigmoid()))

    handles = [block.cross_gate.register_forward_hook(keep) for block in model.decoder.transformer.h]
    text = captions()
    model(text["input_ids"], text["attention_mask"], **regions())
    for handle in handles:
        handle.remove()
    return found


def test_gates_are_shut_exactly_and_never_both() -> None:
    for _, _, s in gates(make(VisualGPTModel, region_dim=20)):
        language, vision = s > 0.2, 1 - s > 0.2
        assert 0.02 < (~language).double().mean() < 0.6
        assert 0.02 < (~vision).double().mean() < 0.6
        assert (language | vision).all()


def test_without_an_image_the_language_gate_alone_is_left() -> None:
    """A residual around the cross-attention would add the text once more."""
    model = make(VisualGPTModel, region_dim=20)
    with torch.no_grad():
        for block in model.decoder.transformer.h:
            block.crossattention.c_proj.weight.zero_()
            block.crossattention.c_proj.bias.zero_()
    for text, output, s in gates(model):
        scale = (s * (s > 0.2)).sum(1) / math.sqrt(3)
        assert (scale < 0.9).any()
        torch.testing.assert_close(output, scale * text)


def test_a_shut_gate_has_no_gradient_and_opens_again() -> None:
    """The block's gate, its language side shut by the bias: text has no gradient through it until s is back."""
    model = make(VisualGPTModel, region_dim=20)
    gate = model.decoder.transformer.h[0].cross_gate
    with torch.no_grad():
        for fc in gate.children():
            fc.weight.zero_()
            fc.bias.fill_(-3.0)  # s = 0.047
    text = torch.randn(1, 4, 32, requires_grad=True)
    visual = torch.randn(1, 1, 4, 32).sign().expand(-1, 3, -1, -1)
    optimizer = torch.optim.SGD([fc.bias for fc in gate.children()], lr=1.0)
    shut = torch.full((3, 32), True)
    for step in range(30):
        text.grad = None
        loss = gate(text, visual).square().sum()  # less of the image is better, so s goes up
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            assert torch.equal(text.grad, torch.zeros_like(text))
            assert all((fc.bias.grad != 0).all() for fc in gate.children())
        optimizer.step()
        shut &= torch.stack([fc.bias.sigmoid() for fc in gate.children()]) <= 0.2
    assert not shut.any()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_activations_that_are_computed_again_change_nothing() -> None:
    model = make(VisualGPTModel).train()
    given = {**captions(), "pixel_values": pixels()}
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model(**given).loss.backward()
        found.append(take_gradients(model))
        model.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.decoder.modules())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_generation_is_that_without_a_cache() -> None:
    check_generation(make(VisualGPTModel, region_dim=20), **regions())
    check_generation(make(VisualGPTModel, tau=0.0), pixel_values=pixels())


def test_what_lies_behind_the_last_region_and_token_changes_nothing() -> None:
    model = make(VisualGPTModel, region_dim=20)
    given = regions()
    loss = model(**captions(), **given).loss
    given["image_features"][given["image_mask"] == 0] = 100
    torch.testing.assert_close(model(**captions(), **given).loss, loss)
    torch.testing.assert_close(model(**captions(left=True), **given).loss, loss)
    given["image_features"][2, 0] += 1
    assert abs(model(**captions(), **given).loss - loss) > 1e-4


def test_a_checkpoint_of_gpt2_loads_and_the_rest_is_new(tmp_path: Path) -> None:
    source = write_language_model(tmp_path / "gpt2", gpt2(bos_token_id=1, eos_token_id=1, vocab_size=5000))
    tower = write_tower(tmp_path / "tower")
    options = VisualGPTOptions(language_model=str(source), vision_tower=str(tower))
    model = VisualGPTModel.build(options, load_tokenizer())
    original = AutoModelForCausalLM.from_pretrained(source).state_dict()
    ours = model.decoder.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in original.items())
    assert {name.split(".")[3] for name in ours.keys() - original.keys()} == {"crossattention", "cross_gate"}
    assert not any(p.requires_grad for p in model.vision.parameters())
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.startswith("vision"))
    model.eval()
    features = model.frozen_features(pixel_values=pixels())
    torch.testing.assert_close(model(**captions(), **features).loss, model(**captions(), pixel_values=pixels()).loss)
    model.save_pretrained(tmp_path / "saved")
    loaded = VisualGPTModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded.decoder.lm_head.weight is loaded.decoder.transformer.wte.weight


def sample(count: int, key: str = "a") -> Sample:
    features = torch.arange(count, dtype=torch.float32)[:, None].expand(-1, 20)
    boxes = torch.tensor([0.0, 0, 8, 8]).expand(count, -1)
    found = {"features": features, "boxes": boxes, "image_size": torch.tensor([16, 16])}
    return Sample(None, "a red cube", key, None, features=found)


def test_regions_are_cut_and_padded() -> None:
    tokenizer = load_tokenizer()
    collator = CaptionCollator(tokenizer, begin=2, stop=1, kind="train", max_length=4, max_regions=3)
    batch = collator([sample(5), sample(2), sample(0)])
    assert batch["image_features"][:, :, 0].tolist() == [[0, 1, 2], [0, 1, 0], [0, 0, 0]]
    assert batch["image_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert batch["input_ids"][0].tolist() == [2, *tokenizer.encode("a red cube", add_special_tokens=False)][:4]
    assert batch["labels"][0, 0] == -100
    with pytest.raises(ValueError, match="features: expected 'boxes' and 'features' of sample 'b'"):
        collator([Sample(None, "a red cube", "b", None)])
    with pytest.raises(
        ValueError, match=r"features: expected none of sample 'a', .* got \['features', 'boxes', 'image_size'\]"
    ):
        CaptionCollator(tokenizer, begin=2, stop=1, kind="prompt")([sample(2)])
    with pytest.raises(ValueError, match="sample 'b': expected an image, or the image tower's features, got none"):
        CaptionCollator(tokenizer, begin=2, stop=1, kind="prompt")([Sample(None, "", "b", None)])


def test_an_image_without_regions_is_no_nan() -> None:
    """Also in training and with gradients; the other images of the batch are what they are without it."""
    model = make(VisualGPTModel, region_dim=20)
    given = regions()
    states = model(**captions(), **given).hidden_states[0]
    given["image_mask"][1] = 0
    output = model.train()(**captions(), **given)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        found = model.eval()(**captions(), **given).hidden_states[0]
    assert found.isfinite().all()
    torch.testing.assert_close(found[[0, 2]], states[[0, 2]])


def test_captions_of_regions_from_the_command_line(tmp_path: Path) -> None:
    """A detector's folder, whose features tell the colour; better than with the features of other images."""
    pytest.importorskip("pycocoevalcap")
    data = tmp_path / "pairs"
    data.mkdir()
    for path in write_pairs(data, 24).glob("*.txt"):
        path.write_text(f"a {path.read_text().split()[0]} thing here")
    dataset = ImageTextDataset(data, transform=None)
    cache = FeatureCache(tmp_path / "regions", {"data": dataset.image_fingerprint(), "model": "by hand"}, len(dataset))
    items: list[Any] = []
    for index in range(len(dataset)):
        count = 1 + index % 3
        features = torch.zeros(count, 20)
        features[0, COLOURS.index((dataset.metadata(index)[1] or "").split()[1])] = 3
        boxes = torch.tensor([0.0, 0, 8, 8]).repeat(count, 1)
        items.append({"features": features, "boxes": boxes, "image_size": torch.tensor([16, 16])})
    cache.write(0, items)
    out, scores = tmp_path / "out", tmp_path / "scores.json"
    common = [f"--data={data}", f"--features={tmp_path / 'regions'}"]
    assert main([
        "train", "visualgpt", *common, f"--output-dir={out}", "--region-dim=20", "--text-width=64", "--text-layers=1",
        "--max-steps=90", "--learning-rate=0.005", "--per-device-train-batch-size=8", "--save-strategy=no",
        "--report-to=none", "--use-cpu", "--max-length=12", "--dataloader-num-workers=0", "--disable-tqdm=true",
    ]) == 0  # fmt: skip
    assert main([
        "eval", f"--checkpoint={out}", *common, "--task=captioning", f"--output={scores}", "--device=cpu",
        "--num-workers=0", "--beams=2", "--max-new-tokens=8",
    ]) == 0  # fmt: skip
    rows = json.loads(scores.read_text())["scores"]
    assert rows["model"]["CIDEr"] > 1.5 * rows["blind"]["CIDEr"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"self_critical": True}, "--self-critical needs --pretrained"),
        ({"region_dim": 8, "patch_size": 4}, "--patch-size 4 has no effect beside --region-dim 8"),
        ({"language_model": "x", "text_layers": 2}, "--text-layers 2 has no effect beside --language-model x"),
        ({"pretrained": "x", "tau": 0.1}, "--tau 0.1 has no effect beside --pretrained"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisualGPTOptions(**options).check()


def test_wrong_configs_and_batches_name_what_is_wrong() -> None:
    for name, value in {"tau": 0.5, "encoder_layers": 0, "encoder_dropout": -1, "region_dim": 0}.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            VisualGPTConfig(**{name: value})
    with pytest.raises(ValueError, match=r"text_config: expected a GPT-2, .* got 'llama'"):
        VisualGPTConfig(text_config=llama())
    model = make(VisualGPTModel, region_dim=20)
    with pytest.raises(ValueError, match="expected one of them, got neither"):
        model(**captions())
    with pytest.raises(ValueError, match=r"image_features: expected \(B, R, 20\), got shape \(3, 4, 21\)"):
        model(**captions(), **regions(21))
    with pytest.raises(ValueError, match="this model has no tower"):
        model(**captions(), pixel_values=pixels())
    with pytest.raises(ValueError, match="at most the language model's 48 positions"):
        model(torch.ones(3, 49, dtype=torch.long), **regions())
    with pytest.raises(ValueError, match="references: expected a model that training_data was called of"):
        model(torch.ones(3, 1, dtype=torch.long), references=[["a"]] * 3, **regions())
