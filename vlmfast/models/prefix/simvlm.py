"""SimVLM: Wang et al. 2022, "SimVLM: Simple Visual Language Model Pretraining with Weak Supervision" (2108.10904).

An encoder reads a prefix, which is an image and the first T_p tokens of its text; a decoder predicts the tokens that
follow. With v the image's patches and x_0, ..., x_(T-1) the text, its end token included::

    loss = -mean over t >= T_p of log p(x_t | v, x_<T_p, x_T_p, ..., x_(t-1))

T_p is drawn for each sample from 0, ..., T - 1, as a function of `Sample.seed`. `--whole` is the probability that it is
0 beforehand: 0 in pretraining, 1 where captions are fine-tuned. Within the prefix every state sees all others; the
decoder is causal and reads all of the prefix. The mean is over the predicted tokens of the batch, of all processes
where the trainer says how many they are. There is no other loss.

An image's patches are the places of the third stage of a ResNet, at 1/16 of its side, mapped to the transformer's width
by one linear layer. Patches and tokens have a table of positions each, and no embedding says which is which. Each layer
of the encoder adds a learned number to the score of one patch for another, by how far they are apart down and across;
scores of tokens have no such number. All parameters are trained, without dropout.

Texts without images have a prefix of text alone: `--text-data`, a text file with one document a line, adds
`--text-batch` of them to every batch, drawn as a function of the batch's first seed. Some prefix may then be empty; the
decoder reads zeros in its place.

What is generated follows what the encoder was given: a prompt such as "a picture of", or a question, stands in the
encoder, and the decoder begins with its begin token. `vlmfast train simvlm --task vqa` trains answers alone, behind the
question.

Where the paper is silent, or departed from:

- The decoder counts positions from its begin token on, whatever T_p is, and shares words and positions of tokens with
  the encoder; its output layer is the embedding of words. Layers are pre-norm, with exact GELU.
- The tables of numbers by relative place are one a layer. Residual branches of the ResNet start at 0.
- No official code exists. Of two ports, one takes the cross-entropy of features instead of logits, and one prefix
  length for a whole batch; the other adds 1e-9 where it means to mask, which masks nothing. Both replace the ResNet by
  a patch embedding, and have no bias by relative place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput, can_return_tuple
from typing_extensions import Self

from vlmfast.models.caption_batches import read_lines
from vlmfast.models.contract import Pretrainable
from vlmfast.models.conv_stage import ConvStage, small_resnet
from vlmfast.models.encoder_decoder import Decoder, Encoder, RelativeBias
from vlmfast.models.prefix_lm_batches import PrefixLMCollator
from vlmfast.models.simvlm_config import POSITIONS, STAGES, SimVLMConfig, SimVLMOptions
from vlmfast.nn.linear_cross_entropy import language_model_loss
from vlmfast.nn.prefix import positions


@dataclass
class SimVLMOutput(ModelOutput):
    """What SimVLM returns.

    Attributes:
        loss (): float32, where there are labels.
        logits (B, T, V): where there are none.
        hidden_states (B, T, D): of the decoder, which its output layer reads.
        encoder_last_hidden_state (B, S, D): of the prefix: all patches, then the tokens; of what is none, any.
        past_key_values: the cache that was given.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    past_key_values: Any = None


