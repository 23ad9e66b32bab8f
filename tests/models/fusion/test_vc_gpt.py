"""VC-GPT against transformers' and torch's parts, its settings, generation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from captioners import captions, check_generation, make, pixels, regions
from numerics import take_gradients
from prefix_models import LANGUAGE, VOCAB, gpt2, llama, vit, write_language_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from vlmfast.data import load_tokenizer
from vlmfast.models.fusion.vc_gpt import VCGPTConfig, VCGPTModel, VCGPTOptions

LANGUAGES = [
    gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False),
    llama(),
]


def text_of(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: given[name] for name in ("input_ids", "attention_mask")}


def torch_layers(model: Any) -> tuple[nn.TransformerDecoder, dict[str, str]]:
    """torch's decoder with the weights of the layers on top, and our name of each of its parameters."""
    blocks = list(model.decoder.fusion.h)
    gelu = partial(F.gelu, approximate="tanh")  # no module, for which TransformerDecoder's copies have a ReLU
    layer = nn.TransformerDecoderLayer(32, 4, 128, dropout=0.0, activation=gelu, batch_first=True, norm_first=True)
    found = nn.TransformerDecoder(layer, len(blocks), nn.LayerNorm(32))
    weights = {"norm.weight": model.decoder.fusion.ln_f.weight, "norm.bias": model.decoder.fusion.ln_f.bias}
    for k, block in enumerate(blocks):
        own, cross, mlp = block.attn, block.crossattention, block.mlp
        parts = {
            "self_attn.in_proj_weight": own.c_attn.weight.T,
            "self_attn.in_proj_bias": own.c_attn.bias,
            "self_attn.out_proj.weight": own.c_proj.weight.T,
            "self_attn.out_proj.bias": own.c_proj.bias,
            "multihead_attn.in_proj_weight": torch.cat([cross.q_attn.weight.T, cross.c_attn.weight.T]),
            "multihead_attn.in_proj_bias": torch.cat([cross.q_attn.bias, cross.c_attn.bias]),
            "multihead_attn.out_proj.weight": cross.c_proj.weight.T,
            "multihead_attn.out_proj.bias": cross.c_proj.bias,
            "linear1.weight": mlp.c_fc.weight.T,
            "linear1.bias": mlp.c_fc.bias,
            "linear2.weight": mlp.c_proj.weight.T,
            "linear2.bias": mlp.c_proj.bias,
        }
        for number, norm in enumerate((block.ln_1, block.ln_cross_attn, block.ln_2), 1):
            parts |= {f"norm{number}.weight": norm.weight, f"norm{number}.bias": norm.bias}
        weights |= {f"layers.{k}.{name}": value for name, value in parts.items()}
    return found, weights


@pytest.mark.parametrize("ensemble", [True, False])
def test_loss_and_gradients_are_those_of_the_parts(ensemble: bool) -> None:
    """transformers' GPT-2 below, torch's TransformerDecoder on top, two linear maps, the logits added."""
    model = make(VCGPTModel, fusion="self_ensemble" if ensemble else "plain", fusion_layers=2, region_dim=32)
    language = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    language.load_state_dict(model.decoder.language_model.state_dict())
    layers, weights = torch_layers(model)
    given, images = captions(), regions(32)

    below = language.transformer(**text_of(given)).last_hidden_state
    length = below.shape[1]
    above = torch.func.functional_call(
        layers,
        weights,
        (below, images["image_features"]),
        {
            "tgt_mask": torch.ones(length, length, dtype=torch.bool).triu(1),
            "memory_key_padding_mask": images["image_mask"] == 0,
        },
    )
    logits = above @ model.decoder.head.weight.T
    if ensemble:
        logits = logits + below @ language.lm_head.weight.T
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten())
    expected.backward()
    wanted = take_gradients(model)
    wanted |= {f"decoder.language_model.{name}": g for name, g in take_gradients(language).items()}

    loss = model(**given, **images).loss
    loss.backward()
    found = take_gradients(model)
    torch.testing.assert_close(loss, expected)
    assert found.keys() == wanted.keys() >= {"decoder.head.weight", "decoder.language_model.transformer.wte.weight"}
    assert ("decoder.language_model.lm_head.weight" in found) == ensemble
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("config", LANGUAGES, ids=["gpt2", "untied", "llama"])
def test_the_language_model_never_sees_the_image(config: Any) -> None:
    model = make(VCGPTModel, config, fusion_layers=1)
    given = text_of(captions())
    base = model.decoder.language_model.base_model
    position_ids = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = base(**given, position_ids=position_ids).last_hidden_state
        states = [model(**given, pixel_values=images).hidden_states for images in (pixels(), 255 - pixels())]
    for below, _ in states:
        assert torch.equal(below, plain)
    assert not torch.allclose(states[0][1], states[1][1], atol=1e-2)


