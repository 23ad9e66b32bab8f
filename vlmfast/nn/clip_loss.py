"""open_clip's contrastive loss without the logits in memory."""

from __future__ import annotations

from torch import Tensor, nn

from vlmfast import distributed
from vlmfast.ops import info_nce


class ClipLoss(nn.Module):
    """Symmetric InfoNCE over one process's batch or the batch of all processes; a drop-in for `open_clip.ClipLoss`.

    Values and gradients are open_clip's for each of the four combinations of local_loss and gather_with_grad. Only
    those with gather_with_grad=True give, after DistributedDataParallel's mean, the gradients of one process on the
    global batch; without it the features of the other ranks are constants.

    Args:
        local_loss: with several processes, each computes the loss of its own rows against all, instead of all against
            all.
        gather_with_grad: let gradients flow to the features of the other ranks.
        cache_labels: accepted for compatibility; no labels are ever built.
        rank, world_size: this process and how many there are; world_size > 1 needs an initialised torch.distributed.
    Raises:
        ValueError: rank is not in [0, world_size).
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
        if not 0 <= rank < world_size:
            raise ValueError(f"ClipLoss: rank must be in [0, world_size); got rank {rank}, world_size {world_size}")
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
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or {"contrastive_loss": loss} with output_dict.

        Args:
            image_features (n, D), text_features (n, D): unit-norm, float32, float16 or bfloat16; n may differ between
                ranks.
            logit_scale (): the inverse temperature itself, as open_clip passes it (the exponential of the parameter).
            logit_bias (): added to every logit by open_clip, which changes neither loss nor gradients; its gradient is
                0.
        Returns:
            loss (): float32.
        Raises:
            ValueError, TypeError: as `vlmfast.ops.info_nce`, and when image_features and text_features differ in rows.
        """
        if image_features.shape[:1] != text_features.shape[:1]:
            raise ValueError(
                "ClipLoss: image_features and text_features must have the same number of rows; "
                f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
            )
        if self.world_size == 1:
            loss = info_nce(image_features, text_features, logit_scale)
        else:
            loss = self._global_loss(image_features, text_features, logit_scale)
        if logit_bias is not None:
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def _global_loss(self, image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
        sizes = distributed.shard_sizes(image)
        all_image, all_text = distributed.gather(image, sizes), distributed.gather(text, sizes)
        offset = sum(sizes[: self.rank])
        if not self.gather_with_grad:
            all_image, all_text = all_image.detach(), all_text.detach()
            if not self.local_loss:
                all_image = all_image.slice_scatter(image, start=offset, end=offset + len(image))
                all_text = all_text.slice_scatter(text, start=offset, end=offset + len(text))
        if not self.local_loss:
            return info_nce(all_image, all_text, scale)
        loss_image = info_nce(image, all_text, scale, label_offset=offset, bidirectional=False)
        loss_text = info_nce(text, all_image, scale, label_offset=offset, bidirectional=False)
        return (loss_image + loss_text) / 2
