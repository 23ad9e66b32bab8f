"""Nearest-neighbour search and recall over a gallery of unit-norm features, without the (Q, N) score matrix.

One total order serves everything here: higher cosine first, lower gallery index first among equals. `top_k` lists the
head of that order and `match_ranks` counts how far down the true match stands, so the two always agree.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

CHUNK = 1024
MAX_NORM = 1e18  # no product of two rows leaves float32


@dataclass(frozen=True)
class Recall:
    """Recall of one retrieval direction, as fractions in [0, 1].

    `chance[k]` is the expected R@k of a gallery in random order: k / N with one match per query, more with several.
    """

    recall: dict[int, float]
    chance: dict[int, float]
    median_rank: float
    num_queries: int
    num_gallery: int


def top_k(
    queries: torch.Tensor, gallery: torch.Tensor, k: int, *, chunk: int = CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k gallery rows with the largest inner product with each query, best first.

    Equals::

        scores = (queries.double() @ gallery.double().T).float()
        values, indices = scores.sort(dim=1, descending=True, stable=True)
        values[:, :k], indices[:, :k]

    Args:
        queries (Q, D), gallery (N, D): float32, float16 or bfloat16, on one device, of finite norm up to 1e18.
        k: 1 <= k <= N.
        chunk: rows of queries and of gallery scored at a time; changes memory and speed, not the result.
    Returns:
        values (Q, k): float32.  indices (Q, k): int64.  The lower index wins among equal scores.
    Raises:
        ValueError, TypeError: an argument is not as above; the message names it.
    Memory: O(chunk * (chunk + k + D) + Q * k).
    """
    _check(queries, gallery, chunk)
    _check_k(k, gallery.shape[0])
    tops = [queries.new_empty(0, k, dtype=torch.int64)]
    for rows in queries.split(chunk):
        best = rows.new_empty(rows.shape[0], 0, dtype=torch.int64)
        for start, scores in _score_chunks(rows, gallery, chunk):
            head = _encode(scores, start).topk(min(k, scores.shape[1]), dim=1).values
            best = torch.cat([best, head], dim=1)
            best = best.topk(min(k, best.shape[1]), dim=1).values
        tops.append(best)
    return _decode(torch.cat(tops))


