from __future__ import annotations

import pytest
import torch
from backends import use_backend
from contrastive import check_info_nce, pairs, unit
from grids import pairwise
from numerics import loss_and_gradients
from torch import Tensor
from torch.nn import functional as F

from vlmfast.ops import info_nce
from vlmfast.ops._info_nce_torch import normalise_side
from vlmfast.ops.info_nce import IMPLS, normalise, reference


@pytest.fixture(params=list(IMPLS))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use_backend(monkeypatch, IMPLS, request.param)
    return request.param


def groups(rows: int, columns: int, kinds: int = 12, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """Ids of either sign; some rows and some columns have no partner."""
    row_ids, col_ids = torch.randint(-kinds, kinds, (rows,)), torch.randint(-kinds, kinds, (columns,))
    row_ids[::7], col_ids[::5] = 1000, -1000
    return row_ids.to(dtype), col_ids.to(dtype)


N, M = 130, 200  # two blocks of rows and two or more of columns, each with one that is not full
VARIANTS = {
    "smoothing": lambda: {"label_smoothing": 0.1},
    "smoothing of rows with a mask": lambda: {
        "label_smoothing": 0.3, "bidirectional": False, "label_offset": 7, "row_mask": torch.rand(N) < 0.5,
    },
    "all smooth": lambda: {"label_smoothing": 1.0},
    "no positive below": lambda: {"exclude_positive": True},
    "no positive below, rows": lambda: {"exclude_positive": True, "bidirectional": False, "label_offset": M - N},
    "mask": lambda: {"row_mask": torch.rand(N) < 0.3},
    "mask of rows": lambda: {"row_mask": torch.rand(N) < 0.3, "bidirectional": False, "label_offset": 3},
    "mask and no positive below": lambda: {"row_mask": torch.rand(N) < 0.7, "exclude_positive": True},
    "groups": lambda: {"groups": groups(N, M)},
    "groups of rows": lambda: {"groups": groups(N, M, dtype=torch.int32), "bidirectional": False},
}  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "dtype", "recompute"),
    pairwise(list(VARIANTS), [torch.float32, torch.bfloat16, torch.float16], [False, True]),
)
def test_variants(backend: str, variant: str, dtype: torch.dtype, recompute: bool) -> None:
    check_info_nce(unit(N, 64), unit(M, 64), 30.0, dtype, recompute=recompute, **VARIANTS[variant]())


@pytest.mark.parametrize(
    ("variant", "recompute", "features"), pairwise(list(VARIANTS), [False, True], ["saturated", "large norms"])
)
def test_variants_of_other_features(backend: str, variant: str, recompute: bool, features: str) -> None:
    """Large norms: one shift for all would overflow, and the sums take running maxima."""
    options = VARIANTS[variant]()
    image, text, scale = unit(N, 64), unit(M, 64), 100.0
    if features == "large norms":
        image, text, scale = 4 * image, 3 * text, 60.0
    else:
        positives = slice(options.get("label_offset", 0), options.get("label_offset", 0) + N)
        text[positives] = F.normalize(image + 0.5 * text[positives], dim=1)
    check_info_nce(image, text, scale, recompute=recompute, **options)


