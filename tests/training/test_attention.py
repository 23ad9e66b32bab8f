"""Attention of short sequences in float32, inside a step of the trainer on a CPU and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import Line, make_trainer
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmfast.training.attention import LONGEST, short_attention_in_float32


class Module(nn.Module):
    is_causal = False


def inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, length, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def results(tensors: list[Tensor], mask: Tensor | None = None, rounded: torch.dtype = torch.float32) -> list[Tensor]:
    """Output and gradients; what is propagated back is of numbers that `rounded` has."""
    found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](Module(), *tensors, mask, scaling=0.25)
    random = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(rounded).to(found.dtype)
    return [found.detach(), *torch.autograd.grad(found, tensors, random)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [None, "bool", "additive"])
def test_short_ones_are_those_of_float32_rounded(dtype: torch.dtype, masked: str | None) -> None:
    tensors = inputs(21, dtype)
    mask = None
    if masked is not None:
        mask = torch.arange(21)[None, None, None, :].expand(2, 1, 21, 21) < 15
        mask = mask if masked == "bool" else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -1e4)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.float()
    expected = results([t.detach().float().requires_grad_() for t in tensors], wide, dtype)
    with torch.autocast("cpu", torch.bfloat16), short_attention_in_float32():
        found = results(tensors, mask, dtype)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))


@pytest.mark.parametrize("case", ["long", "float32", "no gradient"])
def test_all_others_are_as_outside(case: str) -> None:
    tensors = inputs(LONGEST + (case == "long"), torch.float32 if case == "float32" else torch.bfloat16)
    if case == "no gradient":
        with torch.no_grad():
            expected = ALL_ATTENTION_FUNCTIONS["sdpa"](Module(), *tensors, None)[0]
            with short_attention_in_float32():
                assert torch.equal(ALL_ATTENTION_FUNCTIONS["sdpa"](Module(), *tensors, None)[0], expected)
        return
    outside = results(tensors)
    with short_attention_in_float32():
        assert all(torch.equal(a, b) for a, b in zip(results(tensors), outside, strict=True))


def test_the_trainer_has_it_in_its_steps_alone(tmp_path: Path) -> None:
    original: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    seen: list[Any] = []
    make_trainer(tmp_path, model=Line(lambda step: seen.append(ALL_ATTENTION_FUNCTIONS["sdpa"])), max_steps=2).train()
    assert len(seen) == 2
    assert original not in seen
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original

    def fail(step: int) -> None:
        raise KeyError("this went wrong")

    with pytest.raises(KeyError):
        make_trainer(tmp_path, model=Line(fail), max_steps=2).train()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original
