"""open_clip's contrastive loss without the logits in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast import distributed
from vlmfast.nn._features import (
    check_ranks,
    check_rows,
    contrast,
    label_offset,
    of_one_dtype,
    sizes_of_shards,
)
from vlmfast.nn.exchange import shards_per_block
from vlmfast.ops import _pairs
from vlmfast.ops._arguments import check_flag
from vlmfast.ops.info_nce import STORE_BUDGET_BYTES, normalise, tile_backward, tile_forward


class ClipLoss(nn.Module):
    """Symmetric InfoNCE over one process's batch or the batch of all processes; a drop-in for `open_clip.ClipLoss`.

    Values and gradients are open_clip's for each of the four combinations of local_loss and gather_with_grad. Only
    those with gather_with_grad=True give, after DistributedDataParallel's mean, the gradients of one process on the
    global batch; without it the features of the other ranks are constants.

    With gather_with_grad=True each rank computes its images against all texts once, for both directions. Texts are
    gathered, column sums added over ranks and the texts' gradients added and given to their owners, each by one
    collective; or all of that travels round a ring of ranks while the next block is computed. `vlmfast.nn.exchange`
    says which. The gradient of logit_scale is then the mean over the ranks' losses on every rank, which
    DistributedDataParallel's mean leaves as it is; with local_loss open_clip has a different part of it on each rank.

    Args:
        local_loss: with several processes, each returns the loss of its own rows and columns, instead of the global
            loss. The mean over ranks is the global loss: with N rows on W ranks, its own terms are summed and divided
            by N / W, which is its own number of rows where all have as many.
        gather_with_grad: let gradients flow to the features of the other ranks.
        cache_labels: accepted for compatibility; no labels are ever built.
        rank, world_size: this process and how many there are; world_size > 1 needs an initialised torch.distributed.
            With 1 or 0 there is one process, whatever rank says.
        uniform: a promise that on all ranks features have the same shape and dtype, the same inputs need a gradient,
            and the loss is multiplied by the same factor. The ranks then do not ask each other, and the host does not
            wait for the device. Where it does not hold, results are wrong or the ranks wait for each other until the
            process group's timeout.
    Raises:
        TypeError: rank or world_size is no integer, or uniform no bool.
        ValueError: world_size is negative, or more than 1 and rank not in [0, world_size).
    Memory with gather_with_grad, n rows of N on this rank: O(n*N) while the exponentials of the largest shard fit in
    info_nce's budget for them; else O(N*D) where texts are gathered and O(n*D) on the ring. FLOPs: 6*n*N*D and
    8*n*N*D.
    Source: Radford et al. 2021, figure 3; open_clip's loss.py for the interface.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        uniform: bool = False,
    ) -> None:
        super().__init__()
        check_ranks("ClipLoss", rank, world_size)
        check_flag("ClipLoss", "uniform", uniform)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.uniform = uniform

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or {"contrastive_loss": loss} with output_dict.

        Args:
            image_features (n, D), text_features (n, D): unit-norm, float32, float16 or bfloat16; n may differ between
                ranks. Under autocast the two may differ in dtype, and the wider is taken. float64 runs in PyTorch, with
                the logits in memory.
            logit_scale (): the inverse temperature itself, as open_clip passes it (the exponential of the parameter).
            logit_bias (): added to every logit by open_clip, which changes neither loss nor gradients; its gradient is
                0.
        Returns:
            loss (): float32; float64 of float64 features.
        Raises:
            ValueError, TypeError: as `vlmfast.ops.info_nce`; image_features and text_features differ in rows; ranks
                differ in dim, dtype or in what needs a gradient (on every rank alike); rank and world_size are not
                those of torch.distributed.
            RuntimeError: another rank has died or did not answer within the process group's timeout; a second
                derivative is asked for.
        """
        image_features, text_features = of_one_dtype(image_features, text_features)
        if self.world_size <= 1:
            check_rows("ClipLoss", image_features, text_features)
            loss = contrast(image_features, text_features, logit_scale)
        else:
            loss = self._global_loss(image_features, text_features, logit_scale)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def _global_loss(self, image: Tensor, text: Tensor, logit_scale: Tensor | float) -> Tensor:
        distributed.check_rank("ClipLoss", self.rank, self.world_size)
        exact = image.dtype == torch.float64
        scale = logit_scale if exact else _pairs.scalar("ClipLoss", "logit_scale", logit_scale, image)
        leaves = [t for t in (image, text, scale) if isinstance(t, Tensor)]
        wanted = [torch.is_grad_enabled() and t.requires_grad for t in leaves] if self.gather_with_grad else []
        sizes = sizes_of_shards("ClipLoss", image, text, wanted, self.world_size if self.uniform else None)
        if self.gather_with_grad and not exact:
            _pairs.check_features("ClipLoss", image, text)
            block = shards_per_block(sizes, text)
            way = _Rectangle if block == self.world_size else _Strip
            loss: Tensor = way.apply(image, text, scale, _Plan(sizes, wanted, block, self.local_loss, self.uniform))
            return loss
        shards = (image, text) if self.gather_with_grad else (image.detach(), text.detach())
        all_image, all_text = (distributed.gather(shard, sizes) for shard in shards)
        offset = sum(sizes[: self.rank])
        if not self.local_loss:
            if not self.gather_with_grad:
                all_image = all_image.slice_scatter(image, start=offset, end=offset + len(image))
                all_text = all_text.slice_scatter(text, start=offset, end=offset + len(text))
            return contrast(all_image, all_text, scale)
        loss_image = contrast(image, all_text, scale, label_offset=offset, bidirectional=False)
        loss_text = contrast(text, all_image, scale, label_offset=offset, bidirectional=False)
        return (loss_image + loss_text) * (len(image) * self.world_size / sum(sizes) / 2)


@dataclass(frozen=True)
class _Plan:
    """The same on every rank: rows per rank, which of image, text and scale need a gradient, shards per block."""

    sizes: list[int]
    wanted: list[bool]
    block: int
    local_loss: bool
    uniform: bool

    @property
    def unit(self) -> float:
        """One over the mean number of rows per rank."""
        return len(self.sizes) / sum(self.sizes)

    def gathered(self, grad: Tensor) -> Tensor:
        """(ranks,): the gradients that arrive at the ranks' losses; (1,) where they are known to be equal."""
        return grad.float()[None] if self.uniform else distributed.gather_scalars(grad.float())

    def weights(self, grads: Tensor) -> tuple[Tensor, Tensor | None]:
        """What gradients are multiplied by; and by what else those of each rank's terms (ranks,), where they differ.

        Every rank's loss has the terms of its own rows and columns, so each owner's gradient weighs its own. Backends
        expect factors of order 1 and the magnitude, a GradScaler's say, in unit.
        """
        if self.uniform or not self.local_loss:
            return grads.mean() * self.unit, None
        largest = grads.abs().max()
        return largest * self.unit, torch.where(largest == 0, 0, grads / largest)


