"""Flamingo's parts: what is trained, how a language model comes to read media, and documents as batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmfast.data.dataset import IMAGE_PLACE, Sample
from vlmfast.data.text import usable
from vlmfast.models.prefix_batches import PrefixCollator
from vlmfast.nn import GatedCrossAttentionBlock, MediaCache, PerceiverResampler
from vlmfast.nn.prefix import IGNORED, IMAGE
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


def chunk_labels(input_ids: Tensor, attention_mask: Tensor, media_id: int, end_id: int, reads_next: Tensor) -> Tensor:
    """Which tokens of documents are predicted: those of chunks that have an image, and what ends them; (B, L).

    Where a row reads the image before its text, these are the tokens after the first image, but for those between a
    chunk's end and the next image, as in open_flamingo. Where it reads the image after its text, these are the tokens
    before the last image. Pads, images and the first token of a row are never predicted.

    Args:
        input_ids, attention_mask (B, L): pads on the right.
        reads_next (B,): bool.
    """
    media, present = input_ids == media_id, attention_mask != 0
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    last_media = torch.where(media, place, -1).cummax(1).values
    ended_before = F.pad(torch.where(input_ids == end_id, place, -1)[:, :-1], (1, 0), value=-1).cummax(1).values
    before = (last_media >= 0) & (ended_before < last_media)
    after = place < last_media[:, -1:]
    predicted = torch.where(reads_next[:, None], after, before) & present & ~media
    predicted[:, 0] = False  # nothing stands before it
    return input_ids.masked_fill(~predicted, IGNORED)


class DocumentCollator(PrefixCollator):
    """Interleaved documents, or pairs of image and caption, to batches of Flamingo; skipped samples are left out.

    As `PrefixCollator`, with the token of an image in the place of each, and every chunk of text ended:
    "one `<image>` two `<image>` three" becomes one `<image>` two END `<image>` three END; or, where a row reads the
    image that comes after its text, one END `<image>` two END `<image>` three. In training the batch has besides:

    - reads_next (B,): bool, whether a row reads the image after its text; where any does;
    - sample_weights (B,): float32, the `weight` of each record, 1 where there is none; where any record has one.

    Args:
        media_id: the token of an image.
        train: whether those two are there.
        next_probability: that a document whose text begins before its first image reads the image after its text.
        Others as PrefixCollator; `stop` ends a chunk.
    """

    def __init__(
        self, tokenizer: Any, *, media_id: int, train: bool = False, next_probability: float = 0.0, **options: Any
    ) -> None:
        super().__init__(tokenizer, image_length=1, **options)
        self.media_id = media_id
        self.train = train
        self.next_probability = next_probability if train else 0.0
        self._next = False

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Tensor]:
        kept = usable(samples)
        batch = super().__call__(kept)
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, self.media_id)
        if self.stop is None:
            return batch
        reads_next = torch.tensor([self._reads_next(sample) for sample in kept])
        batch["labels"] = chunk_labels(
            batch["input_ids"], batch["attention_mask"], self.media_id, self.stop, reads_next
        )
        if reads_next.any():
            batch["reads_next"] = reads_next
        if self.train and any("weight" in sample.record for sample in kept):
            batch["sample_weights"] = torch.tensor([_weight(sample) for sample in kept])
        return batch

    def _row(self, sample: Sample) -> list[int]:
        self._next = self._reads_next(sample)
        return super()._row(sample)

    def _reads_next(self, sample: Sample) -> bool:
        text, place, _ = sample.caption.partition(IMAGE_PLACE)
        if not (self.next_probability and place and text.strip()):
            return False
        return random.Random(f"next {sample.seed}").random() < self.next_probability

    def _ids(self, text: str) -> list[int]:
        return super()._ids(text.strip())  # space beside an image is no token, as in open_flamingo

    def _ended(self, parts: list[list[int] | None], stop: int) -> list[list[int] | None]:
        """At most max_length tokens of text, and the end of every chunk that has text and was not cut."""
        texts = [k for k, part in enumerate(parts) if part is not None]
        chunks = texts[:-1] if self._next else texts[1:]
        left, found = self.max_length, []
        for k, part in enumerate(parts):
            if part is not None:
                if k in chunks and (part or len(chunks) == 1) and part[-1:] != [stop]:
                    part = [*part, stop]
                part = part[:left]
                left -= len(part)
            found.append(part)
        return found


def _weight(sample: Sample) -> float:
    weight = sample.record.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise ValueError(f"weight of sample {sample.key!r}: expected a number that is not negative, got {weight!r}")
    return float(weight)
