"""The memory that the C++ backend holds from call to call."""

from __future__ import annotations

import pytest
import torch

import vlmfast
from vlmfast.ops import info_nce, patch_embed
from vlmfast.ops._dispatch import core

pytestmark = pytest.mark.skipif(core is None, reason="needs the C++ extension")


def step() -> torch.Tensor:
    image, text = (torch.randn(300, 16, requires_grad=True) for _ in range(2))
    info_nce(image, text, 5.0).backward()
    return image


def test_what_is_held_is_freed_and_taken_anew() -> None:
    vlmfast.release_memory()
    assert vlmfast.release_memory() == 0
    step()
    first = vlmfast.release_memory()
    assert first >= 4 * 300 * 300  # the exponentials; the gradients went with their tensors
    assert vlmfast.release_memory() == 0
    step()
    step()
    assert vlmfast.release_memory() == first


def test_what_a_tensor_uses_stays_its_own() -> None:
    vlmfast.release_memory()
    pixels, weight = torch.randn(2, 3, 8, 8), torch.randn(16, 3, 4, 4)
    tokens = patch_embed(pixels, weight)
    copy = tokens.clone()
    assert vlmfast.release_memory() == 0
    for _ in range(3):
        patch_embed(-pixels, weight)
    assert torch.equal(tokens, copy)
    assert vlmfast.release_memory() == 4 * tokens.numel()


def test_gradients_outlive_the_release() -> None:
    image = step()
    before = image.grad.clone()
    vlmfast.release_memory()
    step()
    assert torch.equal(image.grad, before)
