from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from processes import run_processes
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from vlmfast.nn import ClipLoss

open_clip_loss = pytest.importorskip("open_clip.loss")


def unit(rows: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1)


def gradients(loss_module: nn.Module, image: Tensor, text: Tensor, **options: object) -> list[Tensor]:
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_(), torch.tensor(20.0, requires_grad=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # open_clip gathers through a deprecated function
        loss = loss_module(*leaves, **options)
        (loss["contrastive_loss"] if isinstance(loss, dict) else loss).backward()
    return [loss["contrastive_loss"] if isinstance(loss, dict) else loss, *(leaf.grad for leaf in leaves)]


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


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"rank must be in \[0, world_size\); got rank 2, world_size 2"):
        ClipLoss(rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"same number of rows; got \(3, 4\) and \(2, 4\)"):
        ClipLoss()(torch.randn(3, 4), torch.randn(2, 4), 1.0)


def _compare_with_open_clip(rank: int, world_size: int) -> None:
    torch.manual_seed(rank)
    image, text = unit(6, 16), unit(6, 16)
    for local_loss, gather_with_grad in itertools.product((False, True), repeat=2):
        options = {
            "local_loss": local_loss,
            "gather_with_grad": gather_with_grad,
            "rank": rank,
            "world_size": world_size,
        }
        ours = gradients(ClipLoss(**options), image, text)
        theirs = gradients(open_clip_loss.ClipLoss(**options), image, text)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6, msg=lambda text, o=options: f"{o}: {text}")


@pytest.mark.parametrize("world_size", [2, 4])
def test_many_processes_equal_open_clip(world_size: int) -> None:
    run_processes(_compare_with_open_clip, world_size)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(10, 8), nn.Linear(12, 8)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1), self.logit_scale.exp()


def _parameters_gradient(sizes: list[int], loss: nn.Module, rank: int | None) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(5)
    model = Towers()
    image, text = torch.randn(sum(sizes), 10), torch.randn(sum(sizes), 12)
    if rank is None:
        value = loss(*model(image, text))
    else:
        wrapped = DistributedDataParallel(model)
        value = loss(*wrapped(image.split(sizes)[rank], text.split(sizes)[rank]))
    value.backward()
    return [p.grad for p in model.parameters()], value.detach()


def _compare_with_one_process(rank: int, world_size: int, sizes: list[int]) -> None:
    expected, value = _parameters_gradient(sizes, ClipLoss(), None)
    for local_loss in (False, True):
        if local_loss and len(set(sizes)) > 1:
            continue  # a mean of the ranks' means is not the global mean when shards differ
        loss = ClipLoss(local_loss, gather_with_grad=True, rank=rank, world_size=world_size)
        got, own = _parameters_gradient(sizes, loss, rank)
        if not local_loss:
            torch.testing.assert_close(own, value, rtol=1e-6, atol=1e-6)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [[7, 7], [5, 9], [3, 1, 4, 2]], ids=str)
def test_gradients_after_ddp_equal_one_process(sizes: list[int]) -> None:
    run_processes(_compare_with_one_process, len(sizes), sizes)


def _raise_on_every_rank(rank: int, world_size: int) -> None:
    loss = ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)
    features = unit(3, 8 + rank)
    with pytest.raises(
        ValueError, match=r"the same dim and dtype on every rank; got rank 0: \(3, 8\), rank 1: \(3, 9\)"
    ):
        loss(features, features, 1.0)
    dist.barrier()


def test_ranks_that_disagree_raise_everywhere() -> None:
    run_processes(_raise_on_every_rank, 2)