def against(oracle, image: Tensor, text: Tensor, scale: float, **options: object) -> None:
    """info_nce in float32 against an independent expression in float64."""
    inputs = (image, text, torch.tensor(scale, dtype=torch.float64))
    exact = loss_and_gradients(oracle, inputs)
    ours = loss_and_gradients(lambda *t: info_nce(*t, **options), inputs, [torch.float32, torch.float32, torch.float32])
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6 * want.abs().max().item())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothing_is_that_of_cross_entropy(backend: str, smoothing: float) -> None:
    def oracle(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        logits, labels = s * x @ y.T, torch.arange(90)
        one, two = (F.cross_entropy(t, labels, label_smoothing=smoothing) for t in (logits, logits.T))
        return (one + two) / 2

    against(oracle, *pairs(90, 24), 15.0, label_smoothing=smoothing)


def test_excluded_positive_is_infoloob(backend: str) -> None:
    """CLOOB, equation 2: -ln(exp(s x_i y_i) / sum over j other than i of exp(s x_i y_j)), and the same for y."""

    def oracle(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        e = torch.exp(s * x @ y.T)
        others = e - e.diag().diag()
        return -(torch.log(e.diag() / others.sum(1)) + torch.log(e.diag() / others.sum(0))).mean() / 2

    against(oracle, *pairs(70, 16, noise=2.0), 9.0, exclude_positive=True)


def test_groups_are_uniform_soft_targets(backend: str) -> None:
    row_ids, col_ids = groups(60, 80)

    def oracle(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        logits = s * x @ y.T
        directions = []
        for t, a, b in ((logits, row_ids, col_ids), (logits.T, col_ids, row_ids)):
            losses = []
            for i, row in enumerate(t.log_softmax(1)):
                partners = (b == a[i]).nonzero()[:, 0]
                if len(partners):
                    losses.append(-row[partners].mean())
            directions.append(torch.stack(losses).mean())
        return sum(directions) / 2

    against(oracle, unit(60, 24), unit(80, 24), 12.0, groups=(row_ids, col_ids))


def test_groups_of_one_are_labels(backend: str) -> None:
    image, text = pairs(150, 32, noise=1.0)
    order = torch.randperm(150)
    ids = (torch.arange(150) * 10**12, order * 10**12)  # more than 32 bits
    grouped = loss_and_gradients(
        lambda *t: info_nce(*t, groups=ids), (image.float(), text[order].float(), torch.tensor(20.0))
    )
    plain = loss_and_gradients(info_nce, (image.float(), text.float(), torch.tensor(20.0)))
    plain[2] = plain[2][order]
    for got, want in zip(grouped, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_masked_pairs_stay_negatives(backend: str) -> None:
    """FLAVA: the loss of the kept rows and columns, each over all."""
    mask = torch.rand(80) < 0.4

    def oracle(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        logits, labels = s * x @ y.T, torch.arange(80)[mask]
        return (F.cross_entropy(logits[mask], labels) + F.cross_entropy(logits.T[mask], labels)) / 2

    against(oracle, *pairs(80, 24), 15.0, row_mask=mask)


@pytest.mark.parametrize(
    "options",
    [
        {"row_mask": torch.zeros(6, dtype=torch.bool)},
        {"row_mask": torch.zeros(6, dtype=torch.bool), "label_smoothing": 0.1},
        {"groups": (torch.arange(6), torch.arange(6) + 6)},
    ],
)
def test_nothing_to_learn_is_zero(backend: str, options: dict[str, object]) -> None:
    inputs = (*(t.float() for t in pairs(6, 4)), torch.tensor(5.0))
    found = loss_and_gradients(lambda *t: info_nce(*t, **options), inputs)
    assert not any(t.any() for t in found)


@pytest.mark.parametrize("scale", [0.0, 1e-20, -5.0])
@pytest.mark.parametrize("variant", ["smoothing", "no positive below", "groups"])
def test_odd_scales(backend: str, variant: str, scale: float) -> None:
    options = VARIANTS[variant]()
    inputs = (unit(N, 16), unit(M, 16), torch.tensor(scale, dtype=torch.float64))
    exact = loss_and_gradients(lambda *t: reference(*t, **options), inputs)
    ours = loss_and_gradients(lambda *t: info_nce(*t, **options), inputs, [torch.float32] * 3)
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_label_offset_outside_means_no_positive_here(backend: str) -> None:
    """What a rank computes of another rank's texts: sums over all of them."""
    from vlmfast.ops.info_nce import tile_forward

    image, text = (t.float() for t in (unit(150, 24), unit(170, 24)))
    exact = torch.exp(20 * image.double() @ text.double().T)
    for offset in (-1000, 170, 5000, -150):
        rows, cols, _, _ = tile_forward(image, text, torch.tensor(20.0), None, None, offset, True, False)
        for stats, total in ((rows.double(), exact.sum(1)), (cols.double(), exact.sum(0))):
            torch.testing.assert_close(stats[1].log2() + stats[0], total.log2(), rtol=1e-6, atol=1e-6)
            assert not stats[2].any()


def test_gradcheck_of_the_variants() -> None:
    x, y = (t.requires_grad_() for t in (unit(5, 3), unit(6, 3)))
    s = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    for options in (
        {"label_smoothing": 0.2},
        {"exclude_positive": True},
        {"row_mask": torch.tensor([True, False, True, True, False])},
        {"groups": (torch.tensor([0, 1, 1, 2, 9]), torch.tensor([1, 0, 1, 2, 2, 8]))},
    ):
        assert torch.autograd.gradcheck(lambda a, b, c: reference(a, b, c, **options), (x, y, s))  # noqa: B023


@pytest.mark.parametrize(("exclude_positive", "counted"), [(False, False), (True, False), (False, True)])
def test_normalise(backend: str, exclude_positive: bool, counted: bool) -> None:
    """Each backend's float64 against that of torch: also where there are no negatives, no weight, and far from 1/2."""
    n = 700
    stats = torch.stack([torch.randint(-300, 300, (n,)).float(), torch.rand(n) * 10, torch.randn(n)])
    stats[0, 5:9], stats[2, 5:9] = torch.tensor([400.0, 60.0, -60.0, -400.0]), 0.0
    if not exclude_positive:
        stats[1, 0] = 0 if not counted else 1
    weight = torch.rand(n, dtype=torch.float64)
    weight[3] = 0
    sides = [(stats, weight, torch.randint(0, 5, (n,)) if counted else None)]
    sides.append((stats.flip(1)[:, :430].T.contiguous().T, weight[:430], sides[0][2][:430] if counted else None))
    for given in (sides, sides[:1]):
        losses, found = normalise(given, torch.tensor(7.0), exclude_positive)
        expected = [normalise_side(*side, torch.tensor(7.0), exclude_positive) for side in given]
        torch.testing.assert_close(losses.sum(), sum(loss for loss, _ in expected), rtol=1e-12, atol=0)
        for got, (_, want) in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
