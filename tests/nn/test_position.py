from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from stems import compiled
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from watching import Watch

from vlmfast.nn import interpolate_position, interpolate_position_per_image
from vlmfast.nn import position as module

MODES = list(itertools.product(("bilinear", "bicubic"), (False, True)))
SIZES = [(5, 6), (1, 1), (1, 9), (3, 20), (14, 14), (7, 5), (2, 3), (40, 2)]


def eager(
    position: Tensor, size: tuple[int, int], old: tuple[int, int], prefix: int, mode: str, antialias: bool
) -> Tensor:
    grid = position[prefix:].unflatten(0, old).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size, mode=mode, align_corners=False, antialias=antialias)
    return torch.cat([position[:prefix], grid[0].flatten(1).T])


def check(fused: Callable[[Tensor], Tensor], eager: Callable[[Tensor], Tensor], rows: int, terms: int = 16) -> None:
    """Equal in float64; in float32 output and gradient err at most twice as much, plus a sum of `terms` products."""
    position = torch.randn(rows, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(position), eager(position), rtol=1e-12, atol=1e-12)

    def output_and_gradient(function: Callable[[Tensor], Tensor], leaf: Tensor) -> tuple[Tensor, Tensor]:
        out = function(leaf.requires_grad_())
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        return out.detach(), torch.autograd.grad(out, leaf, cotangent)[0]

    single = position.float()
    exact = output_and_gradient(eager, single.double())
    for ours, theirs, truth in zip(
        output_and_gradient(fused, single), output_and_gradient(eager, single), exact, strict=True
    ):
        error, allowed = ((x.double() - truth).abs().max().item() for x in (ours, theirs))
        largest = truth.abs().max().item()
        assert error <= 2 * allowed + 2.0**-24 * terms**0.5 * largest, (
            f"{error:.2e}, eager {allowed:.2e}, values to {largest:.2e}"
        )


@pytest.mark.parametrize(("mode", "antialias"), MODES)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_equals_interpolate(mode: str, antialias: bool, prefix: int) -> None:
    for old, size in itertools.product(((7, 5), (4, 4), (1, 3)), SIZES):
        options = {"old_size": old, "prefix_tokens": prefix, "mode": mode, "antialias": antialias}
        check(
            partial(interpolate_position, size=size, **options),
            partial(eager, size=size, old=old, prefix=prefix, mode=mode, antialias=antialias),
            prefix + old[0] * old[1],
        )


def per_image(position: Tensor, sizes: Tensor, length: int, old: tuple[int, int], mode: str) -> Tensor:
    rows = [eager(position, (h, w), old, 0, mode, True) for h, w in sizes.tolist()]
    return torch.stack([torch.cat([row, row[:1].expand(length - len(row), -1)]) for row in rows])


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("old", [(7, 5), (4, 4), (1, 3)], ids=str)
def test_per_image_equals_interpolate(mode: str, old: tuple[int, int]) -> None:
    sizes = torch.tensor([*SIZES[:6], (2, 3), (8, 8), (30, 3)])
    check(
        partial(interpolate_position_per_image, sizes=sizes, length=200, old_size=old, mode=mode),
        partial(per_image, sizes=sizes, length=200, old=old, mode=mode),
        old[0] * old[1],
        terms=len(sizes) * 200,
    )


