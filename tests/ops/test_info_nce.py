from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_exact_as_eager, loss_and_gradients
from torch import Tensor
from torch.nn import functional as F

import vlmfast
from vlmfast.ops import info_nce
from vlmfast.ops._dispatch import core
from vlmfast.ops.info_nce import IMPLS, reference

NAMES = ("loss", "image gradient", "text gradient", "scale gradient")
# A few roundings; the rounding of a dot product, times the scale, is a relative error of the exponential.
EPSILON = 2e-6


@pytest.fixture(params=list(IMPLS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VLMFAST_BACKEND", request.param)
    return request.param


def unit(rows: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64), dim=1)


def pairs(rows: int, dim: int, noise: float | None = None) -> tuple[Tensor, Tensor]:
    """Unrelated unit-norm features, or texts that are their images plus noise."""
    image, text = unit(rows, dim), unit(rows, dim)
    return image, text if noise is None else F.normalize(image + noise * text, dim=1)


def check(image: Tensor, text: Tensor, scale: float, dtype: torch.dtype = torch.float32, **options: object) -> None:
    recompute = options.pop("recompute", None)
    # Where all positives are nearly certain the exact values can be 1e-30; a float32 probability is off by up to 2^-24.
    rounding = 2.0**-22
    longest = max(image.norm(dim=1).max().item(), text.norm(dim=1).max().item())
    gradient = rounding * scale / len(image) * longest
    assert_as_exact_as_eager(
        lambda x, y, s: info_nce(x, y, s, recompute=recompute, **options),
        lambda x, y, s: reference(x, y, s.to(x.dtype), **options),
        (image.to(dtype), text.to(dtype), torch.tensor(scale)),
        epsilon=max(EPSILON, scale * 2.0**-24),
        floors=(rounding, gradient, gradient, rounding),
        names=NAMES,
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_at_most_twice_eagers_error_on_random_rows(backend: str, recompute: bool) -> None:
    """Scale 100, where a shift by the scale would underflow most rows; epsilon is one rounding of the result."""
    image, text = pairs(2048, 768)
    assert_as_exact_as_eager(
        lambda x, y, s: info_nce(x, y, s, recompute=recompute),
        reference,
        (image.float(), text.float(), torch.tensor(100.0)),
        epsilon=2.0**-23,
        floors=(0, 0, 0, 0),
        names=NAMES,
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (2, 1), (127, 3), (128, 64), (129, 588), (257, 768), (300, 1152)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(backend: str, rows: int, dim: int, dtype: torch.dtype, recompute: bool) -> None:
    check(*pairs(rows, dim), 20.0, dtype, recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0, 100.0, 300.0, 1e3])
def test_scales(backend: str, scale: float, recompute: bool) -> None:
    check(*pairs(260, 64), scale, recompute=recompute)
    check(*pairs(260, 64, noise=1.0), scale, recompute=recompute)


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


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("label_offset", [0, 5, 140])
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


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 150), dim=st.integers(1, 40), scale=st.floats(0.01, 120), seed=st.integers(0, 1000))
@pytest.mark.parametrize("name", list(IMPLS))
def test_properties(name: str, rows: int, dim: int, scale: float, seed: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("VLMFAST_BACKEND", name)
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


def test_more_threads_change_only_roundings() -> None:
    image, text = (t.float() for t in pairs(700, 64, noise=1.0))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(loss_and_gradients(info_nce, (image, text, torch.tensor(40.0))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_frozen_inputs_get_no_gradient(backend: str, wanted: tuple[bool, ...]) -> None:
    image, text = pairs(140, 16)
    full = loss_and_gradients(info_nce, (image.float(), text.float(), torch.tensor(9.0)))[1:]
    leaves = [t.float().requires_grad_(flag) for t, flag in zip((image, text, torch.tensor(9.0)), wanted, strict=True)]
    info_nce(*leaves).backward()
    for leaf, flag, gradient in zip(leaves, wanted, full, strict=True):
        assert (leaf.grad is not None) == flag
        if flag:
            torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-5, atol=1e-7)


def test_a_frozen_side_is_not_computed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward op returns nothing for it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.vlmfast.info_nce_backward.default:
                seen["shapes"] = [tuple(t.shape) for t in out]
            return out

    image, text = pairs(30, 8)
    y = text.float().requires_grad_()
    loss = info_nce(image.float(), y, 10.0)
    with Watch():
        loss.backward()
    assert seen["shapes"][:2] == [(0,), (30, 8)]


def test_what_is_kept_for_backward(backend: str) -> None:
    """The exponentials with recompute=False, O(N) without, nothing when there is no gradient."""
    x = torch.randn(64, 8)
    op = torch.ops.vlmfast.info_nce_forward
    for keep, shape in ((True, (64, 64)), (False, (0, 0))):
        loss, row_stats, col_stats, shift, kept = op(x, x, torch.tensor(5.0), 0, True, keep)
        assert tuple(kept.shape) == shape
        assert row_stats.shape == col_stats.shape == (2, 64)
        assert all(t.dtype == torch.float32 for t in (loss, row_stats, col_stats, shift, kept))


@pytest.mark.parametrize("first", list(IMPLS))
@pytest.mark.parametrize("second", list(IMPLS))
@pytest.mark.parametrize("scale", [20.0, 300.0])
@pytest.mark.parametrize("keep", [False, True])
def test_backends_agree_on_what_is_saved(first: str, second: str, scale: float, keep: bool, monkeypatch) -> None:
    """One backend's backward reads what another's forward left."""
    image, text = (t.float().requires_grad_() for t in pairs(140, 24))
    expected = loss_and_gradients(reference, (image, text, torch.tensor(scale)), [torch.float64] * 3)
    monkeypatch.setenv("VLMFAST_BACKEND", first)
    s = torch.tensor(scale, requires_grad=True)
    loss = info_nce(image, text, s, recompute=not keep)
    monkeypatch.setenv("VLMFAST_BACKEND", second)
    for got, want in zip(torch.autograd.grad(loss, (image, text, s)), expected[1:], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5 * want.abs().max().item())


def test_gradcheck_of_the_reference() -> None:
    x, y = (t.requires_grad_() for t in pairs(5, 3))
    s = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference, (x, y, s))
    assert torch.autograd.gradcheck(lambda a, b, c: reference(a[:3], b, c, label_offset=1), (x, y, s))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    x, y = (t.to(dtype).requires_grad_() for t in pairs(20, 6))
    s = torch.tensor(4.0, requires_grad=True)
    for arguments in ((x, y, s, 0, True, True), (x[:7], y, s, 3, False, False)):
        torch.library.opcheck(torch.ops.vlmfast.info_nce_forward.default, arguments)


def test_compile_as_one_opaque_op(backend: str) -> None:
    x, y = (t.float() for t in pairs(33, 8))

    def step(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
        return info_nce(F.normalize(a, dim=1), F.normalize(b, dim=1), log_scale.exp()) * 2

    inputs = (x, y, torch.tensor(2.0))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (33, 20):  # the batch size is no constant of the graph
        part = (x[:rows], y[:rows], inputs[2])
        for a, b in zip(loss_and_gradients(compiled, part), loss_and_gradients(step, part), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_autocast_changes_nothing(backend: str) -> None:
    x, y = (t.float() for t in pairs(40, 8))
    outside = info_nce(x, y, 30.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(x, y, 30.0)
    assert torch.equal(inside, outside)


def test_no_grad_gives_the_same_loss_and_saves_nothing(backend: str) -> None:
    x, y = (t.float() for t in pairs(140, 8))
    with torch.no_grad():
        without = info_nce(x.requires_grad_(), y, 30.0)
    assert not without.requires_grad
    torch.testing.assert_close(without, info_nce(x, y, 30.0).detach(), rtol=1e-6, atol=0)


def test_a_second_derivative_raises(backend: str) -> None:
    x, y = (t.float().requires_grad_() for t in pairs(6, 4))
    (gradient,) = torch.autograd.grad(info_nce(x, y, 3.0), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


def test_gradient_of_a_scaled_loss(backend: str) -> None:
    x, y = (t.float().requires_grad_() for t in pairs(20, 4))
    (one,) = torch.autograd.grad(info_nce(x, y, 3.0), x)
    (many,) = torch.autograd.grad(info_nce(x, y, 3.0) * 1024, x)
    torch.testing.assert_close(many, one * 1024)


def test_scale_of_other_kinds(backend: str) -> None:
    x, y = (t.float() for t in pairs(20, 4))
    expected = info_nce(x, y, torch.tensor(3.0))
    s = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    loss = info_nce(x, y, s)
    loss.backward()
    assert torch.equal(loss.detach(), expected)
    assert torch.equal(info_nce(x, y, 3.0), expected)
    assert s.grad.shape == (1,)
    assert s.grad.dtype == torch.float64


def test_not_a_number_comes_out_as_one(backend: str) -> None:
    x, y = (t.float() for t in pairs(20, 4))
    x[3, 1] = math.nan
    assert info_nce(x, y, 3.0).isnan()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": torch.randn(4)}, ValueError, r"image must be \(batch, dim\).*\(4,\)"),
        ({"text": torch.randn(0, 8)}, ValueError, r"text must be .* not empty; got \(0, 8\)"),
        (
            {"image": torch.randn(4, 8).double()},
            TypeError,
            "image must be float32, float16 or bfloat16; got torch.float64",
        ),
        (
            {"text": torch.randn(4, 8).half()},
            TypeError,
            "text must have image's dtype torch.float32; got torch.float16",
        ),
        ({"text": torch.randn(4, 7)}, ValueError, r"text must have image's dim 8; got \(4, 7\)"),
        (
            {"text": torch.randn(3, 8)},
            ValueError,
            "label_offset .* each of the 4 images; got label_offset 0 with 3 rows",
        ),
        ({"label_offset": -1}, ValueError, "label_offset must be at least 0"),
        ({"label_offset": 1}, ValueError, "got label_offset 1 with 4 rows"),
        ({"scale": torch.tensor(3)}, TypeError, "scale must be floating point; got torch.int64"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must have one element; got \(2,\)"),
        ({"text": torch.randn(4, 8, device="meta")}, ValueError, "text must be on image's device cpu; got meta"),
        ({"scale": torch.ones((), device="meta")}, ValueError, "scale must be on image's device cpu; got meta"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"image": torch.randn(4, 8), "text": torch.randn(4, 8), "scale": torch.tensor(3.0), **change}
    with pytest.raises(error, match=f"^info_nce: .*{message}"):
        info_nce(**arguments)


@pytest.mark.parametrize("name", list(IMPLS))
def test_fifty_steps_follow_the_same_curve(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMFAST_BACKEND", name)

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


def test_memory_of_the_streamed_loss_is_linear(run_python) -> None:
    """N = 16384, D = 512: under 250 MB beyond the inputs, where the logits alone take 1 GB. In a process of its own."""
    if core is None:
        pytest.skip("the bound is of the C++ backend, which was not built")
    peak = run_python(
        """
        import torch
        from torch.nn import functional as F
        from vlmfast.ops import info_nce
        def memory(field):  # of this process alone: ru_maxrss starts from the peak of the process that forked it
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
        x, y = (F.normalize(torch.randn(16384, 512), dim=1).requires_grad_() for _ in range(2))
        info_nce(x[:256], y[:256], 20.0).backward()
        x.grad = y.grad = None
        before = memory("VmRSS")  # resident now, not the peak so far
        info_nce(x, y, 20.0, recompute=True).backward()
        print(memory("VmHWM") - before)
        """
    )
    assert float(peak) < 250


def test_explain_and_forced_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 8)
    reasons = vlmfast.explain("info_nce", x, x, 1.0)
    assert list(reasons) == list(IMPLS)
    assert reasons["torch"] is None
    assert vlmfast.explain("info_nce", x.to("meta"), x, 1.0)["cpu"] == "image is on meta" or core is None
    with pytest.raises(ValueError, match="op must be one of info_nce; got 'nce'"):
        vlmfast.explain("nce")
    monkeypatch.setenv("VLMFAST_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="triton: info_nce has no triton backend"):
        info_nce(x, x, 1.0)
    monkeypatch.setenv("VLMFAST_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"VLMFAST_BACKEND must be one of auto, .*; got 'fast'"):
        info_nce(x, x, 1.0)


@pytest.fixture
def bf16_schedule():
    """The schedule of processors that multiply bfloat16, its products on widened copies where this one does not."""
    if core is None:
        pytest.skip("the C++ extension was not built")
    core.force_bf16_schedule(True)
    yield
    core.force_bf16_schedule(False)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (2, 1), (127, 3), (128, 64), (129, 589), (300, 768)])
def test_bfloat16_products(bf16_schedule, rows: int, dim: int, recompute: bool) -> None:
    check(*pairs(rows, dim), 20.0, torch.bfloat16, recompute=recompute)
    check(*pairs(rows, dim, noise=0.5), 100.0, torch.bfloat16, recompute=recompute)


def test_bfloat16_products_of_strided_features(bf16_schedule) -> None:
    x, y = torch.randn(64, 128).bfloat16().T, torch.randn(128, 128).bfloat16()[:, ::2]
    strided = loss_and_gradients(info_nce, (x, y, torch.tensor(3.0)))
    contiguous = loss_and_gradients(info_nce, (x.contiguous(), y.contiguous(), torch.tensor(3.0)))
    assert all(torch.equal(a, b) for a, b in zip(strided, contiguous, strict=True))


def test_bfloat16_products_of_a_rectangle(bf16_schedule) -> None:
    for bidirectional in (False, True):
        image, text = unit(160, 48), unit(300, 48)
        check(image, text, 30.0, torch.bfloat16, label_offset=5, bidirectional=bidirectional)


def test_bfloat16_schedule_rounds_the_gradient_tile(bf16_schedule) -> None:
    """It is taken at all: its gradients differ from the float32 schedule's, within bfloat16's rounding."""
    image, text = (t.bfloat16().requires_grad_() for t in pairs(200, 64))
    forced = torch.autograd.grad(info_nce(image, text, 20.0), image)[0].float()
    core.force_bf16_schedule(False)
    plain = torch.autograd.grad(info_nce(image, text, 20.0), image)[0].float()
    assert core.build_info()["bf16_products"] or not torch.equal(forced, plain)
    torch.testing.assert_close(forced, plain, rtol=2e-2, atol=1e-2 * plain.abs().max().item())


@pytest.mark.parametrize(("budget", "kept"), [(64 * 64 * 4, True), (64 * 64 * 4 - 1, False)])
def test_the_budget_decides_what_is_kept(budget: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vlmfast.ops.info_nce"], "STORE_BUDGET_BYTES", budget)
    loss = info_nce(torch.randn(64, 8, requires_grad=True), torch.randn(64, 8), 3.0)
    shapes = [t.shape for t in loss.grad_fn.saved_tensors]
    assert (torch.Size([64, 64]) in shapes) == kept
