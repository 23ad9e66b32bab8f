"""FSDP under the trainer: two gloo processes through the command line, and what is refused."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import fsdp_utils
from command_line import logged, run, tiny, write_pairs
from processes import run_processes
from safetensors.torch import load_file
from scenarios import Line
from torch import distributed as dist
from torch import nn
from transformers import Trainer

from vlmfast.cli import main
from vlmfast.training import PretrainingTrainer, fsdp

STEPS = 4


def arguments(data: Path, folder: Path, batch: int, *extra: str) -> list[str]:
    sizes = [
        f"--{name.replace('_', '-')}={value}" for name, value in tiny("clip", embed_dim=32, vision_layers=2).items()
    ]
    return [
        "train", "clip", f"--data={data}", f"--val-data={data}", f"--output-dir={folder}", *sizes,
        f"--per-device-train-batch-size={batch}", f"--max-steps={STEPS}", "--logging-steps=1", "--save-steps=2",
        "--learning-rate=1e-3", "--warmup-steps=0", "--eval-strategy=steps", f"--eval-steps={STEPS}",
        "--report-to=none", "--disable-tqdm=true", "--dataloader-num-workers=0", "--use-cpu", *extra,
    ]  # fmt: skip


def shards(rank: int, world_size: int, data: Path, folder: Path) -> None:
    """Runs, of which the second goes on from the middle of the first, the third from its last checkpoint."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}  # the group is there already
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), **common)
    sharded: list[set[str]] = []
    prepare = PretrainingTrainer._prepare_for_training

    def look(self: Any, *given: Any) -> Any:
        found = prepare(self, *given)
        named = dict(self.model.named_parameters())
        assert {name for name, p in named.items() if not hasattr(p, "full_tensor")} == {"logit_scale"}
        sharded.append({type(m).__name__ for m in self.model.modules() if type(m).__name__.startswith("FSDP")})
        return found

    PretrainingTrainer._prepare_for_training = look
    whole, resumed, ended, cached = (folder / name for name in ("whole", "resumed", "ended", "cached"))
    assert main(arguments(data, whole, 4, "--fsdp")) == 0
    assert {"FSDPCLIPEncoderLayer", "FSDPCLIPModel"} <= sharded[0]
    for place, step in ((resumed, 2), (ended, STEPS)):
        if rank == 0:
            place.mkdir()
            shutil.copy(whole / "run.json", place)
            shutil.copytree(whole / f"checkpoint-{step}", place / f"checkpoint-{step}")
        dist.barrier()
        assert main(arguments(data, place, 4, "--fsdp", "--resume")) == 0
    assert main(arguments(data, cached, 4, "--fsdp", "--cache-chunk=2")) == 0
    assert len(sharded) == 3
    averages(rank)


def averages(rank: int) -> None:
    """Of a scalar whose gradient each rank has its own part of, as another loss than CLIP's may leave it."""
    scalar, unused = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(1, 1))
    scalar.grad = torch.tensor(1.0 + rank)
    for _ in range(2):  # a second batch that is accumulated adds 2 here and 4 there
        fsdp.average([scalar, unused])
        assert unused.grad == 0
        scalar.grad += 2.0 * (1 + rank)
    assert scalar.grad == 1.5 + 3.0 + 2.0 * (1 + rank)


def test_two_processes_train_and_resume_as_one(tmp_path: Path) -> None:
    data, one = tmp_path / "pairs", tmp_path / "one"
    data.mkdir()
    write_pairs(data)
    done = run(["python", "-m", "vlmfast", *arguments(data, one, 8)])
    assert done.returncode == 0, done.stderr
    run_processes(shards, 2, data, tmp_path, timeout=120)
    expected, losses = load_file(one / "model.safetensors"), logged(one, STEPS)
    assert len(losses) == STEPS
    for name in ("whole", "cached"):
        assert logged(tmp_path / name, STEPS) == pytest.approx(losses, rel=1e-4)
        found = load_file(tmp_path / name / "model.safetensors")
        assert found.keys() == expected.keys()
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, rtol=1e-3, atol=1e-4)
    assert abs(expected["logit_scale"] - math.log(1 / 0.07)) > 1e-4
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert logged(tmp_path / "resumed", STEPS) == logged(tmp_path / "whole", STEPS)
    for name in ("resumed", "ended"):
        for key, weight in load_file(tmp_path / name / "model.safetensors").items():
            assert torch.equal(weight, whole[key]), (name, key)


class Scaled(Line):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


def asked(version: int = 2, **plugin: Any) -> Any:
    return SimpleNamespace(fsdp=True, cache_chunk=None, fsdp_config={"version": version}, fsdp_plugin_args=plugin)


def test_what_shards_scalars_is_refused_for_models_with_one() -> None:
    fsdp.check(Scaled(), asked())
    fsdp.check(Line(), asked(version=1))  # which has none
    with pytest.raises(ValueError, match="version must be 2: scale of Scaled is a scalar, which FSDP cannot shard"):
        PretrainingTrainer(Scaled(), asked(version=1))
    with pytest.raises(ValueError, match="cpu_ram_efficient_loading must be false: scale of Scaled is a scalar"):
        fsdp.check(Scaled(), asked(cpu_ram_efficient_loading=True))


def test_versions_without_a_way_to_leave_parameters_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Trainer, "_mixed_mesh_grad_norm")
    with pytest.raises(ValueError, match="this transformers has no way to leave it out"):
        fsdp.check(Scaled(), asked())
    monkeypatch.delattr(fsdp_utils, "get_parameters_from_modules")
    with pytest.raises(ValueError, match="this accelerate has no way to leave it out"):
        fsdp.check(Scaled(), asked())


def test_a_cached_loss_with_parameters_of_its_own_is_refused() -> None:
    model, args = Line(), asked()
    model.loss, model.shared_features, args.cache_chunk = model.forward, ("predictor",), 2
    with pytest.raises(ValueError, match="cache_chunk must be unset beside fsdp; got 2: the loss of Line reads param"):
        PretrainingTrainer(model, args)


def test_scalars_have_groups_of_their_own() -> None:
    model = Scaled()
    optimizer = torch.optim.AdamW(
        [{"params": [model.layer.weight], "weight_decay": 0.1}, {"params": [model.layer.bias, model.scale], "lr": 2.0}]
    )
    fsdp.split_groups(optimizer, fsdp.scalars(model).values())
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(model.layer.weight)], [id(model.layer.bias)], [id(model.scale)],
    ]  # fmt: skip
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 2.0, 2.0]


def test_parameters_of_one_number_are_left_out() -> None:
    model = Scaled()
    model.gate = nn.Parameter(torch.ones(1, 1))
    model.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    plugin = SimpleNamespace(ignored_modules=None, transformer_cls_names_to_wrap=None)
    trained = fsdp.leave_out(model, plugin, torch.device("cpu"))
    assert {id(p) for p in trained} == {id(model.scale), id(model.gate), id(model.layer.bias)}
    ignored = {id(p) for module in plugin.ignored_modules for p in module.parameters()}
    assert ignored == {*map(id, trained), id(model.frozen)}


def test_a_norm_of_gradients() -> None:
    assert fsdp.total_norm([torch.tensor([3.0]), torch.tensor(4.0)]) == 5.0
    assert fsdp.total_norm([]) == 0.0
