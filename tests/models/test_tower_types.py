"""Towers of every type of transformers that a model of two towers takes: features, gradients and positions.

A text's feature alone is its feature beside a longer one, however the batch is padded; every parameter that wants a
gradient has one; a text as long as `max_text_length` is read.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import CONFIG_MAPPING, PreTrainedConfig

from vlmfast.models.contrastive import CLIPConfig, CLIPModel, LiTConfig, LiTModel
from vlmfast.models.towers import REFUSED, TOWERS

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 24, "eos_token_id": 49, "bos_token_id": 48}
WIDTHS = "hidden_size embedding_size d_model dim emb_dim emb_size hidden_dim input_embedding_size intermediate_size"
COUNTS = "num_hidden_layers n_layers n_layer encoder_layers num_layers num_attention_heads n_heads n_head"
TINY = {
    **dict.fromkeys(f"{WIDTHS} encoder_ffn_dim d_ff d_inner projection_size image_size".split(), 32),
    **dict.fromkeys(f"{COUNTS} num_key_value_heads encoder_attention_heads".split(), 2),
    **dict.fromkeys(["head_dim", "d_head", "d_kv", "projection_dim", "patch_size"], 16),
    **{"vocab_size": 50, "max_position_embeddings": 24, "n_positions": 24, "pad_token_id": 1},
}
"""Fields by the names that configs have for them."""
OWN: dict[str, dict[str, Any]] = {
    "clip_text_model": {"eos_token_id": 49, "bos_token_id": 48},
    "esm": {"vocab_size": 50, "mask_token_id": 2, "position_embedding_type": "absolute"},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1], "architectures": ["FunnelModel"]},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 32},
    "canine": {"num_hash_buckets": 64, "downsampling_rate": 2, "local_transformer_stride": 4},
    "xmod": {"default_language": "en_XX"},
    "convnext": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "patch_size": 4},
    "convnextv2": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "patch_size": 4},
    "vit": {"use_mask_token": True},
    "deit": {"use_mask_token": True},
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4},
    "swinv2": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4},
    "donut-swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4},
    "maskformer-swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "hidden_size": 32},
    "mobilevit": {"hidden_sizes": [16, 16, 32], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 24], "patch_size": 2},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
    "align_vision_model": {"width_coefficient": 0.1, "depth_coefficient": 0.1},
    "textnet": {"stem_out_channels": 8, "hidden_sizes": [8, 8, 8, 8, 16]},
    "bit": {"hidden_sizes": [32, 32], "depths": [1, 1], "embedding_size": 32, "num_groups": 8},
    "focalnet": {
        **{"embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32], "focal_levels": [1, 1]},
        **{"focal_windows": [3, 3], "patch_size": 4},
    },
    "hiera": {
        **{"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "hidden_size": 64},
        **{"image_size": [64, 64], "patch_size": [7, 7]},
    },
}


def tiny(model_type: str) -> PreTrainedConfig:
    """A small config of a type; skips types that this version of transformers does not have."""
    if model_type not in CONFIG_MAPPING and model_type not in TOWERS:
        pytest.skip(f"transformers has no {model_type}")
    kind = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else TOWERS[model_type].config_class
    usual = kind().to_dict()
    fields: dict[str, Any] = {name: value for name, value in TINY.items() if isinstance(usual.get(name), int)}
    fields |= {"pad_token_id": 1} if "pad_token_id" in usual else {}
    for name, value in {"hidden_sizes": 32, "depths": 1, "num_heads": 2}.items():
        if isinstance(usual.get(name), list | tuple):
            fields[name] = [value] * len(usual[name])
    return kind(**{**fields, **OWN.get(model_type, {})})


TEXTS = """
    albert bert big_bird camembert canine clip_text_model convbert data2vec-text deberta deberta-v2 distilbert dpr
    electra ernie esm esmc eurobert flaubert fnet gte ibert jina_embeddings_v3 layoutlm longformer luke
    markuplm megatron-bert mobilebert modernbert mpnet nomic_bert nystromformer rembert roberta roberta-prelayernorm
    roc_bert roformer siglip_text_model squeezebert tapas tipsv2_text_model ultrabert xlm xlm-roberta xlm-roberta-xl
    xmod align_text_model
"""
"""Types that have a masked language model or whose output has a pooler_output, and that read text alone."""
IMAGES = """
    aimv2_vision_model align_vision_model beit bit chinese_clip_vision_model clip_vision_model convnext convnextv2
    deit dinov2 dinov2_with_registers dinov3_convnext dinov3_vit donut-swin dpt efficientnet focalnet hiera
    levit maskformer-swin mlcd mlcd_vision_model mobilevit pixio regnet resnet sapiens2 siglip_vision_model swin
    swinv2 textnet tipsv2_vision_model vit yolos
"""


def text_model(model_type: str) -> CLIPModel:
    torch.manual_seed(0)
    config = tiny(model_type)
    for name in [name for name in vars(config) if "dropout" in name or name.endswith("_drop")]:
        if isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    return CLIPModel(CLIPConfig(vision_config=VISION, text_config=config, projection_dim=16))


def assert_every_parameter_has_a_gradient(model: CLIPModel) -> None:
    """Those that are frozen are those that could have none."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in found.items() if p.grad is None]
    assert len(found) > 10


