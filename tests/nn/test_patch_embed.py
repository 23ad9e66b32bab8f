from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from stems import MEAN, STD, check_stem, compiled, normalised, randomise, saved_bytes
from torch import Tensor, nn

from vlmfast.nn import PatchEmbed, reason_not_eligible

timm = pytest.importorskip("timm")

SMALL = {"img_size": 12, "patch_size": 4, "embed_dim": 24}


def images(batch: int = 3, height: int = 12, width: int = 12) -> Tensor:
    return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8)


OPTIONS: list[tuple[dict[str, Any], list[tuple[int, int]]]] = [
    ({}, [(12, 12)]),
    ({"bias": False, "norm_layer": nn.LayerNorm}, [(12, 12)]),
    ({"img_size": (8, 12), "patch_size": (2, 4)}, [(8, 12)]),
    ({"flatten": False}, [(12, 12)]),
    ({"output_fmt": "NCHW"}, [(12, 12)]),
    ({"output_fmt": "NHWC", "strict_img_size": False}, [(12, 12), (16, 8)]),
    ({"output_fmt": "NCL"}, [(12, 12)]),
    ({"output_fmt": "NLC"}, [(12, 12)]),
    ({"img_size": None}, [(12, 12), (13, 19)]),
    ({"img_size": None, "output_fmt": "NHWC"}, [(13, 19)]),
    ({"strict_img_size": False, "dynamic_img_pad": True}, [(12, 12), (13, 19), (1, 3)]),
    ({"strict_img_size": False, "dynamic_img_pad": True, "output_fmt": "NCHW"}, [(13, 19)]),
]


def case(index: int) -> tuple[nn.Module, PatchEmbed, list[tuple[int, int]]]:
    options, sizes = OPTIONS[index]
    original = randomise(timm.layers.PatchEmbed(**{**SMALL, **options}))
    stem = PatchEmbed(**{**SMALL, **options}, mean=MEAN, std=STD)
    stem.load_state_dict(original.state_dict())
    return original, stem, sizes


@pytest.mark.parametrize("index", range(len(OPTIONS)), ids=[str(options) for options, _ in OPTIONS])
class TestLikeTimm:
    @pytest.mark.parametrize("shared", [False, True], ids=["constructed", "from_original"])
    def test_values(self, index: int, shared: bool) -> None:
        original, stem, sizes = case(index)
        if shared:
            stem = PatchEmbed.from_original(original, mean=MEAN, std=STD)
            assert [id(p) for p in stem.parameters()] == [id(p) for p in original.parameters()]
        assert list(stem.state_dict()) == list(original.state_dict())
        for size in sizes:
            pixels = images(3, *size)
            floats = normalised(pixels), normalised(pixels, torch.float64)
            check_stem(original, stem, floats[0])
            check_stem(original, stem, pixels, floats=floats)
            check_stem(original, stem, floats[0], autocast=torch.bfloat16)
        original.to(torch.bfloat16)
        stem.to(torch.bfloat16)
        check_stem(original, stem, floats[0].bfloat16())

    def test_compiled_in_one_graph(self, index: int) -> None:
        _, stem, sizes = case(index)
        graph = compiled(stem)
        pixels = images(3, *sizes[-1])
        for x in (pixels, normalised(pixels))[: 1 if index else 2]:  # the options decide what comes after the pixels
            torch.testing.assert_close(graph(x), stem(x))

    def test_no_longer_eligible(self, index: int) -> None:
        original, stem, sizes = case(index)
        pixels = images(3, *sizes[-1])
        expected = original(normalised(pixels))
        stem.proj.register_forward_hook(lambda *_: None)
        assert "hooks" in stem.reason_not_eligible()
        torch.testing.assert_close(stem(pixels), expected)

    def test_attributes(self, index: int) -> None:
        original, stem, sizes = case(index)
        for name in ("img_size", "patch_size", "grid_size", "num_patches", "flatten", "output_fmt"):
            assert getattr(stem, name) == getattr(original, name), name
        assert stem.feat_ratio() == original.feat_ratio()
        assert stem.feat_ratio(as_scalar=False) == original.feat_ratio(as_scalar=False)
        for size in sizes:
            assert stem.dynamic_feat_size(size) == original.dynamic_feat_size(size)


