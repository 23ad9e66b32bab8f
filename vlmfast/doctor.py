"""What `vlmfast doctor` finds out: the machine, the backends and why each would not run, and whether those that run
are right. Every backend in an op's IMPLS is checked against the op's `reference` in float64, on every device here.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import pkgutil
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

import vlmfast
from vlmfast.bench.report import processor
from vlmfast.bench.timing import seconds
from vlmfast.ops import _dispatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""A few roundings of float32, one of a 16-bit result."""
SPLIT_PRODUCTS = 2e-5
"""Of float32 features on a GPU, whose products are those of pairs of float16 numbers."""
PACKAGES = ("triton", "transformers", "open_clip_torch", "timm", "flamingo-pytorch", "accelerate")


@dataclass(frozen=True)
class Problem:
    """One call of an op: `options` are keyword arguments, `leaves` take gradients.

    `before`: the leading arguments, which take none. `epsilon`: of the rule, relative to the largest exact value.
    `floors`: of the rule, of the output and of each leaf's gradient. `operations` and `bytes`: of one forward and
    backward at the least, the bytes being those of inputs, outputs and gradients read and written once.
    """

    leaves: dict[str, Tensor]
    epsilon: float
    floors: tuple[float, ...]
    operations: float
    bytes: float
    options: dict[str, Any] = field(default_factory=dict)
    before: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class _Absent:
    """What backends look at of a tensor, on a device that is not here."""

    device: torch.device
    shape: tuple[int, ...] = (1, 1, 1, 32)
    dtype: torch.dtype = torch.float32

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


Maker = Callable[[torch.dtype, str, bool], Problem]
Reasons = dict[str, dict[str, str | None]]


def _loss(*scalars: float, units: int) -> Maker:
    """Images (N, D) and texts that are their images plus noise; `scalars` begin with the scale."""

    def make(dtype: torch.dtype, device: str, large: bool) -> Problem:
        rows, dim = (16384, 512) if large else (300, 72)
        image, noise = (F.normalize(torch.randn(rows, dim), dim=1) for _ in range(2))
        features = (t.to(device, dtype) for t in (image, F.normalize(image + noise, dim=1)))
        names = ("image", "text", "scale", "bias")
        leaves = dict(zip(names, [*features, *(torch.tensor(v, device=device) for v in scalars)], strict=False))
        # A float32 probability is off by up to 2^-24.
        rounding = 2.0**-22
        gradient = rounding * scalars[0] / rows
        return Problem(
            leaves,
            max(ROUNDING[torch.float32], scalars[0] * 2.0**-24),
            (rounding, gradient, gradient, *[rounding] * len(scalars)),
            units * rows * rows * dim,
            4 * rows * dim * dtype.itemsize,
        )

    return make


def _linear_cross_entropy(dtype: torch.dtype, device: str, large: bool) -> Problem:
    """A language model's head; a third of the rows has no label."""
    rows, dim, words = (8192, 768, 50257) if large else (200, 72, 500)
    shapes = {"hidden": (rows, dim), "weight": (words, dim), "bias": (words,)}
    leaves = {name: torch.randn(shape) for name, shape in shapes.items()}
    leaves["weight"] /= dim**0.5
    labels = torch.randint(words, (rows,)).masked_fill(torch.rand(rows) < 0.33, -100)
    with_label = int((labels != -100).sum())
    return Problem(
        {name: t.to(device, dtype) for name, t in leaves.items()},
        ROUNDING[torch.float32] * 2,
        (2.0**-22, *[2.0**-22 / with_label] * 3),
        6.0 * with_label * words * dim,
        2 * (2 * rows + 2 * words) * dim * dtype.itemsize,
        {"labels": labels.to(device)},
    )


