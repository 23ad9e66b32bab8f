"""Every combination of info_nce's options, small, against a definition written row by row from the papers."""

from __future__ import annotations

import itertools
import sys

import contrastive
import pytest
import torch
from backends import use_backend
from contrastive import pairs, unit
from numerics import loss_and_gradients
from torch import Tensor

from vlmfast.ops import info_nce
from vlmfast.ops.info_nce import IMPLS, reference

Options = dict[str, object]


@pytest.fixture(params=list(IMPLS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_backend(monkeypatch, IMPLS, request.param)
    return request.param


def by_hand(
    x: Tensor,
    y: Tensor,
    s: Tensor,
    *,
    label_offset: int = 0,
    bidirectional: bool = True,
    label_smoothing: float = 0.0,
    exclude_positive: bool = False,
    groups: tuple[Tensor, Tensor] | None = None,
    row_mask: Tensor | None = None,
) -> Tensor:
    """Cross-entropy with smoothing (Szegedy et al. 2016, section 7), InfoLOOB (Fuerst et al. 2022, equation 2), the
    mean log-probability of the positives (Khosla et al. 2020, equation 2)."""
    if groups is not None:
        partners = [(i, j) for i in range(len(x)) for j in range(len(y)) if groups[0][i] == groups[1][j]]
    else:
        partners = [(i, i + label_offset) for i in range(len(x)) if row_mask is None or row_mask[i]]
    logits = s * (x @ y.T)
    directions = []
    for side in range(1 + bidirectional):
        losses = []
        for anchor in sorted({pair[side] for pair in partners}):
            row = logits[anchor] if side == 0 else logits[:, anchor]
            own = [pair[1 - side] for pair in partners if pair[side] == anchor]
            if exclude_positive:
                others = [k for k in range(len(row)) if k not in own]
                losses.append(row[others].exp().sum().log() - row[own[0]])
            else:
                surprise = row.exp().sum().log() - row
                losses.append((1 - label_smoothing) * surprise[own].mean() + label_smoothing * surprise.mean())
        directions.append(torch.stack(losses).mean() if losses else 0 * logits.sum())
    return torch.stack(directions).mean()


KINDS: dict[str, Options] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "no positive below": {"exclude_positive": True},
}
COMBINATIONS = list(itertools.product(KINDS, [False, True], [0, 9], [False, True]))


def options_of(kind: str, masked: bool, label_offset: int, bidirectional: bool, rows: int) -> Options:
    mask = {"row_mask": torch.arange(rows) % 3 != 1} if masked else {}
    return {**KINDS[kind], **mask, "label_offset": label_offset, "bidirectional": bidirectional}


@pytest.mark.parametrize(("kind", "masked", "label_offset", "bidirectional"), COMBINATIONS)
def test_the_definition_is_the_papers(kind: str, masked: bool, label_offset: int, bidirectional: bool) -> None:
    options = options_of(kind, masked, label_offset, bidirectional, 11)
    inputs = (unit(11, 6), unit(20, 6), torch.tensor(7.0, dtype=torch.float64))
    ours = loss_and_gradients(lambda *t: reference(*t, **options), inputs)
    for got, want in zip(ours, loss_and_gradients(lambda *t: by_hand(*t, **options), inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_definition_of_groups_is_the_papers(dtype: torch.dtype, bidirectional: bool) -> None:
    row_ids = torch.tensor([3, -2, 3, 8, -2, 0, 5]).to(dtype)
    col_ids = torch.tensor([-2, 3, 3, 7, 0, -2, -9, 3, 1]).to(dtype)
    options = {"groups": (row_ids, col_ids), "bidirectional": bidirectional}
    inputs = (unit(7, 6), unit(9, 6), torch.tensor(7.0, dtype=torch.float64))
    ours = loss_and_gradients(lambda *t: reference(*t, **options), inputs)
    for got, want in zip(ours, loss_and_gradients(lambda *t: by_hand(*t, **options), inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("kind", "masked", "label_offset", "bidirectional"), COMBINATIONS)
def test_every_combination(
    backend: str, kind: str, masked: bool, label_offset: int, bidirectional: bool, recompute: bool
) -> None:
    options = options_of(kind, masked, label_offset, bidirectional, 37)
    contrastive.check(
        lambda *t: info_nce(*t, recompute=recompute, **options),
        lambda *t: reference(*t, **options),
        unit(37, 8), unit(53, 8), 20.0,
    )  # fmt: skip


SMALLEST: dict[str, tuple[int, int, Options]] = {
    "one pair": (1, 1, {}),
    "one pair, smoothing": (1, 1, {"label_smoothing": 0.5}),
    "one pair, masked": (1, 1, {"row_mask": torch.tensor([False])}),
    "one pair, grouped": (1, 1, {"groups": (torch.tensor([4]), torch.tensor([4]))}),
    "one image, last text": (1, 5, {"label_offset": 4}),
    "one image, no positive below": (1, 5, {"label_offset": 2, "exclude_positive": True, "bidirectional": False}),
    "one image, all texts": (1, 5, {"groups": (torch.zeros(1).long(), torch.zeros(5).long())}),
    "one text, all images": (5, 1, {"groups": (torch.zeros(5).long(), torch.zeros(1).long())}),
    "two pairs, no positive below": (2, 2, {"exclude_positive": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", list(SMALLEST))
def test_the_smallest_batches(backend: str, case: str) -> None:
    rows, columns, options = SMALLEST[case]
    inputs = (unit(rows, 6), unit(columns, 6), torch.tensor(12.0, dtype=torch.float64))
    exact = loss_and_gradients(lambda *t: by_hand(*t, **options), inputs)
    ours = loss_and_gradients(lambda *t: info_nce(*t, **options), inputs, [torch.float32] * 3)
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_class_texts_and_many_images(backend: str, dtype: torch.dtype, rows: int) -> None:
    """One side's losses weigh 100 times the other's: gradients of logits stay within float16."""
    columns = 403 - rows
    ids = torch.arange(rows) % 3, torch.arange(columns) % 3
    losses = (lambda *t: info_nce(*t, groups=ids), lambda *t: reference(*t, groups=ids))
    contrastive.check(*losses, unit(rows, 6), unit(columns, 6), 100.0, dtype=dtype)


def test_ids_of_64_bits_are_not_cut(backend: str) -> None:
    """Equal in their lower 32 bits, and no positives of each other."""
    ids = torch.tensor([5, 5 + 2**32, 5 - 2**40, 7])
    groups = {"groups": (ids, ids.flip(0))}
    inputs = (unit(4, 6), unit(4, 6), torch.tensor(12.0, dtype=torch.float64))
    exact = loss_and_gradients(lambda *t: by_hand(*t, **groups), inputs)
    ours = loss_and_gradients(lambda *t: info_nce(*t, **groups), inputs, [torch.float32] * 3)
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("options", [{"label_offset": 9}, {"groups": (torch.arange(37) % 5, torch.arange(53) % 7)}])
def test_the_torch_backend_in_chunks(monkeypatch: pytest.MonkeyPatch, options: Options, recompute: bool) -> None:
    """Rows by tens, the last chunk shorter: sums over columns go on from chunk to chunk."""
    monkeypatch.setenv("VLMFAST_BACKEND", "torch")
    monkeypatch.setattr(sys.modules["vlmfast.ops._info_nce_torch"], "CHUNK_ELEMENTS", 10 * 53)
    contrastive.check(
        lambda *t: info_nce(*t, recompute=recompute, **options),
        lambda *t: reference(*t, **options),
        unit(37, 8), unit(53, 8), 20.0,
    )  # fmt: skip


@pytest.mark.parametrize("noise", [None, 1.0])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-9)])
def test_sixteen_bits_cost_nothing_in_the_loss(
    backend: str, dtype: torch.dtype, rounding: float, noise: float | None
) -> None:
    """Eager's loss is wrong in the second decimal; ours is float32's, its gradients the dtype's."""
    rounded = tuple(t.to(dtype) for t in pairs(150, 64, noise=noise))
    inputs = (*rounded, torch.tensor(50.0))
    exact = loss_and_gradients(reference, inputs, [torch.float64] * 3)
    ours = loss_and_gradients(info_nce, inputs)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-5, atol=2e-6)
    for got, want in zip(ours[1:3], exact[1:3], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=rounding * want.abs().max().item())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": torch.randn(0, 8)}, ValueError, r"image must be .* not empty; got \(0, 8\)"),
        ({"image": torch.randn(4, 0)}, ValueError, r"image must be .* not empty; got \(4, 0\)"),
        ({"text": torch.randn(4, 8).long()}, TypeError, "text must be float32, float16 or bfloat16; got torch.int64"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\]; got -0.1"),
        ({"groups": (torch.arange(4),) * 3}, TypeError, r"groups must be \(row_ids, col_ids\); got tuple"),
        ({"groups": (torch.arange(4) > 1,) * 2}, TypeError, "groups row_ids must be an integer tensor; got torch.bool"),
        ({"groups": ([1, 2, 3, 4],) * 2}, TypeError, "groups row_ids must be an integer tensor; got <class 'list'>"),
        (
            {"groups": (torch.arange(4), torch.arange(4).to("meta"))},
            ValueError,
            "groups col_ids must be on image's device cpu; got meta",
        ),
        (
            {"groups": (torch.arange(4),) * 2, "label_smoothing": 0.1},
            ValueError,
            "groups cannot be combined with label_smoothing",
        ),
        (
            {"groups": (torch.arange(3), torch.arange(4)), "image": torch.randn(3, 8), "label_offset": 1},
            ValueError,
            "groups cannot be combined with label_offset",
        ),
        (
            {"image": torch.randn(1, 8), "text": torch.randn(1, 8), "exclude_positive": True, "bidirectional": False},
            ValueError,
            "exclude_positive needs a negative for every positive; got 1 images and 1 texts",
        ),
    ],
)
def test_the_other_errors(change: Options, error: type[Exception], message: str) -> None:
    arguments = {"image": torch.randn(4, 8), "text": torch.randn(4, 8), "scale": torch.tensor(3.0), **change}
    with pytest.raises(error, match=f"^info_nce: {message}"):
        info_nce(**arguments)
