"""Flamingo's parts: what is trained, how a language model comes to read media, and the loss of a new token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmfast.nn import GatedCrossAttentionBlock, MediaCache, PerceiverResampler
from vlmfast.nn.prefix import IGNORED
from vlmfast.ops import linear_cross_entropy


class FlamingoParts(nn.Module):
    """What is trained beside a frozen language model.

    Args:
        resampler: of the states of images.
        blocks: by the number of the layer of the language model that each stands before, from 0.
        embedding_size: of the language model's tokens.
        tied: whether the new tokens' output embeddings are their input embeddings, as the language model's are.

    Attributes:
        tokens (2, E): embeddings of the token of an image and of the one that ends a chunk.
        end (E,): the output embedding of the latter, where it is not `tokens[1]`.
    """

    def __init__(
        self,
        resampler: PerceiverResampler,
        blocks: dict[int, GatedCrossAttentionBlock],
        embedding_size: int,
        *,
        tied: bool,
    ) -> None:
        super().__init__()
        self.resampler = resampler
        self.blocks = nn.ModuleDict({str(layer): block for layer, block in blocks.items()})
        self.tokens = nn.Parameter(torch.randn(2, embedding_size) * 0.02)
        self.end = None if tied else nn.Parameter(torch.randn(embedding_size) * 0.02)

    def output_embedding(self) -> Tensor:
        """(E,), of the token that ends a chunk."""
        return self.tokens[1] if self.end is None else self.end

    def forward(self, states: Tensor) -> Tensor:
        """Media (N, n, W) of states (N, R, W), or of those of a video's frames (N, F, R, W)."""
        media: Tensor = self.resampler(states[:, None] if states.ndim == 4 else states)
        return media[:, 0]


class Shown(NamedTuple):
    """What the blocks read during one call of the language model.

    Attributes:
        media (B, T, n, W): of each sample.
        lo, hi (B, L): which of them each token sees, of `vlmfast.ops.media_index`.
        caches: of each layer, where tokens follow one by one; else None.
    """

    media: Tensor
    lo: Tensor
    hi: Tensor
    caches: dict[int, MediaCache] | None


class Reader:
    """Puts blocks before the layers of a language model, whose own modules and weights stay as they are.

    Outside of `reads` the language model is what it was.
    """

    def __init__(self) -> None:
        self.shown: Shown | None = None

    @contextmanager
    def reads(self, media: Tensor, lo: Tensor, hi: Tensor, layers: Sequence[int] | None = None) -> Iterator[None]:
        """The language model sees the media until this ends.

        Args:
            media, lo, hi: of `Shown`.
            layers: that have blocks, where keys and values of the media are kept from one call to the next.
        """
        caches = None if layers is None else {layer: MediaCache() for layer in layers}
        self.shown = Shown(media, lo, hi, caches)
        try:
            yield
        finally:
            self.shown = None

    def hook(self, layer: int, block: nn.Module) -> BeforeLayer:
        """To be called before a layer of the language model."""
        return BeforeLayer(self, layer, block)


class BeforeLayer:
    """A forward pre-hook: the states that a layer is given, after a block."""

    def __init__(self, reader: Reader, number: int, block: nn.Module) -> None:
        self.reader, self.number, self.block = reader, number, block

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.reader.shown is None:
            return None
        if args:
            return (self._read(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._read(kwargs["hidden_states"])}

    def _read(self, states: Tensor) -> Tensor:
        """States (B * k, L, D) after the block; the k beams of a sample read the same media, which stay one."""
        assert self.reader.shown is not None
        media, lo, hi, caches = self.reader.shown
        samples = media.shape[0]
        beams, length = states.shape[0] // samples, states.shape[1]
        cache = None if caches is None else caches[self.number]
        given: Tensor | None = media
        if cache is not None and cache.key is not None:  # tokens after the prompt see what its last one sees
            given, lo, hi = None, lo[:, -1:].expand(-1, length), hi[:, -1:].expand(-1, length)
        interval = (lo.repeat(1, beams), hi.repeat(1, beams))
        folded = states.reshape(samples, beams * length, -1)
        read: Tensor = self.block(folded, given, cache=cache, interval=interval)
        return read.view_as(states)


def decoder_layers(language_model: Any) -> nn.ModuleList:
    """The layers of a causal language model of transformers.

    Raises:
        ValueError: it has none, or several lists of them.
    """
    count = language_model.config.get_text_config().num_hidden_layers
    found = [
        module
        for module in language_model.base_model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(layer) for layer in module}) == 1
    ]
    if len(found) != 1:
        kind = language_model.config.model_type
        raise ValueError(f"language_model: expected one list of {count} layers, got {len(found)} in {kind!r}")
    return found[0]


