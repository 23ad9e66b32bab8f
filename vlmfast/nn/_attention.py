"""What the cross-attention modules share: heads, other modules' parameters, other libraries' masks."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vlmfast.ops import gated_residual, media_attention
from vlmfast.ops.gated_residual import reference as gated_residual_reference
from vlmfast.ops.media_attention import reference as media_attention_reference

Module = TypeVar("Module", bound=nn.Module)


def split_heads(t: Tensor, heads: int) -> Tensor:
    """(B, L, heads * d) as (B, heads, L, d), without a copy."""
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(t: Tensor) -> Tensor:
    """(B, H, L, d) as (B, L, H * d), without a copy where heads lie side by side."""
    return t.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None, **options: Any) -> Tensor:
    """`vlmfast.ops.media_attention`, and its definition in PyTorch for float64, which no kernel has."""
    if q.dtype != torch.float64:
        return media_attention(q, k, v, key_bias=key_bias, **options)
    if key_bias is not None:
        # A sample whose keys are all at -inf is one that sees nothing, not one with a softmax over nothing.
        hidden = key_bias == -math.inf
        key_bias = key_bias.masked_fill(hidden, 0)
        options |= {"tokens_per_media": 1, "media_len": (~hidden).int()}
    return media_attention_reference(q, k, v, key_bias=key_bias, **options)


def add_gated(residual: Tensor, hidden: Tensor, gate: Tensor, **options: Any) -> Tensor:
    """`vlmfast.ops.gated_residual`, and its definition in PyTorch for float64, which no kernel has."""
    op = gated_residual_reference if torch.float64 in (residual.dtype, hidden.dtype, gate.dtype) else gated_residual
    return op(residual, hidden, gate, **options)


def original_part(cls: type[nn.Module], original: nn.Module, path: str, kind: type[nn.Module]) -> Any:
    """The submodule of original at path, whose sizes are to be read.

    Raises:
        ValueError: it is not there, or of another class, such as one that wraps it.
    """
    part: nn.Module | None = original
    for name in path.split("."):
        part = None if part is None else part._modules.get(name)
    if type(part) is not kind:
        wanted = f"{kind.__module__}.{kind.__qualname__}"
        raise ValueError(f"{cls.__name__}: the original's {path} must be {wanted}; got {type(part).__name__}")
    return part


def share(module: Module, original: nn.Module) -> Module:
    """Gives module original's parameters, the same objects under the same names, hooks, modes and other attributes.

    Returns:
        module.

    Raises:
        ValueError: names or shapes differ, or what the submodules are.
    """
    _check_submodules(module, original)
    own, given = dict(module.named_parameters()), dict(original.named_parameters())
    if own.keys() != given.keys():
        raise ValueError(
            f"{type(module).__name__}: the original must have the parameters {sorted(own)}; got {sorted(given)}"
        )
    for name, parameter in given.items():
        if parameter.shape != own[name].shape:
            raise ValueError(
                f"{type(module).__name__}: the original's {name} must be {tuple(own[name].shape)}; "
                f"got {tuple(parameter.shape)}"
            )
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)
    for name, part in module.named_modules(remove_duplicate=False):
        source = vars(original.get_submodule(name))
        own = vars(part).keys() | {"forward", "_compiled_call_impl"}
        vars(part).update({key: value for key, value in source.items() if key in SHARED or key not in own})
    copy_modes(original, module)
    return module


SHARED = frozenset(
    name for name in vars(nn.Module()) if "hook" in name or name in ("_buffers", "_non_persistent_buffers_set")
)
"""Attributes of every module that ours and the original have in common: hooks of the one are the other's."""


def copy_modes(source: nn.Module, target: nn.Module) -> None:
    """Gives target and its submodules the modes, training or not, of source's of the same names."""
    modes = {name: module.training for name, module in source.named_modules()}
    for name, module in target.named_modules():
        module.training = modes.get(name, module.training)