def test_parameters_start_as_timm_s() -> None:
    torch.manual_seed(1)
    original = timm.layers.PatchEmbed(**SMALL)
    torch.manual_seed(1)
    for ours, theirs in zip(PatchEmbed(**SMALL).parameters(), original.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_norm_follows_the_format_as_in_timm() -> None:
    norm = partial(nn.GroupNorm, 2)  # of (B, D, ...)
    original = timm.layers.PatchEmbed(**SMALL, flatten=False, norm_layer=norm)
    pixels = images()
    floats = normalised(pixels), normalised(pixels, torch.float64)
    check_stem(original, PatchEmbed.from_original(original, mean=MEAN, std=STD), pixels, floats=floats)


@pytest.mark.parametrize("dynamic", [False, True])
def test_embed_layer_of_timm_s_vision_transformer(dynamic: bool) -> None:
    options = {**SMALL, "depth": 1, "num_heads": 2, "num_classes": 5, "dynamic_img_size": dynamic}
    original = timm.models.VisionTransformer(**options).eval()
    stem = partial(PatchEmbed, mean=MEAN, std=STD)
    model = timm.models.VisionTransformer(**options, embed_layer=stem).eval()
    model.load_state_dict(original.state_dict())
    pixels = images(2, *((16, 8) if dynamic else (12, 12)))
    torch.testing.assert_close(model(pixels), original(normalised(pixels)))
    channels_first = partial(PatchEmbed, mean=MEAN, std=STD, layout="NCHW")
    model = timm.models.VisionTransformer(**options, embed_layer=channels_first).eval()
    model.load_state_dict(original.state_dict())
    ours, theirs = (
        m.forward_intermediates(x) for m, x in ((model, pixels.permute(0, 3, 1, 2)), (original, normalised(pixels)))
    )
    torch.testing.assert_close(ours, theirs)


def test_set_input_size() -> None:
    original, stem, _ = case(0)
    for options in ({"img_size": 16}, {"img_size": (8, 12), "patch_size": 2}, {"patch_size": (4, 2)}):
        original.set_input_size(**options)
        stem.set_input_size(**options)
        assert (stem.img_size, stem.grid_size) == (original.img_size, original.grid_size)
        assert (stem.patch_size, stem.num_patches) == (original.patch_size, original.num_patches)
        pixels = images(2, *stem.img_size)
        torch.testing.assert_close(stem(pixels), original(normalised(pixels)), rtol=1e-5, atol=1e-5)
    assert all(p.requires_grad for p in stem.parameters())
    stem.requires_grad_(False)
    stem.set_input_size(patch_size=4)
    assert not any(p.requires_grad for p in stem.parameters())


def test_backward_keeps_the_pixels_only() -> None:
    stem = PatchEmbed(**SMALL, mean=MEAN, std=STD)
    pixels = images(16)
    assert saved_bytes(lambda: stem(pixels), list(stem.parameters())) <= pixels.numel()


def test_float64_pixels_and_weights() -> None:
    _, stem, _ = case(0)
    pixels = normalised(images(), torch.float64)
    torch.testing.assert_close(stem(pixels), stem(pixels.float()))
    stem.double()
    assert stem(pixels).dtype == torch.float64


def test_errors() -> None:
    with pytest.raises(ValueError, match="output_fmt must be one of NCHW, NHWC, NCL, NLC; got 'NWHC'"):
        PatchEmbed(output_fmt="NWHC")
    with pytest.raises(ValueError, match="mean and std must be given together"):
        PatchEmbed(mean=MEAN)
    with pytest.raises(ValueError, match="layout must be NHWC or NCHW; got 'BHWC'"):
        PatchEmbed(layout="BHWC")
    with pytest.raises(ValueError, match="uint8 pixels need mean and std"):
        PatchEmbed(**SMALL)(images())
    stem = PatchEmbed(**SMALL, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=r"must be \(12, 12\), or strict_img_size False; got \(16, 12\)"):
        stem(images(1, 16, 12))
    with pytest.raises(ValueError, match=r"must be NHWC with 3 channels, see layout; got \(3, 3, 12, 12\)"):
        stem(images().permute(0, 3, 1, 2))
    stem = PatchEmbed(**SMALL, strict_img_size=False)
    with pytest.raises(ValueError, match=r"sides that the patch \(4, 4\) divides, or dynamic_img_pad; got \(13, 12\)"):
        stem(normalised(images(1, 13, 12)))
    with pytest.raises(TypeError, match=r"must be a timm.layers.patch_embed.PatchEmbed; got PatchEmbed"):
        PatchEmbed.from_original(stem)
    original = timm.layers.PatchEmbed(**SMALL)
    original.proj = nn.Conv2d(3, 24, 4, stride=4, padding=2)
    with pytest.raises(ValueError, match=r"not eligible: it has padding \(2, 2\)"):
        PatchEmbed.from_original(original)


def test_reason_not_eligible() -> None:
    conv = partial(nn.Conv2d, 3, 6)
    assert reason_not_eligible(conv(4, stride=4)) is None
    assert reason_not_eligible(conv((4, 2), stride=(4, 2), padding="valid")) is None
    assert reason_not_eligible(nn.Conv3d(3, 6, (2, 4, 4), stride=(2, 4, 4))) is None
    assert reason_not_eligible(nn.Linear(48, 6).bfloat16()) is None
    assert "stride (4, 4) is not its kernel (7, 7)" in reason_not_eligible(conv(7, stride=4))
    assert "padding" in reason_not_eligible(nn.Conv3d(3, 6, 2, stride=2, padding=(1, 0, 0)))
    assert "padding same" in reason_not_eligible(conv(1, padding="same"))
    assert "dilation" in reason_not_eligible(conv(4, stride=4, dilation=(1, 2)))
    assert "3 groups" in reason_not_eligible(conv(4, stride=4, groups=3))
    assert "torch.float64" in reason_not_eligible(conv(4, stride=4).double())
    assert "it is a ConvTranspose2d" in reason_not_eligible(nn.ConvTranspose2d(3, 6, 4, stride=4))
