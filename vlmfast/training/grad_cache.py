"""GradCache: the gradients of a contrastive step on a large batch, with the activations of a small one in memory.

Three verbs: the features of every chunk without gradients; the loss of all features, evaluated once, and its gradients
at the features; every chunk once more, backward from those gradients. A gradient scaler's factor is in the gradients
from the start, as in the plain step: in float16 they would vanish without it. Dropout and other randomness repeat in
the second pass, so the parameters receive the gradients of the plain step. Layers with statistics of the batch, such as
BatchNorm, see chunks and see each chunk twice; a model that has them in what encodes does not train the same way in
chunks. In the loss they see the whole batch; the parameters that they have there are among the features, as `shared`.

Source: Gao et al. 2021 (2101.06983), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]
Features = dict[str, Tensor]


def forward_backward(
    encode: Callable[[Batch], Features],
    loss_of: Callable[[Features], Tensor],
    batch: Batch,
    chunk_size: int,
    *,
    shared: Collection[str] = (),
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Adds to every parameter's grad what `loss_of(encode(batch)).backward()` would, and returns the detached loss ().

    Args:
        encode: (rows of) a batch to named features: tensors whose first dimension is the batch's; and 0-dim ones, such
            as logit_scale, and those named in shared, that do not depend on the batch.
        loss_of: the features of the whole batch to the loss (); evaluated once.
        batch: tensors (B, ...) of equal B.
        chunk_size: rows per pass through `encode`; B need not be a multiple of it.
        shared: names of features of any shape that are the same for every chunk, such as parameters that the loss has.
        backward: called on one scalar per chunk, so that a gradient scaler or an accelerator can take part; it
            multiplies all of them by the same factor.
        no_sync: entered for the backward of all chunks but the last (DistributedDataParallel.no_sync).
    Raises:
        ValueError: chunk_size is below 1, the batch's tensors differ in B, or everything is frozen.
    """
    chunks = split(batch, chunk_size)
    features, random_states = forward_no_grad(encode, chunks, shared)
    cache = build_cache(loss_of, features)
    for k, chunk in enumerate(chunks):
        last = k == len(chunks) - 1
        with nullcontext() if last else no_sync():
            with random_states[k].replay():
                encoded = encode(chunk)
            rows = slice(k * chunk_size, (k + 1) * chunk_size)
            parts = {}
            for name, value in encoded.items():
                once = value.dim() == 0 or name in shared  # what does not depend on the batch counts once, at last
                if value.requires_grad and (last or not once):
                    parts[name] = (value, None if once else rows)
            if parts or last:
                backward(cache.surrogate(parts))
    return cache.loss.detach()


def split(batch: Batch, chunk_size: int) -> list[Batch]:
    if chunk_size < 1:
        raise ValueError(f"grad_cache: chunk_size must be at least 1; got {chunk_size}")
    rows = {name: len(value) for name, value in batch.items()}
    if len(set(rows.values())) != 1:
        raise ValueError(f"grad_cache: all tensors of the batch must have the same number of rows; got {rows}")
    parts = {name: value.split(chunk_size) for name, value in batch.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def forward_no_grad(
    encode: Callable[[Batch], Features], chunks: list[Batch], shared: Collection[str] = ()
) -> tuple[Features, list[RandomState]]:
    """The features of the whole batch, and the random state before each chunk."""
    encoded, states = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(RandomState(next(iter(chunk.values())).device))
            encoded.append(encode(chunk))
    features = {
        name: value if value.dim() == 0 or name in shared else torch.cat([part[name] for part in encoded])
        for name, value in encoded[0].items()
    }
    return features, states


def build_cache(loss_of: Callable[[Features], Tensor], features: Features) -> Cache:
    """The loss of all features, whose gradients are taken once it is known what `backward` multiplies them by."""
    leaves = {name: value.detach().requires_grad_() for name, value in features.items()}
    with torch.enable_grad():
        return Cache(loss_of(leaves), leaves)


class Cache:
    """The loss () and its gradients at the features of the whole batch."""

    def __init__(self, loss: Tensor, leaves: Features) -> None:
        self.loss = loss
        self._leaves = leaves
        self._gradients: dict[str, Tensor | None] | None = None

    def surrogate(self, parts: Mapping[str, tuple[Tensor, slice | None]]) -> Tensor:
        """A scalar whose gradient at each part is the loss's: at these rows of the feature of that name, or at all.

        Raises:
            ValueError: there are no parts.
        """
        if not parts:
            raise ValueError("grad_cache: no feature has a gradient; expected parameters that are trained")
        places = [(name, rows) for name, (_, rows) in parts.items()]
        surrogate: Tensor = _Surrogate.apply(self, places, *(value for value, _ in parts.values()))
        return surrogate

    def gradients(self, factor: Tensor) -> dict[str, Tensor | None]:
        """At every feature, times the factor of the first call."""
        if self._gradients is None:
            found = torch.autograd.grad(self.loss, list(self._leaves.values()), factor, allow_unused=True)
            self._gradients = dict(zip(self._leaves, found, strict=True))
            self.loss = self.loss.detach()
        return self._gradients


class _Surrogate(torch.autograd.Function):
    """Zero, whose backward hands out cached gradients."""

    @staticmethod
    def forward(ctx: Any, cache: Cache, places: list[tuple[str, slice | None]], *values: Tensor) -> Tensor:
        ctx.cache, ctx.places = cache, places
        return torch.zeros_like(cache.loss)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.cache.gradients(factor)
        found = [(gradients[name], rows) for name, rows in ctx.places]
        return None, None, *(g if g is None or rows is None else g[rows] for g, rows in found)


class RandomState:
    """The state of the generators that a module draws from, to be drawn from again."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(d) for d in self.devices]

    @contextmanager
    def replay(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
