"""The backends of info_nce, made of halves between which processes add up what they have found. Contract and equations:
vlmfast/ops/info_nce.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmfast.ops import _pairs
from vlmfast.ops._dispatch import Impl

PANEL = 256  # kMostCols of csrc/tiles.h

Side = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class InfoNceImpl(Impl):
    """`forward` and `backward` are the op's; besides, the two halves of forward.

    - tile_forward(image, text, scale, row_codes, col_codes, label_offset, columns, keep) -> row_stats, col_stats, shift
      and kept; `backward` reads the latter two.
    - normalise(sides, scale, exclude_positive) -> terms of the loss, to be summed, in float64; for each side shift,
      factor and target (3, n) in float32. A side, of the rows or of the columns, is

      - stats (3, n): as tile_forward returns them, complete over all columns;
      - weight (n,): float64, of each row's loss, 0 where it has none;
      - count (n,): positives of each row with groups, None without.
    """

    tile_forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    normalise: Callable[[Sequence[Side], Tensor, bool], tuple[Tensor, list[Tensor]]]


def in_halves(tiles: Impl, normalise: Callable[..., tuple[Tensor, list[Tensor]]]) -> InfoNceImpl:
    """A backend whose forward is tile_forward, and which keeps (n, N) row by row: on CPU tensors kept are panels."""

    def tile_forward(image: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row_stats, col_stats, shift, kept = tiles.forward(image, *args)
        return row_stats, col_stats, shift, _in_panels(kept) if kept.device.type == "cpu" else kept

    def backward(*args: Any) -> Any:
        before, kept, after = args[:7], args[7], args[8:]
        return tiles.backward(*before, _in_rows(kept) if kept.device.type == "cpu" else kept, *after)

    forward = partial(_forward_by_halves, tile_forward, normalise)
    return InfoNceImpl(forward, backward, tiles.unsupported, tile_forward=tile_forward, normalise=normalise)


def _in_panels(kept: Tensor) -> Tensor:
    return torch.cat([panel.reshape(-1) for panel in kept.split(PANEL, 1)]).view_as(kept) if kept.numel() else kept


def _in_rows(kept: Tensor) -> Tensor:
    if not kept.numel():
        return kept
    n = kept.shape[0]
    return torch.cat([panel.view(n, -1) for panel in kept.view(-1).split(n * PANEL)], 1)


def each_side(
    normalise_side: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[[Sequence[Side], Tensor, bool], tuple[Tensor, list[Tensor]]]:
    """`InfoNceImpl.normalise` from a function of one side."""

    def normalise(sides: Sequence[Side], scale: Tensor, exclude_positive: bool) -> tuple[Tensor, list[Tensor]]:
        losses, normalised = zip(*(normalise_side(*side, scale, exclude_positive) for side in sides), strict=True)
        return torch.stack(losses), list(normalised)

    return normalise


def _forward_by_halves(
    tile_forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
    normalise: Callable[[Sequence[Side], Tensor, bool], tuple[Tensor, list[Tensor]]],
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    row_mask: Tensor | None,
    row_codes: Tensor | None,
    col_codes: Tensor | None,
    label_offset: int,
    bidirectional: bool,
    exclude_positive: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    row_stats, col_stats, shift, kept = tile_forward(
        image, text, scale, row_codes, col_codes, label_offset, bidirectional, keep
    )
    row_weight, col_weight, row_count, col_count, unit = _weights(
        image, text, row_mask, (row_codes, col_codes), label_offset, bidirectional
    )
    sides: list[Side] = [(row_stats, row_weight, row_count)]
    if bidirectional:
        sides.append((col_stats, col_weight, col_count))
    loss, (rows, *cols) = normalise(sides, scale, exclude_positive)
    columns = cols[0] if cols else rows.new_zeros(3, text.shape[0])
    return (loss.sum() * unit).float(), rows, columns, shift, kept, unit.float()


def _weights(
    image: Tensor,
    text: Tensor,
    row_mask: Tensor | None,
    codes: tuple[Tensor | None, Tensor | None],
    label_offset: int,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Weights (n,) and (N,) of the rows' and columns' losses relative to unit (), and how many positives each has."""
    n, columns = image.shape[0], text.shape[0]
    share = 0.5 if bidirectional else 1.0
    if codes[0] is not None and codes[1] is not None:
        row_count, col_count = _pairs.count_matches(codes[0], codes[1]), _pairs.count_matches(codes[1], codes[0])
        rows, cols = (row_count > 0).double(), (col_count > 0).double()
        row_total, col_total = rows.sum().clamp(min=1), cols.sum().clamp(min=1)
        # Of the side with fewer losses, so that no weight is above 1: backends may hold gradients of logits in float16.
        fewer = torch.minimum(row_total, col_total) if bidirectional else row_total
        row_weight, col_weight = share * rows * (fewer / row_total), (1 - share) * cols * (fewer / col_total)
        return row_weight, col_weight, row_count, col_count, 1 / fewer
    cols = torch.zeros(columns, dtype=torch.float64, device=image.device)
    own = cols[label_offset : label_offset + n]
    if row_mask is None:
        own.fill_(1 - share)
        return cols.new_full((n,), share), cols, None, None, cols.new_full((), 1 / n)
    own.copy_(row_mask).mul_(1 - share)
    return share * row_mask.double(), cols, None, None, 1 / row_mask.sum(dtype=torch.float64).clamp(min=1)
