from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from contrastive import check, pairs
from processes import as_one_process, divisors, exchange, run_processes
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from vlmfast.nn import ClipLoss, clip_loss

open_clip_loss = pytest.importorskip("open_clip.loss")


def tight(t: Tensor) -> dict[str, float]:
    """Of features in float64; scale and bias are in float32, and their gradients rounded to it."""
    return {"rtol": 1e-12, "atol": 1e-14} if t.dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}


def unit(rows: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1)


def gradients(
    loss_module: nn.Module, image: Tensor, text: Tensor, weight: float = 1.0, **options: object
) -> list[Tensor]:
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_(), torch.tensor(20.0, requires_grad=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # open_clip gathers through a deprecated function
        loss = loss_module(*leaves, **options)
        loss = loss["contrastive_loss"] if isinstance(loss, dict) else loss
        (weight * loss).backward()
    return [loss, *(leaf.grad for leaf in leaves)]


def test_one_process_equals_open_clip() -> None:
    image, text = unit(50, 16), unit(50, 16)
    for ours, theirs in zip(
        gradients(ClipLoss(cache_labels=True), image, text),
        gradients(open_clip_loss.ClipLoss(), image, text),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_nearer_to_the_truth_than_open_clip() -> None:
    """Their logits are bfloat16, so two right results differ by more than ours is off."""
    image, text = unit(50, 16).bfloat16(), unit(50, 16).bfloat16()
    exact = gradients(open_clip_loss.ClipLoss(), image.double(), text.double())
    ours, theirs = gradients(ClipLoss(), image, text), gradients(open_clip_loss.ClipLoss(), image, text)
    for a, b, c in zip(ours[:3], theirs[:3], exact[:3], strict=True):
        assert (a.double() - c).abs().max() <= (b.double() - c).abs().max()
    torch.testing.assert_close(ours[3], exact[3], rtol=2.0**-9, atol=0)  # the scale's, to bfloat16's rounding


def test_output_dict_and_logit_bias() -> None:
    image, text = unit(8, 4), unit(8, 4)
    bias = torch.tensor(-3.0, requires_grad=True)
    out = ClipLoss()(image, text, torch.tensor(5.0), logit_bias=bias, output_dict=True)
    assert list(out) == ["contrastive_loss"]
    torch.testing.assert_close(out["contrastive_loss"], open_clip_loss.ClipLoss()(image, text, torch.tensor(5.0), bias))
    out["contrastive_loss"].backward()
    assert bias.grad == 0


@pytest.mark.parametrize("bias", [-1.0, 2, None, torch.tensor(-1.0), torch.tensor([3.0])], ids=str)
def test_logit_bias_may_be_a_number(bias: object) -> None:
    image, text = unit(8, 4), unit(8, 4)
    expected = open_clip_loss.ClipLoss()(image, text, torch.tensor(5.0), bias)
    torch.testing.assert_close(ClipLoss()(image, text, torch.tensor(5.0), bias), expected)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 0), (3, 1), (5, 0), (-1, 1)])
def test_a_rank_beyond_one_process_is_not_looked_at(rank: int, world_size: int) -> None:
    image, text = unit(8, 4), unit(8, 4)
    for local_loss in (False, True):
        options = {"local_loss": local_loss, "rank": rank, "world_size": world_size}
        ours, theirs = (gradients(kind(**options), image, text) for kind in (ClipLoss, open_clip_loss.ClipLoss))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_features_of_two_dtypes_under_autocast(other: torch.dtype, swapped: bool) -> None:
    """Nearer to the truth than open_clip, whose product is in autocast's dtype; gradients in the features' own."""
    image, text = unit(20, 8), unit(20, 8).to(other)
    image, text = (text, image) if swapped else (image, text)
    exact = gradients(open_clip_loss.ClipLoss(), image.double(), text.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (gradients(kind(), image, text) for kind in (ClipLoss, open_clip_loss.ClipLoss))
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max()
    with pytest.raises(TypeError, match="text must have image's dtype"):
        ClipLoss()(image, text, 20.0)


def test_float64_is_open_clips_own() -> None:
    image, text = unit(20, 8).double(), unit(20, 8).double()
    ours, theirs = (gradients(kind(), image, text) for kind in (ClipLoss, open_clip_loss.ClipLoss))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tight(a))
    with pytest.raises(ValueError, match=r"must be \(batch, dim\) and not empty; got \(20, 8\) and \(20, 7\)"):
        ClipLoss()(image, text[:, :7], 1.0)


