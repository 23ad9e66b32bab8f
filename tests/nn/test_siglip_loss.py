from __future__ import annotations

import itertools

import pytest
import torch
from contrastive import check, pairs
from processes import as_one_process, divisors, exchange, run_processes
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from vlmfast.nn import SigLipLoss

open_clip_loss = pytest.importorskip("open_clip.loss")


def tight(t: Tensor) -> dict[str, float]:
    """Of features in float64; scale and bias are in float32, and their gradients rounded to it."""
    return {"rtol": 1e-12, "atol": 1e-14} if t.dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}


def unit(rows: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1)


def gradients(loss_module: nn.Module, image: Tensor, text: Tensor, weight: float = 1.0) -> list[Tensor]:
    values = (image, text, torch.tensor(10.0), torch.tensor(-8.0))
    leaves = [value.clone().requires_grad_() for value in values]
    loss = loss_module(*leaves)
    (weight * loss).backward()
    return [loss, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_equals_open_clip(dtype: torch.dtype) -> None:
    check(SigLipLoss(cache_labels=True), open_clip_loss.SigLipLoss(), *pairs(50, 16), 10.0, -8.0, dtype=dtype)


def test_output_dict_and_no_bias() -> None:
    image, text, scale = unit(8, 4), unit(8, 4), torch.tensor(5.0)
    for bias in (None, torch.tensor(-3.0)):
        out = SigLipLoss()(image, text, scale, bias, output_dict=True)
        assert list(out) == ["contrastive_loss"]
        torch.testing.assert_close(out["contrastive_loss"], open_clip_loss.SigLipLoss()(image, text, scale, bias))


@pytest.mark.parametrize("chunk_size", [None, 0, 1, 3, 100])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 0), (3, 1), (-1, 1)])
def test_chunks_and_a_rank_beyond_one_process_change_nothing(chunk_size: int, rank: int, world_size: int) -> None:
    image, text = unit(8, 4), unit(8, 4)
    ours = gradients(SigLipLoss(rank=rank, world_size=world_size, chunk_size=chunk_size), image, text)
    theirs = gradients(open_clip_loss.SigLipLoss(rank=rank, world_size=world_size), image, text)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_features_of_two_dtypes_under_autocast(other: torch.dtype, swapped: bool) -> None:
    image, text = unit(20, 8), unit(20, 8).to(other)
    image, text = (text, image) if swapped else (image, text)
    exact = gradients(open_clip_loss.SigLipLoss(), image.double(), text.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (gradients(kind(), image, text) for kind in (SigLipLoss, open_clip_loss.SigLipLoss))
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max()
    with pytest.raises(TypeError, match="text must have image's dtype"):
        SigLipLoss()(image, text, 20.0, -1.0)


def test_float64_is_open_clips_own() -> None:
    image, text = unit(20, 8).double(), unit(20, 8).double()
    ours, theirs = (gradients(kind(), image, text) for kind in (SigLipLoss, open_clip_loss.SigLipLoss))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tight(a))


def test_one_process_uses_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("get_rank", "get_world_size", "all_gather", "all_reduce", "batch_isend_irecv", "is_initialized"):
        monkeypatch.setattr(dist, name, lambda *_, name=name: pytest.fail(name))
    gradients(SigLipLoss(), unit(4, 3), unit(4, 3))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"rank must be in \[0, world_size\); got rank -1, world_size 2"):
        SigLipLoss(rank=-1, world_size=2)
    with pytest.raises(TypeError, match="SigLipLoss: uniform must be True or False"):
        SigLipLoss(uniform=None)
    with pytest.raises(ValueError, match="dist_impl must be None or one of bidir, shift, reduce, gather; got 'ring'"):
        SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match=r"same number of rows; got \(3, 4\) and \(2, 4\)"):
        SigLipLoss()(torch.randn(3, 4), torch.randn(2, 4), 1.0, 0.0)
    with pytest.raises(ValueError, match=r"those of torch.distributed, \(0, 1\); got \(0, 2\)"):
        SigLipLoss(world_size=2)(torch.randn(3, 4), torch.randn(3, 4), 1.0, 0.0)


def _compare_with_open_clip(rank: int, world_size: int) -> None:
    torch.manual_seed(rank)
    image, text = unit(6, 16), unit(6, 16)
    for dist_impl in (None, "bidir", "shift", "reduce", "gather"):
        options = {"rank": rank, "world_size": world_size, "dist_impl": dist_impl}
        ours = gradients(SigLipLoss(**options, uniform=dist_impl is None), image, text, 3.0)
        theirs = gradients(open_clip_loss.SigLipLoss(**options), image, text, 3.0)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6, msg=lambda text, d=dist_impl: f"{d}: {text}")
    ours = gradients(SigLipLoss(**options), image.double(), text.double(), 3.0)
    theirs = gradients(open_clip_loss.SigLipLoss(**options), image.double(), text.double(), 3.0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tight(a))


