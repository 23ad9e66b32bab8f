"""Models of two towers that are there: from checkpoints, models and configs."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vlmfast.models.contrastive.clip import CLIPModel

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 1}


def assert_same_weights(tower: torch.nn.Module, expected: torch.nn.Module) -> None:
    weights = expected.state_dict()
    assert tower.state_dict()
    for name, value in tower.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_the_towers_of_a_checkpoint_of_two(tmp_path: Path, kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(vision_config=VISION, text_config=TEXT)
    original = getattr(transformers, f"{kind}Model")(config)
    original.save_pretrained(tmp_path)
    model = CLIPModel.from_towers(str(tmp_path), tmp_path, projection_dim=32)
    assert_same_weights(model.vision_model, original.vision_model)
    assert_same_weights(model.text_model, original.text_model)
    assert model.config.projection_dim == 32


def test_towers_of_different_origin(tmp_path: Path) -> None:
    """A folder that says how pixels are normalised, and a model; the pooler that CLIPModel does not use is left out."""
    vision, text = (
        transformers.ViTModel(transformers.ViTConfig(**VISION)),
        transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=50)),
    )
    vision.save_pretrained(tmp_path)
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    model = CLIPModel.from_towers(tmp_path, text)
    assert_same_weights(model.vision_model, vision)
    assert_same_weights(model.text_model, text)
    assert (list(model.config.image_mean), list(model.config.image_std)) == tuple(settings.values())
    named = CLIPModel.from_towers(tmp_path, text, image_mean=[0.5, 0.5, 0.5])
    assert list(named.config.image_mean) == [0.5, 0.5, 0.5]
    assert not model.training


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """transformers would make random ones and go on."""
    transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"vision_model: expected .* lacks \['layernorm.weight'\]"):
        CLIPModel.from_towers(tmp_path, transformers.BertConfig(**SIZES, vocab_size=50))