def test_one_process_uses_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("get_rank", "get_world_size", "all_gather", "all_reduce", "batch_isend_irecv", "is_initialized"):
        monkeypatch.setattr(dist, name, lambda *_, name=name: pytest.fail(name))
    gradients(ClipLoss(gather_with_grad=True), unit(4, 3), unit(4, 3))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"rank must be in \[0, world_size\); got rank 2, world_size 2"):
        ClipLoss(rank=2, world_size=2)
    with pytest.raises(TypeError, match="ClipLoss: uniform must be True or False"):
        ClipLoss(uniform=1)
    with pytest.raises(ValueError, match=r"same number of rows; got \(3, 4\) and \(2, 4\)"):
        ClipLoss()(torch.randn(3, 4), torch.randn(2, 4), 1.0)
    with pytest.raises(ValueError, match=r"those of torch.distributed, \(0, 1\); got \(1, 2\)"):
        ClipLoss(rank=1, world_size=2)(torch.randn(3, 4), torch.randn(3, 4), 1.0)


def _compare_with_open_clip(rank: int, world_size: int) -> None:
    torch.manual_seed(rank)
    image, text = unit(6, 16), unit(6, 16)
    for local_loss, gather_with_grad in itertools.product((False, True), repeat=2):
        # The second: a loss that weighs differently on each rank, which the third promises not to.
        for weight, uniform in ((1.0, False), (rank + 1.0, False), (1.0, True)):
            options = {
                "local_loss": local_loss,
                "gather_with_grad": gather_with_grad,
                "rank": rank,
                "world_size": world_size,
            }
            ours = gradients(ClipLoss(**options, uniform=uniform), image, text, weight)
            theirs = gradients(open_clip_loss.ClipLoss(**options), image, text, weight)
            if gather_with_grad:
                # Ours is the mean on every rank, open_clip's has this mean.
                dist.all_reduce(theirs[3])
                theirs[3] /= world_size
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6, msg=lambda text, o=options: f"{o}: {text}")


@pytest.mark.parametrize("world_size", [2, 4])
def test_many_processes_equal_open_clip(world_size: int) -> None:
    run_processes(_compare_with_open_clip, world_size)


def _two_dtypes_and_float64(rank: int, world_size: int) -> None:
    torch.manual_seed(rank)
    image, text = unit(6, 16), unit(6, 16)
    for local_loss, gather_with_grad in itertools.product((False, True), repeat=2):
        options = {
            "local_loss": local_loss, "gather_with_grad": gather_with_grad, "rank": rank, "world_size": world_size,
        }  # fmt: skip
        ours = gradients(ClipLoss(**options), image.double(), text.double(), rank + 1.0)
        theirs = gradients(open_clip_loss.ClipLoss(**options), image.double(), text.double(), rank + 1.0)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, **tight(a), msg=lambda text, o=options: f"{o}: {text}")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = gradients(ClipLoss(**options), image, text.bfloat16())
        whole = gradients(ClipLoss(**options), image, text.bfloat16().float())
        for a, b in zip(mixed, whole, strict=True):
            torch.testing.assert_close(a.float(), b, rtol=2.0**-8, atol=1e-6)


def test_many_processes_with_two_dtypes_and_float64() -> None:
    run_processes(_two_dtypes_and_float64, 2)


def eager(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits, labels = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _as_exact_as_eager(rank: int, world_size: int, sizes: list[int]) -> None:
    torch.manual_seed(1)
    cases = [
        # dim, noise of the pairs (None: unrelated), scale, dtype
        (16, None, 20.0, torch.float32),
        (16, None, 100.0, torch.float32),
        (5, 0.1, 100.0, torch.float32),
        (5, 0.1, 1000.0, torch.float32),
        (16, 0.5, 20.0, torch.bfloat16),
    ]
    world = [(world_size, local_loss, budget) for local_loss in (False, True) for budget in (1 << 30, 0)]
    rings = [
        (block, local_loss, (1 << 30) * (local_loss == (block == 1)))
        for block in divisors(world_size)[:-1]
        for local_loss in (False, True)
    ]
    for block, local_loss, budget in world + rings:
        exchange(block)
        clip_loss.STORE_BUDGET_BYTES = budget
        loss = ClipLoss(local_loss, gather_with_grad=True, rank=rank, world_size=world_size)
        for dim, noise, scale, dtype in cases:
            image, text = pairs(sum(sizes), dim, noise)
            check(as_one_process(loss, sizes), eager, image, text, scale, dtype=dtype)


@pytest.mark.parametrize("sizes", [[1, 1], [150, 70], [5, 9], [3, 1, 4, 2], [1, 30, 2, 17]], ids=str)
def test_value_and_gradients_equal_one_process(sizes: list[int]) -> None:
    run_processes(_as_exact_as_eager, len(sizes), sizes)


def _extremes(rank: int, world_size: int) -> None:
    # Far from unit norm, logits of the own block and of the others so far apart that one shift serves no two blocks.
    torch.manual_seed(2)
    loss = ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)
    image, text = pairs(8, 5)
    sizes = [1, 4, 3]
    for block in (1, 3):
        exchange(block)
        for low, high in ((1.0, 1e3), (1e-3, 30.0), (-300.0, 300.0)):
            factors = torch.linspace(low, high, 8)[:, None]
            check(as_one_process(loss, sizes), eager, image * factors, text, 2.0)
        # All pairs are opposites, and the first rank's own block has no negatives to take a shift from.
        check(as_one_process(loss, sizes), eager, image[:1] + 0.05 * image, -image[:1] + 0.05 * text, 200.0)
        broken = text.float()
        broken[7, 2] = float("nan")
        assert loss(image.float().split(sizes)[rank], broken.split(sizes)[rank], 5.0).isnan()


