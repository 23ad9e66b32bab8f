from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from contrastive import FIXED_POINT, FLOAT32, pairs, unit
from contrastive import check_info_nce as check
from numerics import loss_and_gradients
from torch import Tensor

from vlmfast.ops import info_nce, sigmoid_loss
from vlmfast.ops._dispatch import core
from vlmfast.ops.info_nce import reference

pytestmark = pytest.mark.skipif(core is None, reason="the C++ extension was not built")


def test_more_threads_change_only_roundings() -> None:
    """Tiles' columns depend on the number of threads; what is kept from forward for backward must not."""
    image, text = (t.float() for t in pairs(700, 64, noise=1.0))
    threads = torch.get_num_threads()
    results = []
    try:
        for forward, backward in ((1, 1), (2, 2), (3, 3), (8, 8), (1, 2), (2, 1)):
            inputs = [t.clone().requires_grad_() for t in (image, text, torch.tensor(40.0))]
            torch.set_num_threads(forward)
            loss = info_nce(*inputs)
            torch.set_num_threads(backward)
            results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_memory_of_the_streamed_loss_is_linear(run_python) -> None:
    """N = 16384, D = 64: under 190 MB beyond the inputs, where the logits alone take 1 GB. In a process of its own."""
    peak = run_python(
        """
        import torch
        from torch.nn import functional as F
        from vlmfast.ops import info_nce, sigmoid_loss
        def memory(field):  # of this process alone: ru_maxrss starts from the peak of the process that forked it
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
        x, y = (F.normalize(torch.randn(16384, 64), dim=1).requires_grad_() for _ in range(2))
        info_nce(x[:256], y[:256], 20.0).backward()
        x.grad = y.grad = None
        before = memory("VmRSS")  # resident now, not the peak so far
        info_nce(x, y, 20.0, recompute=True).backward()
        print(memory("VmHWM") - before)
        """
    )
    assert float(peak) < 190


SCHEDULES = {
    "bfloat16": torch.bfloat16,  # as on processors that multiply it
    "brgemm": torch.bfloat16,  # with oneDNN's products, as where there is AMX
    "int16": torch.float16,  # fixed point, as with AVX-512 VNNI or AVX2
    "int16 of bfloat16": torch.bfloat16,  # as where there is AVX2 and no AVX-512
}
Half = tuple[torch.dtype, float]


@contextmanager
def forced(schedule: str) -> Iterator[None]:
    core.force_schedule(schedule)
    try:
        yield
    finally:
        core.force_schedule("")


@pytest.fixture(params=SCHEDULES)
def half(request: pytest.FixtureRequest) -> Iterator[Half]:
    """A dtype of 16 bits with each schedule that some processor takes for it, and what that rounds dot products by."""
    schedule = request.param.split()[0]
    with forced(schedule):
        yield SCHEDULES[request.param], FIXED_POINT if schedule == "int16" else FLOAT32


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (2, 1), (127, 3), (128, 64), (129, 589), (300, 768)])
def test_products_of_16_bits(half: Half, rows: int, dim: int, recompute: bool) -> None:
    dtype, dots = half
    check(*pairs(rows, dim), 20.0, dtype, recompute=recompute, dots=dots)
    check(*pairs(rows, dim, noise=0.5), 100.0, dtype, recompute=recompute, dots=dots)


