"""patch(model): vlmfast's modules in the place of those it knows, over the same parameters; unpatch(model): back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vlmfast.integrations.rules import KINDS, Method, Rule, class_of, rules_for
from vlmfast.nn._attention import copy_modes
from vlmfast.nn._stem import reason_to_call

STATE = "_vlmfast_patch"
"""Attribute of a module whose forward or children were replaced: the list of those changes."""

OURS = ("training", "mean", "std", "layout")
"""Attributes of a stem that its original does not get back as they are: the mode goes by itself, the others are new."""


@dataclass
class PatchReport:
    """What `patch` did. As a context manager it undoes that, and no other call's, on leaving.

    Attributes:
        model: that was patched.
        replaced: (name in the model, class, what stands there now); the name of the model itself is "".
        left: (name, class, reason) of the parts that vlmfast knows and did not replace.
    """

    model: nn.Module
    replaced: list[tuple[str, str, str]] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)
    _changes: list[_Change] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, left {len(self.left)}"]
        lines += [f"  {name or '(model)'}: {old} -> {new}" for name, old, new in self.replaced]
        lines += [f"  {name or '(model)'}: {old} left: {reason}" for name, old, reason in self.left]
        return "\n".join(lines)

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(self, *error: object) -> None:
        _undo([change for change in self._changes if change in change.parent.__dict__.get(STATE, [])])


@dataclass(eq=False)
class _Change:
    """One change of a patched model: a submodule of parent, or the forward of parent where name is None."""

    parent: nn.Module
    name: str | None
    original: Any
    replacement: Any

    def current(self) -> Any:
        """What stands there now, or None."""
        return self.parent.__dict__.get("forward") if self.name is None else self.parent._modules.get(self.name)

    def stands(self) -> bool:
        """Whether it is still there to be undone; others may have put something else, or nothing, in its place."""
        now = self.current()
        if self.name is None and now is not None:
            # accelerate's unwrap_model binds the function anew.
            return getattr(now, "__func__", now) is getattr(self.replacement, "__func__", self.replacement)
        return now is self.replacement

    def refused(self) -> str | None:
        """Why it cannot be undone, or None."""
        now, replacement = self.current(), self.replacement
        if self.name is None:
            if now is None or self.stands():
                return None
            return f"the forward of its {class_of(self.parent).__name__} was replaced since it was patched"
        kind = type(self.original).__name__
        if now is None or not any(module is replacement for module in now.modules()):
            return None
        if _sharded(replacement) or getattr(replacement, "_is_fsdp_managed_module", False):
            return f"the parameters of its {kind} were sharded (FSDP) since it was patched"
        if dict(self.original.named_parameters()).keys() != dict(replacement.named_parameters()).keys():
            return f"its {kind} has other parameters than when it was patched"
        if now is not replacement:
            return f"its {kind} is inside of a {type(now).__name__} since it was patched"
        if "forward" in replacement.__dict__:
            return f"the forward of its {kind} was replaced since it was patched"
        return None

    def undo(self) -> None:
        if not self.stands():
            return
        if self.name is None:
            self.parent.__dict__.pop("forward")
            self.parent.__dict__.pop("_replicate_for_data_parallel", None)
            return
        original, replacement = self.original, self.replacement
        for name, parameter in replacement.named_parameters(remove_duplicate=False):
            owner, _, leaf = name.rpartition(".")
            original.get_submodule(owner)._parameters[leaf] = parameter
        copy_modes(replacement, original)
        if replacement._modules is original._modules:  # one that has all that the original has
            given = {name: value for name, value in vars(replacement).items() if name[0] != "_" and name not in OURS}
            vars(original).update(given)
        self.parent._modules[self.name] = original


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
        TypeError: model is not a module, only no words.
        ValueError: only has another word.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module; got {type(model).__name__}")
    words = KINDS if only is None else (only,) if isinstance(only, str) else only
    if not isinstance(words, Collection) or not all(isinstance(word, str) for word in words):
        raise TypeError(f"patch: only must be a word or a list of words, of {', '.join(KINDS)}; got {only!r}")
    kinds = set(words)
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
        if any(change.name is None and change.current() is not None for change in module.__dict__.get(STATE, [])):
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
            if isinstance(replacement, Method):
                module.__dict__["_replicate_for_data_parallel"] = Method(_replica, module)
            _record(report, _Change(module, None, None, replacement))
            report.replaced.append((name, kind, "forward without the logits"))
            continue
        leaf = name.rpartition(".")[2]
        _record(report, _Change(parents[-1], leaf, module, replacement))
        parents[-1]._modules[leaf] = replacement
        replaced.append(module)
        now = type(replacement)
        report.replaced.append((name, kind, f"{now.__module__}.{now.__qualname__}"))
    return report


def unpatch(model: nn.Module) -> None:
    """Undoes every `patch` of the model, or of what is in it; nothing happens to one that was not patched.

    Parameters stay those that the model has now, also where they were replaced since (load_state_dict with assign), and
    so do modes and, of stems, attributes. What somebody has taken out since, or put another module in for, stays as it
    is.

    Raises:
        TypeError: model is not a module.
        ValueError: something that was replaced was sharded, wrapped or got other parameters since, or somebody put
            another forward over ours; nothing is undone then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model must be a torch.nn.Module; got {type(model).__name__}")
    _undo([change for module in model.modules() for change in module.__dict__.get(STATE, [])])


def _undo(changes: list[_Change]) -> None:
    if reason := next(filter(None, (change.refused() for change in changes)), None):
        raise ValueError(f"unpatch: {reason}")
    for change in reversed(changes):
        change.undo()
        state = change.parent.__dict__[STATE]
        state.remove(change)
        if not state:
            del change.parent.__dict__[STATE]


def _record(report: PatchReport, change: _Change) -> None:
    state = change.parent.__dict__.setdefault(STATE, [])
    if change.name is None:  # a forward of ours that somebody has deleted
        state[:] = [other for other in state if other.name is not None]
    state.append(change)
    report._changes.append(change)


def _replica(module: nn.Module) -> nn.Module:
    """A replica of DataParallel, which copies attributes: its forward has to be bound to itself."""
    replica = type(module)._replicate_for_data_parallel(module)
    function = getattr(replica.__dict__["forward"], "__func__", None)
    if function is not None:
        replica.__dict__["forward"] = Method(function, replica)
    return replica


def _candidates(
    model: nn.Module, known: dict[type[nn.Module], Rule]
) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Name, module and the modules around it, outermost first, of each place that has a module of a known class."""
    places: list[tuple[str, nn.Module, list[nn.Module]]] = [("", model, [])]
    while places:
        name, module, parents = places.pop()
        if class_of(module) in known:
            yield name, module, parents
        inner = [
            (f"{name}.{leaf}" if name else leaf, child) for leaf, child in module._modules.items() if child is not None
        ]
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