def match_ranks(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    *,
    positives: tuple[torch.Tensor, torch.Tensor] | None = None,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """The rank, from 1, at which each query meets its first match in the order of `top_k`.

    Args:
        queries (Q, D), gallery (N, D): as in `top_k`.
        positives: int64 group ids (query_groups (Q,), gallery_groups (N,)); gallery row j matches query i when the ids
            are equal. None is the standard protocol of paired data: Q = N, and row i alone matches query i. With groups
            of one member the two agree.
        chunk: as in `top_k`.
    Returns:
        ranks (Q,): int64 in [1, N].
    Raises:
        ValueError, TypeError: an argument is not as above, or a query has no match in the gallery.
    Memory: O(chunk * (chunk + D) + Q).
    """
    _check(queries, gallery, chunk)
    query_groups, gallery_groups = _groups(queries, gallery, positives)
    ranks = [query_groups.new_empty(0)]
    for rows, groups in zip(queries.split(chunk), query_groups.split(chunk), strict=True):
        # The match has to be known before anything can be counted above it, hence two passes over the gallery.
        best = rows.new_full((rows.shape[0],), -torch.inf, dtype=torch.float32)
        place = torch.zeros_like(groups)
        for start, scores in _score_chunks(rows, gallery, chunk):
            others = groups[:, None] != gallery_groups[start : start + scores.shape[1]]
            values, columns = scores.masked_fill_(others, -torch.inf).max(dim=1)  # the first of equal maxima
            better = values > best
            best = torch.where(better, values, best)
            place = torch.where(better, start + columns, place)
        above = torch.zeros_like(place)
        for start, scores in _score_chunks(rows, gallery, chunk):
            columns = torch.arange(start, start + scores.shape[1], device=scores.device)
            tied_before = (scores == best[:, None]) & (columns < place[:, None])
            above += ((scores > best[:, None]) | tied_before).sum(dim=1)
        ranks.append(above + 1)
    return torch.cat(ranks)


def recall_at_k(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
    positives: tuple[torch.Tensor, torch.Tensor] | None = None,
    chunk: int = CHUNK,
) -> Recall:
    """R@k, the fraction of queries with a match among their first k, for every k; and the median rank of the match.

    Args:
        queries (Q, D), gallery (N, D), positives, chunk: as in `match_ranks`; Q >= 1.
        ks: each 1 <= k <= N.
    Raises:
        ValueError, TypeError: as in `match_ranks`; there are no queries; a k is out of range.
    """
    if queries.shape[0] == 0:
        raise ValueError("recall_at_k: queries: expected at least one row, got none")
    for k in ks:
        _check_k(k, gallery.shape[0])
    ranks = match_ranks(queries, gallery, positives=positives, chunk=chunk)
    query_groups, gallery_groups = _groups(queries, gallery, positives)
    _, inverse = torch.cat([query_groups, gallery_groups]).unique(return_inverse=True)
    num_queries, num_gallery = queries.shape[0], gallery.shape[0]
    counts = inverse[num_queries:].bincount(minlength=int(inverse.max()) + 1)[inverse[:num_queries]]
    return Recall(
        recall={k: (ranks <= k).double().mean().item() for k in ks},
        chance={k: _chance(counts, num_gallery, k) for k in ks},
        median_rank=float(statistics.median(ranks.tolist())),
        num_queries=num_queries,
        num_gallery=num_gallery,
    )


def caption_groups(captions: Sequence[str]) -> torch.Tensor:
    """Group ids (N,) int64 in which pairs with the identical caption string are one group.

    Two images captioned "star" are both right answers to "star". Where every caption is unique this is the standard
    protocol of one match per query.
    """
    ids: dict[str, int] = {}
    return torch.tensor([ids.setdefault(caption, len(ids)) for caption in captions], dtype=torch.int64)


def _score_chunks(queries: torch.Tensor, gallery: torch.Tensor, chunk: int) -> Iterator[tuple[int, torch.Tensor]]:
    # Summed in float64 and rounded once, scores depend neither on the chunk's shape nor on TF32: equal rows tie
    # wherever they stand.
    wide = queries.double()
    for start in range(0, gallery.shape[0], chunk):
        yield start, (wide @ gallery[start : start + chunk].double().T).float()


# topk leaves open which of two equal scores it takes. A key is a score and its gallery index in one int64, the
# float32's bits, made to order as integers do, above the complement of the index: keys are unique.
_LOW = 0xFFFFFFFF


def _encode(scores: torch.Tensor, start: int) -> torch.Tensor:
    index = torch.arange(start, start + scores.shape[1], device=scores.device)
    bits = scores.add_(0.0).view(torch.int32)  # -0.0 becomes its equal, 0.0
    return _flip(bits).long().bitwise_left_shift_(32).bitwise_or_(_LOW - index)


def _decode(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _flip((keys >> 32).int()).view(torch.float32), _LOW - (keys & _LOW)


def _flip(bits: torch.Tensor) -> torch.Tensor:
    # Negative floats order backwards as integers; turning their magnitude bits over mends that, and undoes itself.
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


def _chance(counts: torch.Tensor, num_gallery: int, k: int) -> float:
    # 1 - C(N - m, k) / C(N, k) for a query with m matches; a factor is 0 where k > N - m.
    draws = torch.arange(k, dtype=torch.float64)
    matches, queries = counts.unique(return_counts=True)
    misses = ((num_gallery - matches.cpu()[:, None] - draws) / (num_gallery - draws)).prod(dim=1)
    return 1.0 - float((misses * queries.cpu()).sum()) / counts.numel()


def _groups(
    queries: torch.Tensor, gallery: torch.Tensor, positives: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    num_queries, num_gallery = queries.shape[0], gallery.shape[0]
    if positives is None:
        if num_queries != num_gallery:
            raise ValueError(
                "positives: expected group ids when queries and gallery are not pairs, "
                f"got None with {num_queries} queries and a gallery of {num_gallery}"
            )
        pairs = torch.arange(num_queries, device=queries.device)
        return pairs, pairs
    for name, ids, length in zip(("queries", "gallery"), positives, (num_queries, num_gallery), strict=True):
        if ids.dtype != torch.int64:
            raise TypeError(f"positives: expected int64 ids of the {name}, got {ids.dtype}")
        if ids.shape != (length,):
            raise ValueError(f"positives: expected ids of shape ({length},) for the {name}, got {tuple(ids.shape)}")
    query_groups, gallery_groups = (ids.to(queries.device) for ids in positives)
    orphans = ~torch.isin(query_groups, gallery_groups)
    if orphans.any():
        first = int(orphans.nonzero()[0])
        raise ValueError(
            f"positives: expected a match in the gallery for every query, got {int(orphans.sum())} queries "
            f"without one (the first is query {first}, group {int(query_groups[first])})"
        )
    return query_groups, gallery_groups


def _check(queries: torch.Tensor, gallery: torch.Tensor, chunk: int) -> None:
    for name, features in (("queries", queries), ("gallery", gallery)):
        if features.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {features.dtype}")
        if features.ndim != 2:
            raise ValueError(f"{name}: expected shape (rows, D), got {tuple(features.shape)}")
        broken = int((~(features.float().norm(dim=1) <= MAX_NORM)).sum())
        if broken:
            raise ValueError(f"{name}: expected finite rows of norm up to {MAX_NORM:g}, got {broken} that are not")
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"gallery: expected D = {queries.shape[1]} as in queries, got {gallery.shape[1]}")
    if queries.device != gallery.device:
        raise ValueError(f"gallery: expected device {queries.device} as queries, got {gallery.device}")
    if gallery.shape[0] == 0:
        raise ValueError("gallery: expected at least one row, got none")
    if gallery.shape[0] > _LOW:
        raise ValueError(f"gallery: expected fewer than 2**32 rows, got {gallery.shape[0]}")
    if chunk < 1:
        raise ValueError(f"chunk: expected a positive number of rows, got {chunk}")


def _check_k(k: int, num_gallery: int) -> None:
    if not 1 <= k <= num_gallery:
        raise ValueError(f"k: expected 1 <= k <= {num_gallery}, the size of the gallery, got {k}")
