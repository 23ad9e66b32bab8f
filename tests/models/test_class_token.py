"""The last layer of a CLIP image tower: the class token and all gradients are those of transformers' own layer."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from vlmfast.models.class_token import ClassTokenLayer, end_at_class_token

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def towers(**config: object) -> tuple[torch.nn.Module, torch.nn.Module, dict[str, bool]]:
    """transformers' and ours with the same weights, in float64, and what ours is called with."""
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=16, patch_size=4, **config)
    original = transformers.CLIPVisionModel(vision).double().train()
    ours = copy.deepcopy(original)
    return original, ours, end_at_class_token(ours)


def gradients(tower: torch.nn.Module, pooled: torch.Tensor) -> dict[str, torch.Tensor]:
    pooled.sin().sum().backward()
    return {name: parameter.grad for name, parameter in tower.named_parameters()}


def test_class_token_and_gradients_are_the_same() -> None:
    original, ours, only = towers()
    assert only == {"class_token_only": True}
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    expected, found = original(pixels), ours(pixels, **only)
    assert found.last_hidden_state.shape == (3, 1, 64)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output)
    theirs, own = gradients(original, expected.pooler_output), gradients(ours, found.pooler_output)
    assert theirs.keys() == own.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(own[name], gradient, msg=name)
    assert original.state_dict().keys() == ours.state_dict().keys()


def test_the_patches_have_two_of_twelve_products() -> None:
    original, ours, only = towers()
    pixels = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    counts = []
    for tower, given in ((original, {}), (ours, {}), (ours, only)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tower(pixels, **given)
        found = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
        counts.append(sum(count for name, count in found.items() if name.endswith("layers.1")))
    assert counts[0] == counts[1]
    # MLPs of twice the width: 8 products instead of 12, of which k and v are left to 17 tokens, attention left aside.
    assert counts[2] < (2 * 17 + 6) / (8 * 17) * counts[0] * 1.1


@pytest.mark.parametrize("how", ["eager", "hidden states"])
def test_whoever_looks_inside_sees_all_tokens(how: str) -> None:
    original, ours, only = towers(attn_implementation="eager") if how == "eager" else towers()
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    given = only if how == "eager" else {"output_hidden_states": True}
    expected, found = original(pixels), ours(pixels, **given)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


def test_other_towers_are_left_alone() -> None:
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, image_size=16, patch_size=4))
    assert end_at_class_token(siglip) == {}
    assert not any(isinstance(module, ClassTokenLayer) for module in siglip.modules())
