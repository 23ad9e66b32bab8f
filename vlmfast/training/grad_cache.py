"""GradCache: the gradients of a contrastive step on a large batch, with the activations of a small one in memory.

Three verbs: the features of every chunk without gradients; the loss of all features, evaluated once, and its gradients
at the features; every chunk once more, backward from those gradients. Dropout and other randomness repeat in the second
pass, so the parameters receive the gradients of the plain step. Layers with statistics of the batch, such as BatchNorm,
see chunks and see each chunk twice; a model that has them in what encodes does not train the same way in chunks. In the
loss they see the whole batch; the parameters that they have there are among the features, as `shared`.

Source: Gao et al. 2021 (2101.06983), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

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
        backward: called on one scalar per chunk, so that a gradient scaler or an accelerator can take part.
        no_sync: entered for the backward of all chunks but the last (DistributedDataParallel.no_sync).
    Raises:
        ValueError: chunk_size is below 1, or the batch's tensors differ in B.
    """
    chunks = split(batch, chunk_size)
    features, random_states = forward_no_grad(encode, chunks, shared)
    loss, gradients = build_cache(loss_of, features)
    for k, chunk in enumerate(chunks):
        last = k == len(chunks) - 1
        with nullcontext() if last else no_sync():
            with random_states[k].replay():
                encoded = encode(chunk)
            backward(_surrogate(encoded, gradients, k * chunk_size, shared, last=last))
    return loss


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


def build_cache(loss_of: Callable[[Features], Tensor], features: Features) -> tuple[Tensor, Features]:
    """The detached loss and its gradient at every feature."""
    leaves = {name: value.detach().requires_grad_() for name, value in features.items()}
    with torch.enable_grad():
        loss = loss_of(leaves)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}


def _surrogate(encoded: Features, gradients: Features, start: int, shared: Collection[str], *, last: bool) -> Tensor:
    """A scalar whose gradient at the features is the cached one; the batch-independent features count once, at last."""
    terms = []
    for name, gradient in gradients.items():
        value = encoded[name]
        once = value.dim() == 0 or name in shared
        if not value.requires_grad or (once and not last):
            continue
        rows = gradient if once else gradient[start : start + len(value)]
        terms.append((value * rows).sum())
    return torch.stack(terms).sum()


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
