"""What the command line sets of a model's config: presets of DeCLIP's weights, and any field by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from command_line import tiny

from vlmfast.data import load_tokenizer
from vlmfast.models import model_class
from vlmfast.models.contrastive import CLIPConfig, DeCLIPConfig, LiTModel
from vlmfast.models.contrastive.declip import WEIGHTS


def build(model: str, *overrides: str, tokenizer: object = None, **options: object) -> transformers.PreTrainedModel:
    """A small model from scratch, or what other options name."""
    cls = model_class(model)
    chosen = options or tiny(model, vision_layers=3)
    made = cls.Options(config_overrides=list(overrides) or None, max_length=12, **chosen)
    return cls.build(made, tokenizer or load_tokenizer())


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("towers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(folder / "vit")
    config = transformers.BertConfig(**sizes, vocab_size=len(load_tokenizer()))
    transformers.BertModel(config).save_pretrained(folder / "bert")
    return {"vision_tower": str(folder / "vit"), "text_tower": str(folder / "bert")}


@pytest.mark.parametrize(
    ("name", "override", "field", "value"),
    [
        ("clip", "projection_dim=24", "projection_dim", 24),
        ("cloob", "scale_hopfield=14.3", "scale_hopfield", 14.3),
        ("align", "label_smoothing=0", "label_smoothing", 0),
        ("declip", "bank_size=7", "bank_size", 7),
        ("siglip", "image_mean=[0.1, 0.2, 0.3]", "image_mean", [0.1, 0.2, 0.3]),
    ],
)
def test_a_field_of_a_model_from_scratch(name: str, override: str, field: str, value: object) -> None:
    model, plain = build(name, override), build(name)
    assert getattr(model.config, field) == value != getattr(plain.config, field)
    changed, before = model.config.to_dict(), plain.config.to_dict()
    assert {key for key in before if changed[key] != before[key]} == {field}


def test_fields_of_a_model_of_two_towers(towers: dict[str, str]) -> None:
    """Sentence encoders are read at the mean of their tokens, which only the config can say."""
    model = build("lit", "text_pooling=mean", "image_head=true", "projection_dim=24", **towers)
    assert isinstance(model, LiTModel)
    assert model.config.text_pooling == "mean"
    assert model.visual_projection.weight.shape == (24, 32)
    assert build("clip", "projection_dim=24", **towers).visual_projection.weight.shape == (24, 32)


def test_fields_of_a_checkpoint_and_of_a_config_file(tmp_path: Path) -> None:
    build("declip").save_pretrained(tmp_path)
    model = build("declip", "image_ssl_weight=0", pretrained=str(tmp_path))
    assert model.projector is None
    assert model.text_predictor is not None
    model = build("declip", "text_ssl_weight=0", config=str(tmp_path / "config.json"))
    assert model.text_predictor is None
    assert model.projector is not None


def test_declip_goes_on_from_a_clip_that_knows_no_mask_token(tmp_path: Path) -> None:
    build("clip").save_pretrained(tmp_path)
    tokenizer = load_tokenizer()
    words = len(tokenizer)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    for options in ({"pretrained": str(tmp_path)}, {"text_tower": str(tmp_path)}):
        model = build("declip", tokenizer=tokenizer, **options)
        assert model.config.text_config.vocab_size == model.text_predictor.out_features == words + 1
    tokenizer.add_tokens(["<|another|>"])
    with pytest.raises(
        ValueError, match=f"--tokenizer has {words + 2} tokens, more than the {words} of the text tower"
    ):
        build("declip", tokenizer=tokenizer, pretrained=str(tmp_path))


def test_presets_of_declips_weights() -> None:
    assert set(WEIGHTS) == {"released", "released-88m-vit", "paper"}
    for preset, weights in WEIGHTS.items():
        model = build("declip", declip_weights=preset, **tiny("declip"))
        assert {key: getattr(model.config, key) for key in weights} == weights
    model = build("declip", "text_ssl_weight=0.5", declip_weights="paper", **tiny("declip"))
    assert (model.config.clip_weight, model.config.text_ssl_weight) == (0.4, 0.5)
    assert {key: getattr(DeCLIPConfig(), key) for key in WEIGHTS["released"]} == WEIGHTS["released"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bank_size", "expected name=value of .*bank_size, .*got 'bank_size'"),
        ("colour=red", "expected name=value of .*got 'colour=red'"),
        ("vision_config={}", "expected name=value of .*got 'vision_config={}'"),
        ("RELEASED_WEIGHTS={}", "expected name=value of"),
        ("architectures=[]", "expected name=value of"),
        ("bank_size=many", "bank_size: expected a value like 65536, got 'many'"),
    ],
)
def test_what_is_no_field_or_value_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("declip", override)


def test_a_config_file_of_a_wrong_type_is_an_error_of_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CLIPConfig.small(vocab_size=50, eos_token_id=1).to_dict(), "projection_dim": "x"}))
    with pytest.raises(ValueError, match=r"^projection_dim: expected a value like 512, got 'x'$"):
        build("clip", config=str(path))
