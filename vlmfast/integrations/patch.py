"""patch(model): vlmfast's modules in the place of those it knows, over the same parameters; unpatch(model): back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vlmfast.integrations.rules import KINDS, Rule, rules_for

STATE = "_vlmfast_patch"


@dataclass
class PatchReport:
    """What `patch` did. As a context manager it undoes it on leaving.

    Attributes:
        model: that was patched.
        replaced: (name in the model, class, what stands there now); the name of the model itself is "".
        left: (name, class, reason) of the parts that vlmfast knows and did not replace.
    """

    model: nn.Module
    replaced: list[tuple[str, str, str]] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, left {len(self.left)}"]
        lines += [f"  {name or '(model)'}: {old} -> {new}" for name, old, new in self.replaced]
        lines += [f"  {name or '(model)'}: {old} left: {reason}" for name, old, reason in self.left]
        return "\n".join(lines)

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(self, *error: object) -> None:
        unpatch(self.model)


@dataclass
class _Change:
    """One change of a patched model: a submodule of parent, or the forward of parent where name is None."""

    parent: nn.Module
    name: str | None
    original: Any

    def undo(self) -> None:
        if self.name is None:
            del self.parent.__dict__["forward"]
            return
        self.original.train(self.parent._modules[self.name].training)  # type: ignore[union-attr]
        self.parent._modules[self.name] = self.original


def patch(model: nn.Module, *, only: Collection[str] | None = None) -> PatchReport:
    """Puts vlmfast's modules and losses into a model of transformers, open_clip, timm, open_flamingo, flamingo-pytorch.

    The instance is changed in place, no class and no module of a library. Parameters are the originals' own: optimizers
    made before go on working, and keys of the state_dict do not change. Patching again replaces what has come since.

    Args:
        model: a model, or open_clip's ClipLoss or SigLipLoss; DistributedDataParallel around it is looked into.
        only: of "patch_embed" (stems of vision transformers), "cross_attention" (gated, of Flamingo and its kin) and
            "loss" (return_loss=True of two-tower models, which then give no logits); None: all.
    Returns:
        What was replaced, and what was left and why; `with patch(model) as report:` undoes it at the end.
    Raises:
        TypeError: model is not a module.
        ValueError: only has another word.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module; got {type(model).__name__}")
    kinds = set(KINDS if only is None else [only] if isinstance(only, str) else only)
    if unknown := sorted(kinds - set(KINDS)):
        raise ValueError(f"patch: only must be of {', '.join(KINDS)}; got {', '.join(unknown)}")
    report = PatchReport(model)
    known = {rule.original: rule for rule in rules_for(model) if rule.kind in kinds}
    changes: list[_Change] = model.__dict__.setdefault(STATE, [])
    new: dict[int, Any] = {}
    for name, module, parents in list(_candidates(model, known)):
        rule = known[type(module)]
        replaced = [change.original for change in changes]
        if any(parent in replaced or type(parent).__module__.startswith("vlmfast.nn") for parent in parents):
            continue
        try:
            if id(module) not in new:
                new[id(module)] = _replacement(rule, module, parents)
        except (TypeError, ValueError) as error:
            report.left.append((name, type(module).__name__, str(error)))
            continue
        replacement = new[id(module)]
        if rule.kind == "loss":
            module.__dict__["forward"] = replacement
            changes.append(_Change(module, None, None))
            report.replaced.append((name, type(module).__name__, "forward without the logits"))
            continue
        replacement.train(module.training)
        leaf = name.rpartition(".")[2]
        changes.append(_Change(parents[-1], leaf, module))
        parents[-1]._modules[leaf] = replacement
        kind = type(replacement)
        report.replaced.append((name, type(module).__name__, f"{kind.__module__}.{kind.__qualname__}"))
    return report


def unpatch(model: nn.Module) -> None:
    """Undoes every `patch` of the model; nothing happens to one that was not patched.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model must be a torch.nn.Module; got {type(model).__name__}")
    for change in reversed(model.__dict__.pop(STATE, [])):
        change.undo()


def _candidates(
    model: nn.Module, known: dict[type[nn.Module], Rule]
) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Name, module and the modules around it, outermost first, of each place that has a module of a known class."""
    places: list[tuple[str, nn.Module, list[nn.Module]]] = [("", model, [])]
    while places:
        name, module, parents = places.pop()
        if type(module) in known:
            yield name, module, parents
        inner = [(f"{name}.{leaf}" if name else leaf, child) for leaf, child in module.named_children()]
        places += [(path, child, [*parents, module]) for path, child in reversed(inner)]


def _replacement(rule: Rule, module: nn.Module, parents: list[nn.Module]) -> Any:
    if "forward" in module.__dict__:
        raise ValueError("its forward was replaced")
    if rule.kind == "loss":
        return rule.replace(module)
    if any(hasattr(parameter, "device_mesh") for parameter in module.parameters()) or any(
        type(parent).__name__ == "FullyShardedDataParallel" for parent in [*parents, module]
    ):
        raise ValueError("its parameters are sharded (FSDP): patch before sharding")
    if not parents:
        raise ValueError("it is the model itself, and only what is inside of it can be replaced")
    hooks = (
        module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks,
        module._state_dict_hooks, module._load_state_dict_pre_hooks,
    )  # fmt: skip
    own = type(module).__name__
    replacement = rule.replace(module)
    shared = replacement._forward_hooks is module._forward_hooks
    if any(hooks) and not shared:
        raise ValueError(f"the {own} has hooks, which would be lost")
    return replacement
