"""The ops on a real GPU: `pytest -m gpu`. Nothing here has run yet on one (see the README)."""

from __future__ import annotations

import pytest
import torch
from contrastive import pairs
from media import any_media, last_media, qkv
from numerics import loss_and_gradients
from torch import Tensor

import vlmfast
from vlmfast.ops import gated_residual, info_nce, media_attention, patch_embed, sigmoid_loss
from vlmfast.ops.gated_residual import reference as gated_residual_reference
from vlmfast.ops.info_nce import reference as info_nce_reference
from vlmfast.ops.media_attention import reference as media_attention_reference
from vlmfast.ops.patch_embed import reference as patch_embed_reference
from vlmfast.ops.sigmoid_loss import reference as sigmoid_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
# Largest error of a gradient entry relative to the largest: float16 operands, or split ones for float32 features.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
SHAPES = [(1, 64), (127, 3), (300, 588), (1000, 768), (5000, 512)]


def check_loss(ours, reference, rows: int, dim: int, dtype: torch.dtype, scalars: tuple[float, ...], **options) -> None:
    image, text = (t.to(dtype).cuda() for t in pairs(rows, dim, noise=1.0))
    inputs: tuple[Tensor, ...] = (image, text, *(torch.tensor(v, device="cuda") for v in scalars))
    exact = loss_and_gradients(lambda *t: reference(*t, **options), inputs, [torch.float64] * len(inputs))
    found = loss_and_gradients(lambda *t: ours(*t, **options), inputs)
    for k, (a, b) in enumerate(zip(found, exact, strict=True)):
        assert (a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max() + 1e-7, f"output {k}"
    again = loss_and_gradients(lambda *t: ours(*t, **options), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VLMFAST_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_info_nce(backend: str, rows: int, dim: int, dtype: torch.dtype) -> None:
    check_loss(info_nce, info_nce_reference, rows, dim, dtype, (20.0,))
    if rows > 1:
        check_loss(info_nce, info_nce_reference, rows, dim, dtype, (20.0,), exclude_positive=True)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_sigmoid_loss(backend: str, rows: int, dim: int, dtype: torch.dtype) -> None:
    check_loss(sigmoid_loss, sigmoid_reference, rows, dim, dtype, (10.0, -10.0))


def tokens_and_gradients(op, pixels: Tensor, inputs: tuple[Tensor, ...], **options) -> list[Tensor]:
    weight, bias, prefix, position = leaves = [t.detach().requires_grad_() for t in inputs]
    tokens = op(pixels, weight, bias, prefix=prefix, position=position, mean=(0.5,) * 3, std=(0.25,) * 3, **options)
    generator = torch.Generator("cuda").manual_seed(0)
    cotangent = torch.randn(tokens.shape, generator=generator, device="cuda")
    return [t.double() for t in (tokens.detach(), *torch.autograd.grad(tokens, leaves, cotangent.to(tokens.dtype)))]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("patch", "kept"), [(16, None), (14, None), (14, 100), (32, 20)])
def test_patch_embed(backend: str, patch: int, kept: int | None, layout: str, dtype: torch.dtype) -> None:
    shape, n = ((32, 3, 224, 224) if layout == "NCHW" else (32, 224, 224, 3)), (224 // patch) ** 2
    pixels = torch.randint(0, 256, shape, device="cuda").byte()
    keep = None if kept is None else torch.randint(n, (32, kept), device="cuda")
    shapes = ((768, 3, patch, patch), (768,), (2, 768), (n + 2, 768))
    inputs = tuple((torch.randn(shape, device="cuda") / 10).to(dtype) for shape in shapes)
    options = {"layout": layout, "keep": keep}
    found = tokens_and_gradients(patch_embed, pixels, inputs, **options)
    doubles = tuple(t.double() for t in inputs)
    exact = tokens_and_gradients(patch_embed_reference, pixels, doubles, **options)
    for k, (a, b) in enumerate(zip(found, exact, strict=True)):
        assert (a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max(), f"output {k}"
    again = tokens_and_gradients(patch_embed, pixels, inputs, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def check_op(op, reference, inputs: tuple[Tensor, ...], dtype: torch.dtype, **options) -> None:
    """Output and gradients, and both again bit for bit."""
    inputs = tuple(t.to(dtype).cuda() for t in inputs)

    def results(function, leaves: tuple[Tensor, ...]) -> list[Tensor]:
        leaves = tuple(t.detach().requires_grad_() for t in leaves)
        out = function(*leaves, **options)
        cotangent = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
        gradients = torch.autograd.grad(out, leaves, cotangent.to(out.dtype))
        return [t.double() for t in (out.detach(), *gradients)]

    found, again = results(op, inputs), results(op, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for k, (a, b) in enumerate(zip(found, results(reference, tuple(t.double() for t in inputs)), strict=True)):
        assert (a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max() + 1e-7, f"output {k}"


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("empty", ["zero", "all"])
@pytest.mark.parametrize(("dim", "group", "tokens"), [(32, 1, 64), (64, 4, 37), (128, 2, 65), (96, 1, 64), (40, 2, 5)])
def test_media_attention(backend: str, dim: int, group: int, tokens: int, empty: str, dtype: torch.dtype) -> None:
    inputs = qkv(2, 4, 4 // group, 300, 5 * tokens, dim)
    lengths = torch.randint(0, tokens + 1, (2, 5)).cuda()
    for intervals in (last_media(2, 300, 5), any_media(2, 300, 5)):
        on_gpu = {name: t.cuda() for name, t in intervals.items()}
        options = {"tokens_per_media": tokens, "media_len": lengths, "empty": empty, **on_gpu}
        check_op(media_attention, media_attention_reference, inputs, dtype, **options)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("channels", [1, 588])
def test_gated_residual(backend: str, channels: int, dtype: torch.dtype) -> None:
    inputs = (torch.randn(2, 500, 588), torch.randn(2, 500, 588), torch.randn(channels))
    mask = (torch.rand(2, 500) < 0.5).cuda()
    check_op(gated_residual, gated_residual_reference, inputs, dtype, row_mask=mask)


def test_triton_is_what_runs() -> None:
    x = torch.randn(8, 8, device="cuda")
    for op in ("info_nce", "patch_embed", "sigmoid_loss"):
        assert vlmfast.explain(op, x)["triton"] is None
    assert vlmfast.explain("gated_residual", x, x, x)["triton"] is None
    assert vlmfast.explain("media_attention", *[x.view(1, 1, 8, 8)] * 3)["triton"] is None


@pytest.mark.parametrize("scale", [50.0, 400.0])
def test_a_step_can_be_captured_in_a_cuda_graph(scale: float) -> None:
    """No synchronisation and no allocation outside of torch's: also where rows are redone with a running maximum."""
    image, text = (t.half().cuda().requires_grad_() for t in pairs(3000, 256))
    s = torch.tensor(scale, device="cuda", requires_grad=True)

    def step() -> tuple[Tensor, ...]:
        loss = info_nce(image, text, s) + sigmoid_loss(image, text, s, torch.zeros((), device="cuda"))
        return (loss.detach(), *torch.autograd.grad(loss, (image, text, s)))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = [t.clone() for t in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)
