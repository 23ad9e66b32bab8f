from __future__ import annotations

import math

import pytest
import torch
from backends import use_backend
from contrastive import check_info_nce as check
from contrastive import pairs, rounding_of_dots, unit
from grids import by_backend, pairwise
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_exact_as_eager, loss_and_gradients
from torch.nn import functional as F

from vlmfast.ops import info_nce
from vlmfast.ops.info_nce import IMPLS, reference

NAMES = ("loss", "image gradient", "text gradient", "scale gradient")


@pytest.fixture(params=list(IMPLS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_backend(monkeypatch, IMPLS, request.param)
    return request.param


@pytest.mark.parametrize("recompute", [False, True])
def test_at_most_twice_eagers_error_on_random_rows(backend: str, recompute: bool) -> None:
    """Scale 100, where a shift by the scale would underflow most rows; epsilon is one rounding of the result."""
    image, text = pairs(256 if backend == "triton" else 1024, 768)  # triton's interpreter is slow
    assert_as_exact_as_eager(
        lambda x, y, s: info_nce(x, y, s, recompute=recompute),
        reference,
        (image.float(), text.float(), torch.tensor(100.0)),
        epsilon=2.0**-23,
        floors=(0, 0, 0, 0),
        names=NAMES,
    )


SIZES = [(1, 64), (2, 1), (127, 3), (128, 64), (129, 588), (257, 768), (300, 1152), (66, 80), (66, 113)]
# Two blocks, of which one is hardly begun, show in its interpreter what three do, and so do four slices of features.
OF_TRITON = [(1, 64), (2, 1), (127, 3), (128, 64), (129, 100), (130, 96), (66, 80), (66, 113)]
KINDS = [torch.float32, torch.bfloat16, torch.float16], [False, True]


@pytest.mark.parametrize(
    ("backend", "size", "dtype", "recompute"),
    by_backend(IMPLS, pairwise(SIZES, *KINDS), pairwise(OF_TRITON, *KINDS)),
    indirect=["backend"],
)
def test_shapes_and_dtypes(backend: str, size: tuple[int, int], dtype: torch.dtype, recompute: bool) -> None:
    check(*pairs(*size), 20.0, dtype, recompute=recompute, dots=rounding_of_dots(backend, dtype))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0, 100.0, 300.0, 1e3])