class SimVLMModel(Pretrainable, PreTrainedModel, GenerationMixin):
    """An encoder of image and prefix, and a decoder of what follows; see the top of this file."""

    config: SimVLMConfig
    config_class = SimVLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    strategy = "prefix"
    paper = "Wang et al. 2022 (2108.10904)"
    Options = SimVLMOptions
    tasks = ("captioning", "vqa")
    special_tokens: ClassVar[dict[str, str]] = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    training_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 5e-4,
        "weight_decay": 0.01,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.02,
    }
    accepts_loss_kwargs = True  # so that the Trainer says how many tokens are predicted
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "words.weight"}
    _keys_to_ignore_on_save: ClassVar[list[str]] = ["lm_head.weight"]  # else a resumed run misses what is tied

    def __init__(self, config: SimVLMConfig) -> None:
        super().__init__(config)
        width, heads, grid = config.hidden_size, config.num_heads, config.grid
        self.conv = ConvStage(config.vision_config, config.image_mean, config.image_std)
        self.image_projection = nn.Linear(config.vision_config.hidden_sizes[-1], width)
        self.image_positions = nn.Embedding(grid[0] * grid[1], width)
        self.words = nn.Embedding(config.vocab_size, width)
        self.text_positions = nn.Embedding(config.max_position_embeddings, width)
        self.encoder = Encoder(width, heads, config.encoder_layers, grid)
        self.decoder = Decoder(width, heads, config.decoder_layers)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def create(cls, options: Any, tokenizer: Any, **overrides: Any) -> Self:
        """A new model from the options."""
        bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        if bos is None or eos is None:
            raise ValueError(f"tokenizer: expected one with a begin and an end token, got {bos} and {eos}")
        settings = {
            "vision_config": small_resnet(options.image_size, options.vision_width, options.vision_layers, STAGES),
            "vocab_size": len(tokenizer),
            "max_position_embeddings": max(options.max_length, POSITIONS),
            "hidden_size": options.text_width,
            "num_heads": options.text_width // 64,
            "encoder_layers": options.text_layers,
            "decoder_layers": options.text_layers,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
        }
        return cls(cls.config_class(**{**settings, **overrides}))

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """Images with texts cut in two; train=False puts all of a text into the decoder."""
        limit = self.config.max_position_embeddings
        if options.max_length > limit:
            raise ValueError(f"--max-length: expected at most the model's {limit} positions, got {options.max_length}")
        lines = read_lines(options.text_data) if train and options.text_data else []
        return PrefixLMCollator(
            tokenizer,
            self.config,
            max_length=options.max_length,
            cut=1 - options.whole if train else 0.0,
            lines=lines,
            documents=options.text_batch,
        )

    def prompt_collator(self, options: Any, tokenizer: Any) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """Image and prompt for the encoder. Prompts are not cut."""
        return PrefixLMCollator(tokenizer, self.config)

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States (B, S, D) of the prefix, patches first where there are images, and which are read, bool (B, S).

        Args:
            As `forward`.
        Raises:
            ValueError: shapes disagree, a row has more tokens than there are positions, or images and image_mask
                disagree.
        """
        config = self.config
        if input_ids.ndim != 2 or input_ids.shape[1] > config.max_position_embeddings:
            limit = config.max_position_embeddings
            raise ValueError(f"input_ids: expected (B, L), L at most {limit}, got shape {tuple(input_ids.shape)}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask: expected {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
        states, read = self.words(input_ids) + self.text_positions(positions(mask)), mask != 0
        patches = 0
        if pixel_values is not None:
            images = self.image_projection(self.conv(pixel_values)) + self.image_positions.weight
            patches = images.shape[1]
            has = image_mask if image_mask is not None else read.new_ones(len(input_ids))
            if image_mask is None and len(images) != len(input_ids):
                raise ValueError(f"image_mask: needed for {len(images)} images of {len(input_ids)} rows")
            if len(has) != len(input_ids) or (has.device.type == "cpu" and int(has.sum()) != len(images)):
                raise ValueError(
                    f"image_mask: expected {len(input_ids)} values, True for {len(images)} images, got {has.tolist()}"
                )
            if len(images):
                number = (has.long().cumsum(0) - 1).clamp(min=0)
                images = torch.where(has[:, None, None], images[number], 0)
            states = torch.cat([images.to(states.dtype), states], dim=1)
            read = torch.cat([has[:, None].expand(-1, patches), read], dim=1)
        return self.encoder(states, read, patches), read

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        encoder_outputs: Any = None,
        encoder_mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> SimVLMOutput:
        """The loss where there are labels, without the logits; else the logits.

        Args:
            input_ids (B, L): int64, the tokens of the prefix; L may be 0.
            attention_mask (B, L): 0 for pads, wherever they stand; None where there are none.
            decoder_input_ids (B, T): the begin token, and what follows the prefix; pads on the right.
            labels (B, T): what comes after each of them, or -100.
            pixel_values: the images, as `ConvStage.forward`, of the rows that have one, in their order; or None.
            image_mask (B,): bool, which rows those are; None: all.
            num_items_in_batch: what the sum over tokens is divided by; None: how many are predicted.
            encoder_outputs: what the encoder made before, with `last_hidden_state`, instead of the five above that it
                reads; encoder_mask bool (B, S) then says what is read of it.
            past_key_values: an EncoderDecoderCache of the tokens before decoder_input_ids.
        Raises:
            ValueError: as `encode`; or decoder_input_ids are missing, or more than there are positions.
        """
        if encoder_outputs is None:
            if input_ids is None:
                raise ValueError("input_ids: expected (B, L), L may be 0, got None")
            memory, read = self.encode(input_ids, attention_mask, pixel_values, image_mask)
        else:
            memory = encoder_outputs.last_hidden_state
            read = memory.new_ones(memory.shape[:2], dtype=torch.bool) if encoder_mask is None else encoder_mask
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids: expected (B, T), got None")
        before = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        length, limit = decoder_input_ids.shape[1], self.config.max_position_embeddings
        if before + length > limit:
            raise ValueError(f"decoder_input_ids: expected at most {limit} positions, got {before + length}")
        places = torch.arange(before, before + length, device=decoder_input_ids.device)
        states = self.words(decoder_input_ids) + self.text_positions(places)
        hidden = self.decoder(states, memory, read, past_key_values)
        loss = logits = None
        if labels is None:
            logits = self.lm_head(hidden)
        else:
            loss = language_model_loss(hidden, self.lm_head, labels, shift=False, num_items_in_batch=num_items_in_batch)
        return SimVLMOutput(loss, logits, hidden, memory, past_key_values)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 30,
        **settings: Any,
    ) -> Any:
        """Token ids (B, T) int64 of what follows the prefix, up to the end token; greedy unless told otherwise.

        Args:
            input_ids, attention_mask, pixel_values, image_mask: as `forward`.
            max_new_tokens: at most.
            settings: of transformers' `generate`, such as num_beams.
        Raises:
            ValueError: as `encode`; or new tokens are more than there are positions.
        """
        config = self.config
        if max_new_tokens > config.max_position_embeddings:
            limit = config.max_position_embeddings
            raise ValueError(f"max_new_tokens: expected at most the model's {limit} positions, got {max_new_tokens}")
        memory, read = self.encode(input_ids, attention_mask, pixel_values, image_mask)
        pad = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
        settings = {"do_sample": False, "eos_token_id": config.eos_token_id, "pad_token_id": pad, **settings}
        if settings.get("use_cache", True):
            settings.setdefault("past_key_values", EncoderDecoderCache(DynamicCache(), DynamicCache()))
        found: Any = super().generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=memory),
            encoder_mask=read,
            decoder_input_ids=torch.full_like(read[:, :1], config.bos_token_id, dtype=torch.long),
            max_new_tokens=max_new_tokens,
            **settings,
        )
        return found[:, 1:] if isinstance(found, Tensor) else found

    def prepare_inputs_for_generation(  # what transformers' generate asks for, at every step
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        encoder_outputs: Any = None,
        encoder_mask: Tensor | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        before = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        return {
            "decoder_input_ids": input_ids[:, before:],
            "past_key_values": past_key_values,
            "encoder_outputs": encoder_outputs,
            "encoder_mask": encoder_mask,
        }

    def get_encoder(self, *given: Any, **named: Any) -> Any:
        """The encoder of patches and tokens."""
        return self.encoder

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def set_input_embeddings(self, value: Any) -> None:
        self.words = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: Any) -> None:
        self.lm_head = value

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # else transformers passes over modules without parameters of their own

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RelativeBias):
            init.zeros_(module.table)
