"""Images as embeddings among those of tokens: what every model assembles that shows images to a language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

IMAGE = -1
"""Stands in input_ids for one embedding of an image; an image of k embeddings has k of them."""
IGNORED = -100


class Assembled(NamedTuple):
    """What a language model reads.

    Attributes:
        inputs_embeds (B, L, D): of tokens and images; of pads, any.
        attention_mask (B, L): int64, 0 for pads.
        position_ids (B, L): int64; the first that is no pad has 0, wherever it stands.
        labels (B, L): int64, IGNORED at images, pads and the first place; None where none were given.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None


def token_ids(parts: Iterable[Iterable[int] | None], length: int) -> list[int]:
    """Tokens and images in the order in which they are read, as one row of input_ids.

    Args:
        parts: ids of tokens; None for an image.
        length: embeddings of an image.
    """
    found: list[int] = []
    for part in parts:
        found += [IMAGE] * length if part is None else part
    return found


def compact(attention_mask: Tensor, *rows: Tensor, left: bool = False) -> tuple[Tensor, ...]:
    """Moves the pads of every row to its right end, or its left one; the order of the others stays.

    Args:
        attention_mask (B, L): 0 for pads.
        rows: tensors (B, L).
    Returns:
        The mask and the rows.
    """
    order = (attention_mask != 0).long().argsort(dim=1, descending=not left, stable=True)
    return tuple(row.gather(1, order) for row in (attention_mask, *rows))


def positions(attention_mask: Tensor) -> Tensor:
    """How many that are no pad stand before each place (B, L), int64; 0 at pads before all of them."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def put_images(embeddings: Tensor, input_ids: Tensor, images: Tensor) -> Tensor:
    """Embeddings (B, L, D) with those of images in the places where input_ids are IMAGE, in order.

    Nothing waits for an accelerator, and gradients reach both.

    Args:
        embeddings (B, L, D): of tokens; of images, any.
        input_ids (B, L): with k times IMAGE for each image.
        images (N, k, D): of all rows, in the order in which they are read.
    """
    if not images.numel():
        return embeddings
    places = input_ids == IMAGE
    number = (places.flatten().cumsum(0) - 1).clamp(min=0).view_as(input_ids)
    rows = images.flatten(0, 1).to(embeddings.dtype)
    return torch.where(places[..., None], rows[number], embeddings)


def assemble(
    embedding: nn.Module,
    input_ids: Tensor,
    images: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    left: bool = False,
) -> Assembled:
    """Tokens and images as a language model reads them, pads on one side.

    Where pads stand in what comes in decides nothing: they are moved, and positions count what is no pad.

    Args:
        embedding: of tokens, ids (B, L) to (B, L, D).
        input_ids (B, L): int64, with k times IMAGE for each image; ids of pads do not matter.
        images (N, k, D): of all rows, in the order in which they are read. A row may have any number of them.
        attention_mask (B, L): 0 for pads; None where there are none.
        labels (B, L): which token stands in a place, IGNORED where it is not predicted. Shifting them is the loss's.
        left: pads on the left, for generation; else on the right.
    Raises:
        TypeError: input_ids are no integers.
        ValueError: shapes disagree; and, looked for on CPU tensors alone, input_ids below IMAGE, or another number of
            places than images have embeddings.
    """
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids: expected integers, got {input_ids.dtype}")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: expected (B, L), got shape {tuple(input_ids.shape)}")
    if images.ndim != 3:
        raise ValueError(f"images: expected (N, k, D), got shape {tuple(images.shape)}")
    for name, given in {"attention_mask": attention_mask, "labels": labels}.items():
        if given is not None and given.shape != input_ids.shape:
            expected = f"{tuple(input_ids.shape)} of input_ids"
            raise ValueError(f"{name}: expected the shape {expected}, got {tuple(given.shape)}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
    if labels is None:
        mask, ids = compact(mask, input_ids, left=left)
    else:
        mask, ids, labels = compact(mask, input_ids, labels, left=left)
    ids = ids.masked_fill(mask == 0, 0)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_ids(ids, images)
    tokens = embedding(ids.clamp(min=0))
    if images.shape[2] != tokens.shape[2]:
        raise ValueError(f"images: expected (N, k, {tokens.shape[2]}), got shape {tuple(images.shape)}")
    if labels is not None:
        labels = labels.masked_fill((mask == 0) | (ids == IMAGE), IGNORED)
        labels = torch.cat([torch.full_like(labels[:, :1], IGNORED), labels[:, 1:]], dim=1)
    return Assembled(put_images(tokens, ids, images), mask, positions(mask), labels)


def _check_ids(ids: Tensor, images: Tensor) -> None:
    if ids.numel() and int(ids.min()) < IMAGE:
        raise ValueError(f"input_ids: expected tokens, and {IMAGE} for images, got {int(ids.min())}")
    places, needed = int((ids == IMAGE).sum()), images.shape[0] * images.shape[1]
    if places != needed:
        each = f"{images.shape[0]} images of {images.shape[1]} embeddings"
        raise ValueError(f"input_ids: expected {IMAGE} at {needed} places, for {each}, got {places}")
