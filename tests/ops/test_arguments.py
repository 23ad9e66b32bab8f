"""Arguments of a wrong type: a TypeError from the public function that names the argument, what it must be and what
came; and numbers that do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numerics import loss_and_gradients
from torch import Tensor

from vlmfast.ops import (
    gated_residual,
    info_nce,
    linear_cross_entropy,
    media_attention,
    media_index,
    patch_embed,
    patch_embed_packed,
    sigmoid_loss,
)

LO, HI = torch.ones(1, 3).long(), torch.full((1, 3), 2)
CALLS: dict[Callable[..., Any], dict[str, Any]] = {
    info_nce: {
        "image": torch.randn(4, 8), "text": torch.randn(4, 8), "scale": torch.tensor(3.0),
        "row_mask": torch.ones(4).bool(), "label_offset": 0, "bidirectional": True, "label_smoothing": 0.0,
        "exclude_positive": False, "recompute": None,
    },
    sigmoid_loss: {
        "image": torch.randn(4, 8), "text": torch.randn(4, 8), "scale": torch.tensor(3.0), "bias": torch.tensor(-3.0),
        "label_offset": 0,
    },
    linear_cross_entropy: {
        "hidden": torch.randn(4, 8), "weight": torch.randn(6, 8), "labels": torch.arange(4), "bias": torch.randn(6),
        "ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean", "recompute": None,
    },
    gated_residual: {
        "residual": torch.randn(4, 8), "hidden": torch.randn(4, 8), "gate": torch.ones(1), "activation": "tanh",
        "row_mask": torch.ones(4).bool(),
    },
    patch_embed: {
        "pixels": torch.randn(2, 3, 4, 4), "weight": torch.randn(8, 3, 2, 2), "bias": torch.randn(8),
        "prefix": torch.randn(1, 8), "position": torch.randn(5, 8), "keep": torch.zeros(2, 3).long(),
        "layout": "NCHW", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "pad": False,
    },
    patch_embed_packed: {
        "images": [torch.randn(3, 4, 4)], "weight": torch.randn(8, 3, 2, 2), "bias": torch.randn(8),
        "position": torch.randn(4, 8), "layout": "NCHW", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "pad": False,
    },
    media_attention: {
        "q": torch.randn(1, 2, 3, 8), "k": torch.randn(1, 2, 8, 8), "v": torch.randn(1, 2, 8, 8), "media_lo": LO,
        "media_hi": HI, "tokens_per_media": 4, "media_len": torch.full((1, 2), 4), "key_bias": torch.zeros(1, 8),
        "scale": 0.3, "empty": "zero",
    },
    media_index: {
        "input_ids": torch.arange(6).view(1, 6), "media_token_id": 2, "mode": "last", "eos_id": 4,
        "num_media": torch.ones(1).long(), "state": None,
    },
}  # fmt: skip


def call(op: Callable[..., Any], **changed: Any) -> Any:
    return op(**{**CALLS[op], **changed})


def tensors(op: Callable[..., Any]) -> list[str]:
    return [name for name, value in CALLS[op].items() if isinstance(value, Tensor)]


EVERY = [(op, name) for op in CALLS for name in CALLS[op]]
TENSORS = [(op, name) for op in CALLS for name in tensors(op)]


def name_of(value: object) -> str | None:
    return getattr(value, "__name__", None)  # of an op; pytest names the rest


@pytest.mark.parametrize("op", list(CALLS), ids=name_of)
def test_the_calls_are_right(op: Callable[..., Any]) -> None:
    call(op)


@pytest.mark.parametrize(("op", "name"), EVERY, ids=name_of)
@pytest.mark.parametrize("wrong", ["yes", ["no"], object(), 3j], ids=lambda wrong: type(wrong).__name__)
def test_an_argument_of_another_type(op: Callable[..., Any], name: str, wrong: object) -> None:
    if type(wrong) is type(CALLS[op][name]) and isinstance(wrong, str):
        wrong = b"yes"
    with pytest.raises(
        TypeError, match=rf"^{op.__name__}: {name}(\[0\])? must be .*; got .*{type(wrong).__name__}|'no'"
    ):
        call(op, **{name: wrong})


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op, name in EVERY if isinstance(CALLS[op][name], bool) or name == "recompute"],
    ids=name_of,
)
@pytest.mark.parametrize("wrong", [1, 0.0, torch.tensor(True), np.bool_(True)])
def test_a_flag_is_true_or_false(op: Callable[..., Any], name: str, wrong: object) -> None:
    with pytest.raises(TypeError, match=f"^{op.__name__}: {name} must be True or False; got "):
        call(op, **{name: wrong})


KINDS = [
    (op, name, kind)
    for op, name in TENSORS
    for kind in ("sparse", "csr", "nested", "jagged", "quantised", "array")
    if kind != "csr" or CALLS[op][name].dim() == 2
]


@pytest.mark.parametrize(("op", "name", "kind"), KINDS, ids=name_of)
def test_a_tensor_of_another_kind(op: Callable[..., Any], name: str, kind: str) -> None:
    given = CALLS[op][name]
    matrix = given.float().reshape(max(1, len(given)) if given.dim() else 1, -1)
    makers: dict[str, Callable[[], object]] = {
        "sparse": lambda: given.to_sparse(),
        "csr": lambda: given.to_sparse_csr(),
        "nested": lambda: torch.nested.nested_tensor(list(matrix)),
        "jagged": lambda: torch.nested.nested_tensor(list(matrix), layout=torch.jagged),
        "quantised": lambda: torch.quantize_per_tensor(given.float(), 0.1, 0, torch.quint8),
        "array": lambda: given.numpy(),
    }
    words = {
        "sparse": "sparse",
        "csr": "sparse_csr",
        "nested": "nested",
        "jagged": "nested",
        "quantised": "torch.quint8",
    }
    with pytest.raises(TypeError, match=f"^{op.__name__}: {name} must .*; got .*{words.get(kind, 'ndarray')}"):
        call(op, **{name: makers[kind]()})


@pytest.mark.parametrize("op", [info_nce, sigmoid_loss], ids=name_of)
def test_groups_of_another_kind(op: Callable[..., Any]) -> None:
    given = {name: value for name, value in CALLS[op].items() if name != "row_mask"}
    ids = torch.arange(4)
    for groups, message in (
        (3, r"\(row_ids, col_ids\); got int"),
        ((ids, ids.to_sparse()), "dense tensor; got a tensor, sparse_coo layout"),
        ((ids.float(), ids), "an integer tensor; got torch.float32"),
    ):
        with pytest.raises(TypeError, match=f"^{op.__name__}: groups .*must be .*{message}"):
            op(**given, groups=groups)


def test_what_numpy_gives_is_taken() -> None:
    assert torch.equal(call(info_nce, label_offset=np.int64(0), label_smoothing=np.float32(0)), call(info_nce))
    mean = np.full(3, 0.5, np.float32)
    assert torch.equal(call(patch_embed, mean=mean, std=list(mean)), call(patch_embed))
    assert torch.equal(call(media_attention, scale=np.float64(0.3)), call(media_attention))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", ["media_lo", "media_hi", "media_len"])
@pytest.mark.parametrize("number", [2**31 - 1, 2**31, 2**32 + 1, 2**62])
def test_numbers_of_media_beyond_int32(backend: str, name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMFAST_BACKEND", backend)
    wrong = torch.full_like(CALLS[media_attention][name], number)
    with pytest.raises(ValueError, match=f"^media_attention: {name} must be .*; got"):
        call(media_attention, **{name: wrong})


def test_numbers_of_media_far_below_are_none() -> None:
    """They are clamped, not cut to 32 bits."""
    for name, number in (("media_lo", 1), ("media_hi", 0), ("media_len", 0)):
        given = CALLS[media_attention][name]
        far = call(media_attention, **{name: torch.full_like(given, -(2**32) + 2)})
        assert torch.equal(far, call(media_attention, **{name: torch.full_like(given, number)}))


def test_ids_and_numbers_beyond_int32() -> None:
    ids = CALLS[media_index]["input_ids"]
    for name in ("media_token_id", "eos_id"):
        with pytest.raises(
            ValueError, match=f"^media_index: {name} must be within input_ids' torch.int32; got 4294967298"
        ):
            call(media_index, input_ids=ids.int(), **{name: 2**32 + 2})
        call(media_index, **{name: 2**32 + 2})
    with pytest.raises(ValueError, match=f"^media_index: num_media must be an int32; got {2**32}"):
        call(media_index, num_media=2**32)
    many = call(media_index, num_media=torch.full((1,), 2**32))
    assert torch.equal(many[1], call(media_index, num_media=1)[1])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_loss_beyond_float32_is_infinite(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMFAST_BACKEND", backend)
    image = torch.tensor([[-1e38, 0.0], [0.0, 1.0]])
    assert info_nce(image, torch.eye(2), 20.0) == math.inf
    assert info_nce(image, torch.eye(2), 20.0, bidirectional=False) == math.inf
    ids = torch.arange(2)
    assert info_nce(image, torch.eye(2), 20.0, groups=(ids, ids)) == math.inf
    assert sigmoid_loss(image, torch.eye(2), 20.0, -10.0) == math.inf
    # The scale's gradient is beyond float16, not the loss.
    found = loss_and_gradients(info_nce, (torch.eye(2) * 300, torch.eye(2).flip(0) * 300, torch.tensor(1.0).half()))
    assert found[0] == 90000
    assert found[-1] == math.inf


@pytest.mark.parametrize("op", [info_nce, sigmoid_loss], ids=name_of)
def test_a_scale_beyond_float32_is_infinite(op: Callable[..., Any]) -> None:
    for scale in (1e39, torch.tensor(1e39, dtype=torch.float64)):
        assert not call(op, scale=scale).isfinite()
