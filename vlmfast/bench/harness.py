"""Measures providers of one op side by side: time, share of the machine's matrix product, memory, error.

Every round times each provider once, one after the other, so that a busy or throttled machine is busy for all alike;
ratios are taken within one run. Memory is measured in a fresh process per row. Errors are against float64. A provider
that is not installed, cannot run on the device or does not fit in memory is named with its reason and has no row.

`run_under_pytest` is the same row under pytest-benchmark, a provider at a time and so not interleaved.
"""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

from vlmfast.bench.memory import memory_of, peak_of
from vlmfast.bench.report import lines_plot, print_table, size_name
from vlmfast.bench.timing import gemm_rates, here, row_of, seconds

Function = Callable[..., Tensor]
T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NotHere(Exception):  # noqa: N818
    """Why a provider cannot run."""


@dataclass(frozen=True)
class Size:
    """One size of an op's problem.

    `numbers`: what describes it, the first being the axis of plots. `operations`: of a provider of one unit.
    `product`: (m, n, k) of the matrix product whose rate is the yardstick. `exact`: whether the float64 reference
    fits in memory.
    """

    numbers: Mapping[str, int]
    operations: float
    product: tuple[int, int, int]
    exact: bool = True


@dataclass(frozen=True)
class Provider:
    """`make(device)` returns the function or raises NotHere.

    `units` times the size's operations are those of its forward and backward. `frozen`: the inputs, by number, that
    have no gradient. `forward_only`: under no_grad. `memory(size, itemsize)`: about how many bytes it holds, if many.
    `backend`: the one of ours that is forced.
    """

    make: Callable[[str], Function]
    units: float
    frozen: Sequence[int] = ()
    forward_only: bool = False
    memory: Callable[[Size, int], float] | None = None
    backend: str | None = None
    dtypes: Sequence[str] = tuple(DTYPES)


@dataclass(frozen=True)
class Op:
    """`size(text)` reads one of the command line; `sizes` are those measured unless told, `small` warms up.

    `inputs(size, dtype)` makes them on the CPU. Of floating-point ones all but a provider's frozen ones take
    gradients; the errors of the `judged` ones are shown.
    """

    name: str
    size: Callable[[str], Size]
    sizes: Sequence[str]
    small: str
    inputs: Callable[[Size, torch.dtype], list[Tensor]]
    judged: Sequence[int]
    reference: Function
    providers: dict[str, Provider]
    baseline: str


