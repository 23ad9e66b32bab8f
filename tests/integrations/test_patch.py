"""patch(model) beside the unpatched original: outputs, losses, gradients, training, checkpoints; and unpatch."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlmfast

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 32, "patch_size": 8}
VOCAB, LENGTHS = 60, (9, 4, 7, 9)


def texts() -> dict[str, Tensor]:
    """Of different lengths, padded on the right, ended by the highest id."""
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(3, VOCAB - 1, mask.shape)
    ids[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] = VOCAB - 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def pairs(side: int = 32) -> dict[str, Any]:
    return {"pixel_values": torch.randn(len(LENGTHS), 3, side, side), **texts(), "return_loss": True}


def clip() -> tuple[nn.Module, dict[str, Any]]:
    text = {**SIZE, "vocab_size": VOCAB, "max_position_embeddings": 12, "eos_token_id": VOCAB - 1}
    config = transformers.CLIPConfig(vision_config={**SIZE, **IMAGE}, text_config=text, projection_dim=24)
    return transformers.CLIPModel(config), pairs()


def siglip() -> tuple[nn.Module, dict[str, Any]]:
    text = {**SIZE, "vocab_size": VOCAB, "max_position_embeddings": 12}
    return transformers.SiglipModel(
        transformers.SiglipConfig(vision_config={**SIZE, **IMAGE}, text_config=text)
    ), pairs()


def dual_encoder() -> tuple[nn.Module, dict[str, Any]]:
    bert = transformers.BertModel(
        transformers.BertConfig(**SIZE, vocab_size=VOCAB, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    vit = transformers.ViTModel(transformers.ViTConfig(**SIZE, **IMAGE))
    return transformers.VisionTextDualEncoderModel(vision_model=vit, text_model=bert), pairs()


def align() -> tuple[nn.Module, dict[str, Any]]:
    vision = {
        "image_size": 32, "width_coefficient": 1.0, "depth_coefficient": 1.0, "kernel_sizes": [3], "in_channels": [32],
        "out_channels": [16], "depthwise_padding": [], "strides": [1], "num_block_repeats": [1], "expand_ratios": [1],
        "drop_connect_rate": 0.0,
    }  # fmt: skip
    text = {**SIZE, "vocab_size": VOCAB, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.AlignConfig(vision_config=vision, text_config=text, projection_dim=16)
    return transformers.AlignModel(config), pairs()


def vit() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.ViTConfig(**SIZE, **IMAGE, num_labels=3)
    labels = torch.tensor([0, 1, 2, 0])
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(4, 3, 32, 32), "labels": labels}


def idefics() -> tuple[nn.Module, dict[str, Any]]:
    vision = {
        "embed_dim": 32, "image_size": 16, "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32,
    }  # fmt: skip
    config = transformers.IdeficsConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        cross_layer_interval=1, alpha_initializer="ones", vision_config=vision,
    )  # fmt: skip
    inputs = texts()
    seen = (torch.arange(9)[:, None] >= torch.tensor([1, 4])) & (torch.arange(9)[:, None] < torch.tensor([4, 9]))
    inputs |= {
        "pixel_values": torch.randn(4, 2, 3, 16, 16),
        "image_attention_mask": seen.long().expand(4, -1, -1),
        "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100),
    }
    return transformers.IdeficsForVisionText2Text(config), inputs


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], int]] = {
    "clip": (clip, 2), "siglip": (siglip, 2), "dual_encoder": (dual_encoder, 2), "align": (align, 1), "vit": (vit, 1),
    "idefics": (idefics, 2),
}  # fmt: skip
"""And the number of parts that are replaced."""


@pytest.fixture(params=list(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module, dict[str, Any], int]:
    make, count = MODELS[request.param]
    model, inputs = make()
    return request.param, model.train(), inputs, count


def results(model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_outputs_and_gradients_are_the_originals(case) -> None:
    _, model, inputs, count = case
    original, keys = copy.deepcopy(model), list(model.state_dict())
    parameters = {name: id(p) for name, p in model.named_parameters()}
    report = vlmfast.patch(model)
    assert len(report.replaced) == count, str(report)
    assert list(model.state_dict()) == keys
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    expected, expected_gradients = results(original, inputs)
    found, gradients = results(model, inputs)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    for field in ("image_embeds", "text_embeds", "logits"):
        if field in expected:
            torch.testing.assert_close(found[field], expected[field], rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in gradients.items():
        floor = 1e-5 * max(1.0, expected_gradients[key].abs().max().item())
        torch.testing.assert_close(
            gradient, expected_gradients[key], rtol=1e-3, atol=floor, msg=lambda m, key=key: key + m
        )


def test_training_follows_the_originals_curve(case) -> None:
    """The optimizer is made before the model is patched."""
    _, model, inputs, _ = case
    original = copy.deepcopy(model)
    curves = []
    for each in (original, model):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3)
        if each is model:
            vlmfast.patch(each)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = each(**inputs).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=2e-3, abs=2e-3)
    assert curves[0][-1] < curves[0][0]


def test_unpatched_it_is_the_original_bit_for_bit(case) -> None:
    _, model, inputs, count = case
    kinds = [type(module) for module in model.modules()]
    before, before_gradients = results(model, inputs)
    with vlmfast.patch(model) as report:
        assert len(report.replaced) == count
        assert not vlmfast.patch(model).replaced
        model.eval()
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module.training for module in model.modules())
    assert not any("forward" in module.__dict__ or "_vlmfast_patch" in module.__dict__ for module in model.modules())
    model.train()
    after, after_gradients = results(model, inputs)
    assert torch.equal(after.loss, before.loss)
    assert all(torch.equal(gradient, before_gradients[key]) for key, gradient in after_gradients.items())
    vlmfast.unpatch(model)


def test_checkpoints_load_into_the_original(case, tmp_path: Path) -> None:
    _, model, inputs, _ = case
    vlmfast.patch(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).train()
    assert all(type(module).__module__.split(".")[0] != "vlmfast" for module in loaded.modules())
    torch.testing.assert_close(loaded(**inputs).loss, model(**inputs).loss, rtol=1e-4, atol=1e-5)


def test_no_logits_are_built_with_the_loss_and_all_without() -> None:
    model, inputs = clip()
    vlmfast.patch(model)
    with_loss, without = model(**inputs), model(**{**inputs, "return_loss": None})
    assert with_loss.logits_per_image is None
    assert without.logits_per_image.shape == (4, 4)
    assert isinstance(with_loss, type(without))
    assert len(model(**inputs, return_dict=False)) > 2
    positional = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], None, True)
    torch.testing.assert_close(positional.loss, with_loss.loss)


@pytest.mark.parametrize("name", ["clip", "siglip", "dual_encoder", "align"])
def test_the_signature_is_the_originals(name: str) -> None:
    """transformers' Trainer drops the columns of a dataset that forward has no argument for."""
    model, _ = MODELS[name][0]()
    expected = inspect.signature(model.forward)
    vlmfast.patch(model)
    assert inspect.signature(model.forward) == expected
    assert "pixel_values" in expected.parameters