class _Rectangle(torch.autograd.Function):
    """This rank's images against all texts, which are gathered: one op forward, one backward, three collectives.

    The sums of a column over all ranks' rows are added up after the op, the gradient of the texts after the op of
    backward. The losses of the rows, and the gradient of the scale, go with them.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, plan: _Plan) -> Tensor:
        rank, _ = distributed.rank_and_world_size()
        n, offset, count = len(image), sum(plan.sizes[:rank]), sum(plan.sizes)
        texts = distributed.gather_rows(text, plan.sizes)
        # As info_nce has it: an accelerator computes a dot product sooner than it reads what it kept.
        keep = any(plan.wanted) and image.device.type == "cpu" and 4 * n * count <= STORE_BUDGET_BYTES
        rows, cols, shift, kept = tile_forward(image, texts, scale, None, None, offset, True, keep)
        weight = image.new_full((count,), 0.5, dtype=torch.float64)
        row_losses, (row_side,) = normalise([(rows, weight[:n], None)], scale, exclude_positive=False)
        cols, all_row_losses = _over_ranks(cols, shift, row_losses)
        if plan.local_loss:
            own = (cols[:, offset : offset + n], weight[:n], None)
            col_losses, (_, col_side) = normalise([own, (cols, weight, None)], scale, exclude_positive=False)
            loss = (row_losses[0] + col_losses[0]) * plan.unit
        else:
            col_losses, (col_side,) = normalise([(cols, weight, None)], scale, exclude_positive=False)
            loss = (all_row_losses + col_losses[0]) / count
        ctx.plan = plan
        ctx.save_for_backward(image, texts, scale, row_side, _with_one_shift(col_side, shift), shift, kept)
        return loss.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        image, texts, scale, row_side, col_side, shift, kept = ctx.saved_tensors
        plan, (rank, world_size) = ctx.plan, distributed.rank_and_world_size()
        wants_image, wants_text, wants_scale = plan.wanted

        def gradients(unit: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            rows, cols = row_side, col_side
            if shares is not None:
                rows, cols = _weighed(rows, shares[rank]), _weighed(cols, _per_row(shares, plan.sizes))
            offset = sum(plan.sizes[:rank])
            return tile_backward(
                unit, image, texts, scale.float(), rows, cols, shift, kept, None, None, offset, wants_image, wants_text
            )

        if wants_text and not plan.uniform and image.device.type == "cpu":
            # What the losses are multiplied by goes with the gradients, as it is hardly ever not the same on all ranks.
            d_image, d_text, d_scale = gradients(grad.float() * plan.unit, None)
            numbers = d_scale.new_zeros(world_size + 1)
            numbers[0], numbers[1 + rank] = d_scale, grad
            d_text, numbers = distributed.reduce_scatter(d_text, plan.sizes, numbers)
            if (numbers[1:] != numbers[1]).any():
                d_image, d_text, d_scale = gradients(*plan.weights(numbers[1:]))
                d_text, numbers = distributed.reduce_scatter(d_text, plan.sizes, d_scale[None])
            d_scale = numbers[0] / world_size
        else:
            d_image, d_text, d_scale = gradients(*plan.weights(plan.gathered(grad)))
            if wants_text:
                d_text, (d_scale,) = distributed.reduce_scatter(d_text, plan.sizes, d_scale[None])
                d_scale = d_scale / world_size
            elif wants_scale:
                d_scale = distributed.mean(d_scale)
        return (
            d_image if wants_image else None,
            d_text.to(texts.dtype) if wants_text else None,
            d_scale.to(scale.dtype) if wants_scale else None,
            None,
        )


def _over_ranks(stats: Tensor, shift: Tensor, row_losses: Tensor) -> tuple[Tensor, Tensor]:
    """Shift, sum and positives' dot products (3, N) over all ranks' rows, and the sum of all ranks' row_losses (1,).

    In float64 powers of two can be added as they are while the logits are within 550 of zero. A CPU sees whether they
    are. An accelerator is not asked, as that would be to wait for it: each column's largest shift is found first.
    """
    shifts, totals, dots = stats.double()
    columns, device = stats.shape[1], stats.device.type
    sums = None
    if device == "cpu":
        # The block's one shift is that of every column, where it is finite.
        far = not (abs(shift.item()) <= 800 or (shifts.abs() <= 800).all())
        sums = distributed.total(
            torch.cat([totals * torch.exp2(shifts), dots, row_losses, row_losses.new_tensor([far])])
        )
    if sums is not None and sums[-1] == 0:
        mantissa, top = torch.frexp(sums[:columns])
    else:
        top = distributed.largest(torch.where(totals == 0, -math.inf, shifts))
        top = torch.where(top == -math.inf, 0, top)
        totals = torch.where(totals == 0, 0, totals * torch.exp2(shifts - top))
        sums = distributed.total(torch.cat([totals, dots, row_losses]))
        mantissa, exponent = torch.frexp(sums[:columns])
        top = top + exponent
    return torch.stack([top, mantissa, sums[columns : 2 * columns]]).float(), sums[2 * columns]


def _with_one_shift(side: Tensor, shift: Tensor) -> Tensor:
    """`normalise`'s shift, factor and target (3, N) of all ranks' columns, for a block whose one shift is finite.

    The one is above a column's by 126 at most, but where the column has nothing but its positive here, and then its
    factor is not read. Factors are at most 1.
    """
    rise = torch.where(shift.isfinite(), shift - side[0], 0).clamp(max=127)
    return torch.stack([side[0] + rise, side[1] * torch.exp2(rise), side[2]])


class _Strip(torch.autograd.Function):
    """This rank's images against all texts, a block of ranks' texts at a time.

    The statistics of the rows are complete when all blocks have been here, those of a block's columns when it has been
    everywhere: they follow it round the ring, and so does the gradient of its texts in backward.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, plan: _Plan) -> Tensor:
        sizes, block = plan.sizes, plan.block
        # The same on every rank: when the exponentials are not kept, neither are the texts, which go round again.
        keep = any(plan.wanted) and 4 * max(sizes) * sum(sizes) <= STORE_BUDGET_BYTES
        rows = image.new_zeros(len(image), 3, dtype=torch.float32)
        cols, shifts, kept = distributed.Homeward(sizes, _merge, block), [], []
        for number, (texts,) in distributed.ring([text], sizes, block):
            offset = label_offset(number, sizes, block)
            row_stats, col_stats, shift, exponentials = tile_forward(
                image, texts, scale, None, None, offset, True, keep
            )
            rows = _merge(rows, row_stats.T)
            cols.add(number, col_stats.T)
            shifts.append(shift)
            if keep:
                kept += [texts, exponentials]
        weight = image.new_full((len(image),), 0.5, dtype=torch.float64)
        losses, (row_side, col_side) = normalise(
            [(stats.T, weight, None) for stats in (rows, cols.total())], scale, exclude_positive=False
        )
        ctx.plan = plan
        ctx.save_for_backward(image, text, scale, row_side, col_side, torch.stack(shifts), *kept)
        loss = losses.sum() * plan.unit
        return (loss if plan.local_loss else distributed.mean(loss)).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        image, text, scale, row_side, col_side, shifts, *kept = ctx.saved_tensors
        plan, (rank, _) = ctx.plan, distributed.rank_and_world_size()
        sizes, block = plan.sizes, plan.block
        wants_image, wants_text, wants_scale = plan.wanted
        unit, shares = plan.weights(plan.gathered(grad))
        if shares is not None:
            row_side, col_side = _weighed(row_side, shares[rank]), _weighed(col_side, shares[rank])
        d_image, d_scale = torch.zeros_like(image, dtype=torch.float32), torch.zeros_like(scale, dtype=torch.float32)
        d_text = distributed.Homeward(sizes, shards_per_block=block)
        travelling = [col_side.T] if kept else [col_side.T, text]
        for step, (number, (cols, *rest)) in enumerate(distributed.ring(travelling, sizes, block)):
            texts, exponentials = kept[2 * step : 2 * step + 2] if kept else (*rest, shifts.new_empty(0, 0))
            found = tile_backward(
                unit,
                image,
                texts,
                scale.float(),
                _side_of_block(row_side, shifts[step]),
                _side_of_block(cols.T, shifts[step]),
                shifts[step],
                exponentials,
                None,
                None,
                label_offset(number, sizes, block),
                wants_image,
                wants_text,
            )
            if wants_image:
                d_image += found[0]
            if wants_text:
                d_text.add(number, found[1].float())
            d_scale += found[2]
        return (
            d_image.to(image.dtype) if wants_image else None,
            d_text.total().to(text.dtype) if wants_text else None,
            distributed.mean(d_scale).to(scale.dtype) if wants_scale else None,
            None,
        )


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "ClipLoss over several processes: the second derivative is not implemented (create_graph=True)"
        )


