"""What is chosen for compute capability 9.0, and several chunks, in Triton's interpreter: the other tests run what is
chosen for 8.0, and one chunk.
"""

from __future__ import annotations

import pytest
import torch
from backends import use_backend
from contrastive import check_info_nce, pairs
from grids import pairwise
from numerics import assert_as_exact_as_eager
from torch import Tensor

from vlmfast.ops import info_nce, patch_embed, sigmoid_loss
from vlmfast.ops.info_nce import IMPLS
from vlmfast.ops.info_nce import reference as info_nce_reference
from vlmfast.ops.patch_embed import reference as patch_embed_reference
from vlmfast.ops.sigmoid_loss import reference as sigmoid_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, IMPLS, "triton")
    from vlmfast.kernels import info_nce as loss
    from vlmfast.kernels import pairs as tiles
    from vlmfast.kernels import patch_embed as patches
    from vlmfast.kernels import sigmoid_loss as sigmoid

    for module in (tiles, patches):
        monkeypatch.setattr(module, "capability", lambda tensor: 90)
    for module in (loss, sigmoid):
        monkeypatch.setattr(module, "CHUNK", 128)


OPTIONS = [{}, {"recompute": False}, {"bidirectional": False}, {"exclude_positive": True}, {"groups": True}]


@pytest.mark.parametrize(("options", "dtype", "dim", "scale"), pairwise(OPTIONS, DTYPES, [40, 37], [20.0, 400.0]))
def test_info_nce(options: dict[str, object], dtype: torch.dtype, dim: int, scale: float) -> None:
    """Several chunks both ways, ragged; rows of features that are no multiple of 16 bytes.

    A scale of 400 with running maxima.
    """
    image, text = pairs(300, dim)
    options, recompute = dict(options), options.get("recompute", True)
    options.pop("recompute", None)
    if options.pop("groups", False):
        options["groups"] = (torch.randint(40, (300,)), torch.randint(40, (300,)))
    check_info_nce(image, text, scale, dtype, recompute=recompute, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", ["image", "text"])
def test_a_frozen_side(frozen: str, dtype: torch.dtype) -> None:
    """Gradients of the other side and of the scale; the text's own where there are more texts than images."""
    x, y = (t.to(dtype) for t in pairs(200, 48))
    x = x[:150]
    leaves = {"image": x, "text": y, "scale": torch.tensor(15.0)}
    wanted = [name for name in leaves if name != frozen]

    def gradients(function, cast: torch.dtype | None) -> list[Tensor]:
        given = {n: t.detach().to(cast or t.dtype).requires_grad_(n != frozen) for n, t in leaves.items()}
        return list(torch.autograd.grad(function(**given, label_offset=30), [given[n] for n in wanted]))

    exact = gradients(info_nce_reference, torch.float64)
    for a, b in zip(gradients(info_nce, None), exact, strict=True):
        assert (a.double() - b).abs().max() <= {2: 2**-8, 4: 1e-6}[dtype.itemsize] * b.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grouped", [False, True])
def test_sigmoid_loss(dtype: torch.dtype, grouped: bool) -> None:
    x, y = (t.to(dtype) for t in pairs(300, 37))
    groups = (torch.randint(40, (300,)), torch.randint(40, (300,))) if grouped else None
    assert_as_exact_as_eager(
        lambda *leaves: sigmoid_loss(*leaves, groups=groups),
        lambda *leaves: sigmoid_reference(*leaves, groups=groups),
        (x, y, torch.tensor(10.0), torch.tensor(-10.0)),
        epsilon=2.0**-20,
        floors=(0, 1e-6, 1e-6, 1e-6, 1e-6),
        names=("loss", "image gradient", "text gradient", "scale gradient", "bias gradient"),
    )


def test_features_that_begin_anywhere() -> None:
    """Descriptors want addresses that 16 divides; float16 features are not copied by a cast."""
    memory = torch.randn(100 * 64 + 1).half()
    text = torch.nn.functional.normalize(torch.randn(100, 64), dim=1).half()
    memory[1:] = text.flatten()
    moved = memory[1:].view(100, 64)
    assert moved.data_ptr() % 16
    assert torch.equal(info_nce(text, moved, 10.0), info_nce(text, text, 10.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patch", [16, 14])
def test_patch_embed(patch: int, dtype: torch.dtype) -> None:
    """14 * 14 * 3 entries are no multiple of 16 bytes."""
    pixels = torch.randint(0, 256, (2, 3 * patch, 2 * patch, 3)).byte()
    shapes = ((40, 3, patch, patch), (40,), (1, 40), (7, 40))
    leaves = tuple((torch.randn(shape) / 10).to(dtype) for shape in shapes)

    def call(op):
        return lambda weight, bias, prefix, position: (
            op(
                pixels, weight, bias, layout="NHWC", mean=(0.5,) * 3, std=(0.25,) * 3, prefix=prefix, position=position
            ).float()
            ** 2
        ).sum()

    assert_as_exact_as_eager(
        call(patch_embed), call(patch_embed_reference), leaves, epsilon=2.0**-20 if dtype == torch.float32 else 2.0**-8,
        floors=(0,) * 5, names=("sum of squares", "weight", "bias", "prefix", "position"),
    )  # fmt: skip


def test_the_precision_of_float32_products_is_one_that_triton_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.5, that of torch 2.9, does not know bf16x6."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from vlmfast.kernels import products

    with FakeTensorMode():
        on_gpu = torch.empty(1, device="cuda")
    found = {}
    for version in ((3, 5), (3, 6), (4, 0)):
        monkeypatch.setattr(products, "VERSION", version)
        found[version] = products.precision(on_gpu)
    assert found == {(3, 5): "tf32x3", (3, 6): "bf16x6", (4, 0): "bf16x6"}
    assert products.precision(torch.empty(1)) == "ieee"