def _patch_embed(dtype: torch.dtype, device: str, large: bool) -> Problem:
    """uint8 pixels (B, H, W, 3) to tokens, with a class token and positions."""
    batch, side, patch_size, width = (256, 224, 16, 768) if large else (3, 42, 14, 40)
    pixels = torch.randint(0, 256, (batch, side, side, 3)).byte().to(device)
    count, entries = (side // patch_size) ** 2, 3 * patch_size**2
    shapes = {"weight": (width, 3, patch_size, patch_size), "bias": (width,), "prefix": (1, width)}
    shapes["position"] = (count + 1, width)
    leaves = {name: (torch.randn(shape) / 10).to(device, dtype) for name, shape in shapes.items()}
    tokens = batch * (count + 1)
    return Problem(
        leaves,
        # A gradient is a sum over tokens in one float32 chain, eager's may be added in a luckier order.
        ROUNDING[dtype] + 2.0**-24 * tokens**0.5,
        (0.0,) * 5,
        4.0 * batch * count * entries * width,
        2 * pixels.numel() + 2 * tokens * width * dtype.itemsize,
        {"layout": "NHWC", "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)},
        (pixels,),
    )


def _media_attention(dtype: torch.dtype, device: str, large: bool) -> Problem:
    """Rows that see the last of several media; those before the first see nothing."""
    batch, heads, rows, media, tokens, dim = (8, 16, 1024, 16, 64, 64) if large else (2, 4, 70, 3, 37, 64)
    places = torch.rand(batch, rows).argsort(1)[:, :media]
    last = (places[:, None] <= torch.arange(rows)[:, None]).sum(2).to(device)
    shapes = {"q": rows, "k": media * tokens, "v": media * tokens}
    leaves = {name: torch.randn(batch, heads, length, dim).to(device, dtype) for name, length in shapes.items()}
    # P_ij (g_i v_j - delta_i) cancels where a row sees one key: its rounding is that of the terms.
    longest = {name: t.float().norm(dim=-1).max().item() for name, t in leaves.items()}
    cancelled = 2.0**-21 * longest["v"] * (dim**0.5 * 2) * dim**-0.5
    return Problem(
        leaves,
        ROUNDING[dtype],
        (0.0, cancelled * longest["k"], cancelled * longest["q"] * math.sqrt(rows), 0.0),
        14.0 * heads * dim * tokens * int((last > 0).sum()),
        (4 * leaves["q"].numel() + 4 * leaves["k"].numel()) * dtype.itemsize,
        {"media_lo": last, "media_hi": last, "tokens_per_media": tokens},
    )


def _gated_residual(dtype: torch.dtype, device: str, large: bool) -> Problem:
    """A branch under a gate of one number, a third of the rows masked out."""
    rows, dim = (8192, 4096) if large else (190, 72)
    residual, hidden = (torch.randn(rows, dim).to(device, dtype) for _ in range(2))
    leaves = {"residual": residual, "hidden": hidden, "gate": torch.tensor([0.7]).to(device, dtype)}
    return Problem(
        leaves,
        ROUNDING[dtype],
        # The gate's gradient is a sum of products that may cancel.
        (0.0, 0.0, 0.0, 2.0**-22 * hidden.float().norm().item()),
        0.0,
        6 * rows * dim * dtype.itemsize,
        {"row_mask": (torch.rand(rows) < 0.67).to(device)},
    )


MAKERS: dict[str, Maker] = {
    "info_nce": _loss(20.0, units=6),
    "sigmoid_loss": _loss(10.0, -10.0, units=6),
    "linear_cross_entropy": _linear_cross_entropy,
    "patch_embed": _patch_embed,
    "media_attention": _media_attention,
    "gated_residual": _gated_residual,
}


def implementations() -> dict[str, Mapping[str, _dispatch.Impl]]:
    """IMPLS of every op that has backends, in the order of `vlmfast.ops`."""
    modules = {name: _module(name) for name in vlmfast.ops.__all__}
    return {name: module.IMPLS for name, module in modules.items() if hasattr(module, "IMPLS")}


def reference(op: str) -> Callable[..., Tensor]:
    """The op's definition, which float64 makes the oracle."""
    found: Callable[..., Tensor] = _module(op).reference
    return found


def _module(op: str) -> Any:
    return sys.modules.get(f"vlmfast.ops.{op}")


def make_problem(op: str, dtype: torch.dtype, device: str, *, large: bool = False) -> Problem:
    """The op's problem, the same at every call; `large` is the size that is timed on a GPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MAKERS[op](dtype, device, large)


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """VLMFAST_BACKEND names this backend, whatever it was before."""
    with patch.dict(os.environ, VLMFAST_BACKEND=backend):
        yield


def results(function: Callable[..., Tensor], problem: Problem, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and the gradient of every leaf, the leaves cast to dtype first, if one is given."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in problem.leaves.values()]
    given = dict(zip(problem.leaves, leaves, strict=True))
    out = function(*problem.before, **given, **problem.options)
    rounded = next(iter(problem.leaves.values())).dtype
    gradients = torch.autograd.grad(out, leaves, _cotangent(out.shape, rounded, out.device).to(out.dtype))
    return [out.detach(), *gradients]


@functools.lru_cache(maxsize=1)
def _cotangent(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is propagated back: of a loss 1, of other values random numbers that the dtype holds, kept for timings."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(1)) if shape else torch.ones(())
    return made.to(device, dtype)


def check(op: str, backend: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Output and gradients of one backend by the rule of the tests, and twice bit for bit.

    Error against float64 <= 2 * error of the eager expression + epsilon * (largest exact value) + floor.

    Returns:
        op, backend, device, dtype, passed, `outputs` (per output its error, eager's and the bound) and `failures`, a
        sentence for each thing that is wrong.
    """
    row: dict[str, Any] = {"op": op, "backend": backend, "device": device, "dtype": str(dtype).removeprefix("torch.")}
    outputs: dict[str, dict[str, float]] = {}
    failures: list[str] = []
    public, eager_op = getattr(vlmfast.ops, op), reference(op)
    try:
        problem = make_problem(op, dtype, device)
        with forced(backend):
            ours, again = results(public, problem), results(public, problem)
        exact, eager = results(eager_op, problem, torch.float64), results(eager_op, problem)
        if not all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)):
            failures.append("a second call gave other bits")
        epsilon = max(problem.epsilon, SPLIT_PRODUCTS if device == "cuda" else 0.0)
        names = ("output", *(f"{name} gradient" for name in problem.leaves))
        for name, a, b, c, floor in zip(names, ours, eager, exact, problem.floors, strict=True):
            error, allowed = ((t.double() - c).abs().max().item() for t in (a, b))
            bound = 2 * allowed + epsilon * c.abs().max().item() + floor
            outputs[name] = {"error": error, "eager": allowed, "bound": bound}
            if not error <= bound:
                failures.append(f"{name}: error {error:.2e}, bound {bound:.2e} (eager's {allowed:.2e})")
    except Exception as error:  # whatever a broken kernel does is the finding
        failures.append(f"{type(error).__name__}: {error}")
    return {**row, "passed": not failures, "outputs": outputs, "failures": failures}


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def runnable(device: str) -> list[tuple[str, str]]:
    """(op, backend) of all that can run on the device's tensors."""
    return _running(reasons(device))


