from __future__ import annotations

from collections import Counter

import pytest
import torch
from stems import compiled
from torch import Tensor

from vlmfast.nn import PatchDropout
from vlmfast.ops import patch_embed

timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")


def numbered(batch: int, tokens: int) -> Tensor:
    """Tokens (B, L, 2) that say where they come from."""
    image, token = torch.meshgrid(torch.arange(batch), torch.arange(tokens), indexing="ij")
    return torch.stack([image, token], dim=2).float()


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("prob", [0.01, 0.25, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("ordered", [False, True])
def test_tokens_that_stay(prefix: int, prob: float, ordered: bool) -> None:
    x = numbered(4, prefix + 13)
    ours = PatchDropout(prob, prefix, ordered)(x)
    assert ours.shape == timm.layers.PatchDropout(prob, prefix, ordered)(x).shape
    assert torch.equal(ours[:, :prefix], x[:, :prefix])
    for image in range(4):
        assert (ours[image, :, 0] == image).all()
        kept = ours[image, prefix:, 1].tolist()
        assert len(set(kept)) == len(kept)
        assert min(kept) >= prefix
        assert not ordered or kept == sorted(kept)


@pytest.mark.parametrize("first", [True, False])
def test_open_clip_s_constructor_and_draws(first: bool) -> None:
    x, state = numbered(5, 17), torch.get_rng_state()
    expected = open_clip.transformer.PatchDropout(0.4, first)(x)
    torch.set_rng_state(state)
    assert torch.equal(PatchDropout(0.4, first)(x), expected)


def test_nothing_is_dropped_in_evaluation_or_with_prob_0() -> None:
    x = numbered(2, 9)
    for module in (PatchDropout(0.5).eval(), PatchDropout(0.0)):
        assert module(x) is x
        assert module.keep(2, 8, "cpu") is None


def test_every_subset_is_as_likely_as_any_other() -> None:
    """Of 4 patches 2 stay: 6 sets, in both orders; 6000 draws leave each set within 5 standard deviations of 1000."""
    kept = PatchDropout(0.5).keep(6000, 4, "cpu")
    counts = Counter(map(tuple, kept.tolist()))
    assert len(counts) == 12
    assert all(abs(count - 500) < 5 * 500**0.5 for count in counts.values())
    ordered = PatchDropout(0.5, ordered=True).keep(6000, 4, "cpu")
    counts = Counter(map(tuple, ordered.tolist()))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 5 * 1000**0.5 for count in counts.values())


def test_images_are_drawn_independently_and_anew() -> None:
    module = PatchDropout(0.5)
    kept = module.keep(2, 50, "cpu")
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept, module.keep(2, 50, "cpu"))


def test_keep_of_patch_embed_is_dropout_of_its_tokens() -> None:
    pixels = torch.randint(0, 256, (3, 12, 12, 3), dtype=torch.uint8)
    weight, prefix, position = torch.randn(8, 3, 4, 4), torch.randn(2, 8), torch.randn(11, 8)
    module = PatchDropout(0.5, num_prefix_tokens=2)
    state = torch.get_rng_state()
    keep = module.keep(3, 9, pixels.device)
    tokens = patch_embed(pixels, weight, layout="NHWC", prefix=prefix, position=position, keep=keep)
    torch.set_rng_state(state)
    every = patch_embed(pixels, weight, layout="NHWC", prefix=prefix, position=position)
    torch.testing.assert_close(tokens, module(every))


def test_drawn_on_the_device() -> None:
    """Nothing is read back from it: from the meta device that would raise."""
    assert PatchDropout(0.5)(torch.randn(3, 10, 4, device="meta")).shape == (3, 5, 4)
    kept = PatchDropout(0.5, ordered=True).keep(3, 9, "meta")
    assert (kept.device.type, kept.dtype, kept.shape) == ("meta", torch.int64, (3, 4))


def test_gradients() -> None:
    x = torch.randn(3, 10, 4, requires_grad=True)
    dropped = PatchDropout(0.5)(x)
    dropped.sum().backward()
    assert x.grad[:, 0].eq(1).all()
    assert x.grad.sum() == dropped.numel()


def test_compiled_in_one_graph() -> None:
    graph = compiled(PatchDropout(0.5, ordered=True))
    out = graph(numbered(3, 9))
    assert out.shape == (3, 5, 2)
    assert (out.diff(dim=1)[..., 1] > 0).all()


@pytest.mark.parametrize("prob", [-0.1, 1.0])
def test_errors(prob: float) -> None:
    with pytest.raises(ValueError, match=rf"PatchDropout: prob must be in \[0, 1\); got {prob}"):
        PatchDropout(prob)
