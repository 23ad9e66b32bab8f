"""Tokens and gradients of patch_embed, against float64 and against the stems of public models."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from backends import use_backend
from grids import by_backend, pairwise
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_exact_as_eager, loss_and_gradients
from torch import Tensor

from vlmfast.ops import patch_embed, patch_embed_packed
from vlmfast.ops.patch_embed import IMPLS, reference

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(params=list(IMPLS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_backend(monkeypatch, IMPLS, request.param)
    return request.param


def images(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(0, 256, shape).byte() if dtype == torch.uint8 else torch.randn(shape).to(dtype)


def parameters(
    pixels: Tensor, embed: int, patch: tuple[int, int], prefix: int = 2, per_image: bool = False
) -> dict[str, Tensor]:
    """Of pixels (B, C, H, W): weight, bias, prefix and position, float32."""
    batch, channels, height, width = pixels.shape
    tokens = prefix + -(-height // patch[0]) * -(-width // patch[1])
    return {
        "weight": torch.randn(embed, channels, *patch) / (channels * patch[0] * patch[1]) ** 0.5,
        "bias": torch.randn(embed),
        "prefix": torch.randn(prefix, embed),
        "position": torch.randn(batch, tokens, embed) if per_image else torch.randn(tokens, embed),
    }


def check(
    pixels: Tensor,
    inputs: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    pixel_grad: bool = False,
    **options: Any,
) -> None:
    """By the twice-eager rule: tokens, and the gradients of a fixed weighting of them."""
    inputs = {name: t.to(dtype) for name, t in inputs.items()}
    names = [*inputs, *(["pixels"] if pixel_grad else [])]
    leaves = [*inputs.values(), *([pixels] if pixel_grad else [])]

    def tokens(op: Any, *values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        return op(named.pop("pixels", pixels), **named, **options)

    exact, eager, ours = (
        tokens(op, *(t.to(kind or t.dtype) for t in leaves)).detach()
        for op, kind in ((reference, torch.float64), (reference, None), (patch_embed, None))
    )
    assert ours.dtype == eager.dtype == dtype
    assert ours.shape == eager.shape
    bound = 2 * (eager.double() - exact).abs().max() + ROUNDING[dtype] * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= bound
    # Entries that every dtype holds, so that all three sums have the same gradient at the tokens.
    cotangent = torch.randint(-8, 9, exact.shape) / 8

    def scalar(op: Any) -> Any:
        return lambda *values: (tokens(op, *values).double() * cotangent).sum()

    # A gradient is a sum over tokens: in one float32 chain of n roundings it is off by about sqrt(n) of them, where
    # eager's convolution may have added in a luckier order.
    chain = 2.0**-24 * (exact.shape[0] * exact.shape[1]) ** 0.5
    assert_as_exact_as_eager(
        scalar(patch_embed), scalar(reference), leaves,
        epsilon=ROUNDING[dtype] + chain, floors=[exact.abs().sum().item() * ROUNDING[dtype], *[0.0] * len(names)],
        names=["weighted sum", *names],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("kind", [torch.uint8, *ROUNDING])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_dtypes_and_layouts(backend: str, layout: str, kind: torch.dtype, dtype: torch.dtype) -> None:
    pixels = images(3, 3, 12, 20, dtype=kind)
    inputs = parameters(pixels, 24, (4, 4))
    given = pixels if layout == "NCHW" else pixels.permute(0, 2, 3, 1).contiguous()
    normalise = {"mean": MEAN, "std": STD, "layout": layout}
    check(given, inputs, dtype, pixel_grad=kind == dtype, **normalise)
    check(given, inputs, dtype, pixel_grad=kind == dtype, layout=layout)


SIZES = [
    ((1, 1), (3, 5), 3, 1), ((2, 2), (1, 1), 1, 3), ((14, 14), (2, 3), 3, 64), ((15, 10), (2, 2), 3, 129),
    ((16, 16), (2, 1), 4, 7), ((32, 32), (1, 2), 3, 5), ((2, 1), (7, 9), 3, 65), ((1, 2), (8, 8), 3, 128),
    ((3, 2), (5, 13), 2, 127),
]  # fmt: skip
HALF = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("backend", "size", "dtype"),
    by_backend(IMPLS, itertools.product(SIZES, HALF), [(size, HALF[index % 2]) for index, size in enumerate(SIZES)]),
    indirect=["backend"],
)
def test_sizes(backend: str, size: tuple[tuple[int, int], tuple[int, int], int, int], dtype: torch.dtype) -> None:
    patch, grid, channels, embed = size
    pixels = images(2, channels, patch[0] * grid[0], patch[1] * grid[1])
    check(pixels, parameters(pixels, embed, patch), dtype, mean=MEAN[:1] * channels, std=STD[:1] * channels)


@pytest.mark.parametrize("tokens", [63, 64, 65, 127, 128, 129])
def test_one_below_and_above_a_tile(backend: str, tokens: int) -> None:
    pixels = images(1, 3, 2, 2 * tokens)
    check(pixels, parameters(pixels, 65, (2, 2), prefix=1), torch.bfloat16, mean=MEAN, std=STD)
    check(pixels, parameters(pixels, 63, (2, 2), prefix=1), mean=MEAN, std=STD)


def test_more_tokens_than_one_sum(backend: str) -> None:
    """The reduction of weight's gradient is split, unevenly."""
    pixels = images(3, 2, 33, 32)
    check(pixels, parameters(pixels, 5, (1, 1)), mean=MEAN[:2], std=STD[:2])


