"""patch(model) before and after DistributedDataParallel, fully_shard and FullyShardedDataParallel, in one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from patch_models import MODELS, clip
from processes import run_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import vlmfast


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: Any) -> nn.Module:
    """Neither FSDP takes scalars, such as CLIP's logit_scale."""
    mesh = init_device_mesh("cpu", (1,))
    for layer in [*model.vision_model.encoder.layers, *model.text_model.encoder.layers]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})


def fsdp1(model: Any) -> nn.Module:
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, device_id=device, use_orig_params=True, ignored_states=[model.logit_scale])


def fsdp1_flat(model: Any) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), ignored_states=[model.logit_scale])


WRAPPERS = {wrap.__name__: wrap for wrap in (ddp, fsdp2, fsdp1, fsdp1_flat)}


def train(model: nn.Module, inputs: dict[str, Any]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def gives_logits(model: nn.Module, inputs: dict[str, Any]) -> bool:
    return model(**inputs).logits_per_image is not None


def _before(rank: int, world_size: int, wrapper: str) -> None:
    torch.manual_seed(0)
    model, inputs = clip()
    original = copy.deepcopy(model)
    vlmfast.patch(model)
    wrapped = WRAPPERS[wrapper](model)
    assert type(model.vision_model.embeddings).__module__ == "vlmfast.nn.transformers"
    # Before all else: an optimizer made after a forward without a backward holds what fully_shard has not resharded.
    assert train(wrapped, inputs) == pytest.approx(train(original, inputs), rel=1e-4)
    assert not gives_logits(wrapped, inputs)
    if wrapper == "ddp":
        vlmfast.unpatch(wrapped)
        assert gives_logits(wrapped, inputs)
        return
    with pytest.raises(ValueError, match=r"unpatch: the parameters of its CLIPVisionEmbeddings were sharded \(FSDP\)"):
        vlmfast.unpatch(wrapped)
    assert not gives_logits(wrapped, inputs)


def _after(rank: int, world_size: int, wrapper: str) -> None:
    torch.manual_seed(0)
    model, inputs = clip()
    original = copy.deepcopy(model)
    wrapped = WRAPPERS[wrapper](model)
    report = vlmfast.patch(wrapped)
    if wrapper == "ddp":
        assert [kind for _, kind, _ in report.replaced] == ["CLIPModel", "CLIPVisionEmbeddings"]
        assert not report.left
    else:
        assert [kind for _, kind, _ in report.replaced] == ["CLIPModel"]
        ((_, kind, reason),) = report.left
        assert (kind, reason) == ("CLIPVisionEmbeddings", "its parameters are sharded (FSDP): patch before sharding")
    assert train(wrapped, inputs) == pytest.approx(train(original, inputs), rel=1e-4)
    assert not gives_logits(wrapped, inputs)
    vlmfast.unpatch(wrapped)
    assert gives_logits(wrapped, inputs)


def _flamingo_sharded(rank: int, world_size: int) -> None:
    """Its modules are new ones over the same parameters, which sharding replaces."""
    model, inputs = MODELS["flamingo"].make()
    expected = model(**inputs)["loss"].item()
    vlmfast.patch(model)
    fully_shard(
        model, mesh=init_device_mesh("cpu", (1,)), ignored_params={model.attend.attn_gate, model.attend.ff_gate}
    )
    assert model(**inputs)["loss"].item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="sharded"):
        vlmfast.unpatch(model)


@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_patched_before_it_is_wrapped(wrapper: str) -> None:
    run_processes(_before, 1, wrapper)


@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_patched_after_it_was_wrapped(wrapper: str) -> None:
    run_processes(_after, 1, wrapper)


def test_new_modules_over_parameters_that_are_sharded_then() -> None:
    run_processes(_flamingo_sharded, 1)