def _check_submodules(module: nn.Module, original: nn.Module) -> None:
    """A layer that was exchanged for another, or set up otherwise, would not compute what it computes in original."""
    given = dict(original.named_modules(remove_duplicate=False))
    own = dict(module.named_modules(remove_duplicate=False))
    for name in [*own, *(name for name in given if name not in own)]:
        wanted, got = (_description(modules.get(name)) for modules in (own, given))
        if name and wanted != got:
            raise ValueError(f"{type(module).__name__}: the original's {name} must be {wanted}; got {got}")


def _description(module: nn.Module | None) -> str:
    """What a submodule computes, but for its parameters."""
    if module is None:
        return "none"
    # Modules of modules have the library's own class in original.
    kind = type(module).__name__ if [*module.children()] else f"{type(module).__module__}.{type(module).__qualname__}"
    options = [f"{name}={getattr(module, name)}" for name in ("eps", "approximate") if hasattr(module, name)]
    return f"{kind}({', '.join(options)})"


def key_bias(name: str, mask: Tensor | None, batch: int, keys: int) -> Tensor | None:
    """media_attention's key_bias (batch, keys) from a mask over keys, the same for all queries.

    Args:
        name: of the class, for errors.
        mask (1 or batch, keys): nonzero where a key is one; or (1 or batch, 1, 1 or Lq, keys): bool, or floating point
            to be added, where less than half the least finite number becomes -inf.
    Raises:
        ValueError: another shape; on a CPU outside torch.compile also queries with different masks.
    """
    if mask is None:
        return None
    if mask.dim() not in (2, 4) or mask.shape[-1] != keys or mask.shape[0] not in (1, batch):
        raise ValueError(
            f"{name}: the mask must be ({batch}, {keys}) or ({batch}, 1, 1, {keys}); got {tuple(mask.shape)}"
        )
    if mask.dim() == 2:
        row = mask.bool()
    else:
        row = mask[:, 0, 0]
        if (
            mask.shape[2] > 1
            and looks_at_values(mask)
            and not torch.equal(mask[:, 0], row[:, None].expand_as(mask[:, 0]))
        ):
            raise ValueError(f"{name}: the mask must be the same for all queries; got one that is not")
    if row.dtype == torch.bool:
        row = torch.zeros_like(row, dtype=torch.float32).masked_fill(~row, -math.inf)
    else:
        row = row.masked_fill(row < torch.finfo(row.dtype).min / 2, -math.inf)
    return row.detach().expand(batch, -1)


def intervals(name: str, mask: Tensor, batch: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """media_attention's media_lo, media_hi (batch, Lq) and media_len (batch, keys), for media of one key, from a mask.

    Every query must see an interval of the keys that some query of its sample sees, which is so for images one after
    the other, each padded at its end.

    Args:
        name: of the class, for errors.
        mask (1 or batch, 1, Lq, keys): bool, or floating point to be added: 0 where a query sees a key.
    Raises:
        ValueError: another shape; on a CPU outside torch.compile also a query that does not see an interval.
    """
    if mask.dim() != 4 or mask.shape[-1] != keys or mask.shape[0] not in (1, batch):
        raise ValueError(f"{name}: the mask must be ({batch}, 1, queries, {keys}); got {tuple(mask.shape)}")
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].expand(batch, -1, -1)
    valid = seen.any(1)
    some = seen.any(2)
    first = seen.to(torch.uint8).argmax(2)
    last = keys - 1 - seen.to(torch.uint8).flip(2).argmax(2)
    lo, hi = torch.where(some, first + 1, 1), torch.where(some, last + 1, 0)
    if looks_at_values(mask):
        used = torch.nn.functional.pad(valid.cumsum(1), (1, 0))
        if (seen.sum(2) != used.gather(1, hi) - used.gather(1, lo - 1)).logical_and(some).any():
            raise ValueError(f"{name}: every query must see an interval of the keys; got a mask with gaps")
    return lo.int(), hi.int(), valid.int()


def looks_at_values(t: Tensor) -> bool:
    """Whether a check of values is made: on an accelerator it would stall the device at every step."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()
