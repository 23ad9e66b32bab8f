"""transformers' causal language models without logits in training: one rule for all that have an lm_head and give its
output to their loss_function.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from vlmfast.integrations.rules import Method, Rule, class_of
from vlmfast.nn import language_model_loss
from vlmfast.nn._stem import reason_to_call
from vlmfast.ops._arguments import DTYPES


def rules(model: nn.Module) -> Iterator[Rule]:
    """One for each class in the model whose forward names lm_head and loss_function."""
    base = import_module("transformers").PreTrainedModel
    for kind in {class_of(module): None for module in model.modules()}:
        if issubclass(kind, base) and {"lm_head", "loss_function"} <= set(code_of(kind).co_names):
            yield Rule("loss", kind, _without_logits)


def code_of(kind: type[nn.Module]) -> Any:
    """Of the class's forward."""
    return inspect.unwrap(kind.forward).__code__


def trains_on_labels(model: Any, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of the model's forward is one in training, with labels, that wants an output with names."""
    if not model.training:
        return False
    given = signature.bind(model, *args, **kwargs).arguments
    as_dict = given.get("kwargs", {}).get("return_dict", given.get("return_dict"))
    return given.get("labels") is not None and (model.config.return_dict if as_dict is None else as_dict)


def _without_logits(model: Any) -> Method:
    if reason := _reason(model):
        raise ValueError(reason)
    return Method(_Forward(model), model)


def _reason(model: Any) -> str | None:
    """Why the loss cannot be computed from lm_head's weight, or None."""
    if model.loss_function is not import_module("transformers.loss.loss_utils").ForCausalLMLoss:
        return f"its loss_function is {getattr(model.loss_function, '__name__', model.loss_function)}"
    head = model.lm_head
    if reason := reason_to_call(head, nn.Linear):
        return reason
    if head.weight.dim() != 2 or hasattr(head.weight, "device_mesh"):
        return "the weight of its lm_head is sharded"
    return None


class _Forward:
    """The forward of a language model; in training and with labels its output has no logits.

    With return_logits=True, in evaluation, without labels, and with return_dict=False it is the original's, as it is
    where lm_head, loss_function or the dtype are not those that are known.
    """

    def __init__(self, model: Any) -> None:
        self.__signature__ = inspect.signature(type(model).forward)
        self.works = True

    def __call__(self, model: Any, *args: Any, return_logits: bool = False, **kwargs: Any) -> Any:
        original = class_of(model).forward
        if not self.works or return_logits or not trains_on_labels(model, self.__signature__, args, kwargs):
            return original(model, *args, **kwargs)
        if _reason(model) or model.lm_head.weight.dtype not in DTYPES:
            return original(model, *args, **kwargs)
        instead = _Instead(model)
        try:
            output = original(instead, *args, **kwargs)
        except Exception:
            # Of hidden states that were taken for logits, or else the caller's.
            if instead.lm_head.hidden is None or instead._vlmfast_fused:
                raise
            output = None
        if output is None or not instead._vlmfast_fused:
            self.works = False
            warnings.warn(
                f"vlmfast.patch: {type(model).__name__} does more with its logits than give them to loss_function; "
                "its own forward runs",
                stacklevel=2,
            )
            return original(model, *args, **kwargs)
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})


class _Instead:
    """What a model's forward takes for the model: an lm_head that gives its input, and a loss that knows of it."""

    def __init__(self, model: Any) -> None:
        # Of names that no model has: all others are its own.
        self._vlmfast_model, self._vlmfast_fused = model, False
        self.lm_head = _Head(model.lm_head)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vlmfast_model, name)

    def loss_function(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        head, hidden = self.lm_head.head, self.lm_head.hidden
        if hidden is None or logits is not hidden or vocab_size != head.weight.shape[0]:
            raise ValueError("something was done with the logits")
        self._vlmfast_fused = True
        targets = labels if shift_labels is None else shift_labels
        return language_model_loss(
            hidden,
            head,
            targets.to(hidden.device).view(hidden.shape[:-1]),
            shift=shift_labels is None,
            ignore_index=ignore_index,
            num_items_in_batch=num_items_in_batch,
        )


class _Head:
    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self.hidden: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head, name)

    def __call__(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden.contiguous()
        return self.hidden
