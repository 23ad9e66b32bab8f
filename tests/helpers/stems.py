"""Drop-in stems beside their originals: outputs and all gradients, by the twice-eager rule."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
# A rounding in the result's dtype, of the largest value: sums are rounded once, but not always to the same side.
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def randomise(module: nn.Module) -> nn.Module:
    """Every parameter from a normal distribution: none may be zero, as mask tokens start."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def normalised(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (B, H, W, C) as a data loader would hand them to the original, (B, C, H, W)."""
    x = images.permute(0, 3, 1, 2).to(dtype) / 255
    return (x - torch.tensor(MEAN, dtype=dtype)[:, None, None]) / torch.tensor(STD, dtype=dtype)[:, None, None]


def output_and_gradients(
    module: nn.Module, method: str, pixels: Tensor, *args: Any, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    leaf = pixels.detach().clone().requires_grad_(pixels.is_floating_point())
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        tokens = getattr(module, method)(leaf, *args)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(tokens.shape, dtype=torch.float64, generator=generator)
    tokens.backward(cotangent.to(torch.bfloat16).to(tokens.dtype))
    grads = {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    if leaf.grad is not None:
        grads["gradient of pixels"] = leaf.grad
    return {"output": tokens.detach(), **grads}


def check_stem(
    original: nn.Module,
    stem: nn.Module,
    pixels: Tensor,
    *args: Any,
    method: str = "__call__",
    floats: Sequence[Tensor] = (),
    autocast: torch.dtype | None = None,
    exact: nn.Module | None = None,
    epsilon: float = 0.0,
) -> None:
    """stem(pixels, *args) errs at most twice as much as the original, against the original's float64 copy.

    `floats`: what the original and its copy get instead of uint8 pixels. `exact`: the copy, where it takes more.
    `epsilon`: of the largest value, where one rounding of the dtype is not enough.
    """
    exact_module = copy.deepcopy(original).double() if exact is None else exact
    eager_pixels, exact_pixels = floats or (pixels, pixels.double())
    truths = output_and_gradients(exact_module, method, exact_pixels, *args)
    eager = output_and_gradients(original, method, eager_pixels, *args, autocast=autocast)
    ours = output_and_gradients(stem, method, pixels, *args, autocast=autocast)
    if not pixels.is_floating_point():
        del eager["gradient of pixels"]
    assert ours.keys() == eager.keys()
    for name, value in ours.items():
        theirs, truth = eager[name], truths[name]
        assert value.shape == theirs.shape
        assert value.dtype == theirs.dtype, f"{name}: {value.dtype} for {theirs.dtype}"
        error, allowed = ((x.double() - truth).abs().max().item() for x in (value, theirs))
        largest = truth.abs().max().item()
        bound = 2 * allowed + max(epsilon, EPSILON[value.dtype]) * largest
        assert error <= bound, f"{name}: error {error:.2e}, the original {allowed:.2e}, values to {largest:.2e}"


def compiled(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """In one graph, with no memory of what other tests compiled of the same code."""
    torch.compiler.reset()
    return torch.compile(call, fullgraph=True, backend="aot_eager")


def saved_bytes(call: Callable[[], Tensor], parameters: Sequence[Tensor]) -> int:
    """Bytes that backward of call() will need, without parameters, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = call()
    del kept
    return sum(storages.values())
