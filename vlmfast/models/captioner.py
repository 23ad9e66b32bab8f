"""What VisualGPT and VC-GPT share: an image's tokens, and a decoder that reads them by cross-attention.

The loss is that of the caption y, between a begin token and an end token, given the image v::

    -mean over l of log p(y_l | v, y_<l)

Pads and the begin token are not predicted. The mean is over the predicted tokens of the batch, of all processes where
the trainer says how many they are. A batch with `references` has another loss, see `vlmfast.models.self_critical`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple
from typing_extensions import Self

from vlmfast.models.captioner_batches import CaptionCollator
from vlmfast.models.captioner_config import CaptionerConfig, CaptionerOptions
from vlmfast.models.contract import Pretrainable, vision_fingerprint
from vlmfast.models.image_tower import ImageTower, load_image_tower, small_vit
from vlmfast.models.language_model import check_length, load_language_model, position_limit, small_gpt2, stop_token
from vlmfast.models.self_critical import SelfCritical
from vlmfast.models.towers import normalisation, tower_width, unread_parameters
from vlmfast.nn.linear_cross_entropy import language_model_loss
from vlmfast.nn.prefix import positions
from vlmfast.nn.transformers_cross_attention import GPT2CrossAttention


@dataclass
class CaptionerOutput(ModelOutput):
    """What a captioner returns.

    Attributes:
        loss (): float32, where there are labels or references.
        hidden_states: what each of the decoder's output heads reads, (B, L, D) each.
    """

    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class CrossGPT2(GPT2LMHeadModel):
    """transformers' GPT-2 with cross-attention, which is computed by `vlmfast.nn`'s drop-in.

    Its cross-attention has no dropout of attention weights.

    Args:
        config: of a GPT-2 with add_cross_attention.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for block in self.transformer.h:
            block.crossattention = GPT2CrossAttention.from_module(block.crossattention)
            block.crossattention.attn_dropout = nn.Identity()

    def states(self, input_ids: Tensor, **inputs: Any) -> tuple[Tensor]:
        """What the output head reads (B, L, D); inputs as of transformers' GPT2Model."""
        return (self.transformer(input_ids, use_cache=False, **inputs).last_hidden_state,)

    def heads(self) -> tuple[nn.Module]:
        """The output head; logits are what it makes of the states."""
        return (self.lm_head,)

    def take(self, language_model: PreTrainedModel) -> None:
        """The weights of a GPT-2; cross-attention, which it lacks, stays as it is."""
        missing, unexpected = self.load_state_dict(language_model.state_dict(), strict=False)
        new = [name for name in missing if "cross" not in name]
        if new or unexpected:
            raise ValueError(f"language_model: expected the weights of a GPT-2, it lacks {new} and has {unexpected}")


