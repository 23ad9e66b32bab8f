"""Image towers for language models, out of checkpoints of all kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from vlmfast.models.contrastive import CLOOBConfig, CLOOBModel
from vlmfast.models.image_tower import ImageTower, load_image_tower
from vlmfast.models.towers import normalisation


@pytest.mark.parametrize("reads", ["pooled", "tokens"])
def test_an_image_tower_out_of_a_model_of_two_towers_of_other_types(reads: str, tmp_path: Path) -> None:
    """Such as that of `make demo`, a ResNet, with the mean and deviation that it was trained with."""
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    text = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "eos_token_id": 49, "bos_token_id": 48}
    config = CLOOBConfig(
        vision_config=resnet, text_config=text, projection_dim=12, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    source = CLOOBModel(config).eval()
    source.save_pretrained(tmp_path)
    tower, projection = load_image_tower(tmp_path)
    assert normalisation(tmp_path) == {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    width = None if reads == "tokens" else 12
    read = ImageTower(tower.config, width, **{"mean": [0.5] * 3, "std": [0.25] * 3, "reads": reads}).eval()
    read.copy_weights(tower, projection)
    pixels = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        given = (pixels / 255 - 0.5).permute(0, 3, 1, 2) / 0.25
        outputs = source.vision_model(given)
        expected = source.visual_projection(outputs.pooler_output.flatten(1))
        if reads == "tokens":
            expected = outputs.last_hidden_state.flatten(2).transpose(1, 2)
        torch.testing.assert_close(read(pixels), expected)