def test_only_what_is_asked_for() -> None:
    model, _ = clip()
    assert [new for _, _, new in vlmfast.patch(model, only=["loss"]).replaced] == ["forward without the logits"]
    assert [name for name, _, _ in vlmfast.patch(model, only="patch_embed").replaced] == ["vision_model.embeddings"]
    with pytest.raises(ValueError, match=r"only must be of patch_embed, cross_attention, loss; got stem"):
        vlmfast.patch(model, only=["stem"])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got dict"):
        vlmfast.patch({})


def test_two_models_stay_apart() -> None:
    (one, inputs), (other, _) = clip(), clip()
    vlmfast.patch(one)
    assert type(other.vision_model.embeddings).__module__.startswith("transformers")
    assert other(**inputs).logits_per_image is not None
    copied = copy.deepcopy(one)
    with torch.no_grad():
        copied.logit_scale.zero_()
    assert copied(**inputs).loss != one(**inputs).loss
    vlmfast.unpatch(copied)
    assert one(**inputs).logits_per_image is None


def test_what_cannot_be_replaced_is_left_with_a_reason() -> None:
    model, _ = clip()
    convolution = model.vision_model.embeddings.patch_embedding
    handle = convolution.register_forward_hook(lambda *_: None)
    report = vlmfast.patch(model, only=["patch_embed"])
    assert not report.replaced
    ((name, kind, reason),) = report.left
    assert (name, kind) == ("vision_model.embeddings", "CLIPVisionEmbeddings")
    assert "has hooks" in reason
    assert reason in str(report)
    handle.remove()
    assert vlmfast.patch(model, only=["patch_embed"]).replaced


