"""patch(model): vlmfast's modules in the place of those it knows, over the same parameters; unpatch(model): back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vlmfast.integrations.rules import KINDS, Rule, class_of, rules_for
from vlmfast.nn._stem import reason_to_call

STATE = "_vlmfast_patch"
"""Attribute of a module whose forward or children were replaced: the list of those changes."""


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

    def refused(self) -> str | None:
        """Why it cannot be undone, or None."""
        if self.name is None:
            return None
        replacement = self.parent._modules[self.name]
        assert replacement is not None
        kind = type(self.original).__name__
        if _sharded(replacement) or getattr(replacement, "_is_fsdp_managed_module", False):
            return f"the parameters of its {kind} were sharded (FSDP) since it was patched"
        if dict(self.original.named_parameters()).keys() != dict(replacement.named_parameters()).keys():
            return f"its {kind} has other parameters than when it was patched"
        return None

    def undo(self) -> None:
        if self.name is None:
            del self.parent.__dict__["forward"]
            return
        replacement = self.parent._modules[self.name]
        assert replacement is not None
        for name, parameter in replacement.named_parameters(remove_duplicate=False):
            owner, _, leaf = name.rpartition(".")
            self.original.get_submodule(owner)._parameters[leaf] = parameter
        self.original.train(replacement.training)
        self.parent._modules[self.name] = self.original


def patch(model: nn.Module, *, only: Collection[str] | None = None) -> PatchReport:
    """Puts vlmfast's modules and losses into a model of transformers, open_clip, timm, open_flamingo, flamingo-pytorch.

    The instance is changed in place, no class and no module of a library. Parameters are the originals' own: optimizers
    made before go on working, and keys of the state_dict do not change. Patching again replaces what has come since.

    Args:
        model: a model, or open_clip's ClipLoss, CoCaLoss or SigLipLoss; DistributedDataParallel or torch.compile may be
            around it. Of what FSDP has sharded the losses are replaced, modules are not: patch those before.
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
    new: dict[int, Any] = {}
    replaced: list[nn.Module] = []
    for name, module, parents in list(_candidates(model, known)):
        rule, kind = known[class_of(module)], class_of(module).__name__
        if any(parent in replaced or type(parent).__module__.startswith("vlmfast.nn") for parent in parents):
            continue
        if any(change.name is None for change in module.__dict__.get(STATE, [])):
            continue
        try:
            if id(module) not in new:
                new[id(module)] = _replacement(rule, module, parents)
        except (TypeError, ValueError) as error:
            report.left.append((name, kind, str(error)))
            continue
        replacement = new[id(module)]
        if rule.kind == "loss":
            module.__dict__["forward"] = replacement
            module.__dict__.setdefault(STATE, []).append(_Change(module, None, None))
            report.replaced.append((name, kind, "forward without the logits"))
            continue
        replacement.train(module.training)
        leaf = name.rpartition(".")[2]
        parents[-1].__dict__.setdefault(STATE, []).append(_Change(parents[-1], leaf, module))
        parents[-1]._modules[leaf] = replacement
        replaced.append(module)
        now = type(replacement)
        report.replaced.append((name, kind, f"{now.__module__}.{now.__qualname__}"))
    return report


def unpatch(model: nn.Module) -> None:
    """Undoes every `patch` of the model, or of what is in it; nothing happens to one that was not patched.

    Parameters stay those that the model has now, also where they were replaced since (load_state_dict with assign).

    Raises:
        TypeError: model is not a module.
        ValueError: something that was replaced was sharded or got other parameters since; nothing is undone then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model must be a torch.nn.Module; got {type(model).__name__}")
    changes = {id(change): change for module in model.modules() for change in module.__dict__.get(STATE, [])}
    if reason := next(filter(None, (change.refused() for change in changes.values())), None):
        raise ValueError(f"unpatch: {reason}")
    for change in reversed(changes.values()):
        change.undo()
        change.parent.__dict__.pop(STATE, None)


def _candidates(
    model: nn.Module, known: dict[type[nn.Module], Rule]
) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Name, module and the modules around it, outermost first, of each place that has a module of a known class."""
    places: list[tuple[str, nn.Module, list[nn.Module]]] = [("", model, [])]
    while places:
        name, module, parents = places.pop()
        if class_of(module) in known:
            yield name, module, parents
        inner = [(f"{name}.{leaf}" if name else leaf, child) for leaf, child in module.named_children()]
        places += [(path, child, [*parents, module]) for path, child in reversed(inner)]


def _replacement(rule: Rule, module: nn.Module, parents: list[nn.Module]) -> Any:
    if "forward" in module.__dict__:
        raise ValueError("its forward was replaced")
    if rule.kind == "loss":
        return rule.replace(module)
    if _sharded(module) or any(type(parent).__name__ == "FullyShardedDataParallel" for parent in parents):
        raise ValueError("its parameters are sharded (FSDP): patch before sharding")
    if not parents:
        raise ValueError("it is the model itself, and only what is inside of it can be replaced")
    hooks = (
        module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks,
        module._state_dict_hooks, module._load_state_dict_pre_hooks,
    )  # fmt: skip
    own = type(module).__name__
    # Stems know which of their submodules they do not call; the others call few of theirs.
    inner = [] if rule.kind == "patch_embed" else list(module.modules())[1:]
    if reason := next(filter(None, map(reason_to_call, inner)), None):
        raise ValueError(reason)
    replacement = rule.replace(module)
    shared = replacement._forward_hooks is module._forward_hooks
    if any(hooks) and not shared:
        raise ValueError(f"the {own} has hooks, which would be lost")
    return replacement


def _sharded(module: nn.Module) -> bool:
    return any(hasattr(parameter, "device_mesh") for parameter in module.parameters())
