"""Config and options of SimVLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vlmfast.models.caption_batches import check_positive
from vlmfast.models.contract import ImageTextOptions
from vlmfast.models.conv_stage import resnet_config

STAGES = 3
STRIDE = 16
POSITIONS = 64  # of tokens in a small model: a question, and a caption


class SimVLMConfig(PreTrainedConfig):
    """A ResNet of three stages and a transformer of an encoder and a decoder.

    Args:
        vision_config: a ResNetConfig or a dict of one, with `image_size`; None is ResNet-101's stages at 224 pixels.
        vocab_size, max_position_embeddings: of tokens, in the encoder and in the decoder.
        hidden_size, num_heads, encoder_layers, decoder_layers: of the transformer.
        bos_token_id: what the decoder begins with.
        eos_token_id: ends a text.
        pad_token_id: stands behind the end in a batch that is generated; None is eos_token_id.
        image_mean, image_std: per channel, of pixels in [0, 1]; they normalise uint8 `pixel_values` only.
        Others as PreTrainedConfig.
    Raises:
        ValueError: a number is not positive, or hidden_size not a multiple of num_heads.
    """

    model_type = "simvlm"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig}

    def __init__(
        self,
        vision_config: Any = None,
        *,
        vocab_size: int = 32_000,
        max_position_embeddings: int = 256,
        hidden_size: int = 768,
        num_heads: int = 12,
        encoder_layers: int = 12,
        decoder_layers: int = 12,
        bos_token_id: int = 0,
        eos_token_id: int = 1,
        pad_token_id: int | None = None,
        image_mean: Sequence[float] = tuple(IMAGENET_DEFAULT_MEAN),
        image_std: Sequence[float] = tuple(IMAGENET_DEFAULT_STD),
        **kwargs: Any,
    ) -> None:
        self.vision_config = resnet_config(
            vision_config, STAGES, depths=[3, 4, 23], hidden_sizes=[256, 512, 1024], image_size=224
        )
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.encoder_layers = encoder_layers
        self.decoder_layers = decoder_layers
        self.image_mean = image_mean
        self.image_std = image_std
        kwargs |= {"is_encoder_decoder": True, "tie_word_embeddings": True}
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)
        sizes = (
            "vocab_size",
            "max_position_embeddings",
            "hidden_size",
            "num_heads",
            "encoder_layers",
            "decoder_layers",
        )
        check_positive(self, *sizes)
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size: expected a multiple of num_heads {num_heads}, got {hidden_size}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's patches."""
        side = -(-self.vision_config.image_size // STRIDE)
        return side, side


@dataclass
class SimVLMOptions(ImageTextOptions):
    """Options of a small SimVLM."""

    vision_width: int = field(
        default=256, metadata={"help": "Channels of the convolutions' last map, a multiple of 4; half in each before."}
    )
    vision_layers: int = field(default=2, metadata={"help": "Blocks of each of the three convolution stages."})
    text_width: int = field(default=192, metadata={"help": "Width of encoder and decoder, a multiple of 64."})
    text_layers: int = field(default=3, metadata={"help": "Layers of the encoder, and of the decoder."})
    whole: float = field(
        default=0.0,
        metadata={
            "help": "Probability that a text is predicted from its image alone, as captions are; 1 to fine-tune."
        },
    )
    text_data: str | None = field(
        default=None, metadata={"help": "A text file, one document a line, to train on beside the pairs."}
    )
    text_batch: int = field(default=8, metadata={"help": "Documents of --text-data in a batch, beside the pairs."})

    new_model: ClassVar[tuple[str, ...]] = ("vision_width", "vision_layers", "text_width", "text_layers")

    def check(self) -> None:
        super().check()
        if self.text_width % 64:
            raise ValueError(f"--text-width: expected a multiple of 64 (the head size), got {self.text_width}")
        if not 0 <= self.whole <= 1:
            raise ValueError(f"--whole: expected a probability, got {self.whole}")
        if not self.text_data and self.is_given("text_batch"):
            raise ValueError(f"--text-batch {self.text_batch} needs --text-data, a file of documents")