def test_hooks_of_what_is_replaced_go_on_running() -> None:
    model, inputs = clip()
    calls: list[str] = []
    model.vision_model.embeddings.register_forward_hook(lambda *_: calls.append("stem"))
    model.register_forward_hook(lambda *_: calls.append("model"))
    vlmfast.patch(model)
    model(**inputs)
    assert calls == ["stem", "model"]


def test_compiled() -> None:
    model, inputs = clip()
    expected = model(**inputs).loss
    vlmfast.patch(model)
    torch.testing.assert_close(torch.compile(model)(**inputs).loss, expected, rtol=1e-4, atol=1e-5)


def test_timm_and_its_state() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3).eval()
    pixels = torch.randn(2, 3, 32, 32)
    expected = model(pixels)
    report = vlmfast.patch(model)
    assert [name for name, _, _ in report.replaced] == ["patch_embed"]
    torch.testing.assert_close(model(pixels), expected, rtol=1e-4, atol=1e-5)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3).eval()
    plain.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(plain(pixels), expected)


def test_open_clip_and_its_losses() -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 1, "head_width": 32}
    text = {"context_length": 12, "vocab_size": VOCAB, "width": 64, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)
    model.visual.image_mean, model.visual.image_std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)  # as create_model does
    pixels, ids = torch.randn(4, 3, 32, 32), nn.functional.pad(texts()["input_ids"], (0, 3))
    loss = open_clip.loss.ClipLoss()
    expected = loss(*model(pixels, ids))
    reports = vlmfast.patch(model), vlmfast.patch(loss)
    assert [len(report.replaced) for report in reports] == [1, 1]
    assert isinstance(loss, open_clip.loss.ClipLoss)
    torch.testing.assert_close(loss(*model(pixels, ids)), expected, rtol=1e-4, atol=1e-5)
    assert loss(*model(pixels, ids), output_dict=True).keys() == {"contrastive_loss"}
    uint8 = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values) for values in (model.visual.image_mean, model.visual.image_std))
    floats = ((uint8 / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(model.encode_image(uint8), model.encode_image(floats), rtol=1e-4, atol=1e-4)
    vlmfast.unpatch(loss)
    assert "forward" not in loss.__dict__


def test_flamingo_pytorch() -> None:
    flamingo = pytest.importorskip("flamingo_pytorch")
    block = nn.ModuleDict(
        {
            "resampler": flamingo.PerceiverResampler(dim=32, depth=1, dim_head=16, heads=2, num_latents=4),
            "attend": flamingo.GatedCrossAttentionBlock(dim=32, dim_head=16, heads=2),
        }
    )
    with torch.no_grad():
        block["attend"].attn_gate.fill_(0.7)
        block["attend"].ff_gate.fill_(0.3)
    text, media = torch.randn(2, 10, 32), torch.randn(2, 2, 5, 32)
    locations = torch.zeros(2, 10, dtype=torch.bool)
    locations[:, [1, 6]] = True

    def forward() -> Tensor:
        return block["attend"](text, block["resampler"](media), media_locations=locations)

    expected = forward()
    assert len(vlmfast.patch(block).replaced) == 2
    torch.testing.assert_close(forward(), expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_nothing_known() -> None:
    report = vlmfast.patch(nn.Sequential(nn.Linear(2, 2)))
    assert (report.replaced, report.left) == ([], [])
