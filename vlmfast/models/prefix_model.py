"""What ClipCap, MAPL and Frozen share: images become k embeddings each, which a language model reads among its tokens.

The loss is that of the tokens y of the text, given all that stands before each, images v included::

    -mean over l of log p(y_l | v, y_<l)

Images, pads and the first place of a row are not predicted; the last embedding of an image predicts the token behind
it. The mean is over the predicted tokens of the batch, of all processes where the trainer says how many they are.

A part that is frozen is in eval mode, has no gradient and is in no optimizer; a gradient goes through a frozen language
model to what made the embeddings. Checkpoints leave out frozen parts that came from a folder or a hub: their config
names where those are and has a hash of their weights, and `from_pretrained` fetches and compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple
from typing_extensions import Self

from vlmfast.models.contract import Pretrainable, fingerprint, vision_fingerprint
from vlmfast.models.image_tower import ImageTower, load_image_tower, small_vit
from vlmfast.models.language_model import (
    absolute,
    check_language_model,
    check_length,
    end_tokens,
    last_hidden_states,
    load_language_model,
    new_language_model,
    output_head,
    position_limit,
    small_gpt2,
    stop_token,
)
from vlmfast.models.prefix_batches import PrefixCollator
from vlmfast.models.prefix_config import PrefixConfig, PrefixOptions
from vlmfast.models.towers import normalisation, tower_width, unread_parameters
from vlmfast.nn.linear_cross_entropy import language_model_loss
from vlmfast.nn.prefix import Assembled, assemble


@dataclass
class PrefixOutput(ModelOutput):
    """What a prefix model returns.

    Attributes:
        loss (): float32, where there are labels.
        hidden_states (B, L, D): what the language model's output head reads; pads are on the right.
    """

    loss: Tensor | None = None
    hidden_states: Tensor | None = None


class PrefixModel(Pretrainable, PreTrainedModel):
    """A model adds `new_mapper`, from image features to embeddings, and says what it reads of an image.

    Args:
        config: names folders or hubs of what is not made anew; they are read here.
        language_model: a pretrained one that was loaded before.
        image_tower: likewise, with the weight of its projection or None.
    Raises:
        FileNotFoundError: a source that the config names is gone; the message has it.
        ValueError: a source holds other weights than those that the model was trained with.
    """

    config: PrefixConfig
    base_model_prefix = ""
    Options: ClassVar[type[PrefixOptions]] = PrefixOptions
    strategy = "frozen prefix"
    main_input_name = "pixel_values"
    reads: ClassVar[str] = "pooled"
    """Of the image tower: one feature of an image, or the states of its tokens; see `ImageTower`."""
    accepts_loss_kwargs = True  # so that the Trainer says how many tokens are predicted
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    language_model: Any
    vision: Any
    mapper: Any

    def __init__(
        self,
        config: PrefixConfig,
        language_model: PreTrainedModel | None = None,
        image_tower: tuple[PreTrainedModel, Tensor | None] | None = None,
    ) -> None:
        super().__init__(config)
        real = torch.empty(0).device.type != "meta"
        # Weights that lie elsewhere are put in once transformers has dealt with all others.
        self.language_model = nn.Module()
        if language_model is None and config.language_model is None:
            self.language_model = new_language_model(config.text_config)
            if real:
                check_language_model("text_config", self.language_model)
        self.vision = nn.Module() if config.vision_tower else self._new_vision()
        self.mapper = self.new_mapper(self._feature_width(), self._embedding_size())
        self.post_init()
        if language_model is not None:
            self._put_language_model(language_model)
        if image_tower is not None:
            self._put_image_tower(*image_tower)
        if real:
            self._fetch()
        self.freeze()

    def new_mapper(self, width: int, embedding_size: int) -> nn.Module:
        """From image features (N, W), or (N, R, W) where tokens are read, to embeddings (N, k, D)."""
        raise NotImplementedError(f"{type(self).__name__}.new_mapper")

    @classmethod
    def create(cls, options: Any, tokenizer: Any, **overrides: Any) -> Self:
        """A new model from the options; see `freezes` for what becomes of pretrained parts."""
        stop = stop_token(tokenizer, options.stop)
        filler = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, stop) if i is not None)
        settings = {"stop_token_id": stop, "filler_token_id": filler, **cls.settings(options)}
        freeze_language, freeze_vision = cls.freezes(options)
        language = tower = None
        if options.language_model:
            language = load_language_model(options.language_model)
            settings["text_config"] = language.config
            if freeze_language:
                settings |= {"language_model": absolute(options.language_model), "language_model_frozen": True}
        else:
            settings["text_config"] = small_gpt2(tokenizer, options.text_width, options.text_layers)
        if options.vision_tower:
            tower = load_image_tower(options.vision_tower)
            settings |= {"vision_config": tower[0].config, **normalisation(options.vision_tower)}
            if tower[1] is not None and cls.reads == "pooled":
                settings["projection_dim"] = len(tower[1])
            if freeze_vision:
                settings |= {"vision_tower": absolute(options.vision_tower), "vision_frozen": True}
        else:
            sizes = (options.image_size, options.patch_size, options.vision_width, options.vision_layers)
            settings["vision_config"] = small_vit(*sizes)
        return cls(cls.config_class(**{**settings, **overrides}), language, tower)

    @classmethod
    def freezes(cls, options: Any) -> tuple[bool, bool]:
        """Whether a pretrained language model, and a pretrained image tower, is frozen."""
        return True, True

    @classmethod
    def settings(cls, options: Any) -> dict[str, Any]:
        """Fields of the config that the options set for a new model, beside those that all models have."""
        return {"prefix_length": options.prefix_length}

    # Parts from elsewhere

    def _new_vision(self) -> ImageTower:
        config = self.config
        return ImageTower(
            config.vision_config, config.projection_dim, config.image_mean, config.image_std, reads=self.reads
        )

    def _put_language_model(self, model: PreTrainedModel) -> None:
        if self.config.language_model is not None:
            self._compare("language_model", model)
        self.language_model = model
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        self.all_tied_weights_keys.update({f"language_model.{k}": f"language_model.{v}" for k, v in tied.items()})

    def _put_image_tower(self, tower: PreTrainedModel, projection: Tensor | None) -> None:
        # float32, whatever dtype the config has come to have, so that the hash is of the weights as they were
        vision = self.vision if isinstance(self.vision, ImageTower) else self._new_vision().float()
        vision.copy_weights(tower, projection)
        if self.config.vision_tower is not None:
            self._compare("vision_tower", vision)
        self.vision = vision

    def _compare(self, name: str, module: nn.Module) -> None:
        """The hash of weights that checkpoints leave out is kept in the config, and later compared."""
        found, known = fingerprint({}, module), getattr(self.config, f"{name}_hash")
        if known is None:
            setattr(self.config, f"{name}_hash", found)
        elif found != known:
            source = getattr(self.config, name)
            raise ValueError(f"{name}: expected the weights that this model was trained with, {source} holds others")

    def _fetch(self) -> None:
        """Puts in the parts whose weights lie elsewhere, in this model's dtype and on its device."""
        weight = next(self.mapper.parameters())
        if not list(self.language_model.children()):
            self._put_language_model(load_language_model(self.config.language_model))  # type: ignore[arg-type]
            self.language_model.to(device=weight.device, dtype=weight.dtype)
        if not isinstance(self.vision, ImageTower):
            self._put_image_tower(*load_image_tower(self.config.vision_tower))
            self.vision.to(device=weight.device, dtype=weight.dtype)
        self._keys_to_ignore_on_save = set(self._left_out())

    def _left_out(self) -> list[str]:
        """Names of the weights that checkpoints leave out."""
        parts = {"language_model": self.config.language_model, "vision": self.config.vision_tower}
        prefixes = tuple(f"{name}." for name, source in parts.items() if source is not None)
        return [name for name in self.state_dict() if name.startswith(prefixes)] if prefixes else []

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers', and the frozen parts from where the config says that they are.

        `language_model=FOLDER` and `vision_tower=FOLDER` say where they are now, if not in the same place.

        Raises:
            FileNotFoundError: a frozen part is not there; the message says where it should be.
            ValueError: its weights are others than those that the model was trained with.
        """
        found = super().from_pretrained(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        model._fetch()
        model.eval()
        return found

    def save_pretrained(
        self, save_directory: str | PathLike[str], *args: Any, whole: bool = False, **kwargs: Any
    ) -> None:
        """As transformers', without the weights of frozen parts that came from elsewhere.

        Args:
            whole: with those too, so that the checkpoint needs nothing beside it.
        """
        sources = {name: getattr(self.config, name) for name in ("language_model", "vision_tower")}
        if not whole or not any(sources.values()):
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        ignored, self._keys_to_ignore_on_save = self._keys_to_ignore_on_save, set()
        self.config.language_model = self.config.vision_tower = None
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._keys_to_ignore_on_save = ignored
            for name, source in sources.items():
                setattr(self.config, name, source)

    # What trainer and tasks call

    def frozen_parts(self) -> tuple[nn.Module, ...]:
        """The language model and the image tower, as far as they are frozen."""
        parts = ((self.language_model, self.config.language_model_frozen), (self.vision, self.config.vision_frozen))
        return tuple(part for part, frozen in parts if frozen)

    def freeze(self) -> None:
        """As Pretrainable's, and what of the image tower can have no gradient, since DDP stops there."""
        super().freeze()
        if isinstance(self.vision, ImageTower):
            for parameter in unread_parameters(self.vision.tower):
                parameter.requires_grad_(False)

    @property
    def max_text_length(self) -> int:
        """Tokens of a text at most, beside one image."""
        return (position_limit(self.config.text_config) or 2**20) - self.config.prefix_length

    def get_input_embeddings(self) -> nn.Module:
        """Of the language model's tokens."""
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """Image and caption, with the labels of the caption; nothing in it is random."""
        stop = self.config.stop_token_id
        if stop is None:
            raise ValueError("stop_token_id: expected the token that ends a caption, got None; set it in the config")
        return PrefixCollator(
            tokenizer,
            image_length=self.config.prefix_length,
            positions=position_limit(self.config.text_config),
            max_length=options.max_length,
            stop=stop,
        )

    def prompt_collator(self, options: Any, tokenizer: Any) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """Images and prompt; several images where `<image>` stands in the caption. Prompts are not cut."""
        return PrefixCollator(
            tokenizer, image_length=self.config.prefix_length, positions=position_limit(self.config.text_config)
        )

    def frozen_features(self, pixel_values: Tensor, **others: Tensor) -> dict[str, Tensor]:
        """What the frozen image tower makes of images, by the name that `forward` has for it.

        Raises:
            ValueError: the image tower is trained.
        """
        if not self.config.vision_frozen:
            raise ValueError("--cache-features: expected a frozen image tower, this model's is trained")
        return {"image_features": self.image_features(pixel_values)}

    def frozen_fingerprint(self) -> str:
        """A hash of what decides `frozen_features`: architecture and weights, normalisation, what is read."""
        return vision_fingerprint(self.config, self.vision, reads=self.reads)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Of the image tower: (N, W), or (N, R, W) where tokens are read; without gradient where it is frozen.

        Args:
            pixel_values: uint8 (N, H, W, 3), normalised here with the config's `image_mean` and `image_std`; or
                floating point (N, C, H, W), already normalised.
        """
        with torch.no_grad() if self.config.vision_frozen else nullcontext():
            features: Tensor = self.vision(pixel_values)
        return features

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> PrefixOutput:
        """The loss where there are labels, without the logits.

        Args:
            input_ids (B, L): int64, with k times `vlmfast.nn.prefix.IMAGE` (-1) in the place of each image.
            attention_mask (B, L): 0 for pads, wherever they stand; None where there are none.
            labels (B, L): the token of each place that is predicted from those before it, or -100.
            pixel_values: the images of all rows in the order in which they are read, as `image_features`.
            image_features: what `image_features` makes of them, in their place.
            num_items_in_batch: what the sum over tokens is divided by; None: how many are predicted.
        Raises:
            TypeError, ValueError: as `vlmfast.nn.prefix.assemble`; images are given twice; or L is more than the
                language model's positions.
        """
        read = self._assemble(input_ids, attention_mask, labels, pixel_values, image_features)
        hidden = last_hidden_states(self.language_model, *read[:3])
        loss = None
        if read.labels is not None:
            head = output_head(self.language_model)
            loss = language_model_loss(hidden, head, read.labels, num_items_in_batch=num_items_in_batch)
        return PrefixOutput(loss=loss, hidden_states=hidden)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        *,
        max_new_tokens: int = 30,
        **settings: Any,
    ) -> Any:
        """Token ids (B, L) int64 of what follows, up to the token that ends it; greedy unless told otherwise.

        Args:
            input_ids, attention_mask, pixel_values, image_features: as `forward`, of prompts of any lengths.
            max_new_tokens: at most.
            settings: of transformers' `generate`, such as num_beams.
        Raises:
            ValueError: as `forward`; or prompt and new tokens are more than the language model's positions.
        """
        read = self._assemble(input_ids, attention_mask, None, pixel_values, image_features, left=True)
        check_length(
            self.config.text_config,
            read.inputs_embeds.shape[1] + max_new_tokens - 1,
            f" for the prompt and {max_new_tokens} new tokens",
        )
        ends = end_tokens(self.language_model, self.config.stop_token_id)
        filler = self.config.filler_token_id
        settings = {
            "do_sample": False,
            "eos_token_id": ends or None,
            "pad_token_id": filler if filler is not None else next(iter(ends), None),
            **settings,
        }
        return self.language_model.generate(
            inputs_embeds=read.inputs_embeds,
            attention_mask=read.attention_mask,
            max_new_tokens=max_new_tokens,
            **settings,
        )

    def _assemble(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        pixel_values: Tensor | None,
        image_features: Tensor | None,
        *,
        left: bool = False,
    ) -> Assembled:
        check_length(self.config.text_config, input_ids.shape[-1])
        embedding = self.get_input_embeddings()
        if pixel_values is not None:
            if image_features is not None:
                raise ValueError("image_features: expected None beside pixel_values, got both")
            image_features = self.image_features(pixel_values)
        if image_features is None:
            images = next(self.mapper.parameters()).new_zeros(0, self.config.prefix_length, self._embedding_size())
        else:
            images = self.mapper(image_features.to(next(self.mapper.parameters()).dtype))
        return assemble(embedding, input_ids, images, attention_mask, labels, left=left)

    def _embedding_size(self) -> int:
        text = self.config.text_config
        return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)  # OPT may have narrower embeddings

    def _feature_width(self) -> int:
        if self.config.projection_dim is not None:
            return int(self.config.projection_dim)
        return tower_width("vision_config", self.config.vision_config)

    # Initial weights: torch's own, for what is in no tower

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # else transformers passes over modules without parameters of their own

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                init.uniform_(module.bias, -(module.in_features**-0.5), module.in_features**-0.5)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
            init.zeros_(module.out_proj.bias)
        elif isinstance(getattr(module, "constant", None), nn.Parameter):
            init.normal_(module.constant)
