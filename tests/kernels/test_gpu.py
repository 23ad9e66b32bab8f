"""The ops on a real GPU: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from contrastive import pairs
from media import any_media, last_media, qkv
from torch import Tensor

import vlmfast
from vlmfast import doctor, ops
from vlmfast.ops import info_nce, sigmoid_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
# Largest error of a gradient entry relative to the largest: float16 operands, or split ones for float32 features.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
SHAPES = [(1, 64), (127, 3), (300, 588), (1000, 768), (5000, 512)]


def check(op: str, leaves: dict[str, Tensor], dtype: torch.dtype, *before: Tensor, **options: object) -> None:
    """Output and gradients against float64, and both again bit for bit."""
    on_gpu = {name: t.cuda() for name, t in leaves.items()}
    problem = doctor.Problem(on_gpu, 0.0, (), 0.0, 0.0, options, before)
    found, again = (doctor.results(getattr(ops, op), problem) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    exact = doctor.results(doctor.reference(op), problem, torch.float64)
    for name, a, b in zip(("output", *leaves), found, exact, strict=True):
        assert (a.double() - b).abs().max() <= TOLERANCE[dtype] * b.abs().max() + 1e-7, name


def check_loss(op: str, rows: int, dim: int, dtype: torch.dtype, scalars: dict[str, float], **options: object) -> None:
    image, text = (t.to(dtype) for t in pairs(rows, dim, noise=1.0))
    leaves = {"image": image, "text": text, **{name: torch.tensor(value) for name, value in scalars.items()}}
    check(op, leaves, dtype, **options)


def over(*names: str) -> pytest.MarkDecorator:
    """A test's `backend` is each of these ops', all ops' where none is named."""
    impls = doctor.implementations()
    every = [(op, backend) for op in names or impls for backend in impls[op]]
    return pytest.mark.parametrize("backend", every, ids=["-".join(one) for one in every], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Forces the backend of an op, or skips with its reason."""
    op, name = request.param
    if reason := doctor.reasons("cuda")[op][name]:
        pytest.skip(reason)
    monkeypatch.setenv("VLMFAST_BACKEND", name)
    return op, name


@over()
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_what_doctor_checks(backend: tuple[str, str], dtype: torch.dtype) -> None:
    row = doctor.check(*backend, dtype, "cuda")
    assert row["passed"], row["failures"]


@over("info_nce")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_info_nce(backend: tuple[str, str], rows: int, dim: int, dtype: torch.dtype) -> None:
    check_loss("info_nce", rows, dim, dtype, {"scale": 20.0})
    if rows > 1:
        check_loss("info_nce", rows, dim, dtype, {"scale": 20.0}, exclude_positive=True)


@over("sigmoid_loss")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_sigmoid_loss(backend: tuple[str, str], rows: int, dim: int, dtype: torch.dtype) -> None:
    check_loss("sigmoid_loss", rows, dim, dtype, {"scale": 10.0, "bias": -10.0})


@over("patch_embed")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("patch", "kept"), [(16, None), (14, None), (14, 100), (32, 20)])
def test_patch_embed(backend: tuple[str, str], patch: int, kept: int | None, layout: str, dtype: torch.dtype) -> None:
    shape, n = ((32, 3, 224, 224) if layout == "NCHW" else (32, 224, 224, 3)), (224 // patch) ** 2
    pixels = torch.randint(0, 256, shape, device="cuda").byte()
    keep = None if kept is None else torch.randint(n, (32, kept), device="cuda")
    shapes = {"weight": (768, 3, patch, patch), "bias": (768,), "prefix": (2, 768), "position": (n + 2, 768)}
    leaves = {name: (torch.randn(shape) / 10).to(dtype) for name, shape in shapes.items()}
    check("patch_embed", leaves, dtype, pixels, layout=layout, keep=keep, mean=(0.5,) * 3, std=(0.25,) * 3)


@over("media_attention")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("empty", ["zero", "all"])
@pytest.mark.parametrize(("dim", "group", "tokens"), [(32, 1, 64), (64, 4, 37), (128, 2, 65), (96, 1, 64), (40, 2, 5)])
def test_media_attention(
    backend: tuple[str, str], dim: int, group: int, tokens: int, empty: str, dtype: torch.dtype
) -> None:
    leaves = {n: t.to(dtype) for n, t in zip("qkv", qkv(2, 4, 4 // group, 300, 5 * tokens, dim), strict=True)}
    if reason := vlmfast.explain("media_attention", *(t.cuda() for t in leaves.values()))[backend[1]]:
        pytest.skip(reason)
    lengths = torch.randint(0, tokens + 1, (2, 5)).cuda()
    for intervals in (last_media(2, 300, 5), any_media(2, 300, 5)):
        on_gpu = {name: t.cuda() for name, t in intervals.items()}
        check("media_attention", leaves, dtype, tokens_per_media=tokens, media_len=lengths, empty=empty, **on_gpu)


@over("gated_residual")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("channels", [1, 588])
def test_gated_residual(backend: tuple[str, str], channels: int, dtype: torch.dtype) -> None:
    shapes = {"residual": (2, 500, 588), "hidden": (2, 500, 588), "gate": (channels,)}
    leaves = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    check("gated_residual", leaves, dtype, row_mask=(torch.rand(2, 500) < 0.5).cuda())


def test_triton_is_what_runs() -> None:
    x = torch.randn(8, 8, device="cuda")
    for op in ("info_nce", "patch_embed", "sigmoid_loss"):
        assert vlmfast.explain(op, x)["triton"] is None
    assert vlmfast.explain("gated_residual", x, x, x)["triton"] is None
    assert vlmfast.explain("media_attention", *[x.view(1, 1, 8, 8)] * 3)["triton"] is None


@over("info_nce")
@pytest.mark.parametrize("scale", [50.0, 400.0])
def test_a_step_can_be_captured_in_a_cuda_graph(backend: tuple[str, str], scale: float) -> None:
    """No synchronisation and no allocation outside of torch's: also where rows are redone with a running maximum."""
    if backend[1] == "torch":
        pytest.skip("PyTorch ops may ask the device")
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