def test_scales(backend: str, scale: float, recompute: bool) -> None:
    rows = 66 if backend == "triton" else 260
    check(*pairs(rows, 64), scale, recompute=recompute)
    check(*pairs(rows, 64, noise=1.0), scale, recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
def test_saturated_batch_keeps_its_small_gradients(backend: str, recompute: bool) -> None:
    """Nearly all probability on the positive: 1 - p is the whole gradient."""
    check(*pairs(200, 256, noise=0.5), 100.0, recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", ["all negative", "duplicates", "large norms", "zero rows", "huge logits"])
def test_unusual_features(backend: str, case: str, recompute: bool) -> None:
    image, text = pairs(150, 32)
    scale = 100.0
    if case == "all negative":  # every cosine near -1: sums underflow at a shift near the scale
        text = F.normalize(-image[:1].expand_as(image) + 0.05 * text, dim=1)
        image = F.normalize(image[:1].expand_as(image) + 0.05 * unit(150, 32), dim=1)
    elif case == "duplicates":
        image, text = image[:1].repeat(150, 1), text[:3].repeat(50, 1)
    elif case == "large norms":
        image, text = 3 * image, 5 * text
    elif case == "zero rows":
        image[::7] = 0
    else:
        image, text, scale = 30 * image, 30 * text, 1e3
    check(image, text, scale, recompute=recompute)


@pytest.mark.parametrize(
    ("label_offset", "bidirectional", "recompute"), pairwise([0, 5, 140], [False, True], [False, True])
)
def test_rectangular(backend: str, label_offset: int, bidirectional: bool, recompute: bool) -> None:
    image, text = unit(160, 48), unit(300, 48)
    check(image, text, 30.0, label_offset=label_offset, bidirectional=bidirectional, recompute=recompute)


def test_equals_the_loss_of_transformers_and_open_clip(backend: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    image, text = pairs(100, 32, noise=2.0)
    x, y, s = image.float(), text.float(), torch.tensor(14.0)
    ours = info_nce(x, y, s)
    torch.testing.assert_close(ours, open_clip.loss.ClipLoss()(x, y, s), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, image_text_contrastive_loss(s * y @ x.T), rtol=1e-6, atol=1e-6)


def test_strides(backend: str) -> None:
    x = torch.randn(64, 40).T
    y = torch.randn(1, 64).expand(40, 64)
    z = torch.randn(40, 128)[:, ::2]
    for text in (y, z):
        a = loss_and_gradients(info_nce, (x, text, torch.tensor(3.0)))
        b = loss_and_gradients(info_nce, (x.contiguous(), text.contiguous(), torch.tensor(3.0)))
        for got, want in zip(a, b, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", list(IMPLS))
def test_properties(name: str) -> None:
    limits = {"rows": st.integers(2, 150), "dim": st.integers(1, 40), "scale": st.floats(0.01, 120)}
    examples = 3 if name == "triton" else 20  # its interpreter is slow
    check = settings(max_examples=examples, deadline=None)(given(**limits, seed=st.integers(0, 1000))(_properties))
    check(name=name)


def _properties(name: str, rows: int, dim: int, scale: float, seed: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_backend(monkeypatch, IMPLS, name)
        torch.manual_seed(seed)
        image, text = (t.float() for t in pairs(rows, dim))
        s = torch.tensor(scale)
        loss, dx, dy, ds = loss_and_gradients(info_nce, (image, text, s))
        close = {"rtol": 1e-4, "atol": 1e-5 * max(1.0, scale)}

        order = torch.randperm(rows)
        loss_p, dx_p, dy_p, _ = loss_and_gradients(info_nce, (image[order], text[order], s))
        torch.testing.assert_close(loss_p, loss, **close)
        torch.testing.assert_close(dx_p, dx[order], **close)
        torch.testing.assert_close(dy_p, dy[order], **close)

        swapped = loss_and_gradients(info_nce, (text, image, s))
        torch.testing.assert_close(swapped[0], loss, **close)
        torch.testing.assert_close(swapped[1], dy, **close)

        # Scaling the features by a is scaling s by a: x . dL/dx = s dL/ds, for either side.
        torch.testing.assert_close((dx * image).sum(), s.double() * ds, **close)
        torch.testing.assert_close((dy * text).sum(), s.double() * ds, **close)

        again = loss_and_gradients(info_nce, (image, text, s))
        assert all(torch.equal(p, q) for p, q in zip((loss, dx, dy, ds), again, strict=True))


def test_not_a_number_comes_out_as_one(backend: str) -> None:
    x, y = (t.float() for t in pairs(20, 4))
    x[3, 1] = math.nan
    assert info_nce(x, y, 3.0).isnan()


@pytest.mark.parametrize("name", list(IMPLS))
def test_fifty_steps_follow_the_same_curve(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, IMPLS, name)

    def train(loss_function) -> list[float]:
        torch.manual_seed(3)
        towers = torch.nn.ModuleList([torch.nn.Linear(20, 16), torch.nn.Linear(30, 16)])
        logit_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        optimizer = torch.optim.AdamW([*towers.parameters(), logit_scale], lr=1e-2)
        mixing = torch.randn(20, 30)
        curve = []
        for _ in range(50):
            images = torch.randn(64, 20)
            features = [F.normalize(t(v), dim=1) for t, v in zip(towers, (images, images @ mixing), strict=True)]
            loss = loss_function(*features, logit_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        return curve

    ours, eager = train(info_nce), train(reference)
    assert eager[-1] < 0.7 * eager[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(eager), rtol=1e-3, atol=1e-4)
