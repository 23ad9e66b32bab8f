"""open_clip's pairwise sigmoid loss without the logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmfast import distributed
from vlmfast.nn._features import (
    check_ranks,
    check_rows,
    contrast_pairwise,
    label_offset,
    of_one_dtype,
    sizes_of_shards,
)
from vlmfast.nn._sizes import check_integer
from vlmfast.nn.exchange import shards_per_block
from vlmfast.ops import _pairs
from vlmfast.ops._arguments import check_flag
from vlmfast.ops.sigmoid_loss import tile_forward

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


class SigLipLoss(nn.Module):
    """Pairwise sigmoid loss over one process's batch or the batch of all; a drop-in for `open_clip.loss.SigLipLoss`.

    With several processes each rank returns the loss of its images against all texts; values and gradients are
    open_clip's. After DistributedDataParallel's mean, the gradients are those of one process on the global batch.
    Texts are gathered, and their gradients added up and given to their owners, by one collective each; or they travel
    round a ring of ranks while the next block is computed. `vlmfast.nn.exchange` says which. All gradients are computed
    in forward, so the gradient that arrives at the loss must be the same on every rank.

    Args:
        cache_labels: accepted for compatibility; no labels are ever built.
        rank, world_size: this process and how many there are; world_size > 1 needs an initialised torch.distributed.
            With 1 or 0 there is one process, whatever rank says.
        dist_impl: one of open_clip's names for how texts are exchanged ("bidir", "shift", "reduce", "gather") or None;
            accepted for compatibility, the result is the same.
        chunk_size: rows of logits at a time in open_clip's main branch, which bounds its memory; accepted for
            compatibility, there is no such bound to choose here, and the result is the same. None or 0: not chunked.
        uniform: a promise that on all ranks features have the same shape and dtype and the same inputs need a gradient.
            The ranks then do not ask each other, and the host does not wait for the device. Where it does not hold,
            results are wrong or the ranks wait for each other until the process group's timeout.
    Raises:
        TypeError: rank, world_size or chunk_size is no integer, or uniform no bool.
        ValueError: world_size or chunk_size is negative, rank is not in [0, world_size) of several processes, or
            dist_impl is not one of those names.
    Memory, n rows of N on this rank: O(N*D) where texts are gathered, O(n*D) on the ring. FLOPs, forward and backward:
    6*n*N*D, all in forward.
    Source: Zhai et al. 2023, algorithm 1 and section 3.3; open_clip's loss.py for the interface.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int | None = None,
        uniform: bool = False,
    ) -> None:
        super().__init__()
        check_ranks("SigLipLoss", rank, world_size)
        check_flag("SigLipLoss", "uniform", uniform)
        if chunk_size is not None:
            check_integer("SigLipLoss", "chunk_size", chunk_size, least=0)
        if dist_impl is not None and dist_impl not in DIST_IMPLS:
            raise ValueError(f"SigLipLoss: dist_impl must be None or one of {', '.join(DIST_IMPLS)}; got {dist_impl!r}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size
        self.uniform = uniform

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or {"contrastive_loss": loss} with output_dict.

        Args:
            image_features (n, D), text_features (n, D): unit-norm, float32, float16 or bfloat16; n may differ between
                ranks. Under autocast the two may differ in dtype, and the wider is taken. float64 runs in PyTorch, with
                the logits in memory.
            logit_scale (): the inverse temperature itself, as open_clip passes it (the exponential of the parameter).
            logit_bias (): added to every logit; None is 0.
        Returns:
            loss (): float32; float64 of float64 features. The sum over this rank's images and all texts, divided by the
            number of images; with several processes, by the mean number of images per rank, so that the mean over ranks
            is the global loss.
        Raises:
            ValueError, TypeError: as `vlmfast.ops.sigmoid_loss`; image_features and text_features differ in rows; ranks
                differ in dim, dtype or in what needs a gradient (on every rank alike); rank and world_size are not
                those of torch.distributed.
            RuntimeError: another rank has died or did not answer within the process group's timeout; a second
                derivative is asked for.
        """
        bias = 0.0 if logit_bias is None else logit_bias
        image_features, text_features = of_one_dtype(image_features, text_features)
        if self.world_size <= 1:
            check_rows("SigLipLoss", image_features, text_features)
            loss = contrast_pairwise(image_features, text_features, logit_scale, bias)
        else:
            loss = self._global_loss(image_features, text_features, logit_scale, bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _global_loss(
        self, image: Tensor, text: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float
    ) -> Tensor:
        distributed.check_rank("SigLipLoss", self.rank, self.world_size)
        wanted = [torch.is_grad_enabled() and t.requires_grad for t in (image, text)]
        sizes = sizes_of_shards("SigLipLoss", image, text, wanted, self.world_size if self.uniform else None)
        if image.dtype == torch.float64:
            all_text, offset = distributed.gather(text, sizes), sum(sizes[: self.rank])
            loss = contrast_pairwise(image, all_text, logit_scale, logit_bias, label_offset=offset)
            return loss * (len(image) * self.world_size / sum(sizes))
        scale = _pairs.scalar("SigLipLoss", "logit_scale", logit_scale, image)
        bias = _pairs.scalar("SigLipLoss", "logit_bias", logit_bias, image)
        _pairs.check_features("SigLipLoss", image, text)
        blocks: Tensor = _Blocks.apply(image, text, scale, bias, sizes, wanted)
        return blocks


class _Blocks(torch.autograd.Function):
    """This rank's images against all texts, gathered or a block of ranks' texts at a time.

    No normaliser has to wait for the other blocks: the gradients are computed with the loss, and those of a block of
    texts follow it round the ring.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, sizes: list[int], wanted: list[bool]
    ) -> Tensor:
        rank, world_size = distributed.rank_and_world_size()
        block = shards_per_block(sizes, text)
        if block == world_size:
            texts, offset = distributed.gather_rows(text, sizes), sum(sizes[:rank])
            total, d_image, d_text, d_scale, d_bias = tile_forward(
                image, texts, scale, bias, None, None, offset, *wanted
            )
            if wanted[1]:
                d_text, _ = distributed.reduce_scatter(d_text, sizes)
        else:
            sums: list[Tensor] = []
            homeward = distributed.Homeward(sizes, shards_per_block=block)
            for number, (texts,) in distributed.ring([text], sizes, block):
                offset = label_offset(number, sizes, block)
                loss, d_image, part, d_scale, d_bias = tile_forward(
                    image, texts, scale, bias, None, None, offset, *wanted
                )
                found = [loss, d_image, d_scale, d_bias]
                sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
                if wanted[1]:
                    homeward.add(number, part)
            total, d_image, d_scale, d_bias = sums
            d_text = homeward.total() if wanted[1] else d_image
        ctx.unit = world_size / sum(sizes)
        ctx.dtypes = [t.dtype for t in (image, text, scale, bias)]
        ctx.save_for_backward(d_image, d_text, d_scale, d_bias)
        return total * ctx.unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "SigLipLoss over several processes: the second derivative is not implemented (create_graph=True)"
            )
        saved = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        gradients = ((t * (grad * ctx.unit)).to(dtype) if wanted else None for t, dtype, wanted in saved)
        return (*gradients, None, None)