def test_grids_one_patch_wide() -> None:
    """There PyTorch's own antialiased interpolation goes wrong; its transpose does not."""
    position = torch.randn(7 * 7, 3, dtype=torch.float64)
    turned = position.view(7, 7, 3).transpose(0, 1).flatten(0, 1)
    right = eager(turned, (1, 3), (7, 7), 0, "bilinear", True)
    assert not torch.allclose(eager(position, (3, 1), (7, 7), 0, "bilinear", True), right)
    torch.testing.assert_close(interpolate_position(position, (3, 1), mode="bilinear", antialias=True), right)
    ours = interpolate_position_per_image(position, torch.tensor([[3, 1]]), 3)
    torch.testing.assert_close(ours[0], right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast_are_rounded_once(dtype: torch.dtype) -> None:
    position = torch.randn(1 + 49, 16).to(dtype)
    exact = interpolate_position(position.double(), (9, 4), prefix_tokens=1)
    ours = interpolate_position(position, (9, 4), prefix_tokens=1)
    assert torch.equal(ours, exact.float().to(dtype))
    sizes = torch.tensor([[9, 4]])
    exact = interpolate_position_per_image(position[1:].double(), sizes, 36)
    ours = interpolate_position_per_image(position[1:], sizes, 36)
    torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    with torch.autocast("cpu", dtype):
        assert torch.equal(ours, interpolate_position_per_image(position[1:], sizes, 36))
        full = interpolate_position(position.float(), (9, 4), prefix_tokens=1)
    assert torch.equal(full, interpolate_position(position.float(), (9, 4), prefix_tokens=1))


def test_gradcheck() -> None:
    position = torch.randn(1 + 9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: interpolate_position(p, (2, 5), prefix_tokens=1), position)
    sizes = torch.tensor([[2, 5], [4, 1]])
    assert torch.autograd.gradcheck(lambda p: interpolate_position_per_image(p[1:], sizes, 12), position)


def test_the_same_size_is_the_position_itself() -> None:
    position = torch.randn(10, 4)
    assert interpolate_position(position, (3, 3), prefix_tokens=1) is position


def test_nothing_is_read_back_from_the_device() -> None:
    """A fake tensor holds nothing to read: whoever tries raises."""
    with FakeTensorMode():
        position, sizes = torch.randn(9, 4, device="cuda"), torch.tensor([[2, 5]], device="cuda")
        assert interpolate_position(position, (5, 4)).shape == (20, 4)
        assert interpolate_position_per_image(position, sizes, 12).shape == (1, 12, 4)
        cpu = torch.randn(9, 4)
        assert interpolate_position(cpu, (5, 4)).shape == (20, 4)
    # and leaves nothing fake behind
    assert type(interpolate_position(torch.randn(9, 4), (5, 4))) is Tensor


def test_matrices_are_made_once() -> None:
    """The second call makes none, and one of other settings does not take the first one's."""
    position = torch.randn(9, 4)
    for settings in ({}, {"antialias": True}, {"mode": "bilinear"}):
        module._kept_matrix.cache_clear()
        with Watch() as first:
            expected = interpolate_position(position, (5, 4), **settings)
        with Watch() as second:
            assert torch.equal(interpolate_position(position, (5, 4), **settings), expected)
        assert any("upsample" in str(op) for op in first.seen)
        assert not any("upsample" in str(op) for op in second.seen)
    interpolate_position(position, (5, 4))
    bilinear = interpolate_position(position, (5, 4), mode="bilinear")
    module._kept_matrix.cache_clear()
    assert torch.equal(interpolate_position(position, (5, 4), mode="bilinear"), bilinear)
    assert interpolate_position(position.double(), (5, 4)).dtype == torch.float64


def test_matrices_made_in_inference_mode_serve_training() -> None:
    module._kept_matrix.cache_clear()
    position = torch.randn(9, 4, requires_grad=True)
    with torch.inference_mode():
        interpolate_position(position, (5, 4))
    interpolate_position(position, (5, 4)).sum().backward()
    torch.testing.assert_close(position.grad.sum(), torch.tensor(80.0))


def test_compiled_in_one_graph() -> None:
    position, sizes = torch.randn(10, 4), torch.tensor([[2, 5], [4, 1]])
    module._kept_matrix.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph = compiled(lambda p: interpolate_position(p, (2, 5), prefix_tokens=1))
        torch.testing.assert_close(graph(position), interpolate_position(position, (2, 5), prefix_tokens=1))
        graph = compiled(lambda p, s: interpolate_position_per_image(p, s, 12))
        torch.testing.assert_close(graph(position[1:], sizes), interpolate_position_per_image(position[1:], sizes, 12))


def test_errors() -> None:
    position = torch.randn(10, 4)
    with pytest.raises(ValueError, match=r"a row for each of a square, as old_size is not given, .*; got 10"):
        interpolate_position(position, (2, 2))
    with pytest.raises(ValueError, match=r"a row for each of 3 \* 4, after prefix_tokens; got 9"):
        interpolate_position(position, (2, 2), old_size=(3, 4), prefix_tokens=1)
    with pytest.raises(ValueError, match="mode must be bilinear or bicubic; got 'nearest'"):
        interpolate_position(position, (2, 2), prefix_tokens=1, mode="nearest")
    with pytest.raises(ValueError, match=r"size must be two positive numbers; got \(0, 2\)"):
        interpolate_position(position, (0, 2), prefix_tokens=1)
    with pytest.raises(ValueError, match=r"position must be \(tokens, width\); got \(1, 10, 4\)"):
        interpolate_position(position[None], (2, 2), prefix_tokens=1)
    position = position[1:]
    with pytest.raises(ValueError, match=r"positive with at most 4 patches; got \[1, 5\]"):
        interpolate_position_per_image(position, torch.tensor([[2, 2], [1, 5]]), 4)
    with pytest.raises(ValueError, match=r"positive with at most 4 patches; got \[0, 2\]"):
        interpolate_position_per_image(position, torch.tensor([[0, 2]]), 4)
    with pytest.raises(ValueError, match=r"sizes must be integers \(images, 2\); got torch.float32 \(1, 2\)"):
        interpolate_position_per_image(position, torch.ones(1, 2), 4)
    with pytest.raises(ValueError, match=r"got torch.int64 \(2,\)"):
        interpolate_position_per_image(position, torch.tensor([2, 2]), 4)
    with pytest.raises(ValueError, match="mode must be bilinear or bicubic; got 'area'"):
        interpolate_position_per_image(position, torch.tensor([[2, 2]]), 4, mode="area")