def views() -> dict[str, Tensor]:
    base = images(4, 6, 24, 24)
    return {
        "channels last": base[:, :3].contiguous(memory_format=torch.channels_last),
        "sliced": base[1:3, 1:4, 8:20, 4:20],
        "strided": base[::2, ::2, ::2, ::3],
        "transposed": base[:, :3].transpose(2, 3),
        "expanded over channels": base[:, :1].expand(-1, 3, -1, -1),
        "expanded over images": base[:1, :3].expand(3, -1, -1, -1),
        "one pixel": base[:2, :3, :1, :1].expand(-1, -1, 8, 8),
        "cropped channels last": base[:, :3].contiguous(memory_format=torch.channels_last)[:, :, 4:20, 4:12],
        "channels of more": base.contiguous(memory_format=torch.channels_last)[:, 1:4],
    }


@pytest.mark.parametrize("name", list(views()))
def test_views(backend: str, name: str) -> None:
    pixels = views()[name]
    inputs = parameters(pixels, 24, (4, 4))
    inputs["weight"] = inputs["weight"].contiguous(memory_format=torch.channels_last)
    check(pixels, inputs, mean=MEAN, std=STD)
    check(pixels.permute(0, 2, 3, 1), inputs, mean=MEAN, std=STD, layout="NHWC")


@pytest.mark.parametrize("per_image", [False, True], ids=["shared", "per image"])
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("kept", ["permuted", "repeated", "one", "none"])
def test_keep(backend: str, kept: str, dtype: torch.dtype, per_image: bool) -> None:
    pixels = images(3, 3, 12, 20, dtype=dtype)
    keep = {
        "permuted": torch.rand(3, 15).argsort(1)[:, :7],
        "repeated": torch.randint(0, 3, (3, 20)),
        "one": torch.tensor([[14], [0], [14]]),
        "none": None,
    }[kept]
    inputs = parameters(pixels, 24, (4, 4), per_image=per_image)
    check(pixels, inputs, dtype, pixel_grad=True, mean=MEAN, std=STD, keep=keep)
    check(pixels, {"weight": inputs["weight"]}, dtype, keep=keep)


@pytest.mark.parametrize(("dtype", "prefix", "kept"), pairwise(HALF, [1, 2], [False, True]))
def test_positions_in_a_large_batch(backend: str, kept: bool, prefix: int, dtype: torch.dtype) -> None:
    """Each of two threads has some of the positions; for the weight's gradient one image is half of each."""
    pixels = images(35, 3, 16, 12)
    keep = torch.stack([torch.randperm(12)[:7] for _ in range(35)]) if kept else None
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        check(pixels, parameters(pixels, 140, (4, 4), prefix), dtype, keep=keep)
    finally:
        torch.set_num_threads(threads)


def test_long_sums_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """16384 patches are added in short chains for the weight, 64 images with one rounding for the positions."""
    use_backend(monkeypatch, IMPLS, "cpu")
    pixels, cotangent = images(64, 3, 64, 64), torch.randn(64, 256, 48)
    inputs = parameters(pixels, 48, (4, 4), prefix=0)

    def gradients(op: Any, dtype: torch.dtype) -> Sequence[Tensor]:
        leaves = [inputs[name].to(dtype).requires_grad_() for name in ("weight", "position")]
        tokens = op(pixels, leaves[0], position=leaves[1], mean=MEAN, std=STD)
        return torch.autograd.grad(tokens, leaves, cotangent.to(dtype))

    pairs = zip(gradients(patch_embed, torch.float32), gradients(reference, torch.float64), strict=True)
    weight, position = (((ours.double() - exact).norm() / exact.norm()).item() for ours, exact in pairs)
    assert weight < 4.7 * 2.0**-24  # chains twice as long: 5.2
    assert position < 0.5 * 2.0**-24


