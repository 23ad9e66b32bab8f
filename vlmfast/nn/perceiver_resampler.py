"""Flamingo's Perceiver Resampler: visual tokens to a fixed number; open_flamingo's and flamingo-pytorch's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.nn._attention import attend, merge_heads, original_part, share, split_heads
from vlmfast.nn._sizes import check_integers
from vlmfast.nn.gated_cross_attention import check_feed_forward, feed_forward, feed_forward_mult


class PerceiverAttention(nn.Module):
    """Latents attend to the visual tokens and to themselves; a drop-in for open_flamingo's and flamingo-pytorch's.

    Args:
        dim: of the visual tokens and of the latents.
        dim_head, heads: size and number of the heads.
    Raises:
        TypeError: one of those is no integer.
        ValueError: one is less than 1.
    """

    def __init__(self, *, dim: int, dim_head: int = 64, heads: int = 8) -> None:
        super().__init__()
        check_integers("PerceiverAttention", dim=dim, dim_head=dim_head, heads=heads)
        inner = dim_head * heads
        self.heads = heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """(B, T, l, dim), without the residual.

        Args:
            x (B, T, n, dim): visual tokens of each of T media.
            latents (B, T, l, dim).
        """
        x, latents = self.norm_media(x), self.norm_latents(latents)
        q, kv = self.to_q(latents), self.to_kv(torch.cat([x, latents], 2))
        heads = (split_heads(t.flatten(0, 1), self.heads) for t in (q, *kv.chunk(2, -1)))
        out = merge_heads(attend(*heads))
        return self.to_out(out.unflatten(0, x.shape[:2]))


class PerceiverResampler(nn.Module):
    """A drop-in for open_flamingo's PerceiverResampler, and with num_media_embeds for flamingo-pytorch's.

    Args:
        dim: of the visual tokens and of the latents.
        depth, dim_head, heads, num_latents, ff_mult: layers, heads, tokens that come out per medium, width of the
            feed-forward over dim.
        max_num_media: learned embeddings of the media, `media_time_embs` (max_num_media, 1, dim); None: none.
        max_num_frames: learned embeddings of a video's frames, `frame_embs` (max_num_frames, dim); None: none.
        num_media_embeds: learned embeddings of the media, flamingo-pytorch's `media_pos_emb` (num_media_embeds, 1,
            dim), which has 4 by default; None: none.
    Raises:
        TypeError: a size is no integer, or ff_mult no number.
        ValueError: a size is less than 1, or ff_mult leaves the feed-forward no width.
    Source: Alayrac et al. 2022 (Flamingo), section 2.1 and figure 5; open_flamingo's helpers.py for the interface.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
        ff_mult: float = 4,
        num_media_embeds: int | None = None,
    ) -> None:
        super().__init__()
        name = "PerceiverResampler"
        check_integers(name, dim=dim, depth=depth, dim_head=dim_head, heads=heads, num_latents=num_latents)
        tables = {
            "max_num_media": max_num_media, "max_num_frames": max_num_frames, "num_media_embeds": num_media_embeds,
        }  # fmt: skip
        check_integers(name, **{argument: number for argument, number in tables.items() if number is not None})
        check_feed_forward(name, dim, ff_mult)
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = _embeddings(max_num_frames, dim)
        self.media_time_embs = _embeddings(max_num_media, 1, dim)
        self.media_pos_emb = _embeddings(num_media_embeds, 1, dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim=dim, dim_head=dim_head, heads=heads), feed_forward(dim, ff_mult)])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    @classmethod
    def from_module(cls, original: Any) -> PerceiverResampler:
        """One with the parameters, the same objects, of open_flamingo's or flamingo-pytorch's.

        Raises:
            ValueError: a submodule of original is not of the class that its library made it of, or set up otherwise.
        """
        original_part(cls, original, "layers", nn.ModuleList)
        q = original_part(cls, original, "layers.0.0.to_q", nn.Linear)
        heads = original.get_submodule("layers.0.0").heads
        number = {
            argument: None if (table := getattr(original, name, None)) is None else len(table)
            for argument, name in (
                ("max_num_frames", "frame_embs"),
                ("max_num_media", "media_time_embs"),
                ("num_media_embeds", "media_pos_emb"),
            )
        }
        with torch.device("meta"):
            module = cls(
                dim=original.latents.shape[1],
                depth=len(original.layers),
                dim_head=q.out_features // heads,
                heads=heads,
                num_latents=original.latents.shape[0],
                ff_mult=feed_forward_mult(cls, original, "layers.0.1"),
                **number,
            )
        return share(module, original)

    def forward(self, x: Tensor) -> Tensor:
        """The latents after the last layer's norm, num_latents for each medium.

        Args:
            x (B, T, F, v, dim): v tokens of each of F frames of each of T media; or (B, T, v, dim), or (B, v, dim), of
                one frame, of one medium.
        Returns:
            media (B, T, num_latents, dim).
        Raises:
            ValueError: another number of dimensions, or more media or frames than there are embeddings of them.
        """
        if x.dim() not in (3, 4, 5):
            raise ValueError(
                f"PerceiverResampler: x must be (batch, media, frames, tokens, dim), without frames, or without both; "
                f"got {tuple(x.shape)}"
            )
        if x.dim() == 3:
            x = x[:, None]
        if x.dim() == 4:
            x = x[:, :, None]
        _check_number("frames", x.shape[2], self.frame_embs)
        if self.frame_embs is not None:
            x = x + self.frame_embs[: x.shape[2], None]
        x = x.flatten(2, 3)
        for table in (self.media_time_embs, self.media_pos_emb):
            _check_number("media", x.shape[1], table)
            if table is not None:
                x = x + table[: x.shape[1]]
        latents = self.latents.expand(*x.shape[:2], -1, -1)
        layers: Any = self.layers  # pairs of modules
        for attention, ff in layers:
            latents = latents + attention(x, latents)
            latents = latents + ff(latents)
        out: Tensor = self.norm(latents)
        return out


def _embeddings(number: int | None, *shape: int) -> nn.Parameter | None:
    return None if number is None else nn.Parameter(torch.randn(number, *shape))


def _check_number(what: str, number: int, table: Tensor | None) -> None:
    if table is not None and number > len(table):
        raise ValueError(f"PerceiverResampler: x must have at most {len(table)} {what}, embedded ones; got {number}")
