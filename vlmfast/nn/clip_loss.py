"""open_clip's contrastive loss without the logits in memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast import distributed
from vlmfast.nn._features import check_ranks, check_rows, contrast, of_one_dtype
from vlmfast.ops import _pairs
from vlmfast.ops.info_nce import STORE_BUDGET_BYTES, normalise, tile_backward, tile_forward


class ClipLoss(nn.Module):
    """Symmetric InfoNCE over one process's batch or the batch of all processes; a drop-in for `open_clip.ClipLoss`.

    Values and gradients are open_clip's for each of the four combinations of local_loss and gather_with_grad. Only
    those with gather_with_grad=True give, after DistributedDataParallel's mean, the gradients of one process on the
    global batch; without it the features of the other ranks are constants.

    With gather_with_grad=True each rank computes its images against all texts once, for both directions; texts, column
    sums and the texts' gradients travel round a ring of ranks while the next block is computed. The gradient of
    logit_scale is then the mean over the ranks' losses on every rank, which DistributedDataParallel's mean leaves as it
    is; with local_loss open_clip has a different part of it on each rank.

    Args:
        local_loss: with several processes, each returns the loss of its own rows and columns, instead of the global
            loss. The mean over ranks is the global loss: with N rows on W ranks, its own terms are summed and divided
            by N / W, which is its own number of rows where all have as many.
        gather_with_grad: let gradients flow to the features of the other ranks.
        cache_labels: accepted for compatibility; no labels are ever built.
        rank, world_size: this process and how many there are; world_size > 1 needs an initialised torch.distributed.
            With 1 or 0 there is one process, whatever rank says.
    Raises:
        TypeError: one of those is no integer.
        ValueError: world_size is negative, or more than 1 and rank not in [0, world_size).
    Memory with gather_with_grad, n rows of N on this rank: O(n*N) while the exponentials of the largest shard fit in
    info_nce's budget for them, else O(n*D). FLOPs: 6*n*N*D and 8*n*N*D.
    Source: Radford et al. 2021, figure 3; open_clip's loss.py for the interface.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        check_ranks("ClipLoss", rank, world_size)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size

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
        sizes = distributed.shard_sizes("ClipLoss", image, text, gradients=wanted)
        if self.gather_with_grad and not exact:
            _pairs.check_features("ClipLoss", image, text)
            loss: Tensor = _Strip.apply(image, text, scale, sizes, wanted, self.local_loss)
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


class _Strip(torch.autograd.Function):
    """This rank's images against all texts, a shard of texts at a time.

    The statistics of the rows are complete when all shards have been here, those of a shard's columns when it has been
    everywhere: they follow it round the ring, and so does the gradient of its texts in backward.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, sizes: list[int], wanted: list[bool], local_loss: bool
    ) -> Tensor:
        rank, world_size = distributed.rank_and_world_size()
        # The same on every rank: when the exponentials are not kept, neither are the texts, which go round again.
        keep = any(wanted) and 4 * max(sizes) * sum(sizes) <= STORE_BUDGET_BYTES
        rows = image.new_zeros(len(image), 3, dtype=torch.float32)
        cols, shifts, kept = distributed.Homeward(sizes, _merge), [], []
        for owner, (shard,) in distributed.ring([text], sizes):
            offset = _label_offset(owner == rank, shard)
            row_stats, col_stats, shift, block = tile_forward(image, shard, scale, None, None, offset, True, keep)
            rows = _merge(rows, row_stats.T)
            cols.add(owner, col_stats.T)
            shifts.append(shift)
            if keep:
                kept += [shard, block]
        weight = image.new_full((len(image),), 0.5, dtype=torch.float64)
        losses, (row_side, col_side) = normalise(
            [(stats.T, weight, None) for stats in (rows, cols.total())], scale, exclude_positive=False
        )
        ctx.unit = world_size / sum(sizes)
        ctx.sizes, ctx.wanted, ctx.local_loss = sizes, wanted, local_loss
        ctx.save_for_backward(image, text, scale, row_side, col_side, torch.stack(shifts), *kept)
        loss = losses.sum() * ctx.unit
        return (loss if local_loss else distributed.mean(loss)).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ClipLoss over several processes: the second derivative is not implemented (create_graph=True)"
            )
        image, text, scale, row_side, col_side, shifts, *kept = ctx.saved_tensors
        rank, _ = distributed.rank_and_world_size()
        wants_image, wants_text, wants_scale = ctx.wanted
        # Every rank's loss has the terms of its own rows and columns, so each owner's gradient weighs its own.
        grads = distributed.gather_scalars(grad.float())
        if not ctx.local_loss:
            grads = grads.mean().expand(len(grads))
        # Backends expect factors of order 1 and the magnitude, a GradScaler's say, in unit.
        largest = grads.abs().max()
        shares = torch.where(largest == 0, 0, grads / largest)
        d_image, d_scale = torch.zeros_like(image, dtype=torch.float32), torch.zeros_like(scale, dtype=torch.float32)
        d_text = distributed.Homeward(ctx.sizes)
        unit = largest * ctx.unit
        travelling = [col_side.T] if kept else [col_side.T, text]
        for step, (owner, (cols, *texts)) in enumerate(distributed.ring(travelling, ctx.sizes)):
            shard, exponentials = kept[2 * step : 2 * step + 2] if kept else (*texts, shifts.new_empty(0, 0))
            block = tile_backward(
                unit,
                image,
                shard,
                scale.float(),
                _side_of_block(row_side, shares[rank], shifts[step]),
                _side_of_block(cols.T, shares[owner], shifts[step]),
                shifts[step],
                exponentials,
                None,
                None,
                _label_offset(owner == rank, shard),
                wants_image,
                wants_text,
            )
            if wants_image:
                d_image += block[0]
            if wants_text:
                d_text.add(owner, block[1].float())
            d_scale += block[2]
        return (
            d_image.to(image.dtype) if wants_image else None,
            d_text.total().to(text.dtype) if wants_text else None,
            distributed.mean(d_scale).to(scale.dtype) if wants_scale else None,
            None,
            None,
            None,
        )


def _label_offset(own: bool, shard: Tensor) -> int:
    """The positives are on the diagonal of the rank's own texts; past the end of a shard there are none."""
    return 0 if own else len(shard)


def _merge(stats: Tensor, others: Tensor) -> Tensor:
    """Shift, sum and positives' dot products (n, 3) over two sets of columns, or rows, from those over each."""
    both = torch.stack([stats, others])
    shift, total = both[..., 0], both[..., 1]
    empty = total == 0  # its shift means nothing
    top = shift.masked_fill(empty, -math.inf).amax(0)
    top = torch.where(top == -math.inf, 0, top)
    total = torch.where(empty, 0, total * torch.exp2(shift - top))
    return torch.stack([top, total.sum(0), both[..., 2].sum(0)], 1)


def _side_of_block(side: Tensor, share: Tensor, shift: Tensor) -> Tensor:
    """`normalise`'s shift, factor and target (3, n) for one block whose gradient is weighed by share.

    Where the block's own shift is finite, backends take it for that of every row, as in what was kept.
    """
    one = shift.isfinite()
    # It is only above a row's shift over all blocks where the row has nothing but its positive in this block.
    factor = side[1] * torch.where(one, torch.exp2((shift - side[0]).clamp(max=0)), 1)
    return torch.stack([torch.where(one, shift, side[0]), factor * share, side[2] * share])