def _per_row(shares: Tensor, sizes: list[int]) -> Tensor:
    """(N,) from (ranks,): each rank's number for each of its rows."""
    if min(sizes) == max(sizes):
        return shares.repeat_interleave(sizes[0])
    return torch.cat([share.expand(size) for share, size in zip(shares, sizes, strict=True)])


def _weighed(side: Tensor, share: Tensor) -> Tensor:
    """`normalise`'s shift, factor and target (3, n) of a gradient that is weighed by share."""
    return torch.stack([side[0], side[1] * share, side[2] * share])


def _merge(stats: Tensor, others: Tensor) -> Tensor:
    """Shift, sum and positives' dot products (n, 3) over two sets of columns, or rows, from those over each."""
    both = torch.stack([stats, others])
    shift, total = both[..., 0], both[..., 1]
    empty = total == 0  # its shift means nothing
    top = shift.masked_fill(empty, -math.inf).amax(0)
    top = torch.where(top == -math.inf, 0, top)
    total = torch.where(empty, 0, total * torch.exp2(shift - top))
    return torch.stack([top, total.sum(0), both[..., 2].sum(0)], 1)


def _side_of_block(side: Tensor, shift: Tensor) -> Tensor:
    """`normalise`'s shift, factor and target (3, n) for one block.

    Where the block's own shift is finite, backends take it for that of every row, as in what was kept.
    """
    one = shift.isfinite()
    # It is only above a row's shift over all blocks where the row has nothing but its positive in this block.
    factor = side[1] * torch.where(one, torch.exp2((shift - side[0]).clamp(max=0)), 1)
    return torch.stack([torch.where(one, shift, side[0]), factor, side[2]])
