"""What the contrastive models share: an image and a text tower of transformers, and one feature of each per sample.

What one feature per sample is read from:

- CLIP towers: their `pooler_output` (layer-normed class token; layer-normed first end-of-text token).
- other vision towers (ViT, ConvNeXt, ResNet, ...): `pooler_output`, flattened.
- other text towers: `last_hidden_state[:, 0]` when transformers has a masked language model of the type, which makes it
  bidirectional with [CLS] first (BERT, DistilBERT, ModernBERT, ...); an unused pooler is removed. Else `pooler_output`.

A feature does not depend on the rest of its batch: padding on the left is moved to the right, and towers that read the
padding too get every text padded to all their positions, see `vlmfast.models.towers.text_inputs`.

Departures from transformers' models of two towers:

- Its initialisation swaps the standard deviations of q/k/v and out_proj, and gives positions 0.02. Here CLIP
  towers start as in OpenAI's code: at width w with L layers, q/k/v w^-0.5, out_proj and fc2 w^-0.5 (2L)^-0.5, fc1
  (2w)^-0.5, text positions 0.01, vision positions w^-0.5, the patch convolution torch's default. OpenAI does this in
  the text blocks and leaves vision blocks at torch's defaults; here both have it.
- It pools position 0 of a text without end-of-text token, silently; here that is an error. It is looked for
  on CPU tensors outside torch.compile only: on an accelerator the look would stall the device at every step.
- The CLIP vision tower's stem is `vlmfast.ops.patch_embed`, which reads uint8 pixels as they are, and its last layer
  computes of the patches what the class token reads, see `vlmfast.models.class_token`.
- Features are normalised in float32, under autocast too, and a zero vector gives zeros where transformers gives NaN.
"""

from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple
from typing_extensions import Self

from vlmfast.models.checkpoints import check_numbers
from vlmfast.models.class_token import end_at_class_token
from vlmfast.models.contract import Pretrainable
from vlmfast.models.towers import (
    CLIPTextModel,
    load_tower,
    new_tower,
    normalisation,
    pools_first,
    read_bytes,
    text_inputs,
    text_positions,
    tokens_first,
    tower_input,
    tower_width,
    unread_parameters,
)
from vlmfast.models.two_tower_config import ProjectionOptions, TwoTowerConfig, TwoTowerOptions

TRAINING = {
    "learning_rate": 5e-4,
    "weight_decay": 0.2,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
}
"""`training_defaults` of contrastive pretraining, as CLIP has them; the learning rate is that of its small models."""


@dataclass
class TwoTowerOutput(ModelOutput):
    """What a model of two towers returns; every tensor carries gradient.

    Attributes:
        loss (): float32, when `return_loss`.
        image_features (B, D): unit-norm, float32.
        text_features (B, D): unit-norm, float32.
        logit_scale (): the log-parameter; None for a model that has none.
    """

    loss: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    logit_scale: Tensor | None = None

    def logits_per_image(self) -> Tensor:
        """exp(logit_scale) * image_features @ text_features.T: (images, texts), built anew at each call."""
        return self["logit_scale"].exp() * self["image_features"] @ self["text_features"].T