def _running(whys: Reasons) -> list[tuple[str, str]]:
    return [(op, name) for op, why in whys.items() for name, reason in why.items() if reason is None]


def reasons(device: str) -> Reasons:
    """Per op, why each backend would not run on tensors of the device, which may be missing here; None where it would.

    Each is asked as if VLMFAST_BACKEND named it: triton runs on CPU tensors when it is asked for in its interpreter.
    """
    probe = (torch.zeros(1, 1, 1, 32, device=device) if device in devices() else _Absent(torch.device(device)),) * 3
    found: Reasons = {}
    for op, impls in implementations().items():
        found[op] = {}
        for name, impl in impls.items():
            with forced(name):
                try:
                    found[op][name] = impl.unsupported(*probe)
                except (RuntimeError, AssertionError):  # torch's two ways to say that there is no GPU to ask
                    found[op][name] = "cannot say: needs a CUDA GPU"
    return found


def facts() -> dict[str, Any]:
    """Versions, processor, instruction set, threads and GPUs."""
    found: dict[str, Any] = {"vlmfast": vlmfast.__version__, "python": platform.python_version()}
    found |= {"torch": torch.__version__, "cuda of torch": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found |= {"system": platform.platform(), "processor": processor(), "threads": torch.get_num_threads()}
    core = _dispatch.core
    found["core"] = core.build_info() if core else _dispatch.CORE_MISSING
    found["gpus"] = [
        {
            "name": torch.cuda.get_device_name(number),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(number))),
            "memory_gb": round(torch.cuda.get_device_properties(number).total_memory / 1e9, 1),
        }
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    return found


def kernels() -> dict[str, list[str] | str]:
    """The functions of the extension for CPUs and GPUs, and Triton's kernels; a reason where they are not."""
    core, cuda = _dispatch.core, _dispatch.cuda_core
    missing = _dispatch.CORE_MISSING or (core.build_info().get("without_cuda") if core else "")
    return {
        "cpu": _functions(core) if core else str(missing),
        "cuda": _functions(cuda) if cuda else f"not built: {missing}",
        "triton": _triton_kernels(),
        "torch": "PyTorch ops",
    }


def _functions(module: Any) -> list[str]:
    return [name for name in dir(module) if name.endswith(("_forward", "_backward"))]