def test_blocks_of_very_different_logits() -> None:
    run_processes(_extremes, 3)


def _frozen(rank: int, world_size: int) -> None:
    torch.manual_seed(rank)
    values = (unit(4, 6), unit(4, 6), torch.tensor(9.0))
    for budget, block in ((1 << 30, 2), (1 << 30, 1), (0, 1)):
        exchange(block)
        clip_loss.STORE_BUDGET_BYTES = budget
        loss = ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)
        reference = open_clip_loss.ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)
        for wanted in itertools.product((False, True), repeat=3):
            leaves = [value.clone().requires_grad_(wants) for value, wants in zip(values, wanted, strict=True)]
            expected = [value.clone().requires_grad_() for value in values]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                reference(*expected).backward()
            if any(wanted):
                loss(*leaves).backward()
            for leaf, other, wants in zip(leaves, expected, wanted, strict=True):
                assert (leaf.grad is not None) == wants
                if wants:
                    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=2e-6)
        for weight, factor in ((0.0, 0.0), (-(2.0**16), -(2.0**16))):
            grads = torch.autograd.grad(weight * loss(*leaves), leaves)
            for grad, leaf in zip(grads, leaves, strict=True):  # the same bits in every run
                assert torch.equal(grad, factor * leaf.grad)
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
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1), self.logit_scale.exp()


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
    expected = _parameters_gradient(sizes, open_clip_loss.ClipLoss(), None)
    for local_loss, block in itertools.product((False, True), (world_size, 1)):
        exchange(block)
        loss = ClipLoss(local_loss, gather_with_grad=True, rank=rank, world_size=world_size)
        for a, b in zip(_parameters_gradient(sizes, loss, rank), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [[7, 7], [3, 1, 4, 2]], ids=str)
def test_gradients_after_ddp_equal_one_process(sizes: list[int]) -> None:
    run_processes(_compare_with_one_process, len(sizes), sizes)


def _raise_on_every_rank(rank: int, world_size: int) -> None:
    def attempt(image: Tensor, text: Tensor, message: str, gather_with_grad: bool = True) -> None:
        loss = ClipLoss(gather_with_grad=gather_with_grad, rank=rank, world_size=world_size)
        with pytest.raises(ValueError, match=message):
            loss(image, text, 1.0)
        dist.barrier()

    for gather_with_grad in (False, True):
        features = unit(3, 8 + rank)
        attempt(features, features, r"rank 0: \(3, 8\) float32, \(3, 8\) float32; rank 1: \(3, 9\)", gather_with_grad)
        features = unit(3, 8)
        attempt(features, features[rank:], r"rank 0: .*; rank 1: \(3, 8\) float32, \(2, 8\)", gather_with_grad)
    attempt(features, features.to([torch.float32, torch.float16][rank]), r"rank 1: \(3, 8\) float32, \(3, 8\) float16")
    attempt(features, features.to([torch.float32, torch.int32][rank]), r"rank 1: .*, \(3, 8\) of another dtype")
    attempt(features.int(), features.int(), r"rank 0: \(3, 8\) of another dtype")
    attempt(features[: 3 * rank], features[: 3 * rank], r"rank 0: \(0, 8\)")
    attempt(features, features if rank else features[None], r"rank 0: .*, 3 dimensions float32")
    attempt(features.requires_grad_(rank == 1), features.detach(), r"rank 0: \[False, .*rank 1: \[True, False, False\]")


def test_ranks_that_disagree_raise_everywhere() -> None:
    run_processes(_raise_on_every_rank, 2)
