"""CLIP: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (2103.00020).

Loss, the only one, with x, t the unit-norm image and text features and s = exp(logit_scale)::

    logits = s * x @ t.T
    (cross_entropy(logits, arange(N)) + cross_entropy(logits.T, arange(N))) / 2

Everything is trained. `logit_scale` starts at ln(1/0.07) and is kept in [0, ln 100] after every optimizer step.

Towers are transformers models. What one feature per sample is read from:

- CLIP towers: their `pooler_output` (layer-normed class token; layer-normed first end-of-text token).
- other vision towers (ViT, ConvNeXt, ResNet, ...): `pooler_output`, flattened.
- other text towers: `last_hidden_state[:, 0]` when transformers has a masked language model of the type, which makes it
  bidirectional with [CLS] first (BERT, DistilBERT, ModernBERT, ...); an unused pooler is removed. Else `pooler_output`.

Text is padded on the right. The attention mask goes to the tower as it is.

Departures from public implementations:

- transformers' CLIPModel builds the (N, N) logits in every forward, and under DDP contrasts each process with itself.
  Here the loss is `vlmfast.nn.ClipLoss` over the global batch; `CLIPOutput.logits_per_image` builds logits when called.
- transformers' initialisation swaps the standard deviations of q/k/v and out_proj, and gives positions 0.02. Here CLIP
  towers start as in OpenAI's code: at width w with L layers, q/k/v w^-0.5, out_proj and fc2 w^-0.5 (2L)^-0.5, fc1
  (2w)^-0.5, text positions 0.01, vision positions w^-0.5, the patch convolution torch's default. OpenAI does this in
  the text blocks and leaves vision blocks at torch's defaults; here both have it.
- transformers rounds the initial logit_scale to 2.6592 and does not clamp it; the paper and open_clip do.
- transformers pools position 0 of a text without end-of-text token, silently; here that is an error. It is looked for
  on CPU tensors outside torch.compile only: on an accelerator the look would stall the device at every step.
- The CLIP vision tower's stem is `vlmfast.ops.patch_embed`, which reads uint8 pixels as they are.
- Features are normalised in float32, under autocast too, and a zero vector gives zeros where transformers gives NaN.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import ModelOutput, can_return_tuple
from typing_extensions import Self

from vlmfast.distributed import rank_and_world_size
from vlmfast.models.towers import (
    CLIPTextModel,
    load_tower,
    new_tower,
    normalisation,
    read_bytes,
    tower_config,
    tower_width,
)
from vlmfast.nn import ClipLoss


class CLIPConfig(PreTrainedConfig):
    """transformers' CLIPConfig with towers of any transformers type; each reads the other's config.json of CLIP towers.

    Args:
        vision_config, text_config: a config object or a dict of one. A dict without `model_type` is CLIP's own tower.
        projection_dim: size D of the shared embedding space.
        logit_scale_init_value: initial value of the log-parameter.
        initializer_factor: multiplies the initial standard deviation of the projections.
        image_mean, image_std: per channel, of pixels in [0, 1]; they normalise uint8 `pixel_values` only.
        Others as PreTrainedConfig.
    Raises:
        ValueError: a setting is of another type, or a tower's `model_type` unknown.
        TypeError: a tower's config is neither.
    """

    # Not one of transformers' config dataclasses, which came after 5.0.
    model_type = "clip"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}
    default_towers: ClassVar[dict[str, Any]] = {
        "vision_config": transformers.CLIPVisionConfig,
        "text_config": transformers.CLIPTextConfig,
    }

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        projection_dim: int | None = 512,
        logit_scale_init_value: float = math.log(1 / 0.07),
        initializer_factor: float = 1.0,
        image_mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN),
        image_std: Sequence[float] = tuple(OPENAI_CLIP_STD),
        **kwargs: Any,
    ) -> None:
        for name, given in {"vision_config": vision_config, "text_config": text_config}.items():
            # Some of OpenAI's checkpoints have each tower's config twice; transformers, too, lets the second win.
            duplicate = kwargs.pop(f"{name}_dict", None)
            chosen = given if duplicate is None else duplicate
            setattr(self, name, tower_config(name, chosen, self.default_towers[name]))
        self.projection_dim: Any = projection_dim
        self.logit_scale_init_value = logit_scale_init_value
        self.initializer_factor = initializer_factor
        self.image_mean = image_mean
        self.image_std = image_std
        for name, default in self.settings().items():
            value = getattr(self, name)
            if not _is_like(value, default):
                raise ValueError(f"{name}: expected a value like {default!r}, got {value!r}")
        if self.projection_dim is None:
            self.projection_dim = tower_width("vision_config", self.vision_config)
        super().__init__(**kwargs)

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """What the class has beside PreTrainedConfig's and the towers' configs, by name, and its default values."""
        found = {}
        for parent in reversed(cls.__mro__):
            if issubclass(parent, CLIPConfig):
                parameters = inspect.signature(parent.__init__).parameters.values()
                found.update({p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY})
        return found

    @classmethod
    def small(
        cls,
        *,
        vocab_size: int,
        eos_token_id: int,
        bos_token_id: int | None = None,
        pad_token_id: int | None = None,
        image_size: int = 64,
        patch_size: int = 8,
        vision_width: int = 192,
        vision_layers: int = 4,
        text_width: int = 192,
        text_layers: int = 2,
        embed_dim: int = 256,
        max_length: int = 32,
    ) -> "CLIPConfig":
        """A ViT and a text transformer from a few numbers: heads of 64, MLPs four times as wide, exact GELU.

        Raises:
            ValueError: a width is not a multiple of 64, `image_size` not one of `patch_size`, or `eos_token_id` not one
                that transformers' text tower can pool at.
        """
        for name, width in {"vision_width": vision_width, "text_width": text_width}.items():
            if width <= 0 or width % 64:
                raise ValueError(f"{name}: expected a positive multiple of 64 (the head size), got {width}")
        if image_size % patch_size:
            raise ValueError(f"image_size: expected a multiple of patch_size {patch_size}, got {image_size}")
        if eos_token_id == 2 or not 0 <= eos_token_id < vocab_size:
            reason = "which transformers takes for 'the highest id ends the text'"
            raise ValueError(f"eos_token_id: expected one below {vocab_size} but 2, {reason}, got {eos_token_id}")
        return cls(
            vision_config=transformers.CLIPVisionConfig(
                image_size=image_size,
                patch_size=patch_size,
                hidden_size=vision_width,
                intermediate_size=4 * vision_width,
                num_hidden_layers=vision_layers,
                num_attention_heads=vision_width // 64,
                projection_dim=embed_dim,
                hidden_act="gelu",
            ),
            text_config=transformers.CLIPTextConfig(
                vocab_size=vocab_size,
                max_position_embeddings=max_length,
                hidden_size=text_width,
                intermediate_size=4 * text_width,
                num_hidden_layers=text_layers,
                num_attention_heads=text_width // 64,
                projection_dim=embed_dim,
                hidden_act="gelu",
                bos_token_id=bos_token_id,
                eos_token_id=eos_token_id,
                pad_token_id=pad_token_id,
            ),
            projection_dim=embed_dim,
        )


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(_is_like(item, 0.0) for item in value)
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, int if default is None else type(default)) or (value is None and default is None)


@dataclass
class CLIPOutput(ModelOutput):
    """What `CLIPModel` returns; every tensor carries gradient.

    Attributes:
        loss (): float32, when `return_loss`.
        image_features (B, D): unit-norm, float32.
        text_features (B, D): unit-norm, float32.
        logit_scale (): the log-parameter.
    """

    loss: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    logit_scale: Tensor | None = None

    def logits_per_image(self) -> Tensor:
        """exp(logit_scale) * image_features @ text_features.T: (images, texts), built anew at each call."""
        return self["logit_scale"].exp() * self["image_features"] @ self["text_features"].T


class CLIPModel(PreTrainedModel):
    """Image and text towers, a linear projection of each, and the contrastive loss; see the top of this file.

    Parameters have the names of transformers' CLIPModel: `from_pretrained` reads its checkpoints, and it reads those of
    CLIP towers saved here. `logit_scale` is a float32 scalar, whatever the dtype asked of `from_pretrained`.
    """

    config: CLIPConfig
    output_class: type[Any] = CLIPOutput
    base_model_prefix = "clip"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    # Each tower checks for itself what it supports.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        vision_config, text_config = config.vision_config, config.text_config
        self.vision_model = new_tower(vision_config)
        self.text_model = new_tower(text_config)
        if isinstance(self.text_model, CLIPTextModel) and not isinstance(text_config.eos_token_id, int):
            raise ValueError(f"text_config: expected an integer eos_token_id, got {text_config.eos_token_id}")
        self.reads_bytes = read_bytes(self.vision_model, config.image_mean, config.image_std)
        self.text_pools_first = type(text_config) in MODEL_FOR_MASKED_LM_MAPPING
        if self.text_pools_first:
            if getattr(text_config, "is_decoder", False) or text_config.is_encoder_decoder:
                raise ValueError(f"text_config: expected an encoder, got {text_config.model_type!r} with a decoder")
            if hasattr(self.text_model, "pooler"):
                self.text_model.register_module("pooler", None)  # DDP stops at a parameter without gradient

        self.visual_projection = nn.Linear(
            tower_width("vision_config", vision_config), config.projection_dim, bias=False
        )
        self.text_projection = nn.Linear(tower_width("text_config", text_config), config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value, dtype=torch.float32))
        self.post_init()

    @classmethod
    def from_towers(cls, vision: Any, text: Any, **config: Any) -> Self:
        """A model of two towers, each pretrained or new; what joins them is new.

        Args:
            vision, text: a name or folder that transformers' AutoModel loads, of which the tower is taken where it
                holds two (CLIP, Siglip); or a model, whose weights are copied; or a config, of which a tower is made.
            config: of the model's config, but the towers' configs. image_mean and image_std are by default those that
                lie beside the pretrained vision tower.
        Raises:
            ValueError: a checkpoint lacks weights of its tower.
        """
        if isinstance(vision, str | PathLike):
            config = {**normalisation(vision), **config}
        towers = {"vision_model": load_tower("vision_model", vision), "text_model": load_tower("text_model", text)}
        configs = {
            name: tower if isinstance(tower, PreTrainedConfig) else tower.config for name, tower in towers.items()
        }
        model = cls(
            cls.config_class(vision_config=configs["vision_model"], text_config=configs["text_model"], **config)
        )
        for name, tower in towers.items():
            if isinstance(tower, nn.Module):
                weights, used = tower.state_dict(), getattr(model, name)
                used.load_state_dict({key: weights[key] for key in used.state_dict()})
        return model.eval()

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # as in OpenAIInit

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for what is outside the towers: the projections and the model itself.
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_factor * module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif module is self:
            init.constant_(self.logit_scale, self.config.logit_scale_init_value)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Unit-norm image features (B, D), float32.

        Args:
            pixel_values: uint8 (B, H, W, 3), normalised here with the config's `image_mean` and `image_std`; or
                floating point (B, C, H, W), already normalised.

        Raises:
            TypeError: another dtype.
            ValueError: another shape, or a size that is not the CLIP tower's.
        """
        outputs = self.vision_model(self._tower_input(pixel_values))
        features = self.visual_projection(self._pooler_output("vision_config", outputs).flatten(1))
        return F.normalize(features.float(), dim=-1)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Unit-norm text features (B, D), float32.

        Args:
            input_ids (B, L): int64 token ids, padded on the right.
            attention_mask (B, L): 1 for tokens, 0 for padding; None when nothing is padding.
            position_ids (B, L): for towers that take them.

        Raises:
            TypeError: `input_ids` are not integers.
            ValueError: a shape is wrong, L is more than the tower's positions, or a text for the CLIP tower has no
                end-of-text token (looked for on CPU tensors, outside torch.compile).
        """
        self._check_text(input_ids, attention_mask)
        positions = {} if position_ids is None else {"position_ids": position_ids}
        outputs = self.text_model(input_ids, attention_mask=attention_mask, **positions)
        if self.text_pools_first:
            pooled = outputs.last_hidden_state[:, 0]
        else:
            pooled = self._pooler_output("text_config", outputs)
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    def loss(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        """Symmetric InfoNCE over the global batch.

        After DDP's mean, gradients are those of one process with the whole batch.

        Args:
            image_features, text_features (B, D): unit-norm, this process's part of the batch.
            logit_scale (): the log-parameter.
        """
        rank, world_size = rank_and_world_size()
        clip_loss = ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)
        return clip_loss(image_features, text_features, logit_scale.float().exp())

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool = True,
    ) -> CLIPOutput:
        """Features of both towers, and the loss when `return_loss`; `return_dict=False` gives a tuple.

        Arguments are those of `get_text_features` and `get_image_features`. Without the loss, the numbers of images
        and texts may differ.

        Raises:
            ValueError: an input is missing, or there is not one text per image.
        """
        if input_ids is None or pixel_values is None:
            missing = "input_ids" if input_ids is None else "pixel_values"
            raise ValueError(f"{missing}: missing; for one tower call get_image_features or get_text_features")
        if return_loss and len(input_ids) != len(pixel_values):
            raise ValueError(f"input_ids: expected {len(pixel_values)} texts, one per image, got {len(input_ids)}")
        image_features = self.get_image_features(pixel_values)
        text_features = self.get_text_features(input_ids, attention_mask, position_ids)
        return self._output(image_features, text_features, return_loss)

    def _output(self, image_features: Tensor, text_features: Tensor, return_loss: bool) -> Any:
        features = {"image_features": image_features, "text_features": text_features, **self._scalars()}
        return self.output_class(loss=self.loss(**features) if return_loss else None, **features)

    def _scalars(self) -> dict[str, Tensor]:
        """Of the loss. Not the parameters: among the outputs, DDP with find_unused_parameters takes one for unused."""
        return {"logit_scale": self.logit_scale.clone()}

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Clamp `logit_scale` to [0, ln 100], in place."""
        self.logit_scale.clamp_(0, math.log(100))

    def _pooler_output(self, name: str, outputs: ModelOutput) -> Tensor:
        if outputs.get("pooler_output") is None:
            model_type = getattr(self.config, name).model_type
            raise ValueError(f"{name}: expected a tower with pooler_output, got {model_type!r}")
        return outputs["pooler_output"]

    def _tower_input(self, pixel_values: Tensor) -> Tensor:
        is_bytes = pixel_values.dtype == torch.uint8
        if not is_bytes and not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values: expected uint8 or floating point, got {pixel_values.dtype}")
        expected = "uint8 (B, H, W, 3)" if is_bytes else "floating point (B, C, H, W)"
        if pixel_values.ndim != 4 or (is_bytes and pixel_values.shape[-1] != 3):
            raise ValueError(f"pixel_values: expected {expected}, got shape {tuple(pixel_values.shape)}")
        if self.reads_bytes:
            side = self.config.vision_config.image_size
            size = tuple(pixel_values.shape[1:3] if is_bytes else pixel_values.shape[2:])
            if size != (side, side):
                raise ValueError(f"pixel_values: expected {expected} of size {(side, side)}, got {size}")
        if not is_bytes or self.reads_bytes:
            return pixel_values  # its stem normalises while it reads
        channels = zip(pixel_values.unbind(-1), self.config.image_mean, self.config.image_std, strict=True)
        normalised = torch.stack([(channel / 255 - mean) / std for channel, mean, std in channels], dim=-1)
        # Still NHWC in memory (channels_last), in which convolutions are fastest on CPUs and tensor cores.
        return normalised.permute(0, 3, 1, 2).to(self.vision_model.dtype)

    def _check_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise TypeError(f"input_ids: expected integers, got {input_ids.dtype}")
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids: expected (B, L), got shape {tuple(input_ids.shape)}")
        positions = getattr(self.config.text_config, "max_position_embeddings", None)
        if positions is not None and input_ids.shape[1] > positions:
            raise ValueError(f"input_ids: expected at most {positions} tokens, got {input_ids.shape[1]}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            shapes = f"{tuple(input_ids.shape)} of input_ids, got {tuple(attention_mask.shape)}"
            raise ValueError(f"attention_mask: expected the shape {shapes}")
        looking_is_free = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if isinstance(self.text_model, CLIPTextModel) and looking_is_free:
            eos = self.config.text_config.eos_token_id
            if eos == 2:  # wrong in early checkpoints of OpenAI's, so the tower then pools at the highest id
                eos = self.config.text_config.vocab_size - 1
            without = torch.ne(input_ids, eos).all(dim=1).nonzero()
            if len(without):
                raise ValueError(
                    f"input_ids: expected end-of-text token {eos} (text_config.eos_token_id) in every row, where the "
                    f"text feature is read, got none in row {int(without[0])} and {len(without) - 1} others"
                )