def _triton_kernels() -> list[str] | str:
    try:
        jit = importlib.import_module("triton.runtime").JITFunction
    except ImportError as error:
        return f"triton is not there ({error})"
    package = importlib.import_module("vlmfast.kernels")
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"vlmfast.kernels.{info.name}")
        kernels = (value for value in vars(module).values() if isinstance(value, jit))
        found += [f"{info.name}.{k.__name__}" for k in kernels if k.__name__.endswith("_kernel")]
    return found


def _rate(function: Callable[[], object], device: str, rounds: int) -> float:
    """The median of the seconds that it takes, after two calls that warm up."""
    return statistics.median([seconds(function, device) for _ in range(rounds + 2)][2:])


def rates(device: str, *, side: int = 8192, copied: int = 1 << 30, rounds: int = 10) -> dict[str, float]:
    """What the device does at best: `bandwidth` (bytes/s, of a copy of so many bytes, read and written) and FLOP/s.

    The matrix products are of (side, side) matrices; float32's is TF32's on a GPU, beside IEEE `float32 ieee`.
    """
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"bandwidth": 2 * copied / _rate(lambda: target.copy_(source), device, rounds)}
    kept = torch.get_float32_matmul_precision()
    settings = [("float16", "high"), ("bfloat16", "high"), ("float32", "high"), ("float32 ieee", "highest")]
    try:
        for name, precision in settings:
            torch.set_float32_matmul_precision(precision)
            a = torch.randn(side, side, device=device).to(DTYPES[name.split()[0]])
            found[name] = 2 * side**3 / _rate(functools.partial(torch.matmul, a, a), device, rounds)
    finally:
        torch.set_float32_matmul_precision(kept)
    return found


def timings(device: str, peak: Mapping[str, float], *, large: bool = True, rounds: int = 10) -> list[dict[str, Any]]:
    """Forward and backward of every op, backend and dtype that runs, and the share of its roofline.

    The roofline is the longer of operations / rate of products of the dtype and bytes / bandwidth, of `peak` from
    `rates`; both count what is needed at the least, so that the share cannot pass 1 by recomputing.
    """
    rows = []
    for op, backend in runnable(device):
        for name, dtype in DTYPES.items():
            public = getattr(vlmfast.ops, op)
            row: dict[str, Any] = {"op": op, "backend": backend, "device": device, "dtype": name}
            try:
                problem = make_problem(op, dtype, device, large=large)
                roof = max(problem.operations / peak[name], problem.bytes / peak["bandwidth"])
                with forced(backend):
                    taken = _rate(functools.partial(results, public, problem), device, rounds)
            except Exception as error:  # said in the row; the check of the same backend decides the exit code
                rows.append({**row, "failure": f"{type(error).__name__}: {error}"})
                continue
            rows.append({**row, "seconds": taken, "roofline_seconds": roof, "share": roof / taken})
    return rows


def _left_out(device: str, whys: Reasons) -> list[str]:
    """The backends that cannot run on the device, a line for all ops that have the same reason."""
    ops_of: dict[tuple[str, str], list[str]] = {}
    for op, why in whys.items():
        for backend, reason in why.items():
            if reason:
                ops_of.setdefault((backend, reason), []).append(op)
    return [f"{backend} on {device} tensors ({', '.join(ops)}): {why}" for (backend, why), ops in ops_of.items()]


def report() -> dict[str, Any]:
    """All of it, as `vlmfast doctor --json` writes it; `passed` says whether every check did."""
    here = devices()
    # Before the checks: once a kernel has made an illegal access, whatever asks the GPU raises.
    backends = {device: reasons(device) for device in ("cpu", "cuda")}
    found: dict[str, Any] = {"machine": facts(), "backends": backends, "kernels": kernels()}
    not_checked = [line for device in here for line in _left_out(device, backends[device])]
    asked = [(op, backend, device) for device in here for op, backend in _running(backends[device])]
    checks = [check(op, backend, dtype, device) for op, backend, device in asked for dtype in DTYPES.values()]
    passed = all(row["passed"] for row in checks)
    speed = "bandwidth, matrix products, shares of the roofline"
    if "cuda" in here:
        try:
            peak = rates("cuda")
            found |= {"rates": peak, "timings": timings("cuda", peak)}
        except Exception as error:  # whatever a broken or full GPU does is the finding
            not_checked.append(f"{speed}: {type(error).__name__}: {error}")
            passed = False
    else:
        not_checked.append(f"every op on CUDA tensors, {speed}: needs a CUDA GPU")
    return {**found, "checks": checks, "not_checked": not_checked, "passed": passed}
