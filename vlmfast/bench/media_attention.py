"""Gated cross-attention to the last image, forward and backward: `vlmfast bench media_attention`.

Width 1024, 8 heads of 64, images of 64 tokens of width 1024 at random places in the text. Scopes: `part` is the
attention part of a block (layer norm, projections, attention, gate and residual), `core` the attention alone, `decode`
the part for one token, with the keys and values of the images cached where a provider can.

Every round times each provider once, one after the other; ratios are taken within one run. Memory is measured in a
fresh process per row. Errors are against float64. GFLOP/s count the operations that are needed: the projections, and
the pairs of a query row and a key that it sees.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmfast.bench.harness import (
    DTYPES,
    Bench,
    NotHere,
    attempt,
    compiled,
    interleave,
    relative,
    require,
    require_backend,
)
from vlmfast.bench.memory import memory_of, peak_of
from vlmfast.bench.report import bars_plot, print_table
from vlmfast.bench.timing import gemm_rates, here, row_of
from vlmfast.ops import gated_residual, media_attention, media_index
from vlmfast.ops.media_attention import IMPLS

DIM, HEADS, HEAD_DIM, TOKENS = 1024, 8, 64, 64
INNER = HEADS * HEAD_DIM
IMAGE_TOKEN = 1


@dataclass(frozen=True)
class Case:
    batch: int
    length: int
    images: int
    scope: str = "part"


CASES = {
    "16 images": Case(2, 1024, 16),
    "5 images": Case(4, 320, 5),
    "1 image": Case(4, 320, 1),
    "core, 16 images": Case(2, 1024, 16, "core"),
    "core, 5 images": Case(4, 320, 5, "core"),
    "decode, 16 images": Case(2, 1024, 16, "decode"),
}


@dataclass
class Inputs:
    """The weights' names are open_flamingo's. q, k, v are what the core gets; in scope `decode` x is the last token."""

    x: Tensor
    media: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    to_q: Tensor
    to_kv: Tensor
    to_out: Tensor
    gate: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    lo: Tensor
    hi: Tensor

    def leaves(self, scope: str) -> list[Tensor]:
        if scope == "core":
            return [self.q, self.k, self.v]
        if scope == "decode":
            return []
        return [self.x, self.media, self.norm_weight, self.norm_bias, self.to_q, self.to_kv, self.to_out, self.gate]


def split(t: Tensor) -> Tensor:
    return t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    places = torch.rand(case.batch, case.length, generator=generator).argsort(1)[:, : case.images]
    ids = torch.zeros(case.batch, case.length, dtype=torch.long).scatter_(1, places, IMAGE_TOKEN).to(device)
    lo, hi, _ = media_index(ids, IMAGE_TOKEN)
    x, media = normal(case.batch, case.length, DIM), normal(case.batch, case.images * TOKENS, DIM)
    if case.scope == "decode":
        x, lo, hi = x[:, -1:].contiguous(), lo[:, -1:], hi[:, -1:]
    to_q, to_kv = (normal(rows, DIM, scale=DIM**-0.5) for rows in (INNER, 2 * INNER))
    to_out = normal(DIM, INNER, scale=INNER**-0.5)
    ones, zeros = (torch.full((DIM,), value, device=device, dtype=dtype) for value in (1.0, 0.0))
    gate = torch.full((1,), 0.5, device=device, dtype=dtype)
    q, (k, v) = split(x @ to_q.T), (split(t) for t in (media @ to_kv.T).chunk(2, -1))
    rows = normal(case.batch, x.shape[1], INNER if case.scope == "core" else DIM)
    grad = split(rows) if case.scope == "core" else rows
    inputs = Inputs(x, media, ones, zeros, to_q, to_kv, to_out, gate, q, k, v, grad, lo, hi)
    for leaf in inputs.leaves(case.scope):
        leaf.requires_grad_()
    return inputs


# Attention of q, k, v and the interval of images, here one image, to (B, H, L, head dim).
Core = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def vlmfast_core(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    return media_attention(q, k, v, media_lo=lo, media_hi=hi, tokens_per_media=TOKENS)


def open_flamingo_core(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """What open_flamingo's MaskedCrossAttention computes, which is also flamingo-pytorch's."""
    scores = (q * HEAD_DIM**-0.5) @ k.transpose(-1, -2)
    image = torch.arange(k.shape[2] // TOKENS, device=k.device) + 1
    own = hi[:, None, :, None] == image.repeat_interleave(TOKENS)
    scores = scores.masked_fill(~own, -torch.finfo(scores.dtype).max)
    scores = scores - scores.amax(-1, keepdim=True).detach()
    weights = scores.softmax(-1).masked_fill((hi == 0)[:, None, :, None], 0.0)
    return weights @ v


def sdpa_core(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """What one writes without a kernel: torch's fused attention with a dense mask, rows without an image cleared."""
    image = torch.arange(k.shape[2] // TOKENS, device=k.device) + 1
    own = (hi[:, :, None] == image.repeat_interleave(TOKENS)) | (hi == 0)[:, :, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=own[:, None])
    return out.masked_fill((hi == 0)[:, None, :, None], 0.0)


def part(core: Core, gated: bool, cached: bool, inputs: Inputs) -> Tensor:
    normed = F.layer_norm(inputs.x, (DIM,), inputs.norm_weight, inputs.norm_bias)
    q = split(F.linear(normed, inputs.to_q))
    if cached:
        k, v = inputs.k, inputs.v
    else:
        k, v = (split(t) for t in F.linear(inputs.media, inputs.to_kv).chunk(2, -1))
    out = core(q, k, v, inputs.lo, inputs.hi)
    hidden = F.linear(out.transpose(1, 2).flatten(2), inputs.to_out)
    return gated_residual(inputs.x, hidden, inputs.gate) if gated else hidden * inputs.gate.tanh() + inputs.x


def projections(inputs: Inputs) -> Tensor:
    """The matrix products of the part and nothing else: no provider whose projections are torch's is faster."""
    q, kv = F.linear(inputs.x, inputs.to_q), F.linear(inputs.media, inputs.to_kv)
    hidden = F.linear(q, inputs.to_out)
    return hidden + kv.sum()  # a gradient for kv that costs next to nothing


def flamingo_pytorch(case: Case, device: str) -> Callable[[Inputs], Tensor]:
    module = require("flamingo_pytorch.flamingo_pytorch").MaskedCrossAttention
    if case.scope != "part":
        raise NotHere("its core cannot be called by itself")
    attention = module(dim=DIM, dim_head=HEAD_DIM, heads=HEADS, only_attend_immediate_media=True).to(device)

    def run(inputs: Inputs) -> Tensor:
        named = dict(attention.named_parameters())
        own = {"norm.weight": inputs.norm_weight, "norm.bias": inputs.norm_bias, "to_q.weight": inputs.to_q}
        own |= {"to_kv.weight": inputs.to_kv, "to_out.weight": inputs.to_out}
        unknown = set(named) - set(own)
        if unknown:
            raise NotHere(f"parameters {unknown} are not known here")
        media = inputs.media.unflatten(1, (-1, TOKENS))
        located = torch.diff(inputs.hi, dim=1, prepend=torch.zeros_like(inputs.hi[:, :1])) > 0
        out = torch.func.functional_call(attention, own, (inputs.x, media), {"media_locations": located})
        return out * inputs.gate.tanh() + inputs.x

    return run


@dataclass(frozen=True)
class Provider:
    """`core` in scope core; in the others the part around it. `make`, given instead, returns a function of Inputs."""

    core: Core | None = None
    gated: bool = False
    cached: bool = False
    compile: bool = False
    backend: str | None = None
    make: Callable[[Case, str], Callable[[Inputs], Tensor]] | None = None

    def function(self, case: Case, device: str) -> Callable[[Inputs], Tensor]:
        """Raises NotHere where it cannot run."""
        if self.backend is not None:
            require_backend(IMPLS, self.backend, device)
        if self.make is not None:
            return self.make(case, device)
        assert self.core is not None, "a provider has core or make"
        core = compiled(self.core) if self.compile and case.scope == "core" else self.core
        if case.scope == "core":
            return lambda inputs: core(inputs.q, inputs.k, inputs.v, inputs.lo, inputs.hi)
        whole = functools.partial(part, core, self.gated, self.cached and case.scope == "decode")
        return compiled(whole) if self.compile else whole


def only_projections(case: Case, device: str) -> Callable[[Inputs], Tensor]:
    if case.scope != "part":
        raise NotHere("only beside the whole part")
    return projections


PROVIDERS = {
    "vlmfast": Provider(vlmfast_core, gated=True, cached=True),
    **{f"vlmfast {name}": Provider(vlmfast_core, gated=True, cached=True, backend=name) for name in IMPLS},
    "open_flamingo": Provider(open_flamingo_core),
    "open_flamingo compiled": Provider(open_flamingo_core, compile=True),
    "flamingo-pytorch": Provider(make=flamingo_pytorch),
    "sdpa, dense mask": Provider(sdpa_core),
    "projections alone": Provider(make=only_projections),
}
BASELINE = "open_flamingo"


def step(function: Callable[[Inputs], Tensor], inputs: Inputs, scope: str, backend: str | None) -> list[Tensor]:
    """The output and the gradients of the leaves, by the backend named if one is."""
    with patch.dict(os.environ, {"VLMFAST_BACKEND": backend} if backend else {}):
        leaves = inputs.leaves(scope)
        with torch.set_grad_enabled(bool(leaves)):
            out = function(inputs)
        gradients = torch.autograd.grad(out, leaves, inputs.grad, allow_unused=True) if leaves else ()
        return [out.detach(), *gradients]


def gflop(case: Case, inputs: Inputs) -> float:
    """Operations that are needed, of the projections and of pairs of a row and a key that it sees.

    Backward takes twice those of forward, and 5 products to 2 of the attention.
    """
    rows = inputs.x.shape[0] * inputs.x.shape[1]
    pairs = 2 * HEADS * HEAD_DIM * TOKENS * int((inputs.hi > 0).sum())
    if case.scope == "core":
        return 7 * pairs / 1e9
    products = 2 * rows * DIM * INNER * 2
    if case.scope == "decode":
        return (products + 2 * pairs) / 1e9
    products += 2 * case.batch * case.images * TOKENS * DIM * 2 * INNER
    return (3 * products + 7 * pairs) / 1e9


def exact_results(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Of the published math in float64, at inputs rounded to dtype."""
    rounded = make_inputs(case, dtype, device)
    wide = Inputs(**{name: t if t.dtype == torch.int32 else t.detach().double() for name, t in vars(rounded).items()})
    for leaf in wide.leaves(case.scope):
        leaf.requires_grad_()
    function = (
        (lambda i: open_flamingo_core(i.q, i.k, i.v, i.lo, i.hi))
        if case.scope == "core"
        else functools.partial(part, open_flamingo_core, False, case.scope == "decode")
    )
    return step(function, wide, case.scope, None)


def error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest error of an entry relative to the largest entry, over output and gradients."""
    return max(relative(a, b) for a, b in zip(results, exact, strict=True))


def measure_case(providers: Sequence[str], name: str, dtype_name: str, rounds: int) -> list[dict[str, Any]]:
    case, dtype = CASES[name], DTYPES[dtype_name]
    device = here()
    torch.compiler.reset()
    exact = exact_results(case, dtype, device)
    inputs = make_inputs(case, dtype, device)
    once: dict[str, Callable[[], list[Tensor]]] = {}
    errors: dict[str, float] = {}

    def first(provider: Provider) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
        one = functools.partial(step, provider.function(case, device), inputs, case.scope, provider.backend)
        return one, one()

    for provider in providers:
        made = attempt(provider, functools.partial(first, PROVIDERS[provider]))
        if made is None:
            continue
        once[provider] = made[0]
        if provider != "projections alone":
            errors[provider] = error(made[1], exact)
    del exact
    rows = case.batch * case.length
    rates = gemm_rates((rows, rows, DIM), dtype, device)
    measured, gemm = interleave(once, rates, rounds, device)
    needed = gflop(case, inputs)
    group = []
    for provider, times in measured.items():
        row = {
            "case": name, "provider": provider, "dtype": dtype_name, "device": device,
            "size": {"B": case.batch, "L": case.length, "images": case.images}, "gflop": needed,
            **row_of(times, needed, gemm), "peak_extra_mb": memory_of("media_attention", provider, name, dtype_name),
        }  # fmt: skip
        if provider in errors:
            row["error"] = {"value": errors[provider]}
        group.append(row)
    print_table(f"media_attention, {name}", BASELINE, group)
    return group


def peak_memory(provider: str, name: str, dtype_name: str) -> float:
    """MB beyond the inputs in one forward and backward, in this process, gradients included."""
    case, device = CASES[name], here()
    function, backend = PROVIDERS[provider].function(case, device), PROVIDERS[provider].backend
    small = make_inputs(Case(1, 64, 1, case.scope), DTYPES[dtype_name], device)
    step(function, small, case.scope, backend)  # libraries warm up
    inputs = make_inputs(case, DTYPES[dtype_name], device)
    return peak_of(functools.partial(step, function, inputs, case.scope, backend), device)


def check(name: str) -> str:
    if name not in CASES:
        raise ValueError("there are no others")
    return name


BENCH = Bench("media_attention", tuple(CASES), tuple(PROVIDERS), check, measure_case, peak_memory, bars_plot)