@pytest.mark.parametrize("world_size", [2, 4])
def test_many_processes_equal_open_clip(world_size: int) -> None:
    run_processes(_compare_with_open_clip, world_size)


def _as_exact_as_eager(rank: int, world_size: int, sizes: list[int]) -> None:
    torch.manual_seed(1)
    loss = as_one_process(SigLipLoss(rank=rank, world_size=world_size), sizes)
    eager = open_clip_loss.SigLipLoss()
    for block in divisors(world_size):
        exchange(block)
        for dim, noise, scale, bias, dtype in (
            (16, None, 10.0, -10.0, torch.float32),
            (5, 0.1, 100.0, -50.0, torch.float32),
            (16, 0.5, 10.0, -8.0, torch.bfloat16),
        ):
            check(loss, eager, *pairs(sum(sizes), dim, noise), scale, bias, dtype=dtype)


@pytest.mark.parametrize("sizes", [[1, 1], [150, 70], [5, 9], [3, 1, 4, 2], [1, 30, 2, 17]], ids=str)
def test_value_and_gradients_equal_one_process(sizes: list[int]) -> None:
    run_processes(_as_exact_as_eager, len(sizes), sizes)


def _frozen(rank: int, world_size: int) -> None:
    torch.manual_seed(rank)
    values = (unit(4, 6), unit(4, 6), torch.tensor(9.0), torch.tensor(-4.0))
    loss = SigLipLoss(rank=rank, world_size=world_size)
    expected = [value.clone().requires_grad_() for value in values]
    open_clip_loss.SigLipLoss(rank=rank, world_size=world_size)(*expected).backward()
    for block, *wanted in itertools.product((1, 2), *4 * [(False, True)]):
        exchange(block)
        leaves = [value.clone().requires_grad_(wants) for value, wants in zip(values, wanted, strict=True)]
        if any(wanted):
            loss(*leaves).backward()
        for leaf, other, wants in zip(leaves, expected, wanted, strict=True):
            assert (leaf.grad is not None) == wants
            if wants:
                torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=2e-6)
    with torch.no_grad():
        assert not loss(*leaves).requires_grad
    with pytest.raises(RuntimeError, match="second derivative is not implemented"):
        torch.autograd.grad(loss(*leaves), leaves, create_graph=True)


def test_frozen_inputs_no_grad_and_second_derivative() -> None:
    run_processes(_frozen, 2)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(10, 8), nn.Linear(12, 8)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-5.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        features = (F.normalize(tower(x), dim=1) for tower, x in ((self.image, image), (self.text, text)))
        return *features, self.logit_scale.exp(), self.logit_bias


def _parameters_gradient(sizes: list[int], loss: nn.Module, rank: int | None) -> list[Tensor]:
    torch.manual_seed(5)
    model = Towers()
    image, text = torch.randn(sum(sizes), 10), torch.randn(sum(sizes), 12)
    if rank is None:
        value = loss(*model(image, text))
    else:
        wrapped = DistributedDataParallel(model)
        value = loss(*wrapped(image.split(sizes)[rank], text.split(sizes)[rank]))
    value.backward()
    return [p.grad for p in model.parameters()]


def _compare_with_one_process(rank: int, world_size: int, sizes: list[int]) -> None:
    expected = _parameters_gradient(sizes, open_clip_loss.SigLipLoss(), None)
    for block in (world_size, 1):
        exchange(block)
        got = _parameters_gradient(sizes, SigLipLoss(rank=rank, world_size=world_size), rank)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [[7, 7], [3, 1, 4, 2]], ids=str)
def test_gradients_after_ddp_equal_one_process(sizes: list[int]) -> None:
    run_processes(_compare_with_one_process, len(sizes), sizes)


def _raise_on_every_rank(rank: int, world_size: int) -> None:
    loss = SigLipLoss(rank=rank, world_size=world_size)
    features = unit(3, 8 + rank)
    with pytest.raises(ValueError, match=r"SigLipLoss: features must .*rank 0: \(3, 8\) .*rank 1: \(3, 9\)"):
        loss(features, features, 1.0, 0.0)
    features = unit(3, 8)
    with pytest.raises(ValueError, match=r"SigLipLoss: the inputs that need a gradient .*rank 1: \[True, False\]"):
        loss(features.clone().requires_grad_(rank == 1), features, 1.0, 0.0)
    dist.barrier()


def test_ranks_that_disagree_raise_everywhere() -> None:
    run_processes(_raise_on_every_rank, 2)