def rows_of_media(media: Tensor, counts: Tensor) -> Tensor:
    """Media (N, n, W) of all samples one after another as (B, T, n, W), at least one each, zeros where there are none.

    Args:
        counts (B,): media of each sample.
    """
    most = max(1, int(counts.max()))
    place = torch.arange(most, device=counts.device)
    source = (counts.cumsum(0) - counts)[:, None] + place
    source = torch.where(place < counts[:, None], source, len(media))
    return F.pad(media, (0, 0, 0, 0, 0, 1))[source]


def losses_with_end(hidden: Tensor, head: Any, end: Tensor, end_id: int, labels: Tensor) -> Tensor:
    """Cross-entropy (n,) float32 of a frozen vocabulary and one new token, without the logits; 0 where ignored.

    The logits are those of the head, and h @ end at end_id. A frozen head costs no gradient of its weight.

    Args:
        hidden (n, D): float.
        head: a module with weight (V, D) and perhaps bias (V,).
        end (D,): output embedding of the new token.
        end_id: its number, in [0, V), where it stands for the head's own row, or beyond.
        labels (n,): int64 in [0, V), or end_id, or IGNORED.
    """
    weight, bias = head.weight, getattr(head, "bias", None)
    kept, is_end = labels != IGNORED, labels == end_id
    own = labels.masked_fill(is_end | ~kept, 0)
    losses = linear_cross_entropy(
        hidden, weight, own.masked_fill(~kept, IGNORED), bias=bias, ignore_index=IGNORED, reduction="none"
    )
    states = hidden.float()

    def logit(rows: Tensor, ids: Tensor | int) -> Tensor:
        found = (states * rows.float()).sum(-1)
        return found if bias is None else found + bias[ids].float()

    label = logit(weight[own], own)
    end_logit = states @ end.float()
    total = torch.logaddexp(losses + label, end_logit)
    if end_id < len(weight):  # the head's own row for it is no token
        unread = logit(weight[end_id], end_id)
        total = total + torch.log1p(-torch.exp(unread - total))
    return torch.where(kept, total - torch.where(is_end, end_logit, label), 0)


def from_open_flamingo(
    checkpoint: Mapping[str, Tensor],
    parts: FlamingoParts,
    *,
    media_id: int,
    end_id: int,
    names: Sequence[Sequence[str]],
) -> dict[str, Tensor]:
    """The state dict of `parts` from one of open_flamingo.

    Args:
        checkpoint: the names of its blocks are those of a list or, as in its released checkpoints, of layers.
        parts: whose weights are wanted.
        media_id, end_id: the new tokens.
        names: of the language model's input embeddings there, and of its output embeddings. What it lacks of the
            latter, which open_flamingo does not save, is as in `parts`.
    Raises:
        ValueError: weights are missing, are others than those of `parts`, or of another shape; the message names them.
    """
    own = parts.state_dict()
    given = {name.removeprefix("module."): value for name, value in checkpoint.items()}
    taken: dict[str, Tensor] = {"end": own["end"]} if "end" in own else {}
    for name, value in given.items():
        before, _, rest = name.partition(".gated_cross_attn_layer.")
        if name.startswith("perceiver."):
            taken[f"resampler.{name.removeprefix('perceiver.')}"] = value
        elif ".gated_cross_attn_layers." in name:
            taken[f"blocks.{name.partition('.gated_cross_attn_layers.')[2]}"] = value
        elif rest:
            taken[f"blocks.{before.rpartition('.')[2]}.{rest}"] = value
        elif name in names[0]:
            taken["tokens"] = value[[media_id, end_id]]
        elif name in names[1] and "end" in own:
            taken["end"] = value[end_id]
    wrong = sorted(own.keys() ^ taken.keys()) or [
        f"{name} of shape {tuple(taken[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if taken[name].shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"checkpoint: expected the weights of this model, wrong or missing: {', '.join(wrong[:4])}")
    return taken