@pytest.mark.parametrize("tie", [False, True])
def test_with_w_fuse_0_it_is_the_language_model(tie: bool, tmp_path: Path) -> None:
    """A GPT-2's checkpoint, W_G being its embedding of tokens at first, and trained apart unless it is tied."""
    source = write_language_model(tmp_path / "gpt2", gpt2(bos_token_id=1, eos_token_id=1, vocab_size=5000))
    options = VCGPTOptions(language_model=str(source), config_overrides=[f"tie_language_head={str(tie).lower()}"])
    model = VCGPTModel.build(options, load_tokenizer())
    model.eval()
    head, embedding = model.decoder.heads()[0], model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tie
    assert torch.equal(head.weight, embedding.weight)
    assert abs(model.decoder.head.weight.std() - 0.02) < 1e-3
    with torch.no_grad():
        model.decoder.head.weight.zero_()
        ids = captions()["input_ids"]
        images = model.image_states(torch.randint(256, (3, 64, 64, 3), dtype=torch.uint8), None, None)
        found = model.decoder(ids, encoder_hidden_states=images).logits
        language = AutoModelForCausalLM.from_pretrained(source).eval()
        assert torch.equal(found, language(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    loaded = VCGPTModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert (loaded.decoder.heads()[0].weight is loaded.get_input_embeddings().weight) == tie


def test_a_new_one_begins_with_its_embedding_too() -> None:
    model = VCGPTModel(VCGPTConfig(vit(), gpt2(), fusion_layers=1))
    head, embedding = model.decoder.heads()[0], model.get_input_embeddings()
    assert torch.equal(head.weight, embedding.weight)
    assert head.weight is not embedding.weight


@pytest.mark.parametrize("wide", [False, True])
def test_vanilla_is_transformers_vision_encoder_decoder(wide: bool) -> None:
    """Loss and gradients with padded captions; with an image tower of another width there is a linear map between."""
    tower = transformers.ViTConfig(
        hidden_size=48 if wide else 32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, image_size=16,
        patch_size=8,
    )  # fmt: skip
    model = make(VCGPTModel, fusion="vanilla", vision_config=tower)
    language = AutoModelForCausalLM.from_config(model.config.text_config)
    theirs = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(tower, add_pooling_layer=False), decoder=language
    ).eval()
    weights = {f"encoder.{name}": value for name, value in model.vision.tower.state_dict().items()}
    weights |= {f"decoder.{name}": value for name, value in model.decoder.state_dict().items()}
    weights |= {f"enc_to_dec_proj.{name}": value for name, value in model.project.state_dict().items()}
    assert theirs.load_state_dict(weights, strict=False) == ([], [])
    given = captions()
    images = torch.randn(3, 3, 16, 16)
    out = theirs(
        pixel_values=images, decoder_input_ids=given["input_ids"], decoder_attention_mask=given["attention_mask"]
    )
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten())
    expected.backward()
    wanted = take_gradients(theirs)
    loss = model(**given, pixel_values=images).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    renamed = {"vision.tower.": "encoder.", "project.": "enc_to_dec_proj."}
    found = take_gradients(model)
    assert len(found) == len(wanted)
    for name, gradient in found.items():
        other = next((b + name.removeprefix(a) for a, b in renamed.items() if name.startswith(a)), name)
        torch.testing.assert_close(gradient, wanted[other], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("language", "fusion"),
    [("gpt2", "self_ensemble"), ("llama", "self_ensemble"), ("gpt2", "plain"), ("gpt2", "vanilla")],
)
def test_generation_is_that_without_a_cache(language: str, fusion: str) -> None:
    model = make(VCGPTModel, LANGUAGE[language](), fusion=fusion, fusion_layers=2)
    check_generation(model, pixel_values=pixels())
    if fusion == "self_ensemble":
        check_generation(make(VCGPTModel, LANGUAGE[language](), fusion_layers=1, region_dim=20), **regions())


def test_what_nothing_reads_is_frozen() -> None:
    """All others have a gradient, as DDP needs it."""
    for config in LANGUAGES:
        for fusion in ("self_ensemble", "plain"):
            model = make(VCGPTModel, config, fusion=fusion, fusion_layers=1).train()
            model(**captions(), pixel_values=pixels()).loss.backward()
            still = {name for name, p in model.named_parameters() if p.grad is None}
            assert still == {name for name, p in model.named_parameters() if not p.requires_grad}
            head = model.decoder.language_model.get_output_embeddings()
            untied = head.weight is not model.get_input_embeddings().weight
            assert bool(still) == (fusion == "plain" and untied)


def test_wrong_settings_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"^fusion: expected one of self_ensemble, plain, vanilla, got 'sum'"):
        VCGPTConfig(fusion="sum")
    with pytest.raises(ValueError, match=r"^fusion_layers: expected a positive integer, got 0"):
        VCGPTConfig(fusion_layers=0)
    with pytest.raises(ValueError, match=r"text_config: expected a GPT-2, .* got 'llama'"):
        VCGPTConfig(text_config=llama(), fusion="vanilla")
    with pytest.raises(ValueError, match="--fusion: expected one of"):
        VCGPTOptions(fusion="sum").check()
    with pytest.raises(ValueError, match="--fusion-layers 3 has no effect beside --fusion vanilla"):
        VCGPTOptions(fusion="vanilla", fusion_layers=3).check()
    assert make(VCGPTModel).vocabulary == VOCAB