def test_products_of_16_bits_of_strided_features(half: Half) -> None:
    x, y = torch.randn(64, 128).to(half[0]).T, torch.randn(128, 128).to(half[0])[:, ::2]
    strided = loss_and_gradients(info_nce, (x, y, torch.tensor(3.0)))
    contiguous = loss_and_gradients(info_nce, (x.contiguous(), y.contiguous(), torch.tensor(3.0)))
    assert all(torch.equal(a, b) for a, b in zip(strided, contiguous, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_frozen_side_in_16_bits(half: Half, recompute: bool) -> None:
    """What only the other side's gradient reads is not made; this side's is the same to the bit."""
    image, text = (t.to(half[0]).requires_grad_() for t in pairs(150, 48))
    both = torch.autograd.grad(info_nce(image, text, 20.0, recompute=recompute), (image, text))
    for x, y, leaf, expected in ((image, text.detach(), image, both[0]), (image.detach(), text, text, both[1])):
        assert torch.equal(torch.autograd.grad(info_nce(x, y, 20.0, recompute=recompute), leaf)[0], expected)


def test_products_of_16_bits_of_a_rectangle(half: Half) -> None:
    for bidirectional in (False, True):
        image, text = unit(160, 48), unit(300, 48)
        check(image, text, 30.0, half[0], label_offset=5, bidirectional=bidirectional, dots=half[1])


def test_schedule_of_16_bits_rounds_the_gradient_tile(half: Half) -> None:
    """It is taken at all: its gradients differ from the float32 schedule's, within the dtype's rounding."""
    image, text = pairs(200, 64)
    # Exact in every schedule, but for the steps of int16.
    image, text = ((t.float() * 64).round().div(64).requires_grad_() for t in (image, text))
    plain = torch.autograd.grad(info_nce(image, text, 20.0), image)[0]
    rounded = torch.autograd.grad(info_nce(image.to(half[0]), text.to(half[0]), 20.0), image)[0]
    assert not torch.equal(rounded, plain.to(half[0]).float())
    torch.testing.assert_close(rounded, plain, rtol=2e-2, atol=1e-2 * plain.abs().max().item())


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_fixed_point_is_as_exact_as_the_dtype(dtype: torch.dtype, rounding: float) -> None:
    """Lengths from 0.2 to 5, one of them 0, most texts the same but for theirs: sums neither overflow nor lose
    the small; the gradients are off by no more than twice what rounding them to the dtype is."""
    image, text = pairs(600, 96)
    text[:500] = text[0]
    lengths = torch.logspace(-0.7, 0.7, 600, dtype=torch.float64)[:, None]
    image, text = image / lengths, text * lengths
    image[7] = 0
    image, text = image.to(dtype), text.to(dtype)
    inputs = [t.double().requires_grad_() for t in (image, text)]
    exact = torch.autograd.grad(reference(*inputs, torch.tensor(1.0).double()), inputs)
    leaves = [t.clone().requires_grad_() for t in (image, text)]
    with forced("int16"):
        found = torch.autograd.grad(info_nce(*leaves, 1.0) * 256, leaves)  # else float16 has no room for the small ones
    for ours, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double() / 256, truth, rtol=0, atol=2 * rounding * truth.abs().max().item())


def test_fixed_point_passes_on_what_is_not_finite() -> None:
    for value in (float("nan"), float("inf")):
        image, text = (t.half() for t in pairs(40, 16))
        image[3, 2] = value
        with forced("int16"):
            assert not info_nce(image, text, 10.0).isfinite()


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """PyTorch's deterministic mode fills what `empty` returns."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("single", [False, True])
def test_no_memory_is_read_before_it_is_written(half: Half, fresh_memory_is_nan, threads: int, single: bool) -> None:
    dtype = torch.float32 if single else half[0]
    image, text = (t.to(dtype).requires_grad_() for t in (unit(131, 33), unit(205, 33)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for loss in (
            info_nce(image, text, 20.0, recompute=False),
            info_nce(image, text, 20.0, recompute=True),
            sigmoid_loss(image, text, 10.0, -10.0),
        ):
            assert all(t.isfinite().all() for t in (loss, *torch.autograd.grad(loss, (image, text))))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_as_many_threads_as_torch(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert core.build_info()["threads"] == threads
    finally:
        torch.set_num_threads(before)


def test_what_is_kept_serves_again_only_when_nobody_holds_it() -> None:
    image, text = (t.float().requires_grad_() for t in pairs(200, 16))
    other = pairs(200, 16)[0].float()

    def kept(loss: Tensor) -> Tensor:
        return next(t for t in loss.grad_fn.saved_tensors if t is not None and t.shape == (200, 200))

    first = info_nce(image, text, 20.0, recompute=False)
    expected = torch.autograd.grad(first, image, retain_graph=True)[0]
    second = info_nce(image, other, 20.0, recompute=False)
    assert kept(first).data_ptr() != kept(second).data_ptr()
    assert torch.equal(torch.autograd.grad(first, image)[0], expected)
    place = kept(second).data_ptr()
    del second
    assert kept(info_nce(image, text, 20.0, recompute=False)).data_ptr() == place
