from __future__ import annotations

import copy

import pytest
import torch
from stems import MEAN, STD, check_stem, compiled, normalised, randomise, saved_bytes
from torch import Tensor, nn

open_clip = pytest.importorskip("open_clip")

from vlmfast.nn.open_clip import VisionTransformer  # noqa: E402

VISION = {"image_size": 12, "patch_size": 4, "width": 64, "layers": 1, "head_width": 32}


def images(batch: int = 3) -> Tensor:
    return torch.randint(0, 256, (batch, 12, 12, 3), dtype=torch.uint8)


def pair(**options: object) -> tuple[nn.Module, VisionTransformer]:
    original = open_clip.transformer.VisionTransformer(
        image_size=12, patch_size=4, width=24, layers=1, heads=2, mlp_ratio=2.0, output_dim=8, **options
    )
    randomise(original)
    return original, VisionTransformer.from_original(original, mean=MEAN, std=STD)


@pytest.mark.parametrize("options", [{}, {"no_ln_pre": True}, {"pos_embed_type": "sin_cos_2d"}], ids=str)
class TestStem:
    def test_floats_and_uint8(self, options: dict[str, object]) -> None:
        original, stem = pair(**options)
        pixels = images()
        floats = normalised(pixels), normalised(pixels, torch.float64)
        # The class token's gradient is rounded to autocast's dtype after its sum over the batch, open_clip's never.
        for autocast, epsilon in ((None, 0.0), (torch.bfloat16, 2.0**-9)):
            numerics = {"method": "_embeds", "autocast": autocast, "epsilon": epsilon}
            check_stem(original, stem, floats[0], **numerics)
            check_stem(original, stem, pixels, floats=floats, **numerics)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, options: dict[str, object], dtype: torch.dtype) -> None:
        original, stem = pair(**options)
        original.to(dtype)
        check_stem(original, stem, normalised(images()).to(dtype), method="_embeds")

    def test_parameters_are_the_original_s(self, options: dict[str, object]) -> None:
        original, stem = pair(**options)
        assert isinstance(stem, open_clip.transformer.VisionTransformer)
        assert list(stem.state_dict()) == list(original.state_dict())
        assert [id(p) for p in stem.parameters()] == [id(p) for p in original.parameters()]

    def test_no_longer_eligible(self, options: dict[str, object]) -> None:
        original, stem = pair(**options)
        pixels = images()
        expected = original(normalised(pixels))
        stem.conv1.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(stem(pixels), expected)


@pytest.mark.parametrize("prob", [0.3, 0.5, 0.95])
def test_patch_dropout_draws_what_open_clip_draws(prob: float) -> None:
    """On a CPU, where open_clip always draws, from the same state of the generator."""
    original, stem = pair(patch_dropout=prob)
    pixels = images()
    for _ in range(3):
        state = torch.get_rng_state()
        expected = original._embeds(normalised(pixels))
        torch.set_rng_state(state)
        tokens = stem._embeds(pixels)
        assert tokens.shape[1] == 1 + max(1, int(9 * (1 - prob)))
        torch.testing.assert_close(tokens, expected)
    for module in (original, stem):
        module.eval()
    torch.testing.assert_close(stem(pixels), original(normalised(pixels)))
    assert stem._embeds(pixels).shape[1] == 10


def test_patch_dropout_of_the_class_token_too_is_left_to_open_clip() -> None:
    original, stem = pair(patch_dropout=0.5)
    original.patch_dropout.exclude_first_token = False
    pixels, state = images(), torch.get_rng_state()
    expected = original._embeds(normalised(pixels))
    torch.set_rng_state(state)
    torch.testing.assert_close(stem._embeds(pixels), expected)


def test_dropped_patches_cost_nothing_and_backward_keeps_the_pixels_only() -> None:
    _, stem = pair(patch_dropout=0.5, no_ln_pre=True)
    pixels = images(16)
    kept = 16 * 4 * 8  # indices
    assert saved_bytes(lambda: stem._embeds(pixels), list(stem.parameters())) <= pixels.numel() + kept
    stem._embeds(pixels).sum().backward()
    # A position's gradient is how often it was kept.
    assert stem.positional_embedding.grad[1:, 0].sum() == 16 * 4


def test_compiled_in_one_graph() -> None:
    _, stem = pair(patch_dropout=0.5)
    stem.eval()
    graph = compiled(stem)
    pixels = images()
    for x in (pixels, normalised(pixels)):
        torch.testing.assert_close(graph(x), stem(x))
    stem.train()
    assert compiled(stem._embeds)(pixels).shape == (3, 5, 24)


def test_swapped_into_a_model_that_trains() -> None:
    text = {"context_length": 6, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=text)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    model.visual = VisionTransformer.from_original(model.visual, mean=MEAN, std=STD)
    start = model.visual.conv1.weight.detach().clone()
    tokens = torch.randint(1, 20, (3, 6))
    for _ in range(5):
        pixels = images()
        for optimizer, m, x in zip(optimizers, (model, twin), (pixels, normalised(pixels)), strict=True):
            optimizer.zero_grad()
            image, text_features, scale = m(x, tokens)
            open_clip.ClipLoss()(image, text_features, scale).backward()
            optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    assert (model.visual.conv1.weight - start).abs().max() > 1e-4


def test_forward_intermediates_of_permuted_pixels() -> None:
    original, _ = pair()
    stem = VisionTransformer.from_original(original, mean=MEAN, std=STD, layout="NCHW")
    pixels = images()
    ours = stem.forward_intermediates(pixels.permute(0, 3, 1, 2))
    torch.testing.assert_close(ours, original.forward_intermediates(normalised(pixels)))


def test_errors() -> None:
    original, stem = pair()
    with pytest.raises(ValueError, match=r"NHWC with 3 channels, see layout; got \(3, 3, 12, 12\)"):
        stem(images().permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"position must be \(7, 24\)"):
        stem(normalised(images())[:, :, :8])
    original.conv1 = nn.Conv2d(3, 24, 4, stride=4, dilation=2)
    with pytest.raises(ValueError, match=r"VisionTransformer.from_original: .*not eligible: it has dilation"):
        VisionTransformer.from_original(original)
    with pytest.raises(TypeError, match=r"must be a open_clip.transformer.VisionTransformer; got VisionTransformer"):
        VisionTransformer.from_original(stem)