class Captioner(Pretrainable, PreTrainedModel):
    """A model adds `add_parts`, which makes `decoder` and what lies between image and decoder, and `encode`.

    Args:
        config: of the model.
        language_model: a pretrained one, whose weights are copied.
        image_tower: likewise, with the weight of its projection, which is not read.
    """

    config: Any
    base_model_prefix = ""
    Options: ClassVar[type[CaptionerOptions]] = CaptionerOptions
    strategy = "fusion"
    tasks = ("captioning",)
    main_input_name = "input_ids"
    reads_features = True
    supports_gradient_checkpointing = True
    freezes_vision: ClassVar[bool] = False
    """Whether a pretrained image tower is kept as it is."""
    accepts_loss_kwargs = True  # so that the Trainer says how many tokens are predicted
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    decoder: Any

    def __init__(
        self,
        config: CaptionerConfig,
        language_model: PreTrainedModel | None = None,
        image_tower: tuple[PreTrainedModel, Tensor | None] | None = None,
    ) -> None:
        super().__init__(config)
        if config.region_dim is None:
            width = tower_width("vision_config", config.vision_config)
            self.vision: ImageTower | None = ImageTower(
                config.vision_config, None, config.image_mean, config.image_std, reads="tokens"
            )
        else:
            width, self.vision = config.region_dim, None
        self.feature_width = width
        self.add_parts(width)
        self.self_critical: SelfCritical | None = None
        self.post_init()
        self._keys_to_ignore_on_save = set(self.all_tied_weights_keys)  # or the Trainer says that they are missing
        if language_model is not None:
            self.decoder.take(language_model)
        if image_tower is not None and self.vision is not None:
            self.vision.copy_weights(image_tower[0], None)
        self.freeze()

    def add_parts(self, width: int) -> None:
        """Makes `decoder`, with `states`, `heads` and `take` as `CrossGPT2` has them, and what `encode` needs.

        Args:
            width: of the image's tokens.
        """
        raise NotImplementedError(f"{type(self).__name__}.add_parts")

    def encode(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """What the decoder's cross-attention reads, (B, R, ...), of tokens (B, R, W); mask (B, R) is 0 for pads."""
        raise NotImplementedError(f"{type(self).__name__}.encode")

    @classmethod
    def create(cls, options: Any, tokenizer: Any, **overrides: Any) -> Self:
        """A new model from the options; pretrained parts are copied into it."""
        stop = stop_token(tokenizer, "")
        begin = stop if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        filler = stop if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        tokens = {"begin_token_id": begin, "stop_token_id": stop, "filler_token_id": filler}
        settings = {**tokens, "region_dim": options.region_dim, **cls.settings(options)}
        language = tower = None
        if options.language_model:
            language = load_language_model(options.language_model)
            settings["text_config"] = language.config
        else:
            settings["text_config"] = small_gpt2(tokenizer, options.text_width, options.text_layers)
        if options.vision_tower:
            tower = load_image_tower(options.vision_tower)
            settings |= {"vision_config": tower[0].config, "vision_frozen": cls.freezes_vision}
            settings |= normalisation(options.vision_tower)
        elif options.region_dim is None:
            sizes = (options.image_size, options.patch_size, options.vision_width, options.vision_layers)
            settings["vision_config"] = small_vit(*sizes)
        return cls(cls.config_class(**{**settings, **overrides}), language, tower)

    @classmethod
    def settings(cls, options: Any) -> dict[str, Any]:
        """Fields of the config that the options set for a new model, beside those that all captioners have."""
        return {}

    # What trainer and tasks call

    def frozen_parts(self) -> tuple[nn.Module, ...]:
        """The image tower, where it is frozen."""
        return (self.vision,) if self.config.vision_frozen and self.vision is not None else ()

    def freeze(self) -> None:
        """As Pretrainable's, and what of the image tower can have no gradient, since DDP stops there."""
        super().freeze()
        if self.vision is not None:
            for parameter in unread_parameters(self.vision.tower):
                parameter.requires_grad_(False)

    @property
    def max_text_length(self) -> int:
        """Tokens of a caption at most, with its begin and end."""
        return position_limit(self.config.text_config) or 2**20

    def transform(self, options: Any, *, train: bool) -> Any:
        """As Pretrainable's; no image is read in training where features of regions are."""
        return None if train and self.vision is None else super().transform(options, train=train)

    def image_size(self, options: Any) -> int:
        """As Pretrainable's; of no meaning where features of regions are read."""
        return int(options.image_size) if self.vision is None else super().image_size(options)

    def get_input_embeddings(self) -> nn.Module:
        """Of the language model's tokens."""
        embeddings: nn.Module = self.decoder.get_input_embeddings()
        return embeddings

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Callable[[Sequence[Any]], dict[str, Any]]:
        """Image and caption with its labels; in self-critical training, image and all true captions."""
        kind = "references" if train and options.self_critical else "train"
        return self._collator(tokenizer, kind, options.max_length)

    def prompt_collator(self, options: Any, tokenizer: Any) -> Callable[[Sequence[Any]], dict[str, Any]]:
        """Image, and what its caption begins with. Prompts are not cut."""
        return self._collator(tokenizer, "prompt", 0)

    def _collator(self, tokenizer: Any, kind: str, max_length: int) -> CaptionCollator:
        for name in ("begin_token_id", "stop_token_id"):
            if getattr(self.config, name) is None:
                raise ValueError(f"{name}: expected a token, got None; set it in the config")
        begin, stop = self.config.begin_token_id, self.config.stop_token_id
        most = None if self.vision is not None else self.config.max_regions
        return CaptionCollator(tokenizer, begin=begin, stop=stop, kind=kind, max_length=max_length, max_regions=most)

    def training_data(self, options: Any, dataset: Any, tokenizer: Any) -> Any:
        """The dataset as it is, once the n-grams of its captions are counted, where training is self-critical."""
        if options.self_critical:
            self.self_critical = SelfCritical.of_dataset(dataset, tokenizer, length=options.max_length)
        return dataset

    def metrics(self) -> dict[str, float]:
        """Of the last batch of self-critical training, the mean CIDEr of the beams."""
        return {} if self.self_critical is None else {"reward": self.self_critical.reward}

    def frozen_features(self, pixel_values: Tensor, **others: Tensor) -> dict[str, Tensor]:
        """What the frozen image tower makes of images, by the name that `forward` has for it.

        Raises:
            ValueError: there is no image tower, or it is trained.
        """
        if not self.frozen_parts():
            raise ValueError("--cache-features: expected a frozen image tower, this model has none")
        return {"image_features": self.image_features(pixel_values)}

    def frozen_fingerprint(self) -> str:
        """A hash of what decides `frozen_features`: architecture and weights, and normalisation."""
        assert self.vision is not None
        return vision_fingerprint(self.config, self.vision, reads="tokens")

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Of the image tower, (B, R, W); without gradient where it is frozen.

        Args:
            pixel_values: uint8 (B, H, W, 3), normalised here with the config's `image_mean` and `image_std`; or
                floating point (B, C, H, W), already normalised.
        Raises:
            ValueError: the model reads features of regions.
        """
        if self.vision is None:
            raise ValueError("pixel_values: expected features of regions as image_features, this model has no tower")
        with torch.no_grad() if self.config.vision_frozen else nullcontext():
            features: Tensor = self.vision(pixel_values)
        return features

    def image_states(
        self, pixel_values: Tensor | None, image_features: Tensor | None, image_mask: Tensor | None
    ) -> Tensor:
        """What the decoder's cross-attention reads of images, (B, R, ...)."""
        if (pixel_values is None) == (image_features is None):
            got = "neither" if pixel_values is None else "both"
            raise ValueError(f"pixel_values, image_features: expected one of them, got {got}")
        if pixel_values is not None:
            image_features = self.image_features(pixel_values)
        assert image_features is not None
        if image_features.ndim != 3 or image_features.shape[2] != self.feature_width:
            shape = tuple(image_features.shape)
            raise ValueError(f"image_features: expected (B, R, {self.feature_width}), got shape {shape}")
        return self.encode(image_features.to(self.dtype), image_mask)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_mask: Tensor | None = None,
        references: Sequence[Sequence[str]] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CaptionerOutput:
        """The loss where there are labels or references, without the logits.

        Args:
            input_ids (B, L): int64, with the begin token first.
            attention_mask (B, L): 0 for pads, on either side; None where there are none.
            labels (B, L): the token of each place that is predicted from those before it, or -100.
            pixel_values: images, as `image_features`.
            image_features (B, R, W): what `image_features` makes of them, or features of regions.
            image_mask (B, R): 0 for pads among these; None where there are none.
            references: true captions of each image; the loss is then that of self-critical training, and input_ids
                are what a caption begins with.
            num_items_in_batch: what the sum over tokens is divided by; None: how many are predicted.
        Raises:
            ValueError: images are given twice or not at all, L is more than the language model's positions, or
                references come without `training_data`.
        """
        images = self.image_states(pixel_values, image_features, image_mask)
        if references is not None:
            if self.self_critical is None:
                raise ValueError("references: expected a model that training_data was called of, got one without")
            given = {"pixel_values": pixel_values, "image_features": image_features, "image_mask": image_mask}
            loss = self.self_critical.loss(self, input_ids, attention_mask, references, images, **given)
            return CaptionerOutput(loss=loss)
        states = self.states(input_ids, attention_mask, images, image_mask)
        found = None
        if labels is not None:
            found = language_model_loss(states, self.decoder.heads(), labels, num_items_in_batch=num_items_in_batch)
        return CaptionerOutput(loss=found, hidden_states=states)

    def states(
        self, input_ids: Tensor, attention_mask: Tensor | None, images: Tensor, image_mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """What each of the decoder's heads reads, (B, L, D); arguments as `forward`, `images` of `image_states`."""
        check_length(self.config.text_config, input_ids.shape[-1])
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        found: tuple[Tensor, ...] = self.decoder.states(
            input_ids,
            attention_mask=mask,
            position_ids=positions(mask),
            encoder_hidden_states=images,
            encoder_attention_mask=image_mask,
        )
        return found

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 30,
        **settings: Any,
    ) -> Any:
        """Token ids (B, L) int64 of what follows, up to the token that ends it; greedy unless told otherwise.

        Args:
            input_ids (B, L), attention_mask (B, L): begin and prompt, pads on the left.
            pixel_values, image_features, image_mask: as `forward`.
            max_new_tokens: at most.
            settings: of transformers' `generate`, such as num_beams.
        Raises:
            ValueError: as `forward`; or prompt and new tokens are more than the language model's positions.
        """
        length = input_ids.shape[1]
        check_length(
            self.config.text_config, length + max_new_tokens - 1, f" for the prompt and {max_new_tokens} new tokens"
        )
        stop, filler = self.config.stop_token_id, self.config.filler_token_id
        settings = {
            "do_sample": False,
            "eos_token_id": stop,
            "pad_token_id": stop if filler is None else filler,
            **settings,
        }
        found = self.decoder.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            encoder_hidden_states=self.image_states(pixel_values, image_features, image_mask),
            encoder_attention_mask=image_mask,
            max_new_tokens=max_new_tokens,
            **settings,
        )
        return found[:, length:]

    # Initial weights of what is in no tower

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # else transformers passes over modules without parameters of their own

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
            init.zeros_(module.out_proj.bias)
