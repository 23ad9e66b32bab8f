"""patch(model): vlmfast's modules in the place of those it knows, over the same parameters; unpatch(model): back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vlmfast.integrations.changes import STATE, Change, changes_in, record, sharded, undo
from vlmfast.integrations.rules import KINDS, Method, Rule, class_of, rules_for
from vlmfast.nn._stem import forward_replaced


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
    _changes: list[Change] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, left {len(self.left)}"]
        lines += [f"  {name or '(model)'}: {old} -> {new}" for name, old, new in self.replaced]
        lines += [f"  {name or '(model)'}: {old} left: {reason}" for name, old, reason in self.left]
        return "\n".join(lines)

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(self, *error: object) -> None:
        undo([change for change in self._changes if change in change.parent.__dict__.get(STATE, [])])


def patch(model: nn.Module, *, only: Collection[str] | None = None) -> PatchReport:
    """Puts vlmfast's modules and losses into a model of transformers, open_clip, timm, open_flamingo, flamingo-pytorch.

    The instance is changed in place, no class and no module of a library. Parameters are the originals' own: optimizers
    made before go on working, and keys of the state_dict do not change. Patching again replaces what has come since.

    Args:
        model: a model, or open_clip's ClipLoss, CoCaLoss or SigLipLoss; DistributedDataParallel or torch.compile may be
            around it. Of what FSDP has sharded the losses are replaced, modules are not: patch those before.
        only: of "patch_embed" (stems of vision transformers), "cross_attention" (gated, of Flamingo and its kin) and
            "loss" (return_loss=True of two-tower models, labels of causal and masked language models in training, which
            then give no logits); None: all.
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
        kind = class_of(module).__name__
        if any(parent in replaced or _is_ours(parent) for parent in parents):
            continue
        if class_of(module) not in known:
            base = next(base for base in type(module).__mro__ if base in known)
            report.left.append((name, kind, f"it is a subclass of {base.__name__}, and may compute something else"))
            continue
        rule = known[class_of(module)]
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
            change = Change(module, None, None, replacement)
            record(change)
            report._changes.append(change)
            report.replaced.append((name, kind, "forward without the logits"))
            continue
        leaf = name.rpartition(".")[2]
        change = Change(parents[-1], leaf, module, replacement)
        record(change)
        report._changes.append(change)
        parents[-1]._modules[leaf] = replacement
        replaced.append(module)
        now = type(replacement)
        report.replaced.append((name, kind, f"{now.__module__}.{now.__qualname__}"))
    return report


def unpatch(model: nn.Module) -> None:
    """Undoes every `patch` of the model, or of what is in it; nothing happens to one that was not patched.

    Parameters stay those that the model has now, also where they were replaced since (load_state_dict with assign), and
    so do modes, hooks and what else was set, put in or taken out since. Only what module.compile() made of a replaced
    module is lost: compile its original anew.

    Raises:
        TypeError: model is not a module.
        ValueError: something that was replaced was sharded, wrapped, parametrised or got other parameters since, or
            somebody put another forward over ours; nothing is undone then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model must be a torch.nn.Module; got {type(model).__name__}")
    undo(changes_in(model))


def _replica(module: nn.Module) -> nn.Module:
    """A replica of DataParallel, which copies attributes: its forward has to be bound to itself."""
    replica = type(module)._replicate_for_data_parallel(module)
    function = getattr(replica.__dict__.get("forward"), "__func__", None)
    if function is not None:
        replica.__dict__["forward"] = Method(function, replica)
    return replica


def _candidates(
    model: nn.Module, known: dict[type[nn.Module], Rule]
) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Name, module and the modules around it, outermost first, where a module is of a known class or a subclass."""
    places: list[tuple[str, nn.Module, list[nn.Module]]] = [("", model, [])]
    while places:
        name, module, parents = places.pop()
        if class_of(module) in known or (not _is_ours(module) and not known.keys().isdisjoint(type(module).__mro__)):
            yield name, module, parents
        inner = [
            (f"{name}.{leaf}" if name else leaf, child) for leaf, child in module._modules.items() if child is not None
        ]
        places += [(path, child, [*parents, module]) for path, child in reversed(inner)]


def _is_ours(module: nn.Module) -> bool:
    """Whether it is one of vlmfast.nn, also where FSDP or torch.nn.utils.parametrize gave it a class of its own."""
    return any(base.__module__.startswith("vlmfast.nn") for base in type(module).__mro__)


def _replacement(rule: Rule, module: nn.Module, parents: list[nn.Module]) -> Any:
    if forward_replaced(module):
        raise ValueError("its forward was replaced")
    if rule.kind == "loss":
        return rule.replace(module)
    if sharded(module) or any(type(parent).__name__ == "FullyShardedDataParallel" for parent in parents):
        raise ValueError("its parameters are sharded (FSDP): patch before sharding")
    if not parents:
        raise ValueError("it is the model itself, and only what is inside of it can be replaced")
    if type(parents[-1]).__name__ == "OptimizedModule":
        raise ValueError("torch.compile has taken its forward: patch before compiling it by itself")
    return rule.replace(module)
