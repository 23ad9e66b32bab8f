import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vlmfast.tasks.search import caption_groups, match_ranks, recall_at_k, top_k


def order(queries: torch.Tensor, gallery: torch.Tensor) -> list[list[int]]:
    """The whole gallery for each query, best first, by Python's sort over the full matrix."""
    scores = (queries.double() @ gallery.double().T).float().tolist()
    return [sorted(range(len(row)), key=lambda index, row=row: (-row[index], index)) for row in scores]  # type: ignore[misc]


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Small integers, so that most scores tie, exactly."""
    dim = draw(st.integers(1, 3))
    row = st.lists(st.integers(-2, 2), min_size=dim, max_size=dim)
    queries = draw(st.lists(row, min_size=1, max_size=6))
    gallery = draw(st.lists(row, min_size=1, max_size=12))
    return torch.tensor(queries, dtype=torch.float32), torch.tensor(gallery, dtype=torch.float32)


@settings(deadline=None)
@given(problems(), st.data(), st.integers(1, 14))
def test_top_k_is_the_head_of_the_full_order(
    problem: tuple[torch.Tensor, torch.Tensor], data: st.DataObject, chunk: int
) -> None:
    queries, gallery = problem
    k = data.draw(st.integers(1, len(gallery)))
    values, indices = top_k(queries, gallery, k, chunk=chunk)
    assert indices.tolist() == [row[:k] for row in order(queries, gallery)]
    assert values.dtype == torch.float32
    assert indices.dtype == torch.int64
    torch.testing.assert_close(values, (queries @ gallery.T).gather(1, indices), rtol=0, atol=0)


@settings(deadline=None)
@given(problems(), st.data(), st.integers(1, 14))
def test_rank_is_the_place_of_the_first_match(
    problem: tuple[torch.Tensor, torch.Tensor], data: st.DataObject, chunk: int
) -> None:
    queries, gallery = problem
    gallery_groups = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(gallery), max_size=len(gallery))))
    pick = st.sampled_from(gallery_groups.tolist())
    query_groups = torch.tensor(data.draw(st.lists(pick, min_size=len(queries), max_size=len(queries))))
    ranks = match_ranks(queries, gallery, positives=(query_groups, gallery_groups), chunk=chunk)
    expected = [
        1 + next(place for place, hit in enumerate(row) if gallery_groups[hit] == group)
        for row, group in zip(order(queries, gallery), query_groups, strict=True)
    ]
    assert ranks.tolist() == expected


def test_recall_agrees_with_top_k_on_random_features() -> None:
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(203, 24, generator=generator), dim=1)
    text = F.normalize(image + 0.3 * torch.randn(203, 24, generator=generator), dim=1)
    scores = recall_at_k(image, text, ks=(1, 5, 10, 203), chunk=64)
    for k in (1, 5, 10):
        found = top_k(image, text, k)[1] == torch.arange(203)[:, None]
        assert scores.recall[k] == pytest.approx(found.any(dim=1).double().mean().item(), abs=1e-12)
        assert 0.1 < scores.recall[k] < 1  # neither hopeless nor solved, or the test would show nothing
    assert scores.recall[203] == 1.0
    ranks = [1 + row.index(query) for query, row in enumerate(order(image, text))]
    assert scores.median_rank == sorted(ranks)[101]
    assert (scores.num_queries, scores.num_gallery) == (203, 203)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunk_size_changes_nothing(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    queries = F.normalize(torch.randn(37, 48, generator=generator), dim=1).to(dtype)
    gallery = F.normalize(torch.randn(91, 48, generator=generator), dim=1).to(dtype)
    gallery[60:70] = gallery[3:13]  # equal rows far apart: they must tie in every chunking
    groups = torch.arange(37), torch.arange(91) % 37
    values, indices = top_k(queries, gallery, 20, chunk=1000)
    ranks = match_ranks(queries, gallery, positives=groups, chunk=1000)
    for chunk in (1, 2, 7, 37, 64, 90):
        again, where = top_k(queries, gallery, 20, chunk=chunk)
        assert torch.equal(again, values)
        assert torch.equal(where, indices)
        assert torch.equal(match_ranks(queries, gallery, positives=groups, chunk=chunk), ranks)


def test_equal_rows_come_in_index_order_across_chunks() -> None:
    row = F.normalize(torch.randn(1, 33, generator=torch.Generator().manual_seed(2)), dim=1)
    _, indices = top_k(row, row.expand(50, -1), 50, chunk=7)
    assert indices.tolist() == [list(range(50))]


def test_signed_zeros_tie() -> None:
    _, indices = top_k(torch.tensor([[1e-30]]), torch.tensor([[-1e-30], [1e-30], [0.0]]), 3)  # underflows to -0, 0, 0
    assert indices.tolist() == [[0, 1, 2]]


def test_negative_scores_are_ordered_and_returned_exactly() -> None:
    gallery = torch.tensor([[-0.5], [-0.25], [0.75], [-2.0], [-math.pi]])
    values, indices = top_k(torch.ones(1, 1), gallery, 5, chunk=2)
    assert indices.tolist() == [[2, 1, 0, 3, 4]]
    assert torch.equal(values[0], gallery[:, 0][indices[0]])


def test_a_collapsed_model_scores_chance_not_everything() -> None:
    same = torch.ones(50, 4)
    scores = recall_at_k(same, same)
    assert scores.recall == pytest.approx(scores.chance) == {1: 0.02, 5: 0.1, 10: 0.2}
    assert scores.median_rank == 25.5


def test_unique_captions_give_the_standard_protocol() -> None:
    generator = torch.Generator().manual_seed(3)
    image, text = torch.randn(2, 40, 5, generator=generator)
    groups = caption_groups([f"caption {index}" for index in range(40)])
    assert recall_at_k(image, text) == recall_at_k(image, text, positives=(groups, groups))


def test_identical_captions_match_one_another_only_when_asked() -> None:
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    image = torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    groups = caption_groups(["star", "moon", "star"])
    assert groups.tolist() == [0, 1, 0]
    # The caption of row 0, "star", is nearest to the image of row 2, another star; row 2's caption ties with row 0's.
    assert match_ranks(text, image).tolist() == [2, 1, 1]
    assert match_ranks(text, image, positives=(groups, groups)).tolist() == [1, 1, 1]
    assert match_ranks(image, text).tolist() == [2, 1, 2]
    assert match_ranks(image, text, positives=(groups, groups)).tolist() == [2, 1, 1]


def test_chance_counts_every_draw() -> None:
    gallery_groups = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    query_groups = torch.tensor([0, 1, 2])
    scores = recall_at_k(torch.ones(3, 1), torch.ones(7, 1), ks=(1, 3, 7), positives=(query_groups, gallery_groups))
    for k in (1, 3, 7):
        draws = list(itertools.combinations(gallery_groups.tolist(), k))
        expected = sum(group in draw for group in (0, 1, 2) for draw in draws) / (3 * len(draws))
        assert scores.chance[k] == pytest.approx(expected, abs=1e-12)


class Largest(TorchDispatchMode):
    """Size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_tensor_as_large_as_the_score_matrix() -> None:
    queries, gallery = torch.randn(2, 600, 4)
    with Largest() as largest:
        top_k(queries, gallery, 10, chunk=50)
        recall_at_k(queries, gallery, chunk=50)
    assert largest.numel <= 600 * 10  # the result of top_k, more than chunk * (chunk + k)
    with Largest() as whole:
        top_k(queries, gallery, 10, chunk=600)
    assert whole.numel >= 600 * 600  # the mode does see the matrix where there is one


