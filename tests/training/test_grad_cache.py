from __future__ import annotations

import contextlib

import pytest
import torch
from processes import run_processes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from vlmfast.nn import ClipLoss
from vlmfast.training.grad_cache import RandomState, forward_backward, split


class Towers(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 8))
        self.text = nn.Sequential(nn.Embedding(50, 16), nn.Dropout(dropout), nn.Linear(16, 8))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.passes = 0

    def forward(self, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
        self.passes += 1
        image, text = self.image(pixels), self.text(ids).mean(1)
        return {
            "image_features": F.normalize(image, dim=1),
            "text_features": F.normalize(text, dim=1),
            "logit_scale": self.logit_scale,
        }


def batch(rows: int) -> dict[str, Tensor]:
    return {"pixels": torch.randn(rows, 10), "ids": torch.randint(50, (rows, 6))}


class CountedLoss:
    def __init__(self, **options: object) -> None:
        self.calls = 0
        self.module = ClipLoss(**options)

    def __call__(self, features: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        return self.module(features["image_features"], features["text_features"], features["logit_scale"].exp())


def assert_same_gradients(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("chunk", [1, 7, 16, 40, 100])
def test_gradients_equal_the_plain_step(chunk: int) -> None:
    plain, cached = Towers(), Towers()
    cached.load_state_dict(plain.state_dict())
    data = batch(40)
    expected = CountedLoss()(plain(**data))
    expected.backward()
    loss_of = CountedLoss()
    loss = forward_backward(lambda part: cached(**part), loss_of, data, chunk)
    torch.testing.assert_close(loss, expected.detach())
    assert_same_gradients(cached, plain)
    assert loss_of.calls == 1
    assert cached.passes == 2 * -(-40 // chunk)


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_parameters_of_the_loss_are_shared_features(chunk: int) -> None:
    """Batch norms of the loss see the whole batch, and a feature that every chunk has counts once."""
    plain, cached = Towers(), Towers()
    for towers in (plain, cached):
        towers.head = nn.Parameter(torch.ones(8))
    cached.load_state_dict(plain.state_dict())
    data = batch(40)

    def encode(towers: Towers, part: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**towers(**part), "head": towers.head * 2}

    def loss_of(features: dict[str, Tensor]) -> Tensor:
        image = F.batch_norm(features["image_features"], None, None, weight=features["head"], training=True)
        return CountedLoss()({**features, "image_features": F.normalize(image, dim=1)})

    expected = loss_of(encode(plain, data))
    expected.backward()
    loss = forward_backward(lambda part: encode(cached, part), loss_of, data, chunk, shared=("head",))
    torch.testing.assert_close(loss, expected.detach())
    assert cached.head.grad.abs().min() > 0
    assert_same_gradients(cached, plain)


def test_gradients_accumulate() -> None:
    once, twice = Towers(), Towers()
    twice.load_state_dict(once.state_dict())
    data = batch(12)
    forward_backward(lambda part: once(**part), CountedLoss(), data, 5)
    for _ in range(2):
        forward_backward(lambda part: twice(**part), CountedLoss(), data, 5)
    for p, q in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(2 * p.grad, q.grad)


def test_dropout_repeats_in_the_second_pass() -> None:
    cached, direct = Towers(dropout=0.5), Towers(dropout=0.5)
    direct.load_state_dict(cached.state_dict())
    data = batch(30)
    torch.manual_seed(11)
    loss = forward_backward(lambda part: cached(**part), CountedLoss(), data, 8)
    torch.manual_seed(11)
    parts = [direct(**part) for part in split(data, 8)]
    features = {name: torch.cat([part[name] for part in parts]) for name in ("image_features", "text_features")}
    expected = CountedLoss()({**features, "logit_scale": direct.logit_scale})
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert_same_gradients(cached, direct)


def test_randomness_after_the_step_is_that_of_the_first_pass() -> None:
    """The second pass leaves no trace, so a step draws as much whatever happens in backward."""
    torch.manual_seed(4)
    model, data = Towers(dropout=0.5), batch(30)
    torch.manual_seed(11)
    forward_backward(lambda part: model(**part), CountedLoss(), data, 8)
    after = torch.rand(3)
    torch.manual_seed(11)
    for part in split(data, 8):
        model(**part)
    assert torch.equal(after, torch.rand(3))


def test_a_frozen_tower_gets_nothing() -> None:
    model = Towers()
    model.image.requires_grad_(False)
    forward_backward(lambda part: model(**part), CountedLoss(), batch(20), 6)
    assert all(p.grad is None for p in model.image.parameters())
    assert all(p.grad is not None for p in model.text.parameters())


@pytest.mark.parametrize("chunk", [3, 10, 20])
@pytest.mark.parametrize("frozen", ["image", "text", "towers", "logit_scale"])
def test_whatever_is_frozen_the_rest_has_its_gradients(frozen: str, chunk: int) -> None:
    plain, cached = Towers(), Towers()
    cached.load_state_dict(plain.state_dict())
    for model in (plain, cached):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(("image", "text") if frozen == "towers" else frozen))
    data = batch(20)
    CountedLoss()(plain(**data)).backward()
    forward_backward(lambda part: cached(**part), CountedLoss(), data, chunk)
    for (name, p), q in zip(cached.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_nothing_to_train_is_an_error() -> None:
    model = Towers().requires_grad_(False)
    with pytest.raises(ValueError, match="grad_cache: no feature has a gradient"):
        forward_backward(lambda part: model(**part), CountedLoss(), batch(6), 4)


@pytest.mark.parametrize("factor", [2.0**10, 2.0**15, 2.0**16, 2.0**20])
def test_float16_features_under_a_scaler_have_the_gradients_of_the_plain_step(factor: float) -> None:
    """The factor is there before float16 rounds to zero what is small; what overflows does so in both."""
    plain, cached = Towers(), Towers()
    cached.load_state_dict(plain.state_dict())
    data = batch(256)

    def encode(model: Towers, part: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v if v.dim() == 0 else v.half() for k, v in model(**part).items()}

    def backward(value: Tensor) -> None:
        (value * factor).backward()

    backward(CountedLoss()(encode(plain, data)))
    forward_backward(lambda part: encode(cached, part), CountedLoss(), data, 100, backward=backward)
    for (name, p), q in zip(cached.named_parameters(), plain.parameters(), strict=True):
        assert p.grad.isfinite().all() == q.grad.isfinite().all(), name
        if q.grad.isfinite().all():
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3 * q.grad.abs().max().item())
    if factor == 2.0**15:
        unscaled = Towers()
        unscaled.load_state_dict(plain.state_dict())
        CountedLoss()(unscaled(**data)).backward()
        for p, q in zip(cached.parameters(), unscaled.parameters(), strict=True):
            error = (p.grad / factor - q.grad).norm() / q.grad.norm()
            assert error < 0.02


def test_backward_and_no_sync_are_called_as_promised() -> None:
    calls: list[str] = []

    @contextlib.contextmanager
    def no_sync():
        calls.append("no_sync")
        yield

    def backward(value: Tensor) -> None:
        calls.append("backward")
        value.backward()

    model = Towers()
    forward_backward(lambda part: model(**part), CountedLoss(), batch(10), 4, backward=backward, no_sync=no_sync)
    assert calls == ["no_sync", "backward", "no_sync", "backward", "backward"]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="chunk_size must be at least 1; got 0"):
        split(batch(4), 0)
    with pytest.raises(ValueError, match=r"same number of rows; got \{'a': 3, 'b': 4\}"):
        split({"a": torch.zeros(3), "b": torch.zeros(4)}, 2)


def test_random_state_replays() -> None:
    state = RandomState(torch.device("cpu"))
    first = torch.rand(5)
    with state.replay():
        assert torch.equal(torch.rand(5), first)


def _ddp_equals_one_process(rank: int, world_size: int) -> None:
    torch.manual_seed(5)
    model, data = Towers(), batch(24)
    plain = Towers()
    plain.load_state_dict(model.state_dict())
    CountedLoss()(plain(**data)).backward()
    wrapped = DistributedDataParallel(model)
    loss_of = CountedLoss(gather_with_grad=True, rank=rank, world_size=world_size)
    own = {name: value.chunk(world_size)[rank] for name, value in data.items()}
    forward_backward(lambda part: wrapped(**part), loss_of, own, 5, no_sync=wrapped.no_sync)
    assert_same_gradients(model, plain)


def test_two_processes_equal_one() -> None:
    run_processes(_ddp_equals_one_process, 2)
