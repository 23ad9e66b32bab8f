"""Patch dropout: train on a random subset of the patches of every image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmfast.nn._sizes import check_integer, check_real


class PatchDropout(nn.Module):
    """Keeps a random part of each image's patches in training; a drop-in for timm's and open_clip's PatchDropout.

    Called on tokens it drops some of them. Better, `keep` says beforehand which patches will stay, and
    `vlmfast.ops.patch_embed(..., keep=keep)` never embeds the others::

        keep = self.patch_dropout.keep(len(pixels), num_patches, pixels.device)
        tokens = patch_embed(pixels, weight, prefix=prefix, position=position, keep=keep)

    Indices are drawn on the device of the tokens. Every subset is as likely as any other.

    Args:
        prob: part of the patches to drop, in [0, 1); at least one patch stays.
        num_prefix_tokens: tokens before the patches (class token, registers), which always stay. True and False, as in
            open_clip's second argument, are 1 and 0.
        ordered: keep patches in the order that they have in the image; else in random order.
    Raises:
        TypeError: prob is no number, or num_prefix_tokens no integer.
        ValueError: prob is not in [0, 1), or num_prefix_tokens negative.
    Source: Li et al. 2023 (FLIP), section 3; Liu et al. 2023 (PatchDropout).
    """

    def __init__(self, prob: float = 0.5, num_prefix_tokens: int = 1, ordered: bool = False) -> None:
        super().__init__()
        check_real("PatchDropout", "prob", prob, "in [0, 1)", lambda x: 0 <= x < 1)
        if not isinstance(num_prefix_tokens, bool):
            check_integer("PatchDropout", "num_prefix_tokens", num_prefix_tokens, least=0)
        self.prob = prob
        self.num_prefix_tokens = int(num_prefix_tokens)
        self.ordered = ordered

    def keep(self, batch: int, patches: int, device: torch.device | str) -> Tensor | None:
        """Indices (B, K) int64 of the patches that stay, or None if all do: in evaluation, or with prob 0."""
        if not self.training or self.prob == 0:
            return None
        kept = sample_patches(batch, patches, self.prob, device)
        return kept.sort(dim=1).values if self.ordered else kept

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, k + K, D) that stay of x (B, k + n, D), k being num_prefix_tokens."""
        prefix, tokens = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        kept = self.keep(tokens.shape[0], tokens.shape[1], x.device)
        if kept is None:
            return x
        tokens = tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
        return torch.cat([prefix, tokens], dim=1) if self.num_prefix_tokens else tokens

    def extra_repr(self) -> str:
        return f"prob={self.prob}, num_prefix_tokens={self.num_prefix_tokens}, ordered={self.ordered}"


def sample_patches(batch: int, patches: int, prob: float, device: torch.device | str) -> Tensor:
    """Indices (B, K) int64 of K = max(1, int(n * (1 - prob))) of n patches, without repetition, in random order."""
    return torch.randn(batch, patches, device=device).topk(max(1, int(patches * (1 - prob))), dim=1).indices
