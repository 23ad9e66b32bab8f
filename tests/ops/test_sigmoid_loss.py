from __future__ import annotations

import sys

import contrastive
import pytest
import torch
from backends import use_backend
from contrastive import FIXED_POINT, pairs, rounding_of_dots, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import loss_and_gradients
from torch import Tensor
from torch.nn import functional as F

import vlmfast
from vlmfast.ops import sigmoid_loss
from vlmfast.ops._dispatch import core
from vlmfast.ops.sigmoid_loss import IMPLS, reference


@pytest.fixture(params=list(IMPLS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_backend(monkeypatch, IMPLS, request.param)
    return request.param


def check(
    image: Tensor, text: Tensor, scale: float, bias: float, dtype: torch.dtype = torch.float32, **options: object
) -> None:
    contrastive.check(
        lambda x, y, s, b: sigmoid_loss(x, y, s, b, **options),
        lambda x, y, s, b: reference(x, y, s, b, **options),
        image, text, scale, bias, dtype=dtype, terms=len(text),
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (2, 1), (191, 3), (192, 64), (193, 588), (127, 1152), (400, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(backend: str, rows: int, dim: int, dtype: torch.dtype) -> None:
    if backend == "triton":  # a second block that is hardly begun shows in its interpreter what more would
        rows, dim = min(rows, 130), min(dim, 100)
    check(*pairs(rows, dim), 10.0, -10.0, dtype)


@pytest.mark.parametrize("bias", [-10.0, 0.0, 3.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 100.0, 1e3])
def test_scales_and_biases(backend: str, scale: float, bias: float) -> None:
    rows = 66 if backend == "triton" else 260
    check(*pairs(rows, 64), scale, bias)
    check(*pairs(rows, 64, noise=0.5), scale, bias)


def test_large_norms(backend: str) -> None:
    check(*(20 * t for t in pairs(200, 32)), 100.0, -10.0)


@pytest.mark.parametrize("label_offset", [0, 5, 140, 250, -100, 300, -160])
def test_rectangles_and_positives_outside(backend: str, label_offset: int) -> None:
    check(unit(160, 48), unit(300, 48), 10.0, -5.0, label_offset=label_offset)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64, torch.uint8])
def test_groups(backend: str, kind: torch.dtype) -> None:
    ids = torch.randint(0, 40, (160,)).to(kind), torch.randint(20, 60, (300,)).to(kind)
    check(unit(160, 48), unit(300, 48), 10.0, -5.0, groups=ids)


def test_relative_accuracy_of_small_losses(backend: str) -> None:
    """All pairs told apart: a loss of 1e-7 a pair that float32's softplus would round to nothing."""
    image = torch.eye(64, dtype=torch.float64)
    exact = reference(image, image, torch.tensor(40.0).double(), torch.tensor(-20.0).double())
    ours = sigmoid_loss(image.float(), image.float(), 40.0, -20.0)
    assert exact < 2e-7
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)


def test_equals_open_clip_and_transformers(backend: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    image, text = pairs(100, 32, noise=2.0)
    inputs = (image.float(), text.float(), torch.tensor(12.0), torch.tensor(-9.0))
    ours = loss_and_gradients(sigmoid_loss, inputs)

    def siglip(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
        """transformers' SiglipModel.forward."""
        logits = y @ x.T * s + b
        signs = -torch.ones_like(logits) + 2 * torch.eye(len(x))
        return -F.logsigmoid(signs * logits).sum(-1).mean()

    for theirs in (lambda x, y, s, b: open_clip.loss.SigLipLoss()(x, y, s, b), siglip):
        for got, want in zip(ours, loss_and_gradients(theirs, inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(IMPLS))
def test_properties(name: str) -> None:
    examples, most = (3, 150) if name == "triton" else (20, 250)  # its interpreter is slow
    limits = {"rows": st.integers(2, most), "dim": st.integers(1, 40), "scale": st.floats(0.01, 120)}
    check = settings(max_examples=examples, deadline=None)(given(**limits, seed=st.integers(0, 1000))(_properties))
    check(name=name)


def _properties(name: str, rows: int, dim: int, scale: float, seed: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_backend(monkeypatch, IMPLS, name)
        torch.manual_seed(seed)
        image, text = (t.float() for t in pairs(rows, dim))
        s, b = torch.tensor(scale), torch.tensor(-scale / 2)
        loss, dx, dy, ds, db = loss_and_gradients(sigmoid_loss, (image, text, s, b))
        close = {"rtol": 1e-4, "atol": 1e-5 * max(1.0, scale)}

        order = torch.randperm(rows)
        permuted = loss_and_gradients(sigmoid_loss, (image[order], text[order], s, b))
        for got, want in zip(permuted, (loss, dx[order], dy[order], ds, db), strict=True):
            torch.testing.assert_close(got, want, **close)
        swapped = loss_and_gradients(sigmoid_loss, (text, image, s, b))
        for got, want in zip(swapped, (loss, dy, dx, ds, db), strict=True):
            torch.testing.assert_close(got, want, **close)
        torch.testing.assert_close((dx * image).sum(), s.double() * ds, **close)
        torch.testing.assert_close((dy * text).sum(), s.double() * ds, **close)
        again = loss_and_gradients(sigmoid_loss, (image, text, s, b))
        assert all(torch.equal(p, q) for p, q in zip((loss, dx, dy, ds, db), again, strict=True))


@pytest.mark.parametrize(
    "wanted", [(True, False, False, False), (False, True, False, False), (False, False, True, True)]
)
def test_frozen_inputs_get_no_gradient(backend: str, wanted: tuple[bool, ...]) -> None:
    values = [*(t.float() for t in pairs(140, 16)), torch.tensor(9.0), torch.tensor(-4.0)]
    full = loss_and_gradients(sigmoid_loss, values)[1:]
    leaves = [t.clone().requires_grad_(flag) for t, flag in zip(values, wanted, strict=True)]
    loss = sigmoid_loss(*leaves)
    frozen = [t.shape == (0, 16) for t in loss.grad_fn.saved_tensors[4:6]]
    assert frozen == [not flag for flag in wanted[:2]]  # its product was not computed either
    loss.backward()
    for leaf, flag, gradient in zip(leaves, wanted, full, strict=True):
        assert (leaf.grad is not None) == flag
        if flag:
            torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-5, atol=1e-7)


def test_gradients_of_float16_survive_a_scaled_loss(backend: str) -> None:
    """What is saved for backward is float32: gradients of 1e-8 come back once a GradScaler has multiplied them."""
    x, y = (t.half().requires_grad_() for t in pairs(300, 64))
    (sigmoid_loss(x, y, 1e-2, -12.0) * 2.0**16).backward()
    exact = loss_and_gradients(reference, (x, y, torch.tensor(1e-2), torch.tensor(-12.0)), [torch.float64] * 4)
    expected = exact[1] * 2.0**16
    # Fixed point leaves float16's rounding of the largest.
    fixed_point = rounding_of_dots(backend, torch.float16) == FIXED_POINT
    lost = 2.0**-11 * expected.abs().max().item() if fixed_point else 1e-6
    torch.testing.assert_close(x.grad.double(), expected, rtol=2e-3, atol=lost)


def test_gradcheck_of_the_reference() -> None:
    x, y = (t.requires_grad_() for t in (unit(5, 3), unit(7, 3)))
    s, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (4.0, -2.0))
    assert torch.autograd.gradcheck(lambda *t: reference(*t, label_offset=1), (x, y, s, b))
    ids = torch.tensor([0, 1, 1, 2, 9]), torch.tensor([1, 0, 1, 2, 2, 8, 8])
    assert torch.autograd.gradcheck(lambda *t: reference(*t, groups=ids), (x, y, s, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    x, y = (t.to(dtype).requires_grad_() for t in pairs(20, 6))
    s, b = torch.tensor(4.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    codes = (torch.arange(20).int() % 4, torch.arange(20).int() % 5)
    for arguments in ((x, y, s, b, None, None, 0, True, True), (x, y.detach(), s, b, *codes, 0, True, False)):
        torch.library.opcheck(torch.ops.vlmfast.sigmoid_loss_forward.default, arguments)


def test_compile_as_one_opaque_op(backend: str) -> None:
    x, y = (t.float() for t in pairs(33, 8))

    def step(a: Tensor, b: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
        return sigmoid_loss(F.normalize(a, dim=1), F.normalize(b, dim=1), log_scale.exp(), bias) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (33, 20):
        part = (x[:rows], y[:rows], torch.tensor(2.0), torch.tensor(-3.0))
        for a, b in zip(loss_and_gradients(compiled, part), loss_and_gradients(step, part), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_autocast_and_no_grad_change_nothing(backend: str) -> None:
    x, y = (t.float() for t in pairs(40, 8))
    outside = sigmoid_loss(x, y, 10.0, -10.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sigmoid_loss(x, y, 10.0, -10.0), outside)
    with torch.no_grad():
        assert torch.equal(sigmoid_loss(x.requires_grad_(), y, 10.0, -10.0), outside)


def test_a_second_derivative_raises(backend: str) -> None:
    x, y = (t.float().requires_grad_() for t in pairs(6, 4))
    (gradient,) = torch.autograd.grad(sigmoid_loss(x, y, 3.0, -1.0), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()
    s = torch.tensor(3.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(sigmoid_loss(x, y, s, -1.0), s, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.backward()


def test_not_a_number_comes_out_as_one(backend: str) -> None:
    x, y = (t.float() for t in pairs(20, 4))
    x[3, 1] = torch.nan
    assert sigmoid_loss(x, y, 3.0, 0.0).isnan()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": torch.randn(4)}, ValueError, r"image must be \(batch, dim\).*\(4,\)"),
        (
            {"text": torch.randn(4, 8).half()},
            TypeError,
            "text must have image's dtype torch.float32; got torch.float16",
        ),
        ({"text": torch.randn(4, 7)}, ValueError, r"text must have image's dim 8; got \(4, 7\)"),
        ({"text": torch.randn(0, 8)}, ValueError, r"text must be .* not empty; got \(0, 8\)"),
        ({"image": torch.randn(4, 8).double()}, TypeError, "image must be float32, float16 or bfloat16; got torch.f"),
        ({"text": torch.randn(4, 8, device="meta")}, ValueError, "text must be on image's device cpu; got meta"),
        ({"groups": torch.arange(4)}, TypeError, r"groups must be \(row_ids, col_ids\); got Tensor"),
        (
            {"groups": (torch.rand(4), torch.arange(4))},
            TypeError,
            "groups row_ids must be an integer tensor; got torch",
        ),
        ({"groups": (torch.arange(4), torch.arange(5))}, ValueError, r"groups col_ids must be \(4,\); got \(5,\)"),
        ({"bias": torch.tensor(3)}, TypeError, "bias must be floating point; got torch.int64"),
        ({"bias": torch.ones(2)}, ValueError, r"bias must have one element; got \(2,\)"),
        ({"scale": torch.ones((), device="meta")}, ValueError, "scale must be on image's device cpu; got meta"),
        (
            {"groups": (torch.arange(4), torch.arange(4)), "label_offset": 2},
            ValueError,
            "groups cannot be combined with label_offset; got 2",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"image": torch.randn(4, 8), "text": torch.randn(4, 8), "scale": 3.0, "bias": -1.0, **change}
    with pytest.raises(error, match=f"^sigmoid_loss: .*{message}"):
        sigmoid_loss(**arguments)


@pytest.mark.parametrize("options", [{"label_offset": 9}, {"groups": (torch.arange(37) % 5, torch.arange(53) % 7)}])
def test_the_torch_backend_in_chunks(monkeypatch: pytest.MonkeyPatch, options: dict[str, object]) -> None:
    """Rows by tens, the last chunk shorter."""
    monkeypatch.setenv("VLMFAST_BACKEND", "torch")
    monkeypatch.setattr(sys.modules["vlmfast.ops.sigmoid_loss"], "CHUNK_ELEMENTS", 10 * 53)
    check(unit(37, 8), unit(53, 8), 10.0, -5.0, **options)


def test_equals_the_loss_inside_siglip_of_transformers(backend: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        text_config={**sizes, "vocab_size": 20, "max_position_embeddings": 4, "projection_size": 16},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
    )
    model = transformers.SiglipModel(config).eval()
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    out = model(torch.randint(20, (9, 4)), torch.randn(9, 3, 8, 8), return_loss=True)
    ours = sigmoid_loss(out.image_embeds, out.text_embeds, model.logit_scale.exp(), model.logit_bias)
    torch.testing.assert_close(ours, out.loss, rtol=1e-6, atol=1e-6)
    parameters = (model.logit_scale, model.logit_bias, model.vision_model.embeddings.patch_embedding.weight)
    for got, want in zip(
        torch.autograd.grad(ours, parameters, retain_graph=True), torch.autograd.grad(out.loss, parameters), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_forced_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMFAST_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="VLMFAST_BACKEND cannot run: cuda: "):
        sigmoid_loss(torch.randn(4, 8), torch.randn(4, 8), 1.0, 0.0)


def test_explain() -> None:
    x = torch.randn(4, 8)
    reasons = vlmfast.explain("sigmoid_loss", x, x, 1.0, 0.0)
    assert list(reasons) == list(IMPLS)
    assert reasons["torch"] is None
    assert (reasons["cpu"] is None) == (core is not None)
