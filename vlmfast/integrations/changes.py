"""What a patch changed in a model, and how each change is undone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vlmfast.integrations.rules import class_of
from vlmfast.nn._attention import SHARED
from vlmfast.nn._stem import forward_replaced, own_forward

STATE = "_vlmfast_patch"
"""Attribute of a module whose forward or children were replaced: the list of those changes."""

KEPT = SHARED | {
    "_parameters", "_modules", "forward", "_compiled_call_impl",
    "mean", "std", "layout", "empty", "before_media",
}  # fmt: skip
"""Attributes that an original does not get back as others are: containers, what calls our module, what it alone has."""


@dataclass(eq=False)
class Pair:
    """A module of ours and the one that it stands in for.

    Attributes:
        kind: ours' class when it was made; torch.nn.utils.parametrize gives it another.
        attributes: of ours when it was made.
    """

    ours: nn.Module
    original: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]

    @classmethod
    def of(cls, ours: nn.Module, original: nn.Module) -> list[Pair]:
        """One for ours itself and, where its submodules are not the original's own, one for each of those."""
        same = ours._modules is original._modules
        names = [""] if same else [name for name, _ in ours.named_modules()]
        parts = [(ours.get_submodule(name), original.get_submodule(name)) for name in names]
        return [cls(part, source, type(part), _attributes(part)) for part, source in parts]

    def hand_back(self) -> None:
        """Gives the original the parameters of ours, and the attributes that were set and deleted since."""
        now = _attributes(self.ours)
        for name, value in now.items():
            if name not in self.attributes or self.attributes[name] is not value:
                self.original.__dict__[name] = value
        for name in self.attributes.keys() - now.keys():
            self.original.__dict__.pop(name, None)
        self.original._parameters.update(self.ours._parameters)
        # Not hooks that are the same objects already, but the flag that torch keeps beside those of backward.
        self.original._is_full_backward_hook = self.ours._is_full_backward_hook


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in KEPT}


def _names(parameters: dict[str, Any]) -> set[str]:
    return {name for name, parameter in parameters.items() if parameter is not None}


@dataclass(eq=False)
class Change:
    """One change of a patched model: a submodule of parent, or the forward of parent where name is None."""

    parent: nn.Module
    name: str | None
    original: Any
    replacement: Any
    pairs: list[Pair] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.name is not None:
            self.pairs = Pair.of(self.replacement, self.original)

    def current(self) -> Any:
        """What stands there now, or None."""
        if self.name is not None:
            return self.parent._modules.get(self.name)
        return self.parent.__dict__.get("forward") if forward_replaced(self.parent) else None

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
        if sharded(replacement) or getattr(replacement, "_is_fsdp_managed_module", False):
            return f"the parameters of its {kind} were sharded (FSDP) since it was patched"
        if now is not replacement:
            return f"its {kind} is inside of a {type(now).__name__} since it was patched"
        if type(replacement) is not self.pairs[0].kind:
            return f"its {kind} became a {type(replacement).__name__} since it was patched"
        if any(_names(pair.ours._parameters) != _names(pair.original._parameters) for pair in self._pairs_there()):
            return f"its {kind} has other parameters than when it was patched"
        forward = replacement.__dict__.get("forward")
        if forward_replaced(replacement) and not own_forward(forward, self.original):
            return f"the forward of its {kind} was replaced since it was patched"
        return None

    def undo(self) -> None:
        if self.name is None:
            if self.stands():
                self.parent.__dict__.pop("forward")
            self.parent.__dict__.pop("_replicate_for_data_parallel", None)
            return
        if not self.stands():
            return
        originals = {pair.ours: pair.original for pair in self._pairs_there()}
        for pair in self.pairs:
            pair.hand_back()
        if self.replacement._modules is not self.original._modules:
            for ours in list(self.replacement.modules()):
                # Modules that were put in since go where ours were, and hold the originals of those that they hold.
                children = {name: originals.get(child, child) for name, child in ours._modules.items()}
                held_by = originals.get(ours, ours)
                held_by._modules.clear()
                held_by._modules.update(children)
        self.parent._modules[self.name] = self.original

    def _pairs_there(self) -> list[Pair]:
        """Those of modules that are still in the replacement, as they were made."""
        there = set(self.replacement.modules())
        return [pair for pair in self.pairs if pair.ours in there and type(pair.ours) is pair.kind]


def undo(changes: list[Change]) -> None:
    """Undoes all, the last first.

    Raises:
        ValueError: one cannot be undone; then none is.
    """
    if reason := next(filter(None, (change.refused() for change in changes)), None):
        raise ValueError(f"unpatch: {reason}")
    for change in reversed(changes):
        change.undo()
        state = change.parent.__dict__[STATE]
        state.remove(change)
        if not state:
            del change.parent.__dict__[STATE]


def record(change: Change) -> None:
    """Notes a change at its parent."""
    state = change.parent.__dict__.setdefault(STATE, [])
    if change.name is None:  # a forward of ours that somebody has taken away
        state[:] = [other for other in state if other.name is not None]
    state.append(change)


def changes_in(model: nn.Module) -> list[Change]:
    """All changes of model and of what is in it."""
    return [change for module in model.modules() for change in module.__dict__.get(STATE, [])]


def sharded(module: nn.Module) -> bool:
    """Whether FSDP has sharded its parameters."""
    return any(hasattr(parameter, "device_mesh") for parameter in module.parameters())
