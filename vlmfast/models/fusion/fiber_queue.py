"""FIBER's queue of the pairs of earlier batches, and those of the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmfast.models.gathered import Shards


class PairQueue(nn.Module):
    """The last pairs of earlier batches, first in first out: their features, and what a model must read again.

    All is in buffers, so that checkpoints hold it.

    Args:
        size: pairs at most.
        dim: of the features.
        image_size: side of the images, uint8 (image_size, image_size, 3).
        max_length: tokens of a text at most.
    """

    def __init__(self, size: int, dim: int, image_size: int, max_length: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("image_features", torch.zeros(size, dim))
        self.register_buffer("text_features", torch.zeros(size, dim))
        self.register_buffer("pixel_values", torch.zeros(size, image_size, image_size, 3, dtype=torch.uint8))
        self.register_buffer("input_ids", torch.zeros(size, max_length, dtype=torch.long))
        self.register_buffer("attention_mask", torch.zeros(size, max_length, dtype=torch.long))
        self.register_buffer("image_ids", torch.zeros(size, dtype=torch.long))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))

    image_features: Tensor
    text_features: Tensor
    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    image_ids: Tensor
    pushed: Tensor

    def filled(self) -> int:
        """How many pairs there are."""
        return min(int(self.pushed), self.size)

    @torch.no_grad()
    def push(self, **rows: Tensor) -> None:
        """Takes in N pairs, all buffers by name; of more than `size` the last.

        Raises:
            ValueError: images are of another size, or texts longer than `max_length`.
        """
        pixels, ids = rows["pixel_values"], rows["input_ids"]
        if pixels.shape[1:] != self.pixel_values.shape[1:] or ids.shape[1] > self.input_ids.shape[1]:
            raise ValueError(
                f"pixel_values: expected images {tuple(self.pixel_values.shape[1:])} and texts of at most "
                f"{self.input_ids.shape[1]} tokens, got {tuple(pixels.shape[1:])} and {ids.shape[1]}"
            )
        count = len(ids)
        kept = slice(max(0, count - self.size), count)
        places = (self.pushed + torch.arange(count, device=ids.device)[kept]) % self.size
        for name, values in rows.items():
            buffer: Tensor = getattr(self, name)
            if values.ndim == 2 and values.shape[1] < buffer.shape[1]:
                values = nn.functional.pad(values, (0, buffer.shape[1] - values.shape[1]))
            buffer[places] = values[kept].to(buffer.dtype)
        self.pushed += count

    def after(self, batch: dict[str, Tensor], name: str) -> Tensor:
        """One of the buffers' pairs behind those of a batch (N + Q, ...), texts padded to one length."""
        values, kept = batch[name], getattr(self, name)[: self.filled()]
        if values.ndim == 2:
            values = nn.functional.pad(values, (0, max(0, kept.shape[1] - values.shape[1])))
            kept = nn.functional.pad(kept, (0, values.shape[1] - kept.shape[1]))
        return torch.cat([values, kept.to(values.dtype)])

    def pixels(self, batch: dict[str, Tensor], rows: Tensor) -> Tensor:
        """Images of rows (m,) of a batch and of the queue behind it, without a copy of the queue."""
        own = batch["pixel_values"]
        stored = self.pixel_values[(rows - len(own)).clamp(min=0)].to(own.dtype)
        return torch.where((rows < len(own))[:, None, None, None], own[rows.clamp(max=len(own) - 1)], stored)


def raw_pairs(
    shards: Shards,
    queue: PairQueue | None,
    pixel_values: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_ids: Tensor | None,
) -> dict[str, Tensor]:
    """The pairs of all processes as they came, by the names that the queue has for them.

    Raises:
        TypeError: there is a queue, and images are not uint8.
    """
    if queue is not None and pixel_values.dtype != torch.uint8:
        raise TypeError(f"pixel_values: expected uint8, which the queue keeps, got {pixel_values.dtype}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if image_ids is None:
        # Numbers that no other pair has, also among those of earlier batches.
        first = 0 if queue is None else int(queue.pushed)
        image_ids = -1 - first - shards.offset - torch.arange(len(input_ids), device=input_ids.device)
    named = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": mask}
    found = {name: shards.rows(values) for name, values in named.items()}
    found["image_ids"] = shards.rows(image_ids[:, None])[:, 0]
    return found