ROW = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: top_k(ROW, ROW, 4), ValueError, "k: expected 1 <= k <= 3, the size of the gallery, got 4"),
        (lambda: top_k(ROW, ROW, 0), ValueError, "k: expected 1 <= k <= 3"),
        (lambda: recall_at_k(ROW, ROW, ks=(1, 5)), ValueError, "k: expected 1 <= k <= 3"),
        (lambda: top_k(ROW, ROW[:0], 1), ValueError, "gallery: expected at least one row"),
        (lambda: recall_at_k(ROW[:0], ROW[:0], ks=(1,)), ValueError, "queries: expected at least one row"),
        (lambda: top_k(ROW, ROW, 1, chunk=0), ValueError, "chunk: expected a positive number"),
        (lambda: top_k(ROW, ROW[:, :1], 1), ValueError, "gallery: expected D = 2 as in queries, got 1"),
        (lambda: top_k(ROW[0], ROW, 1), ValueError, r"queries: expected shape \(rows, D\)"),
        (lambda: top_k(ROW.double(), ROW, 1), TypeError, "queries: expected float32, float16 or bfloat16"),
        (lambda: top_k(ROW, ROW / 0, 1), ValueError, "gallery: expected finite rows .*, got 3 that are not"),
        (lambda: top_k(ROW * 1e19, ROW, 1), ValueError, "queries: expected finite rows of norm up to 1e.18, got 3"),
        (lambda: top_k(ROW * torch.nan, ROW, 1), ValueError, "queries: expected finite rows"),
        (lambda: match_ranks(ROW, ROW[:2]), ValueError, "positives: expected group ids"),
        (
            lambda: match_ranks(ROW, ROW, positives=(torch.tensor([0, 7, 8]), torch.tensor([0, 1, 2]))),
            ValueError,
            "got 2 queries without one .the first is query 1, group 7",
        ),
        (
            lambda: match_ranks(ROW, ROW, positives=(torch.arange(3), torch.arange(2))),
            ValueError,
            r"positives: expected ids of shape \(3,\) for the gallery",
        ),
        (
            lambda: match_ranks(ROW, ROW, positives=(torch.arange(3).int(), torch.arange(3))),
            TypeError,
            "positives: expected int64 ids of the queries",
        ),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_no_queries_give_no_neighbours() -> None:
    values, indices = top_k(ROW[:0], ROW, 2)
    assert values.shape == indices.shape == (0, 2)
