"""Flamingo's gated cross-attention without a mask over the keys; open_flamingo's and flamingo-pytorch's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.nn._attention import add_gated, attend, merge_heads, original_part, share, split_heads
from vlmfast.nn._sizes import check_integer, check_integers, check_real
from vlmfast.ops import media_index
from vlmfast.ops.media_index import MediaState


class MediaCache:
    """What decoding keeps of one layer's media: keys and values, computed once, and where each sample has come to.

    Make one for each layer and generation, and pass it with every call. A sample that meets a medium's token moves on
    by itself; the others stay where they are.

    Attributes:
        key (B, H, T * n, dh), value: of all media so far; None before the first call.
        tokens_per_media: n.
        state: of the tokens so far; None before the first call.
    """

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.tokens_per_media = 0
        self.state: MediaState | None = None

    def append(self, key: Tensor, value: Tensor, tokens_per_media: int) -> None:
        """New media: each sample's come after those whose tokens it has met, and take the place of the others."""
        if self.key is None or self.value is None:
            self.key, self.value, self.tokens_per_media = key, value, tokens_per_media
            return
        if tokens_per_media != self.tokens_per_media:
            raise ValueError(
                f"MediaCache: media must have {self.tokens_per_media} tokens, as before; got {tokens_per_media}"
            )
        before, new = (t.shape[2] // tokens_per_media for t in (self.key, key))
        place = torch.arange(before + new, device=key.device).expand(key.shape[0], -1)
        seen = torch.full_like(place[:, :1], before) if self.state is None else self.state.seen[:, None]
        source = torch.where(place < seen, place, place - seen + before).clamp(max=before + new - 1)
        self.key = _take_media(torch.cat([self.key, key], 2), source, tokens_per_media)
        self.value = _take_media(torch.cat([self.value, value], 2), source, tokens_per_media)

    def reorder(self, index: Tensor) -> None:
        """Takes the samples of index (B'), as beam search does."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key[index], self.value[index]
        if self.state is not None:
            self.state = MediaState(*(t[index] for t in self.state))


def _take_media(t: Tensor, source: Tensor, tokens_per_media: int) -> Tensor:
    """Medium source[b, i] of t (B, H, T * n, d) at place i."""
    sample = torch.arange(t.shape[0], device=t.device)[:, None]
    return t.unflatten(2, (-1, tokens_per_media)).transpose(1, 2)[sample, source].transpose(1, 2).flatten(2, 3)


def feed_forward(dim: int, mult: float = 4) -> nn.Sequential:
    """Layer norm, dim to mult * dim, GELU, back; no biases."""
    inner = int(dim * mult)
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, inner, bias=False), nn.GELU(), nn.Linear(inner, dim, bias=False)
    )


def check_feed_forward(name: str, dim: int, mult: float) -> None:
    """
    Raises:
        TypeError, ValueError: `feed_forward` would have no width.
    """
    check_real(name, "ff_mult", mult, f"a number that gives dim {dim} at least one column", lambda x: dim * x >= 1)


class MaskedCrossAttention(nn.Module):
    """Text attends to the media that come before it; a drop-in for open_flamingo's and flamingo-pytorch's.

    Args:
        dim: of the text.
        dim_visual: of the media; None: dim, as in flamingo-pytorch.
        dim_head, heads: size and number of the heads.
        only_attend_immediate_media: a token sees the last medium alone, else all media so far.
        before_media: what a token before the first medium gets: "zero", or "uniform", the mean over the values of all
            media, later ones too, which is what the originals do without only_attend_immediate_media. With it they
            give zero, too.
    Raises:
        TypeError: a size is no integer.
        ValueError: a size is less than 1, before_media is neither, or "uniform" with only_attend_immediate_media.
    Source: Alayrac et al. 2022 (Flamingo), section 2.3; open_flamingo's helpers.py for the interface.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        only_attend_immediate_media: bool = True,
        before_media: str = "zero",
    ) -> None:
        super().__init__()
        _check_sizes("MaskedCrossAttention", dim, dim_visual, dim_head, heads)
        if before_media not in ("zero", "uniform"):
            raise ValueError(f"MaskedCrossAttention: before_media must be 'zero' or 'uniform'; got {before_media!r}")
        if before_media == "uniform" and only_attend_immediate_media:
            raise ValueError("MaskedCrossAttention: before_media='uniform' needs only_attend_immediate_media=False")
        inner = dim_head * heads
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim if dim_visual is None else dim_visual, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.only_attend_immediate_media = only_attend_immediate_media
        self.before_media = before_media

    @classmethod
    def from_module(cls, original: Any, **options: Any) -> MaskedCrossAttention:
        """One over the very parameters of open_flamingo's or flamingo-pytorch's; options: before_media.

        Raises:
            ValueError: a submodule of original is not of the class that its library made it of, or set up otherwise.
        """
        with torch.device("meta"):
            module = cls(**_arguments(cls, original, ""), **options)
        return share(module, original)

    def forward(
        self,
        x: Tensor,
        media: Tensor | None,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
        cache: MediaCache | None = None,
        interval: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """What the media have to say to x: neither gate nor residual.

        Args:
            x (B, L, dim): text.
            media (B, T, n, dim_visual): n tokens of each of T media; a sample with fewer has any at the end. None:
                those in cache.
            media_locations (B, L): bool or integers, where x has the tokens that stand for the media. None: all of x
                sees all media.
            use_cached_media: media_locations (B, any length) are those of a past that ends before x.
            cache: keeps keys and values of the media, and each sample's place, from call to call. media of a later call
                come after those before.
            interval: the media that each token sees, lo and hi (B, L) of `vlmfast.ops.media_index`, where the caller
                has found them; in the place of media_locations. A cache then keeps keys and values alone.
        Returns:
            out (B, L, dim).
        Raises:
            ValueError: shapes disagree, there is neither media nor a filled cache, media_locations and interval are
                both given, or, on a CPU outside torch.compile, a sample has more tokens of media than media.
        """
        if x.dim() != 3:
            raise ValueError(f"MaskedCrossAttention: x must be (batch, length, dim); got {tuple(x.shape)}")
        k, v, tokens = self._keys_and_values(x, media, cache)
        q = split_heads(self.to_q(self.norm(x)), self.heads)
        lo, hi = (None, None) if interval is None else interval
        empty = "zero"
        if media_locations is not None:
            if interval is not None:
                raise ValueError("MaskedCrossAttention: interval must be None beside media_locations; got both")
            lo, hi = self._interval(x, media_locations, use_cached_media, k.shape[2] // tokens, cache)
            if self.before_media == "uniform":
                # Zero queries score all keys alike.
                q, empty = q.masked_fill((hi == 0)[:, None, :, None], 0), "all"
        out = attend(q, k, v, media_lo=lo, media_hi=hi, tokens_per_media=tokens, empty=empty)
        return self.to_out(merge_heads(out))

    def _keys_and_values(self, x: Tensor, media: Tensor | None, cache: MediaCache | None) -> tuple[Tensor, Tensor, int]:
        if media is not None:
            if media.dim() != 4 or media.shape[0] != x.shape[0]:
                raise ValueError(
                    f"MaskedCrossAttention: media must be (batch, media, tokens, dim) with x's batch of {x.shape[0]}; "
                    f"got {tuple(media.shape)}"
                )
            k, v = (split_heads(t, self.heads) for t in self.to_kv(media.flatten(1, 2)).chunk(2, -1))
            if cache is None:
                return k, v, media.shape[2]
            cache.append(k, v, media.shape[2])
        if cache is None or cache.key is None or cache.value is None:
            raise ValueError("MaskedCrossAttention: media must be a tensor where no cache holds them; got None")
        return cache.key, cache.value, cache.tokens_per_media

    def _interval(
        self, x: Tensor, media_locations: Tensor, use_cached_media: bool, num_media: int, cache: MediaCache | None
    ) -> tuple[Tensor, Tensor]:
        length = media_locations.shape[-1] if use_cached_media else x.shape[1]
        if media_locations.shape != (x.shape[0], length):
            raise ValueError(
                f"MaskedCrossAttention: media_locations must be ({x.shape[0]}, {length}), one per token; "
                f"got {tuple(media_locations.shape)}"
            )
        lo, hi, state = media_index(
            media_locations.long(),
            1,
            mode="last" if self.only_attend_immediate_media else "all_prev",
            num_media=num_media,
            state=None if cache is None or use_cached_media else cache.state,
        )
        if cache is not None:
            cache.state = state
        if use_cached_media:
            return lo[:, -1:].expand(-1, x.shape[1]), hi[:, -1:].expand(-1, x.shape[1])
        return lo, hi


class GatedCrossAttentionBlock(nn.Module):
    """Flamingo's GATED XATTN-DENSE; a drop-in for open_flamingo's and flamingo-pytorch's.

    Equals::

        x = x + attn_gate.tanh() * attn(x, media, media_locations)
        x = x + ff_gate.tanh() * ff(x)

    Both gates start at 0: the block is then the identity, bit for bit, and the gates alone have a gradient.

    Args:
        ff_mult: width of the feed-forward over dim; the others as MaskedCrossAttention.
    Raises:
        TypeError, ValueError: as MaskedCrossAttention; ff_mult is no number, or leaves the feed-forward no width.
    Source: Alayrac et al. 2022 (Flamingo), section 2.2; open_flamingo's helpers.py for the interface.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: float = 4,
        only_attend_immediate_media: bool = True,
        before_media: str = "zero",
    ) -> None:
        super().__init__()
        _check_sizes("GatedCrossAttentionBlock", dim, dim_visual, dim_head, heads)
        check_feed_forward("GatedCrossAttentionBlock", dim, ff_mult)
        self.attn = MaskedCrossAttention(
            dim=dim,
            dim_visual=dim_visual,
            dim_head=dim_head,
            heads=heads,
            only_attend_immediate_media=only_attend_immediate_media,
            before_media=before_media,
        )
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(dim, ff_mult)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    @classmethod
    def from_module(cls, original: Any, **options: Any) -> GatedCrossAttentionBlock:
        """One over the very parameters of open_flamingo's or flamingo-pytorch's; options: before_media.

        Raises:
            ValueError: as `MaskedCrossAttention.from_module`.
        """
        arguments = _arguments(cls, original, "attn.")
        with torch.device("meta"):
            module = cls(**arguments, ff_mult=feed_forward_mult(cls, original, "ff"), **options)
        return share(module, original)

    def forward(
        self,
        x: Tensor,
        media: Tensor | None,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
        cache: MediaCache | None = None,
        interval: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x (B, L, dim) after the block; arguments and errors are MaskedCrossAttention's."""
        x = add_gated(x, self.attn(x, media, media_locations, use_cached_media, cache, interval), self.attn_gate)
        return add_gated(x, self.ff(x), self.ff_gate)


def _check_sizes(name: str, dim: int, dim_visual: int | None, dim_head: int, heads: int) -> None:
    check_integers(name, dim=dim, dim_head=dim_head, heads=heads)
    if dim_visual is not None:
        check_integer(name, "dim_visual", dim_visual)


def _arguments(cls: type[nn.Module], original: nn.Module, prefix: str) -> dict[str, Any]:
    """MaskedCrossAttention's, read off the one at prefix in original."""
    q, kv = (original_part(cls, original, f"{prefix}{name}", nn.Linear) for name in ("to_q", "to_kv"))
    attn: Any = original.get_submodule(prefix[:-1])
    return {
        "dim": q.in_features,
        "dim_visual": kv.in_features,
        "dim_head": q.out_features // attn.heads,
        "heads": attn.heads,
        "only_attend_immediate_media": attn.only_attend_immediate_media,
    }


def feed_forward_mult(cls: type[nn.Module], original: nn.Module, path: str) -> float:
    """feed_forward's mult, read off the one at path in original."""
    original_part(cls, original, path, nn.Sequential)
    linear = original_part(cls, original, f"{path}.1", nn.Linear)
    mult: float = linear.out_features / linear.in_features
    return mult
