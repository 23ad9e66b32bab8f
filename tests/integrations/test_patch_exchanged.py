"""Whatever stands in the place of a submodule of a replaced part is called, as the original calls it.

Every replaceable part of every model that patch knows is walked, and each of its submodules exchanged for something
that calls it, counts the calls and gives another result: before the model is patched and after.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from patch_models import MODELS
from torch import Tensor, nn

import vlmfast

WHOLE = ("", "loss", "VisionTransformer")
"""Parts, or classes of them, that are models themselves: what is deep in them is the business of what calls it."""

ONE_OF_EACH = (
    "clip", "siglip", "siglip2", "dual encoder", "flava", "bridgetower", "idefics", "mllama", "qwen2-vl", "timm",
    "naflex", "open_clip", "flamingo",
)  # fmt: skip
"""Models that have a part of each class, for what is not tried in all."""


def another(out: Any) -> Any:
    if isinstance(out, Tensor):
        return 1.5 * out
    return (another(out[0]), *out[1:]) if type(out) is tuple else out


class Counter:
    calls = 0

    def call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return another(forward(*args, **kwargs))


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module, counter: Counter) -> None:
        super().__init__()
        self.inner = inner
        self.counter = counter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.counter.call(self.inner, *args, **kwargs)


class LikeIt(Wrapper):
    """With the attributes of what it wraps, as adapters have them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def split(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, leaf = path.rpartition(".")
    return model.get_submodule(owner), leaf


@contextmanager
def wrapped(kind: type[Wrapper], model: nn.Module, path: str, counter: Counter) -> Iterator[None]:
    owner, leaf = split(model, path)
    original = owner._modules[leaf]
    owner._modules[leaf] = kind(original, counter)
    yield
    owner._modules[leaf] = original


@contextmanager
def subclass(model: nn.Module, path: str, counter: Counter) -> Iterator[None]:
    module = model.get_submodule(path)
    kind = type(module)
    forward = lambda self, *args, **kwargs: counter.call(partial(kind.forward, self), *args, **kwargs)  # noqa: E731
    module.__class__ = type("Sub" + kind.__name__, (kind,), {"forward": forward})
    yield
    module.__class__ = kind


@contextmanager
def partial_forward(model: nn.Module, path: str, counter: Counter) -> Iterator[None]:
    module = model.get_submodule(path)
    module.forward = partial(counter.call, module.forward)
    yield
    del module.forward


@contextmanager
def hook(model: nn.Module, path: str, counter: Counter) -> Iterator[None]:
    handle = model.get_submodule(path).register_forward_hook(lambda _, args, out: counter.call(lambda: out))
    yield
    handle.remove()


EXCHANGES: dict[str, Callable[[nn.Module, str, Counter], Any]] = {
    "adapter": partial(wrapped, LikeIt),
    "wrapper without attributes": partial(wrapped, Wrapper),
    "subclass": subclass,
    "partial forward": partial_forward,
    "hook": hook,
}


def results(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor] | type[Exception]:
    """Loss, features or logits, and gradients; or what it raised."""
    model.zero_grad()
    try:
        output = model(**inputs)
    except (AttributeError, TypeError) as error:
        return type(error)
    output["loss"].backward()
    found = {name: output[name].detach() for name in ("loss", "logits", "image_embeds") if name in output}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def paths(model: nn.Module, part: str, depth: int) -> list[str]:
    """Names of the submodules of part that have a forward."""
    prefix = f"{part}." if part else ""
    return [
        prefix + name for name, module in model.get_submodule(part).named_modules()
        if name and name.count(".") < depth and not isinstance(module, nn.ModuleList)
    ]  # fmt: skip


def check_each(name: str, part: str, kind: str, apply: Callable[[nn.Module, str, Counter], Any]) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name].make()
    patched = copy.deepcopy(model.train())
    vlmfast.patch(patched)
    checked = 0
    names = paths(model, part, 2 if part in WHOLE or kind in WHOLE else 4)
    for path in names:
        counters = Counter(), Counter(), Counter()
        with apply(model, path, counters[0]):
            expected = results(model, inputs)
        with apply(patched, path, counters[1]):
            after = results(patched, inputs)
        with apply(model, path, counters[2]), vlmfast.patch(model):
            before = results(model, inputs)
        for order, counter, found in (("after", counters[1], after), ("before", counters[2], before)):
            where = f"{path} exchanged {order} patch"
            if isinstance(expected, type):
                assert isinstance(found, type), f"{where}: the original raises {expected.__name__}"
                continue
            assert not isinstance(found, type), f"{where}: {found}"
            assert counter.calls == counters[0].calls, where
            # A language model that computes its loss without the logits gives none.
            wanted = {key: value for key, value in expected.items() if key != "logits" or key in found}
            assert found.keys() == wanted.keys(), where
            for key, value in wanted.items():
                floor = 2e-5 * max(1.0, value.abs().max().item())
                torch.testing.assert_close(
                    found[key], value, rtol=1e-3, atol=floor, msg=lambda m, w=where, k=key: f"{w}: {k}: {m}"
                )
        checked += counters[0].calls > 0 or isinstance(expected, type)
    assert checked or not names


@pytest.mark.parametrize("name", list(MODELS))
def test_every_submodule_wrapped_is_called(name: str) -> None:
    parts = {kind: part for part, kind in MODELS[name].replaced.items()}
    for kind, part in parts.items():  # one of each class
        check_each(name, part, kind, EXCHANGES["adapter"])


@pytest.mark.parametrize("exchange", [name for name in EXCHANGES if name != "adapter"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_submodule_exchanged_is_called(name: str, exchange: str) -> None:
    """A loss without logits calls towers and heads alone: of those the wrapper says enough."""
    parts = {kind: part for part, kind in MODELS[name].replaced.items() if part not in WHOLE}
    for kind, part in parts.items():
        check_each(name, part, kind, EXCHANGES[exchange])