def require(module: str) -> Any:
    """An optional package, or NotHere with the reason."""
    from importlib import import_module

    try:
        return import_module(module)
    except Exception as error:  # some peers fail at import where there is no GPU, each in its own way
        raise NotHere(
            f"{module}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def on_gpu(device: str) -> None:
    if device != "cuda":
        raise NotHere("needs a GPU")


def require_backend(impls: Mapping[str, Any], backend: str, device: str) -> None:
    """NotHere where the backend of an op cannot run on the device, or is the one that runs there by itself."""
    probe = (torch.zeros(1, 1, 1, 64, device=device),) * 3
    reasons = {name: impl.unsupported(*probe) for name, impl in impls.items()}
    if reasons[backend]:
        raise NotHere(reasons[backend])
    if backend == next(name for name, reason in reasons.items() if not reason):
        raise NotHere("is what the rows without a backend's name run")


def attempt(name: str, function: Callable[[], T]) -> T | None:
    """What the function returns; None, and why on the terminal, where the provider has no row.

    That is where it cannot run or a GPU's memory is full, and any other failure of a peer: ours must run.
    """
    try:
        return function()
    except NotHere as reason:
        why = str(reason)
    except Exception as error:  # a peer that this size, dtype or GPU is too much for
        if name.startswith("vlmfast") and not isinstance(error, torch.OutOfMemoryError):
            raise
        why = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
    print(f"  {name}: no row ({why})", flush=True)
    return None


def one_or_two(text: str, second: int) -> tuple[int, int]:
    """The numbers of a size A or AxB; B is `second` unless told."""
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError("it is A or AxB, whole numbers of at least 1")
    first, other = [*map(int, parts), second][:2]
    return first, other


def backend_rows(impls: Mapping[str, Any], modes: Mapping[str, Provider]) -> dict[str, Provider]:
    """`modes` once more for each backend of an op, without that which runs by itself on the device."""

    def maker(backend: str, make: Callable[[str], Function]) -> Callable[[str], Function]:
        def checked(device: str) -> Function:
            require_backend(impls, backend, device)
            return make(device)

        return checked

    return {
        f"vlmfast {backend}{mode}": replace(provider, make=maker(backend, provider.make), backend=backend)
        for backend in impls
        for mode, provider in modes.items()
    }


def compiled(function: Function) -> Function:
    """torch.compile for each size by itself: told of a second size, it would make one slower kernel for all sizes."""
    return torch.compile(function, dynamic=False)


def make(provider: Provider, size: Size, dtype_name: str, device: str) -> Function:
    """The provider's function.

    Raises:
        NotHere: it is not for this dtype or device, is not installed, or will not fit in memory.
    """
    if dtype_name not in provider.dtypes:
        raise NotHere(f"not for {dtype_name}")
    # A GPU says that it is full; a CPU's system may end the whole run instead.
    if device == "cpu" and provider.memory and Path("/proc/meminfo").exists():
        needed = provider.memory(size, DTYPES[dtype_name].itemsize)
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        if needed > 0.9 * available:
            raise NotHere(f"needs about {needed / 1e9:.0f} GB, {available / 1e9:.0f} GB are free")
    return provider.make(device)


def make_inputs(op: Op, size: Size, dtype: torch.dtype, device: str, provider: Provider | None = None) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = [t.to(device) for t in op.inputs(size, dtype)]
    for number, tensor in enumerate(inputs):
        still = provider is not None and (provider.forward_only or number in provider.frozen)
        tensor.requires_grad_(tensor.is_floating_point() and not still)
    return inputs


def step(function: Function, inputs: list[Tensor], backend: str | None = None) -> tuple[Tensor, dict[int, Tensor]]:
    """The value and, by number, the gradients of the inputs that want one, by the backend named if one is."""
    if backend:
        with patch.dict(os.environ, VLMFAST_BACKEND=backend):
            return step(function, inputs)
    leaves = {number: t for number, t in enumerate(inputs) if t.requires_grad}
    with torch.set_grad_enabled(bool(leaves)):
        value = function(*inputs)
    if not leaves:
        return value.detach(), {}
    # A peer may give no gradient for a scale; zero stands for it.
    found = torch.autograd.grad(
        value, list(leaves.values()), _cotangent(value), allow_unused=True, materialize_grads=True
    )
    return value.detach(), dict(zip(leaves, found, strict=True))


_cotangents: dict[tuple[Any, ...], Tensor] = {}


def _cotangent(value: Tensor) -> Tensor:
    """What is propagated back: of a loss 1, of other values random numbers, always the same and made once."""
    key = (value.shape, value.dtype, value.device)
    if key not in _cotangents:
        random = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        _cotangents[key] = (random if value.dim() else torch.ones(())).to(value.device, value.dtype)
    return _cotangents[key]


Results = tuple[Tensor, dict[int, Tensor]]


def exact_results(op: Op, size: Size, dtype: torch.dtype, device: str) -> Results:
    """Value and every gradient of the reference in float64, at inputs rounded to dtype."""
    inputs = make_inputs(op, size, dtype, device)
    return step(op.reference, [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs])


def relative(ours: Tensor, exact: Tensor) -> float:
    """The largest error relative to the largest exact entry; 0 where both are 0."""
    largest = exact.abs().max().clamp(min=torch.finfo(exact.dtype).tiny)
    return ((ours.double() - exact).abs().max() / largest).item()


def errors(op: Op, ours: Results, exact: Results) -> dict[str, float]:
    """Of a loss the error, of other values and of the judged gradients the largest relative to the largest entry."""
    value = relative(ours[0], exact[0]) if exact[0].dim() else (ours[0].double() - exact[0]).abs().item()
    found = {"value": value}
    judged = [number for number in op.judged if number in ours[1]]
    if judged:
        found["gradient"] = max(relative(ours[1][number], exact[1][number]) for number in judged)
    return found


def peak_memory(op: Op, name: str, size: Size, dtype_name: str, device: str) -> float:
    """MB beyond the inputs in one forward and backward, in this process.

    A smaller one before it warms libraries up, and one of this size compiles what is to be compiled.
    """
    provider = op.providers[name]
    function = provider.make(device)
    step(function, make_inputs(op, op.size(op.small), DTYPES[dtype_name], device, provider), provider.backend)
    inputs = make_inputs(op, size, DTYPES[dtype_name], device, provider)
    return peak_of(functools.partial(step, function, inputs, provider.backend), device)


def interleave(
    functions: Mapping[str, Callable[[], object]], rates: Mapping[str, Callable[[], float]], rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Each function's seconds, a round after the other with every function in it, and the median of each rate.

    One that fails, as `attempt` has it, is left out from then on.
    """
    measured: dict[str, list[float]] = {name: [] for name in functions}
    products: dict[str, list[float]] = {name: [] for name in rates}
    for _ in range(rounds):
        for name in list(measured):
            elapsed = attempt(name, functools.partial(seconds, functions[name], device))
            if elapsed is None:
                del measured[name]
            else:
                measured[name].append(elapsed)
        for name, rate in rates.items():
            products[name].append(rate())
    return measured, {name: statistics.median(values) for name, values in products.items()}


def _measure(op: Op, names: Sequence[str], size_text: str, dtype_name: str, rounds: int) -> list[dict[str, Any]]:
    # What torch.compile made for other sizes counts against its limit of kernels per function.
    torch.compiler.reset()
    device, size, dtype = here(), op.size(size_text), DTYPES[dtype_name]
    exact = exact_results(op, size, dtype, device) if size.exact else None
    once: dict[str, Callable[[], Results]] = {}
    found: dict[str, dict[str, float]] = {}

    def first(provider: Provider) -> tuple[Callable[[], Results], dict[str, float] | None]:
        """One step, and its errors."""
        function = make(provider, size, dtype_name, device)
        inputs = make_inputs(op, size, dtype, device, provider)
        one = functools.partial(step, function, inputs, provider.backend)
        results = one()
        if exact is None or results[0].shape != exact[0].shape:
            return one, None
        return one, errors(op, results, exact)

    for name in names:
        made = attempt(name, functools.partial(first, op.providers[name]))
        if made is None:
            continue
        once[name] = made[0]
        if made[1] is not None:
            found[name] = made[1]
    measured, gemm = interleave(once, gemm_rates(size.product, dtype, device), rounds, device)
    once.clear()
    group = []
    for name, times in measured.items():
        units = op.providers[name].units
        row = {
            "provider": name, "size": dict(size.numbers), "dtype": dtype_name, "device": device, "units": units,
            **row_of(times, units * size.operations / 1e9, gemm),
        }  # fmt: skip
        if name in found:
            row["error"] = found[name]
        row["peak_extra_mb"] = memory_of(op.name, name, size_text, dtype_name)
        group.append(row)
    print_table(op.name, op.baseline, group)
    return group


@dataclass(frozen=True)
class Bench:
    """What `vlmfast bench` knows of an op.

    `check(size)` returns the size as its rows name it, and raises ValueError where the text is none.
    `measure(providers, size, dtype, rounds)` prints a table and returns its rows; `memory(provider, size, dtype)` gives
    MB of one in this process; `plot(rows, machine, title, path)` draws all rows.
    """

    name: str
    sizes: Sequence[str]
    providers: Sequence[str]
    check: Callable[[str], str]
    measure: Callable[[Sequence[str], str, str, int], list[dict[str, Any]]]
    memory: Callable[[str, str, str], float]
    plot: Callable[[Sequence[dict[str, Any]], dict[str, Any], str, Path], None]


def bench_of(op: Op) -> Bench:
    return Bench(
        op.name,
        op.sizes,
        tuple(op.providers),
        lambda size: size_name(op.size(size).numbers),
        functools.partial(_measure, op),
        lambda name, size, dtype: peak_memory(op, name, op.size(size), dtype, here()),
        lines_plot,
    )


def run_under_pytest(op: Op, name: str, size_text: str, dtype_name: str, benchmark: Any) -> None:
    """One provider at one size as a pytest-benchmark; skips where the provider cannot run."""
    import pytest

    device = here()
    provider, dtype, size = op.providers[name], DTYPES[dtype_name], op.size(size_text)
    torch.compiler.reset()
    try:
        function = make(provider, size, dtype_name, device)
    except NotHere as reason:
        pytest.skip(str(reason))
    inputs = make_inputs(op, size, dtype, device, provider)

    def once() -> Results:
        results = step(function, inputs, provider.backend)
        if device == "cuda":
            torch.cuda.synchronize()
        return results

    results = benchmark.pedantic(once, rounds=5, warmup_rounds=2)
    exact = exact_results(op, size, dtype, device)
    found = errors(op, results, exact) if results[0].shape == exact[0].shape else {}
    gflop = provider.units * size.operations / 1e9
    benchmark.extra_info.update(provider=name, **size.numbers, dtype=dtype_name, gflop=gflop, error=found)
