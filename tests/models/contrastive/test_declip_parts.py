"""SimSiam's heads and loss, the bank of features, and batch norm over processes, each against its definition."""

import copy

import pytest
import torch
from processes import run_processes
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from vlmfast.models.contrastive import declip_parts
from vlmfast.models.contrastive.declip import DeCLIPConfig
from vlmfast.models.contrastive.declip_parts import (
    FeatureBank,
    GlobalBatchNorm1d,
    predictor,
    projector,
    simsiam_loss,
)


def unit(rows: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1)


class TestBank:
    @pytest.mark.parametrize("size", [6, 7, 20])
    @pytest.mark.parametrize("pushes", [[4, 4], [6], [7], [13], [1] * 15, [5, 3, 9, 2], [20, 1]])
    def test_holds_exactly_the_last_pushed(self, size: int, pushes: list[int]) -> None:
        bank = FeatureBank(size, 3)
        keys = torch.arange(sum(pushes)).float()[:, None] * torch.ones(3)
        for part in keys.split(pushes):
            bank.push(part)
            last = range(int(bank.pushed))[-size:]
            expected = torch.zeros(size, 3)
            for number in last:
                expected[number % size] = number
            assert torch.equal(bank.features, expected)
        assert bank.pushed == sum(pushes)

    def test_of_the_paper_s_size_it_wraps_around(self) -> None:
        """65,536 features of 70,000, pushed 1,000 at a time, of which 65,536 is no multiple."""
        bank = FeatureBank(DeCLIPConfig.settings()["bank_size"], 1)
        assert len(bank.features) == 65536
        keys = torch.arange(1.0, 70001)[:, None]
        for part in keys.split(1000):
            bank.push(part)
        assert torch.equal(bank.features.sort(0).values, keys[-65536:])
        bank.push(torch.tensor([[-1.0]]))
        assert -1 in bank.features
        assert keys[-65536] not in bank.features
        assert keys[-65535] in bank.features

    @pytest.mark.parametrize("chunk", [5, 8, 1000])
    @pytest.mark.parametrize("pushed", [3, 16, 40])
    def test_nearest_is_the_nearest_of_what_was_pushed(
        self, chunk: int, pushed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(declip_parts, "BANK_CHUNK", chunk)
        bank, keys, queries = FeatureBank(16, 8), unit(pushed, 8), unit(50, 8)
        bank.push(keys)
        kept = keys[-16:]
        nearest = torch.cdist(queries.double(), kept.double()).argmin(1)
        assert torch.equal(bank.nearest(queries), kept[nearest])

    def test_what_was_never_pushed_is_no_neighbour(self) -> None:
        """Zeros have a larger dot product with a query than what points away from it."""
        bank, query = FeatureBank(8, 4), unit(1, 4)
        assert torch.equal(bank.nearest(query), torch.zeros(1, 4))
        bank.push(-query)
        assert torch.equal(bank.nearest(query), -query)

    def test_no_gradients_and_float32(self) -> None:
        bank = FeatureBank(8, 4)
        features = unit(6, 4).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            bank.push(features)
            found = bank.nearest(features)
        assert not bank.features.requires_grad
        assert not found.requires_grad
        assert torch.equal(found, features)
        assert not list(bank.parameters())
        assert set(bank.state_dict()) == {"features", "pushed"}


class TestSimSiam:
    def test_equals_the_definition(self) -> None:
        p, z = torch.randn(2, 5, 2, 7, dtype=torch.float64).unbind()
        expected = [-(p[i, 0] @ z[i, 1] / p[i, 0].norm() / z[i, 1].norm()) / 2 for i in range(5)]
        expected = [e - (p[i, 1] @ z[i, 0] / p[i, 1].norm() / z[i, 0].norm()) / 2 for i, e in enumerate(expected)]
        torch.testing.assert_close(simsiam_loss(p, z), torch.stack(expected).float())

    def test_no_gradient_reaches_the_projections(self) -> None:
        p, z = (torch.randn(5, 2, 7, requires_grad=True) for _ in range(2))
        simsiam_loss(p, z).sum().backward()
        assert z.grad is None
        assert (p.grad.abs().sum(-1) > 0).all()

    def test_heads_have_the_layers_of_the_paper(self) -> None:
        layers = [type(layer).__name__ for layer in projector(5, 8)]
        block = ["Linear", "GlobalBatchNorm1d"]
        assert layers == [*block, "ReLU", *block, "ReLU", *block]
        assert [layer.out_features for layer in predictor(8, 4) if isinstance(layer, nn.Linear)] == [4, 8]
        assert projector(5, 8)(torch.randn(3, 5)).shape == (3, 8)


SIZES = [5, 3]


def _batch_norm_on_each_rank(rank: int, world_size: int, module: GlobalBatchNorm1d, x: Tensor, weight: Tensor) -> None:
    """Output, gradients after DDP's mean, and running statistics against torch's on the whole batch."""
    whole = nn.BatchNorm1d(x.shape[1])
    whole.load_state_dict(module.state_dict())
    module = copy.deepcopy(module)
    for _ in range(2):
        leaf, own = x.clone().requires_grad_(), x.split(SIZES)[rank].clone().requires_grad_()
        whole.zero_grad()
        module.zero_grad()
        expected, output = whole(leaf), module(own)
        torch.testing.assert_close(output, expected.split(SIZES)[rank])
        (expected * weight).sum().backward()
        (output * weight.split(SIZES)[rank]).sum().backward()
        torch.testing.assert_close(own.grad, leaf.grad.split(SIZES)[rank], rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(module.parameters(), whole.parameters(), strict=True):
            dist.all_reduce(mine.grad)
            torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(module.state_dict(), whole.state_dict())
    torch.testing.assert_close(module.eval()(x), whole.eval()(x))


def test_batch_norm_over_processes_is_that_of_one() -> None:
    module = GlobalBatchNorm1d(4)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    x = 3 + 2 * torch.randn(sum(SIZES), 4)
    run_processes(_batch_norm_on_each_rank, 2, module, x, torch.randn(sum(SIZES), 4))


def test_batch_norm_of_one_process_is_torchs() -> None:
    module, x = GlobalBatchNorm1d(4), torch.randn(6, 4)
    assert torch.equal(module(x), nn.BatchNorm1d(4)(x))
