"""The losses on a real GPU: `pytest -m gpu`. Nothing here has run yet on one (see the README)."""

from __future__ import annotations

import pytest
import torch
from contrastive import pairs
from numerics import loss_and_gradients
from torch import Tensor

import vlmfast
from vlmfast.ops import info_nce, sigmoid_loss
from vlmfast.ops.info_nce import reference as info_nce_reference
from vlmfast.ops.sigmoid_loss import reference as sigmoid_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
# Largest error of a gradient entry relative to the largest: float16 operands, or split ones for float32 features.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
SHAPES = [(1, 64), (127, 3), (300, 588), (1000, 768), (5000, 512)]


def check(ours, reference, rows: int, dim: int, dtype: torch.dtype, scalars: tuple[float, ...], **options) -> None:
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
    check(info_nce, info_nce_reference, rows, dim, dtype, (20.0,))
    if rows > 1:
        check(info_nce, info_nce_reference, rows, dim, dtype, (20.0,), exclude_positive=True)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_sigmoid_loss(backend: str, rows: int, dim: int, dtype: torch.dtype) -> None:
    check(sigmoid_loss, sigmoid_reference, rows, dim, dtype, (10.0, -10.0))


def test_triton_is_what_runs() -> None:
    x = torch.randn(8, 8, device="cuda")
    for op in ("info_nce", "sigmoid_loss"):
        assert vlmfast.explain(op, x)["triton"] is None


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
