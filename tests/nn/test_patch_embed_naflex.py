"""timm's NaFlex stem and ours: images, rows of patches, uint8 pixels, and what the original's forward still does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stems import EPSILON, MEAN, STD, compiled, normalised, randomise
from torch import Tensor, nn

timm = pytest.importorskip("timm")

from timm.models.naflexvit import NaFlexEmbeds as Original  # noqa: E402

from vlmfast.nn.naflex import NaFlexEmbeds  # noqa: E402

SHAPES = [(4, 4), (2, 5), (3, 4), (1, 7), (2, 8)]


def original(**options: Any) -> Original:
    stem = Original(patch_size=4, embed_dim=24, pos_embed_grid_size=(4, 4), **options)
    return randomise(stem).train()  # type: ignore[return-value]


def rows(batch: int = len(SHAPES), length: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Patches, zeros after an image's last, and their coordinates."""
    coordinates = torch.zeros(batch, length, 2, dtype=torch.long)
    patches = torch.randint(0, 256, (batch, length, 48), dtype=torch.uint8) if dtype == torch.uint8 else torch.randn(
        batch, length, 48
    )  # fmt: skip
    for i, (height, width) in enumerate(SHAPES[:batch]):
        grid = torch.cartesian_prod(torch.arange(height), torch.arange(width))[:length]
        coordinates[i, : len(grid)] = grid
        patches[i, len(grid) :] = 0
    return patches, coordinates


def results(stem: nn.Module, *args: Any) -> dict[str, Tensor]:
    stem.zero_grad()
    tokens, _ = stem(*args)
    generator = torch.Generator().manual_seed(1)
    tokens.backward(torch.randn(tokens.shape, generator=generator).to(tokens.dtype))
    return {"tokens": tokens.detach(), **{n: p.grad.clone() for n, p in stem.named_parameters() if p.grad is not None}}


def check(stem: nn.Module, theirs: nn.Module, args: tuple[Any, ...], original_args: tuple[Any, ...]) -> None:
    """The twice-eager rule, and one rounding of the largest."""
    exact = results(copy.deepcopy(theirs).double(), original_args[0].double(), *original_args[1:])
    eager, ours = results(theirs, *original_args), results(stem, *args)
    assert ours.keys() == eager.keys() == exact.keys()
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype
        error, allowed = ((x[name].double() - exact[name]).abs().max().item() for x in (ours, eager))
        assert error <= 2 * allowed + 4 * EPSILON[torch.float32] * exact[name].abs().max().item(), name


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("prefix", [{"class_token": False}, {"class_token": True, "reg_tokens": 2}])
def test_rows_of_patches(mode: str, prefix: dict[str, Any]) -> None:
    theirs = original(proj_type="linear", pos_embed_interp_mode=mode, **prefix)
    stem = NaFlexEmbeds.from_original(copy.deepcopy(theirs))
    patches, coordinates = rows()
    check(stem, theirs, (patches, coordinates), (patches, coordinates))
    check(stem, theirs, (patches.unflatten(2, (4, 4, 3)), coordinates), (patches, coordinates))


@pytest.mark.parametrize("projection", ["linear", "conv"])
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (14, 9)])
def test_images(projection: str, size: tuple[int, int]) -> None:
    theirs = original(proj_type=projection, reg_tokens=1, dynamic_img_pad=projection == "linear")
    stem = NaFlexEmbeds.from_original(copy.deepcopy(theirs), mean=MEAN, std=STD)
    images = torch.randn(2, 3, *size)
    check(stem, theirs, (images,), (images,))
    assert stem(images)[1] == tuple(theirs(images)[1])
    pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    check(stem, theirs, (pixels,), (normalised(pixels),))


def test_rows_of_uint8_patches() -> None:
    theirs = original(proj_type="linear", pos_embed="none")
    stem = NaFlexEmbeds.from_original(copy.deepcopy(theirs), mean=MEAN, std=STD)
    patches, coordinates = rows(dtype=torch.uint8)
    floats = normalised(patches.unflatten(2, (16, 3))).permute(0, 2, 3, 1).reshape(patches.shape)
    check(stem, theirs, (patches, coordinates), (floats, coordinates))


def test_what_the_originals_forward_still_does() -> None:
    theirs = original(proj_type="linear", enable_patch_interpolator=True)
    stem = NaFlexEmbeds.from_original(copy.deepcopy(theirs))
    patches, coordinates = rows(length=12)  # (4, 4) and (2, 8) do not fit
    assert torch.equal(stem(patches, coordinates)[0], theirs(patches, coordinates)[0])
    other = torch.randn(2, 16, 2, 2, 3)
    assert torch.equal(stem(other, rows(2)[1])[0], theirs(other, rows(2)[1])[0])
    with pytest.raises(RuntimeError):
        stem(torch.randn(1, 3, 14, 16))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pos_embed": "factorized"}, "its positions are factorized"),
        ({"pos_embed_antialias": False}, "not interpolated by antialiased"),
        ({"pos_embed_ar_preserving": True}, "keep the aspect ratio"),
        ({"proj_norm_layer": nn.LayerNorm}, "it has a norm"),
        ({"channels_last": False}, "channels first"),
    ],
)
def test_what_is_not_eligible(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        NaFlexEmbeds.from_original(original(proj_type="linear", **options))


def test_compiled_in_one_graph_and_under_autocast() -> None:
    theirs = original(proj_type="linear", reg_tokens=1)
    stem = NaFlexEmbeds.from_original(copy.deepcopy(theirs))
    patches, coordinates = rows()
    expected = stem(patches, coordinates)[0]
    torch.testing.assert_close(compiled(stem)(patches, coordinates)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = stem(patches, coordinates)[0], theirs(patches, coordinates)[0]
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
