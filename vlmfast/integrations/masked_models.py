"""transformers' masked models without logits in training: one rule for all that give the scores of a vocabulary head to
torch's cross-entropy. The head runs on the rows that have a label, and ends in linear_cross_entropy.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmfast.integrations.language_models import code_of, trains_on_labels
from vlmfast.integrations.rules import Method, Rule, class_of
from vlmfast.nn._stem import reason_to_call
from vlmfast.ops import linear_cross_entropy
from vlmfast.ops._arguments import DTYPES


def rules(model: nn.Module) -> Iterator[Rule]:
    """One for each class in the model that has a vocabulary head, and whose forward gives labels to a cross-entropy."""
    base = import_module("transformers").PreTrainedModel
    for kind, module in {class_of(module): module for module in model.modules()}.items():
        if not issubclass(kind, base) or "labels" not in inspect.signature(kind.forward).parameters:
            continue
        if not LOSSES.isdisjoint(code_of(kind).co_names) and _head(module) is not None:
            yield Rule("loss", kind, _on_labelled_rows)


LOSSES = {"CrossEntropyLoss", "loss_fcts", "mlm_loss_fct"}
"""Of which a forward names one: the class, or attributes of LXMERT and DistilBERT that hold an instance of it."""


def _head(model: Any) -> Any:
    """The layer onto the vocabulary: the output embeddings, or what is tied to the input embeddings as they are.

    None where the model has none, the model itself where something was exchanged that should have held it.
    """
    try:
        if (head := model.get_output_embeddings()) is not None:
            return head
        names = [name.removesuffix(".weight") for name in model._tied_weights_keys or () if name.endswith(".weight")]
        tied = (model.get_submodule(name) for name in names)
        return next((module for module in tied if not isinstance(module, nn.Embedding)), None)
    except AttributeError:
        return model


def _on_labelled_rows(model: Any) -> Method:
    head = _head(model)
    name = next((name for name, module in model.named_modules() if module is head), "")
    if not name:
        raise ValueError("the layer onto its vocabulary is not where its class has it")
    path = tuple(name.split("."))
    inner = model.get_submodule(path[0])
    if isinstance(inner, import_module("transformers").PreTrainedModel):
        raise ValueError(f"its layer onto the vocabulary is in its {path[0]}, a {type(inner).__name__}")
    forward = _Forward(model, path)
    if reason := forward.reason(model):
        raise ValueError(reason)
    return Method(forward, model)


class _Forward:
    """The forward of a masked model; in training and with labels its output has no logits.

    With return_logits=True, in evaluation, without labels, and with return_dict=False it is the original's, as it is
    where the head or the dtype are not those that are known. Where the forward does something else with its logits than
    to give them to cross_entropy, they are made.

    Args:
        path: names from the model to the layer onto the vocabulary. What holds that layer, if not the model, computes
            each row by itself, as heads of transformers do: linear layers, activations and layer norms.
    """

    def __init__(self, model: Any, path: tuple[str, ...]) -> None:
        self.__signature__ = inspect.signature(type(model).forward)
        self.path = path
        self.kinds = [type(module) for module in self._modules(model)]

    def _modules(self, model: Any) -> list[nn.Module]:
        """Those on the path that are there."""
        found, module = [], model
        for name in self.path:
            module = module._modules.get(name)
            if module is None:
                break
            found.append(module)
        return found

    def reason(self, model: Any) -> str | None:
        """Why the head must be called as it is, or None."""
        modules = self._modules(model)
        if [type(module) for module in modules] != self.kinds:
            return "its head was exchanged"
        for module in modules[:-1]:
            if type(module).__module__.split(".")[0] != "transformers":
                return f"its head is in a {type(module).__name__}, which would not be called"
            if reason := reason_to_call(module):
                return reason
        if reason := reason_to_call(modules[-1], nn.Linear):
            return reason
        if hasattr(modules[-1].weight, "device_mesh"):
            return "the weight of its head is sharded"
        return None

    def __call__(self, model: Any, *args: Any, return_logits: bool = False, **kwargs: Any) -> Any:
        original = class_of(model).forward
        # Dynamo has a cross-entropy of its own, which asks no subclass of a tensor.
        if torch.compiler.is_compiling():
            return original(model, *args, **kwargs)
        if return_logits or not trains_on_labels(model, self.__signature__, args, kwargs) or self.reason(model):
            return original(model, *args, **kwargs)
        if self._modules(model)[-1].weight.dtype not in DTYPES:
            return original(model, *args, **kwargs)
        output = original(_Instead(model, self.path), *args, **kwargs)
        for name, value in list(output.items()):
            if isinstance(value, _Scores):
                pending = value.pending
                output[name] = None if pending.fused else pending.made()
        return type(output)(**{name: value for name, value in output.items() if value is not None})


class _Instead:
    """A module in whose forward the head at the end of path gives its scores later; all else is the module's."""

    def __init__(self, module: Any, path: tuple[str, ...]) -> None:
        # Of a name that no module has: all others are its own.
        self._vlmfast_module = module
        child = getattr(module, path[0])
        setattr(self, path[0], _Head(child, path[1:]) if len(path) <= 2 else _Instead(child, path[1:]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vlmfast_module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self._vlmfast_module).forward(self, *args, **kwargs)


@dataclass
class _Head:
    """A head, which is the layer onto the vocabulary itself where inner is empty, or holds it by that name."""

    module: Any
    inner: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    @property
    def last(self) -> nn.Linear:
        layer: nn.Linear = getattr(self.module, self.inner[0]) if self.inner else self.module
        return layer

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return self.module(hidden, *args, **kwargs)
        return _Scores.of(_Pending(self, hidden), flat=False)


@dataclass
class _Pending:
    """The scores of a head that were not made, unless somebody asks for them.

    Attributes:
        hidden (..., D): what the head was given.
        fused: a loss was made of them without logits.
    """

    head: _Head
    hidden: Tensor
    fused: bool = False
    logits: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.hidden.shape[:-1], self.head.last.out_features])

    def made(self) -> Tensor:
        if self.logits is None:
            self.logits = self.head.module(self.hidden)
        return self.logits

    def loss(self, target: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
        """F.cross_entropy of the scores as (rows, V); 0 where no row has a label."""
        self.fused = True
        rows = self.hidden.reshape(-1, self.hidden.shape[-1])
        options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        last = self.head.last
        if not self.head.inner:
            return linear_cross_entropy(rows, last.weight, target, bias=last.bias, **options)
        labelled = (target != ignore_index).nonzero().squeeze(1)
        rows, target = rows[labelled], target[labelled]
        module = self.head.module
        scores = type(module).forward(_Holder(module, self.head.inner[0]), rows)
        if isinstance(scores, _Last):
            biases = [bias for bias in (last.bias, scores.bias) if bias is not None]
            bias = sum(biases[1:], biases[0]) if biases else None
            return linear_cross_entropy(scores.hidden, last.weight, target, bias=bias, **options)
        # The head read the layer's weight and did not call it.
        return F.cross_entropy(scores, target, reduction="sum", **options) / max(1, len(target))


class _Holder:
    """A head whose layer onto the vocabulary gives what it is given."""

    def __init__(self, module: Any, name: str) -> None:
        self._vlmfast_module = module
        setattr(self, name, _Layer(getattr(module, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vlmfast_module, name)


class _Layer:
    def __init__(self, layer: nn.Linear) -> None:
        self._vlmfast_layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vlmfast_layer, name)

    def __call__(self, hidden: Tensor) -> _Last:
        return _Last(hidden)


@dataclass
class _Last:
    """The input of the layer onto the vocabulary, and what was added to its output."""

    hidden: Tensor
    bias: Tensor | None = None

    def __add__(self, bias: Tensor) -> _Last:
        return _Last(self.hidden, bias if self.bias is None else self.bias + bias)


class _Scores(Tensor):
    """What a forward takes for logits. Their cross-entropy is computed without them; anything else makes them."""

    pending: _Pending
    flat: bool

    @classmethod
    def of(cls, pending: _Pending, flat: bool) -> _Scores:
        """flat: as (rows, V)."""
        scores = torch.empty(0, device="meta").as_subclass(cls)
        scores.pending, scores.flat = pending, flat
        return scores

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(scores := args[0], cls):
            pending, shape = scores.pending, scores.pending.shape
            if func is F.cross_entropy and scores.flat and _is_plain(pending, *args[1:], **kwargs):
                return pending.loss(args[1], kwargs["ignore_index"], kwargs["label_smoothing"])
            if func is Tensor.view and args[1:] == (-1, shape[-1]):
                return cls.of(pending, flat=True)
            if func == Tensor.device.__get__:
                return pending.hidden.device
            if func is Tensor.size and not scores.flat:
                return shape.__getitem__(*args[1:], **kwargs) if len(args) > 1 else shape
        return func(*_made(args), **_made(kwargs))


def _is_plain(pending: _Pending, target: Tensor, *weight: Any, reduction: str = "mean", **options: Any) -> bool:
    """Whether a call of F.cross_entropy is a mean over rows with labels."""
    others = [*weight, *(options.get(name) for name in ("weight", "size_average", "reduce"))]
    rows = target.dim() == 1 and not target.is_floating_point() and len(target) == pending.hidden[..., 0].numel()
    return rows and reduction == "mean" and all(other is None for other in others)


def _made(given: Any) -> Any:
    """With logits where scores are."""
    if isinstance(given, _Scores):
        logits = given.pending.made()
        return logits.view(-1, logits.shape[-1]) if given.flat else logits
    if isinstance(given, dict):
        return {name: _made(value) for name, value in given.items()}
    return type(given)(map(_made, given)) if type(given) in (tuple, list) else given