@pytest.mark.parametrize("model_type", TEXTS.split())
def test_a_text_tower(model_type: str) -> None:
    model = text_model(model_type).eval()
    length = min(model.text_positions or 24, 24)
    ids = torch.arange(length).roll(5) % 40 + 3
    ids[-1] = 49  # ends each text
    short = torch.cat([ids[:3], ids[-1:]])

    def beside(side: str, padding: int) -> Tensor:
        missing = (length - len(short), 0) if side == "left" else (0, length - len(short))
        texts = torch.stack([pad(short, missing, value=padding), ids])
        return model.get_text_features(
            texts, torch.stack([pad(torch.ones_like(short), missing), torch.ones_like(ids)])
        )[0]

    with torch.no_grad():
        alone = model.get_text_features(short[None])[0]
        for side in ("right", "left"):
            for padding in (1, 0, 7):
                torch.testing.assert_close(beside(side, padding), alone, rtol=1e-4, atol=2e-5)
        changed = short.clone()
        changed[:3] = torch.tensor([30, 31, 32])
        assert not torch.equal(model.get_text_features(changed[None])[0], alone)
        if model.text_positions is not None:
            assert model.max_text_length == model.text_positions
            with pytest.raises(ValueError, match=f"input_ids: expected at most {model.text_positions} tokens"):
                model.get_text_features(torch.full((1, model.text_positions + 1), 49))

    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    texts = torch.stack([ids, ids.roll(1).where(ids != 49, ids)])
    model.train()(input_ids=texts, pixel_values=pixels, attention_mask=torch.ones_like(texts)).loss.backward()
    assert_every_parameter_has_a_gradient(model)


@pytest.mark.parametrize("model_type", IMAGES.split())
def test_an_image_tower(model_type: str) -> None:
    torch.manual_seed(0)
    config = tiny(model_type)
    model = CLIPModel(CLIPConfig(vision_config=config, text_config=TEXT, projection_dim=16)).train()
    side = config.image_size if isinstance(getattr(config, "image_size", None), int) else 64
    texts = torch.tensor([[5, 6, 49], [7, 8, 49]])
    model(input_ids=texts, pixel_values=torch.randn(2, 3, side, side)).loss.backward()
    assert_every_parameter_has_a_gradient(model)


@pytest.mark.parametrize("model_type", [name for name in REFUSED if "vision" not in name])
def test_a_text_tower_that_cannot_be_right_is_refused(model_type: str) -> None:
    message = f"text_config: expected another tower than '{model_type}', {REFUSED[model_type]}"
    with pytest.raises(ValueError, match=message):
        text_model(model_type)


@pytest.mark.parametrize("model_type", ["ijepa", "data2vec-vision", "internvl_vision"])
def test_an_image_tower_without_a_pooler_is_refused(model_type: str) -> None:
    with pytest.raises(ValueError, match=f"vision_config: expected .*'{model_type}', which .*"):
        CLIPModel(CLIPConfig(vision_config=tiny(model_type), text_config=TEXT))


@pytest.mark.parametrize("model_type", ["bert", "convbert", "fnet"])
def test_the_mean_over_tokens(model_type: str) -> None:
    """Of LiT: over each text's own tokens, whichever side the padding is on."""
    torch.manual_seed(0)
    model = LiTModel(LiTConfig(vision_config=VISION, text_config=tiny(model_type), text_pooling="mean")).eval()
    ids, mask = torch.tensor([[5, 6, 7, 1, 1, 1], [8, 9, 10, 11, 12, 13]]), torch.ones(2, 6, dtype=torch.int64)
    mask[0, 3:] = 0
    with torch.no_grad():
        alone = model.get_text_features(ids[:1, :3])[0]
        torch.testing.assert_close(model.get_text_features(ids, mask)[0], alone, rtol=1e-4, atol=1e-5)
        ids[0], mask[0] = ids[0].roll(3), mask[0].roll(3)
        torch.testing.assert_close(model.get_text_features(ids, mask)[0], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 49, 56])
def test_openais_end_of_text_2(padding: int) -> None:
    """The highest id of a text ends it, 49 here, whatever rows of the vocabulary or padding are beyond it."""
    torch.manual_seed(0)
    text = {**TEXT, "vocab_size": 57, "eos_token_id": 2}
    model = CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=16)).eval()
    ids, mask = torch.tensor([[5, 6, 49, padding, padding], [8, 9, 10, 11, 49]]), torch.ones(2, 5, dtype=torch.int64)
    mask[0, 3:] = 0
    with torch.no_grad():
        alone = model.get_text_features(ids[:1, :3])[0]
        torch.testing.assert_close(model.get_text_features(ids, mask)[0], alone, rtol=1e-5, atol=1e-6)
    ids[1, 4] = 12
    with pytest.raises(ValueError, match=r"expected end-of-text token 49 .* none in row 1"):
        model.get_text_features(ids, mask)