class TwoTowerModel(Pretrainable, PreTrainedModel):
    """Image and text towers; a model adds `visual_projection`, `text_projection`, the scalars of its loss and `loss`.

    Scalars are float32, whatever the dtype asked of `from_pretrained`.
    """

    config: TwoTowerConfig
    output_class: type[Any] = TwoTowerOutput
    scalars: ClassVar[tuple[str, ...]] = ("logit_scale",)
    """Parameters or buffers of the loss; field <name>_init_value of the config is what each starts at."""
    visual_projection: Any
    text_projection: Any
    Options: ClassVar[type[TwoTowerOptions]] = ProjectionOptions
    strategy = "contrastive"
    training_defaults = TRAINING
    tasks = ("retrieval", "zero_shot")
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    # Each tower checks for itself what it supports.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__(config)
        check_numbers("config", config)
        vision_config, text_config = config.vision_config, config.text_config
        self.vision_model = new_tower(vision_config, "image", "vision_config")
        self.text_model = new_tower(text_config, "text", "text_config")
        if isinstance(self.text_model, CLIPTextModel) and not isinstance(text_config.eos_token_id, int):
            raise ValueError(f"text_config: expected an integer eos_token_id, got {text_config.eos_token_id}")
        self.reads_bytes = read_bytes(self.vision_model, config.image_mean, config.image_std)
        self.class_token = end_at_class_token(self.vision_model)
        self.text_pools_first = pools_first(text_config)
        if self.text_pools_first:
            if getattr(text_config, "is_decoder", False) or text_config.is_encoder_decoder:
                raise ValueError(f"text_config: expected an encoder, got {text_config.model_type!r} with a decoder")
            if isinstance(getattr(self.text_model, "pooler", None), nn.Module):
                self.text_model.pooler = nn.Identity()  # DDP stops at a parameter without gradient
        self.text_positions = text_positions(self.text_model)
        TwoTowerModel.freeze(self)

    def freeze(self) -> None:
        """As Pretrainable's, and the towers' parameters that can have no gradient, since DDP stops at them."""
        super().freeze()
        for tower in (self.vision_model, self.text_model):
            for parameter in unread_parameters(tower):
                parameter.requires_grad_(False)

    @property
    def max_text_length(self) -> int:
        """Tokens of a text at most, as the text tower counts its positions.

        Raises:
            ValueError: the tower has no limit.
        """
        if self.text_positions is None:
            raise ValueError(
                f"--max-length is needed: {self.config.text_config.model_type!r} reads texts of any length"
            )
        return self.text_positions

    def linear_heads(self, *, text_bias: bool = False) -> tuple[nn.Linear, nn.Linear]:
        """Of the image and the text tower, to `projection_dim`; the first without bias."""
        config = self.config
        image = nn.Linear(tower_width("vision_config", config.vision_config), config.projection_dim, bias=False)
        text = nn.Linear(tower_width("text_config", config.text_config), config.projection_dim, bias=text_bias)
        return image, text

    def scalar(self, name: str) -> nn.Parameter:
        """A new parameter () float32, one of `scalars`."""
        return nn.Parameter(torch.tensor(float(getattr(self.config, f"{name}_init_value")), dtype=torch.float32))

    @classmethod
    def create(cls, options: Any, tokenizer: Any, **overrides: Any) -> Self:
        towers = {"vision": options.vision_tower, "text": options.text_tower}
        if tokenizer.eos_token_id is None and not options.text_tower:
            raise ValueError(
                f"--tokenizer {tokenizer.name_or_path} has no end-of-text token; pass --text-tower or --config"
            )
        names = ("image_size", "patch_size", "vision_width", "vision_layers", "text_width", "text_layers", "embed_dim")
        small = cls.config_class.small(
            vocab_size=len(tokenizer),
            eos_token_id=0 if options.text_tower else tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            max_length=options.max_length,
            **{name: getattr(options, name) for name in names if hasattr(options, name)},
        )
        if not any(towers.values()):
            return cls(cls.config_class.from_dict({**small.to_dict(), **overrides}) if overrides else small)
        width = {"projection_dim": options.embed_dim} if hasattr(options, "embed_dim") else {}
        return cls.from_towers(
            small.vision_config if options.vision_tower is None else options.vision_tower,
            small.text_config if options.text_tower is None else options.text_tower,
            **{**width, **overrides},
        )

    @classmethod
    def from_towers(cls, vision: Any, text: Any, **config: Any) -> Self:
        """A model of two towers, each pretrained or new; what joins them is new.

        Args:
            vision, text: a name or folder that transformers' AutoModel loads or of a model of two towers here, of which
                the tower is taken where it holds two (CLIP, Siglip); or a model, whose weights are copied; or a config,
                of which a tower is made.
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
            for name in self.scalars:
                init.constant_(getattr(self, name), getattr(self.config, f"{name}_init_value"))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Unit-norm image features (B, D), float32.

        Args:
            pixel_values: uint8 (B, H, W, 3), normalised here with the config's `image_mean` and `image_std`; or
                floating point (B, C, H, W), already normalised.

        Raises:
            TypeError: another dtype.
            ValueError: another shape, or a size that is not the CLIP tower's.
        """
        return F.normalize(self.visual_projection(self._pool_image(pixel_values)).float(), dim=-1)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Unit-norm text features (B, D), float32.

        Args:
            input_ids (B, L): int64 token ids, padded on the right; on the left too where there is an attention_mask.
            attention_mask (B, L): 1 for tokens, 0 for padding; None when nothing is padding.
            position_ids (B, L): for towers that take them.

        Raises:
            TypeError: `input_ids` are not integers.
            ValueError: a shape is wrong, L is more than the tower's positions, or a text for the CLIP tower has no
                end-of-text token (looked for on CPU tensors, outside torch.compile).
        """
        _, pooled = self._pool_text(input_ids, attention_mask, position_ids)
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    def _pool_image(self, pixel_values: Tensor) -> Tensor:
        """What the image's feature is made of (B, W)."""
        outputs = self.vision_model(self._tower_input(pixel_values), **self.class_token)
        return self._pooler_output("vision_config", outputs).flatten(1)

    def _pool_text(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """States of all tokens (B, L, W) after the tower's last norm, and what the text's feature is made of (B, W).

        Without position_ids, padding is behind the tokens, as `tokens_first` moves it. A tower that gives no states
        has its pooled one in their place.
        """
        self._check_text(input_ids, attention_mask)
        outputs = self.text_model(**text_inputs(self.text_model, input_ids, attention_mask, position_ids))
        if outputs.get("last_hidden_state") is None:  # DPR
            pooled = self._pooler_output("text_config", outputs)
            return pooled[:, None], pooled
        states = outputs.last_hidden_state[:, : input_ids.shape[1]]
        return states, states[:, 0] if self.text_pools_first else self._pooler_output("text_config", outputs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool = True,
    ) -> Any:
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
        features = {"image_features": image_features, "text_features": text_features, **self.scalar_features()}
        return self.output_class(loss=self.loss(**features) if return_loss else None, **features)

    def scalar_features(self) -> dict[str, Tensor]:
        """The scalars, each (), for `loss`.

        They are not the parameters: among the outputs, DDP with find_unused_parameters takes one for unused.
        """
        return {name: getattr(self, name).reshape(()).clone() for name in self.scalars}

    def loss(self, **features: Tensor) -> Tensor:
        """The loss () of the global batch from the features of `forward`, this process's part of the batch."""
        raise NotImplementedError(f"{type(self).__name__}.loss")

    def metrics(self) -> dict[str, float]:
        """The temperature, which the softmax of the similarities is divided by."""
        logit_scale: Tensor = self.logit_scale
        return {"temperature": (-logit_scale.detach().float()).exp().item()}

    def _pooler_output(self, name: str, outputs: ModelOutput) -> Tensor:
        if outputs.get("pooler_output") is None:
            model_type = getattr(self.config, name).model_type
            raise ValueError(f"{name}: expected a tower with pooler_output, got {model_type!r}")
        return outputs["pooler_output"]

    def _tower_input(self, pixel_values: Tensor) -> Tensor:
        mean, std = self.config.image_mean, self.config.image_std
        return tower_input(self.vision_model, pixel_values, mean, std, reads_bytes=self.reads_bytes)

    def _check_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise TypeError(f"input_ids: expected integers, got {input_ids.dtype}")
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids: expected (B, L), got shape {tuple(input_ids.shape)}")
        positions = self.text_positions
        if positions is not None and input_ids.shape[1] > positions:
            raise ValueError(f"input_ids: expected at most {positions} tokens, got {input_ids.shape[1]}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            shapes = f"{tuple(input_ids.shape)} of input_ids, got {tuple(attention_mask.shape)}"
            raise ValueError(f"attention_mask: expected the shape {shapes}")
        looking_is_free = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if isinstance(self.text_model, CLIPTextModel) and looking_is_free:
            eos = self.config.text_config.eos_token_id
            if eos == 2:  # wrong in early checkpoints of OpenAI's, so the tower then pools at the highest id
                read = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, 0)
                eos = int(read.max())
            without = torch.ne(input_ids, eos).all(dim=1).nonzero()
            if len(without):
                raise ValueError(
                    f"input_ids: expected end-of-text token {eos} (text_config.eos_token_id) in every row, where the "
                    f"text feature is read, got none in row {int(without[0])} and {len(without) - 1} others"
                )


def read_class_token(tower: nn.Module) -> bool:
    """Whether an image's feature is its class token after the last norm: where the pooler is a dense layer with tanh
    (ViT, DeiT, BEiT), which was trained for something else and is removed."""
    found = hasattr(getattr(tower, "pooler", None), "dense")
    if found:
        tower.register_module("pooler", None)
    return found


def mean_of_tokens(
    states: Tensor, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """The mean (B, W) of the states (B, L, W) of all tokens but padding, as `_pool_text` gives them."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if position_ids is None:
        mask = tokens_first(mask, mask)
    weights = mask.to(states.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
    return (states * weights[..., None]).sum(1)
