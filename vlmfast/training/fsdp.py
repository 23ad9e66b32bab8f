"""FSDP under the trainer: accelerate's FSDP 2, with parameters of one number left whole on every process.

FSDP cuts parameters along their first dimension, which scalars such as logit_scale do not have; and of a gate (1,) all
processes but one would have nothing to log. They are left out of the sharding (`fully_shard(ignored_params=...)`), have
a group of the optimizer to themselves, since one group cannot update sharded and whole tensors together, and their
gradients are averaged over processes as FSDP does for the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

TASK_METHODS = (
    "get_image_features", "get_text_features", "match_scores", "generate", "joint_features", "phrase_scores", "detect",
)  # fmt: skip
"""What tasks call of a model beside forward."""


def scalars(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters without dimensions, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 0}


def check(model: nn.Module, args: Any) -> None:
    """Whether the installed libraries can shard this model.

    Args:
        model: not sharded yet.
        args: TrainingArguments with fsdp.
    Raises:
        ValueError: fsdp_config asks for what excludes parameters that are left whole, transformers or accelerate is
            too old for them, or GradCache's loss has parameters of its own.
    """
    from accelerate.utils import fsdp_utils
    from transformers import Trainer

    name = type(model).__name__
    if getattr(args, "cache_chunk", None) is not None and getattr(model, "shared_features", None):
        raise ValueError(
            f"cache_chunk must be unset beside fsdp; got {args.cache_chunk}: the loss of {name} reads parameters, which"
            " FSDP has sharded where GradCache reads them"
        )
    if not (whole := scalars(model)):
        return
    config = args.fsdp_config
    why = f"{next(iter(whole))} of {name} is a scalar, which FSDP cannot shard"
    if int(config.get("version", args.fsdp_plugin_args.get("fsdp_version", 1))) != 2:
        raise ValueError(f"fsdp_config: version must be 2: {why}, and version 1 cannot leave out")
    if args.fsdp_plugin_args.get("cpu_ram_efficient_loading"):
        raise ValueError(f"fsdp_config: cpu_ram_efficient_loading must be false: {why}, and it would replace it")
    for owner, function in ((fsdp_utils, "get_parameters_from_modules"), (Trainer, "_mixed_mesh_grad_norm")):
        if not hasattr(owner, function):
            library = "accelerate" if owner is fsdp_utils else "transformers"
            raise ValueError(
                f"fsdp: {why}, and this {library} has no way to leave it out (known to work: accelerate 1.15 with"
                " transformers 5.23). Without fsdp, large batches fit with cache_chunk"
            )


def set_up(accelerator: Any, args: Any) -> None:
    """Tells an Accelerator on CPUs of the plugin, which it has been given and takes on accelerators alone.

    Args:
        accelerator: just made, with the plugin of args.
        args: TrainingArguments with fsdp.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        for state in (PartialState(), accelerator.state):  # the second takes this from the first, again and again
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
        if accelerator.mixed_precision != "no":
            accelerator.state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)


def leave_out(model: nn.Module, plugin: Any, device: torch.device) -> list[nn.Parameter]:
    """Has accelerate's plugin shard each layer of the towers and, at last, all else but parameters of one number.

    Args:
        model: on the CPU.
        plugin: of the Accelerator that will prepare the model.
        device: where the model will be.
    Returns:
        the parameters of one number that are trained, moved to the device.
    """
    whole = [parameter for parameter in model.parameters() if parameter.numel() == 1]
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    try:
        model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:  # accelerate asks every model, and goes on without where it is told None
        model.get_input_embeddings = _none  # type: ignore[assignment]
    except AttributeError:
        pass
    # Of the modules named here accelerate takes the parameters.
    plugin.ignored_modules = [*(plugin.ignored_modules or ()), nn.ParameterList(whole)]
    if plugin.transformer_cls_names_to_wrap is None:
        # A tower says which modules are layers, some of which a model may have replaced.
        here = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(here & set(getattr(model, "_no_split_modules", None) or ()))
    return [parameter for parameter in whole if parameter.requires_grad]


def _none() -> None:
    return None


def split_groups(optimizer: torch.optim.Optimizer, whole: Iterable[nn.Parameter]) -> None:
    """Moves these parameters from the optimizer's groups to groups of their own with the same settings."""
    ids = {id(parameter) for parameter in whole}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in ids]
        if not own or len(own) == len(group["params"]):
            continue
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        optimizer.add_param_group({**group, "params": own})


def average(whole: list[nn.Parameter]) -> None:
    """Gradients of parameters of one number, which are left whole, become their mean over processes, with one message.

    What is averaged already, of an earlier batch that is accumulated, stays as it is.
    """
    if not whole:
        return
    zero = torch.zeros((), device=whole[0].device)
    gradients = torch.stack([zero if p.grad is None else p.grad.float().reshape(()) for p in whole])
    dist.all_reduce(gradients)
    for parameter, gradient in zip(whole, gradients / dist.get_world_size(), strict=True):
        parameter.grad = gradient.to(parameter.dtype).view_as(parameter)


def whole_tensor(value: Tensor) -> Tensor:
    """A sharded tensor gathered, which all processes must ask for together; another as it is."""
    gathered: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return gathered


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm () of all, sharded and whole ones together."""
    kinds: dict[bool, list[Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault(hasattr(gradient, "full_tensor"), []).append(gradient)
    norms = [whole_tensor(torch.nn.utils.get_total_norm(kind)) for kind in kinds.values()]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


@contextmanager
def gathered_by_tasks(model: nn.Module) -> Iterator[None]:
    """Inside, what tasks call of a sharded model gathers its parameters, as forward does everywhere.

    forward calls some of the same methods, and gathers for them.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    names = [name for name in TASK_METHODS if hasattr(model, name) and name not in vars(model)]
    for name in names:
        register_fsdp_forward_method(model, name)
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)