@pytest.mark.parametrize(("height", "width"), [(1, 1), (13, 19), (12, 17), (11, 20), (12, 20)])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
def test_padding(backend: str, height: int, width: int, kind: torch.dtype, channels_last: bool) -> None:
    pixels = images(2, 3, height, width, dtype=kind)
    if channels_last:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    inputs = parameters(pixels, 24, (4, 5))
    last = -(-height // 4) * -(-width // 5) - 1
    keep = torch.tensor([[last, 0], [0, last]])
    for options in ({}, {"keep": keep}):
        check(pixels, inputs, pixel_grad=kind == torch.float32, mean=MEAN, std=STD, pad=True, **options)


@pytest.mark.parametrize("given", [(), ("bias",), ("prefix",), ("position",), ("bias", "position")], ids=str)
def test_parts_that_are_left_out(backend: str, given: tuple[str, ...]) -> None:
    pixels = images(2, 3, 8, 8)
    inputs = parameters(pixels, 24, (4, 4), prefix=2 if "prefix" in given else 0)
    check(pixels, {name: t for name, t in inputs.items() if name in ("weight", *given)}, mean=MEAN, std=STD)


def test_a_gradient_of_any_strides(backend: str) -> None:
    """Of a sum, which is expanded, and of tokens that were transposed."""
    pixels = images(2, 3, 8, 12)
    inputs = parameters(pixels, 5, (4, 4))
    for use in (Tensor.sum, lambda t: (t.transpose(1, 2).contiguous() * torch.arange(8)).sum(), lambda t: t[0].sum()):
        ours, exact = (
            loss_and_gradients(lambda *v, op=op, use=use: use(op(pixels, **dict(zip(inputs, v, strict=True)))), kinds)
            for op, kinds in ((patch_embed, list(inputs.values())), (reference, [t.double() for t in inputs.values()]))
        )
        for got, want in zip(ours, exact, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 4), rows=st.integers(1, 4), columns=st.integers(1, 4), p=st.integers(1, 5),
    q=st.integers(1, 5), embed=st.integers(1, 20), seed=st.integers(0, 1000),
)  # fmt: skip
@pytest.mark.parametrize("name", list(IMPLS))
def test_properties(name: str, batch: int, rows: int, columns: int, p: int, q: int, embed: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_backend(monkeypatch, IMPLS, name)
        torch.manual_seed(seed)
        pixels = images(batch, 3, rows * p, columns * q)
        inputs = parameters(pixels, embed, (p, q))
        tokens = patch_embed(pixels, **inputs, mean=MEAN, std=STD)
        assert torch.equal(patch_embed(pixels, **inputs, mean=MEAN, std=STD), tokens)
        order = torch.randperm(batch)
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(patch_embed(pixels[order], **inputs, mean=MEAN, std=STD), tokens[order], **close)
        everything = torch.arange(rows * columns).expand(batch, -1)
        torch.testing.assert_close(patch_embed(pixels, **inputs, mean=MEAN, std=STD, keep=everything), tokens, **close)
        shuffled = torch.randperm(rows * columns)
        kept = patch_embed(pixels, **inputs, mean=MEAN, std=STD, keep=shuffled.expand(batch, -1))
        torch.testing.assert_close(kept, torch.cat([tokens[:, :2], tokens[:, 2:][:, shuffled]], 1), **close)


def test_repeatable_bit_for_bit(backend: str) -> None:
    pixels = images(3, 3, 32, 40)
    inputs = parameters(pixels, 24, (2, 2))
    keep = torch.randint(0, 5, (3, 400))

    def run() -> Sequence[Tensor]:
        return loss_and_gradients(
            lambda *v: patch_embed(pixels, **dict(zip(inputs, v, strict=True)), keep=keep).square().sum(),
            list(inputs.values()),
        )

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("layout", ["CHW", "HWC"])
@pytest.mark.parametrize("pad", [False, True])
def test_packed_images(backend: str, layout: str, pad: bool) -> None:
    """Each image's tokens are those that it has alone, and so are the gradients."""
    sizes = [(4, 4), (12, 8), (4, 20)] if not pad else [(3, 4), (12, 8), (5, 18)]
    singles = [images(1, 3, *size) for size in sizes]
    weight, bias = torch.randn(24, 3, 4, 4) / 7, torch.randn(24)
    given = [t[0] if layout == "CHW" else t[0].permute(1, 2, 0) for t in singles]
    counts = [-(-h // 4) * -(-w // 4) for h, w in sizes]
    position = torch.randn(sum(counts), 24)
    cotangent = torch.randn(sum(counts), 24)
    options = {"mean": MEAN, "std": STD, "pad": pad}

    def packed(w: Tensor, b: Tensor, pos: Tensor) -> Tensor:
        tokens, grids = patch_embed_packed(given, w, b, layout=f"N{layout}", position=pos, **options)
        assert grids == [(-(-h // 4), -(-w // 4)) for h, w in sizes]
        return (tokens * cotangent.to(tokens.dtype)).sum()

    def alone(w: Tensor, b: Tensor, pos: Tensor) -> Tensor:
        tokens = torch.cat([reference(image, w, b, **options)[0] for image in singles]) + pos
        return (tokens * cotangent.to(tokens.dtype)).sum()

    exact = loss_and_gradients(alone, (weight, bias, position), [torch.float64] * 3)
    for got, want in zip(loss_and_gradients(packed, (weight, bias, position)), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
