"""Options and config of Flamingo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from vlmfast.models.prefix_config import PrefixConfig, PrefixOptions

IMAGE_TOKEN, END_TOKEN = "<image>", "<|endofchunk|>"


class FlamingoConfig(PrefixConfig):
    """PrefixConfig with the sizes of resampler and blocks.

    Args:
        prefix_length: tokens n that the resampler makes of an image.
        resampler_layers: of the resampler.
        cross_attention_every, cross_attention_offset: a block stands before layer i of the language model where
            i % every == offset. None: every - 1, as in open_flamingo; Idefics has 0.
        cross_attention_heads, cross_attention_head_size: of resampler and blocks.
        max_frames: embeddings of a video's frames; None: none, as in open_flamingo.
        media_token_id: the token in the place of an image.
        stop_token_id: the token that ends a chunk.
        Others as PrefixConfig.
    Raises:
        ValueError: a number is not positive, or the offset not within [0, every).
    """

    model_type = "flamingo"

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        prefix_length: int = 64,
        resampler_layers: int = 6,
        cross_attention_every: int = 1,
        cross_attention_offset: int | None = None,
        cross_attention_heads: int = 8,
        cross_attention_head_size: int = 64,
        max_frames: int | None = None,
        media_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.resampler_layers = resampler_layers
        self.cross_attention_every = cross_attention_every
        self.cross_attention_offset = cross_attention_offset
        self.cross_attention_heads = cross_attention_heads
        self.cross_attention_head_size = cross_attention_head_size
        self.max_frames = max_frames
        self.media_token_id = media_token_id
        super().__init__(vision_config, text_config, prefix_length=prefix_length, **kwargs)
        self.positive(
            "resampler_layers",
            "cross_attention_every",
            "cross_attention_heads",
            "cross_attention_head_size",
            *(["max_frames"] if max_frames is not None else []),
        )
        if not 0 <= self.offset() < cross_attention_every:
            raise ValueError(
                f"cross_attention_offset: expected at least 0 and less than cross_attention_every "
                f"{cross_attention_every}, got {cross_attention_offset}"
            )
        if not self.layers():
            raise ValueError(
                f"cross_attention_every: expected a block before one of the language model's "
                f"{self.text_config.num_hidden_layers} layers, got {cross_attention_every} with offset {self.offset()}"
            )

    def offset(self) -> int:
        """The first layer, from 0, that a block stands before."""
        given = self.cross_attention_offset
        return self.cross_attention_every - 1 if given is None else given

    def layers(self) -> list[int]:
        """The layers of the language model, from 0, that blocks stand before."""
        return list(range(self.offset(), self.text_config.num_hidden_layers, self.cross_attention_every))


@dataclass
class FlamingoOptions(PrefixOptions):
    """PrefixOptions with the sizes of resampler and blocks."""

    prefix_length: int = field(default=32, metadata={"help": "Tokens that the resampler makes of an image."})
    resampler_layers: int = field(default=2, metadata={"help": "Layers of the resampler."})
    cross_attention_every: int = field(
        default=1, metadata={"help": "A gated block stands before every such layer of the language model."}
    )
    cross_attention_first: int | None = field(
        default=None,
        metadata={"help": "First layer, from 1, with a block before it; by default --cross-attention-every."},
    )
    p_next: float = field(
        default=0.0,
        metadata={"help": "Probability that the text of a document reads the image after it, not the one before."},
    )
    stop: str = field(default=END_TOKEN, metadata={"help": "What ends a chunk of text; no other is possible."})

    new_model: ClassVar[tuple[str, ...]] = (
        *PrefixOptions.new_model,
        "resampler_layers",
        "cross_attention_every",
        "cross_attention_first",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.p_next <= 1:
            raise ValueError(f"--p-next: expected a probability, got {self.p_next}")
        if self.stop != END_TOKEN:
            raise ValueError(f"--stop: expected {END_TOKEN}, got {self.stop!r}")
