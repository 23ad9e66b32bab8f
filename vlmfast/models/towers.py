"""Towers of transformers: made of a config, with OpenAI's initial weights where they are CLIP's, or loaded."""

import re
from collections.abc import Sequence
from inspect import signature
from os import fspath
from pathlib import Path
from types import MethodType
from typing import Any, Literal, get_args, get_type_hints

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.align.modeling_align import round_filters
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPTextEmbeddings, CLIPVisionEmbeddings

from vlmfast.models import MODELS, model_class
from vlmfast.models.checkpoints import (
    find,
    load,
    load_auto,
    making,
    of_config,
    read_config,
    read_json,
    refuse_kernels,
)
from vlmfast.nn import transformers as stems


class OpenAIInit(transformers.CLIPPreTrainedModel):
    """transformers' CLIP tower with OpenAI's initial weights, where the two differ."""

    @classmethod
    def is_custom_code(cls) -> bool:
        # In custom code transformers passes over `_init_weights` of modules without parameters of their own: here,
        # attention and MLPs.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # biases, norms, MLPs, token and class embeddings agree
        factor = self.config.initializer_factor or 1.0
        if isinstance(module, CLIPAttention):
            std = factor * module.embed_dim**-0.5
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init.normal_(projection.weight, std=std)
            init.normal_(module.out_proj.weight, std=std * (2 * module.config.num_hidden_layers) ** -0.5)
        elif isinstance(module, CLIPTextEmbeddings):
            init.normal_(module.position_embedding.weight, std=factor * 0.01)
        elif isinstance(module, CLIPVisionEmbeddings):
            init.kaiming_uniform_(module.patch_embedding.weight, a=5**0.5)  # torch's default for a convolution
            init.normal_(module.position_embedding.weight, std=factor * module.embed_dim**-0.5)


class CLIPVisionModel(OpenAIInit, transformers.CLIPVisionModel):
    """transformers' CLIPVisionModel with OpenAI's initialisation."""

    config: transformers.CLIPVisionConfig


class CLIPTextModel(OpenAIInit, transformers.CLIPTextModel):
    """transformers' CLIPTextModel with OpenAI's initialisation."""

    config: transformers.CLIPTextConfig


# AutoModel does not know the last three, and gives the first two other initial weights.
TOWERS = {
    "clip_vision_model": CLIPVisionModel,
    "clip_text_model": CLIPTextModel,
    "siglip_vision_model": transformers.SiglipVisionModel,
    "siglip_text_model": transformers.SiglipTextModel,
    "align_vision_model": transformers.AlignVisionModel,
    "align_text_model": transformers.AlignTextModel,
}


def small_bert(config_class: Any, width: int, layers: int, max_length: int, **tokens: Any) -> Any:
    """A BERT's config from a few numbers: heads of 64, MLPs four times as wide, one type of segment."""
    return config_class(
        max_position_embeddings=max_length,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        type_vocab_size=1,
        **tokens,
    )


def tower_config(name: str, given: Any, default: Any) -> PreTrainedConfig:
    """A tower's config: as given, or of a dict, or of None; a dict without `model_type` is one of the default class."""
    if isinstance(given, PreTrainedConfig):
        return given
    if given is not None and not isinstance(given, dict):
        raise TypeError(f"{name}: expected a config or a dict of one, got {type(given).__name__}")
    settings = dict(given or {})
    refuse_kernels(name, settings)
    model_type = settings.pop("model_type", default.model_type)
    with of_config(name, model_type):
        if model_type == default.model_type:
            return default(**settings)
        return AutoConfig.for_model(model_type, **settings)


def new_tower(
    config: PreTrainedConfig, reads: Literal["image", "text"] | None = None, name: str = "config"
) -> PreTrainedModel:
    """A tower of random weights; EfficientNets are put right, see `correct_efficientnet`.

    Args:
        config: of a type that AutoModel knows.
        reads: what the tower must read, without other inputs, and make one feature of.
        name: of the config, for messages.
    Raises:
        ValueError: the type reads something else, or `vlmfast.models.checkpoints.check_sizes` refuses the config.
    """
    own = TOWERS.get(config.model_type)
    if own is None:
        tower = making(name, config, lambda: AutoModel.from_config(config, trust_remote_code=False))
    else:
        tower = making(name, config, lambda: own._from_config(config))
        _flatten(tower)
    if reads is not None:
        _check_kind(name, tower, reads)
    correct_efficientnet(tower)
    return tower


def pools_first(config: PreTrainedConfig) -> bool:
    """Whether a text's feature is read from its first token: of types that have a masked language model."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING


def _check_kind(name: str, tower: PreTrainedModel, reads: Literal["image", "text"]) -> None:
    own, other = ("pixel_values", "input_ids") if reads == "image" else ("input_ids", "pixel_values")
    kind, forward = tower.config.model_type, type(tower).forward
    parameters = {key: value for key, value in signature(forward).parameters.items() if key != "self"}
    named = (value for value in parameters.values() if value.kind not in (value.VAR_POSITIONAL, value.VAR_KEYWORD))
    needed = [value.name for value in named if value.default is value.empty and value.name != own]
    if own not in parameters or other in parameters:
        what = "both" if own in parameters else f"no {own}"
        raise ValueError(f"{name}: expected a model that reads {own} alone, got {kind!r}, whose forward takes {what}")
    if needed:
        raise ValueError(f"{name}: expected a model that reads {own} alone, got {kind!r}, which needs {needed} too")
    if kind in REFUSED:
        raise ValueError(f"{name}: expected another tower than {kind!r}, {REFUSED[kind]}")
    if reads == "text" and pools_first(tower.config):
        return
    result = get_type_hints(forward).get("return")
    fields = [getattr(part, "__dataclass_fields__", {}) for part in get_args(result) or (result,)]
    if result is not None and not any("pooler_output" in names for names in fields):
        raise ValueError(f"{name}: expected a tower with pooler_output, got {kind!r}")
    if getattr(tower, "pooler", tower) is None:
        raise ValueError(f"{name}: expected a tower with a pooler, got {kind!r}, which AutoModel makes without")


def _flatten(tower: PreTrainedModel) -> None:
    """Gives a CLIP or Siglip tower of transformers 5.0, which has its layers in a module inside, those of later ones.

    Parameters then have the names that they have in transformers' two-tower models, of all versions.
    """
    for name in ("vision_model", "text_model"):
        inner = tower._modules.pop(name, None)
        if inner is not None:
            for key, value in inner.__dict__.items():
                tower.__dict__.setdefault(key, value)
            tower._modules.update(inner._modules)
            tower.__dict__[name] = tower  # where its own methods look for the layers
            tower.forward = MethodType(type(inner).forward, tower)


class DropConnect(nn.Module):
    """In training each sample of x (B, ...) is 0 with the given probability, and else x / (1 - probability)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        kept = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= self.probability
        return x * kept / (1 - self.probability)


def correct_efficientnet(tower: PreTrainedModel) -> None:
    """Batch norms' momentum and drop-connect of transformers' EfficientNets as they are meant; others are left alone.

    Source: Tan and Le 2019 (1905.11946) and its code; Huang et al. 2016 (1603.09382) for what is dropped.
    """
    momentum = getattr(tower.config, "batch_norm_momentum", None)
    if momentum is None:
        return
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1 - momentum
        if isinstance(getattr(module, "project_bn", None), nn.BatchNorm2d) and isinstance(module.dropout, nn.Dropout):
            module.dropout = DropConnect(module.dropout.p)


PADDED = {"siglip_text_model": False, "fnet": False, "convbert": True, "mobilebert": True, "nystromformer": True}
"""Text towers that read padding too, so that every text is padded to all their positions; with the attention mask?"""
REFUSED = {
    "internvl_vision": "which gives no pooler_output",
    "bros": "which needs the box of each word",
    "funnel": "whose layers pool the padding beside a text",
    "lilt": "which needs the box of each word",
    "mra": "whose attention is a kernel of a hub, and zeros without it",
    "yoso": "whose attention depends on the padding beside a text",
}
"""Towers that cannot give a text the same feature in every batch, need more than it, or give no feature."""
UNREAD = {
    "canine": r"^(projection|final_char_encoder)\.",  # of characters, behind the pooler
    "esm": r"^contact_head\.",
    "longformer": r"_global\.",  # attention of tokens that a task names
    "luke": r"^entity_embeddings\.|\.(w2e|e2w|e2e)_query\.",
    "markuplm": r"\.xpath_unitseq2_embeddings\.",  # made, and used by nothing
}
"""Parameters, by model type, that a feature is not read through; `mask_token` of any type is another."""


def unread_parameters(tower: PreTrainedModel) -> list[nn.Parameter]:
    """Parameters of a tower that can have no gradient from a feature: DDP stops at them unless they are frozen."""
    pattern = re.compile(rf"(^|\.)mask_token$|{UNREAD.get(tower.config.model_type, '$^')}")
    return [parameter for name, parameter in tower.named_parameters() if pattern.search(name)]


def text_positions(tower: PreTrainedModel) -> int | None:
    """How many tokens a text tower can read; None where there is no limit.

    Towers of RoBERTa's kind count positions from padding_idx + 1, so that fewer are left than the config says.
    """
    found: int | None = getattr(tower.config, "max_position_embeddings", None)
    for name, module in tower.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            found = len(module.weight) - module.padding_idx - 1
    return found


def tokens_first(attention_mask: Tensor, values: Tensor) -> Tensor:
    """Values (B, L) of tokens, each row's padding on the left moved to its end, on any device without a look at it."""
    length = attention_mask.shape[1]
    before = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)
    return values.gather(1, (torch.arange(length, device=values.device) + before) % length)


def text_inputs(
    tower: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
) -> dict[str, Tensor]:
    """What a text tower is called with, so that a text's feature does not depend on the others of its batch.

    Padding on the left is moved to the right, on any device without a look at the values. Where the tower reads the
    padding, it is made the same for a text alone and beside a longer one.

    Args:
        input_ids, attention_mask (B, L): as `TwoTowerModel.get_text_features`.
        position_ids (B, L): given, nothing is moved.
    Returns:
        `input_ids` and, as far as there are any and the tower takes them, `attention_mask` and `position_ids`.
    """
    config, mask = tower.config, attention_mask
    if mask is not None and position_ids is None:
        input_ids, mask = tokens_first(mask, input_ids), tokens_first(mask, mask)
    if config.model_type in PADDED:
        padding = config.pad_token_id or 0
        mask = torch.ones_like(input_ids) if mask is None else mask
        missing = (0, config.max_position_embeddings - input_ids.shape[1])
        input_ids = nn.functional.pad(input_ids.masked_fill(mask == 0, padding), missing, value=padding)
        mask = nn.functional.pad(mask, missing) if PADDED[config.model_type] else None
    elif isinstance(tower, CLIPTextModel) and config.eos_token_id == 2 and mask is not None:
        input_ids = input_ids.masked_fill(mask == 0, 0)  # this tower pools at the highest id
    inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
    return {name: value for name, value in inputs.items() if value is not None}


def read_bytes(tower: PreTrainedModel, mean: Sequence[float], std: Sequence[float]) -> bool:
    """Gives a CLIP or Siglip vision tower a stem that normalises uint8 pixels while it reads; False for others."""
    if isinstance(tower, CLIPVisionModel):
        tower.embeddings = stems.CLIPVisionEmbeddings.from_original(tower.embeddings, mean=mean, std=std)
    elif isinstance(tower, transformers.SiglipVisionModel):
        tower.embeddings = stems.SiglipVisionEmbeddings.from_original(tower.embeddings, mean=mean, std=std)
    else:
        return False
    return True


def tower_input(
    tower: PreTrainedModel, pixel_values: Tensor, mean: Sequence[float], std: Sequence[float], *, reads_bytes: bool
) -> Tensor:
    """Pixels as an image tower takes them.

    Args:
        pixel_values: uint8 (B, H, W, 3), which is normalised with mean and std; or floating point (B, C, H, W), already
            normalised.
        reads_bytes: what `read_bytes` gave for this tower.
    Raises:
        TypeError: another dtype.
        ValueError: another shape, or a size that is not that of a tower that reads bytes.
    """
    is_bytes = pixel_values.dtype == torch.uint8
    if not is_bytes and not pixel_values.is_floating_point():
        raise TypeError(f"pixel_values: expected uint8 or floating point, got {pixel_values.dtype}")
    expected = "uint8 (B, H, W, 3)" if is_bytes else "floating point (B, C, H, W)"
    if pixel_values.ndim != 4 or (is_bytes and pixel_values.shape[-1] != 3):
        raise ValueError(f"pixel_values: expected {expected}, got shape {tuple(pixel_values.shape)}")
    if reads_bytes:
        side = tower.config.image_size
        size = tuple(pixel_values.shape[1:3] if is_bytes else pixel_values.shape[2:])
        if size != (side, side):
            raise ValueError(f"pixel_values: expected {expected} of size {(side, side)}, got {size}")
    if not is_bytes or reads_bytes:
        return pixel_values  # its stem normalises while it reads
    channels = zip(pixel_values.unbind(-1), mean, std, strict=True)
    normalised = torch.stack([(channel / 255 - m) / s for channel, m, s in channels], dim=-1)
    # Still NHWC in memory (channels_last), in which convolutions are fastest on CPUs and tensor cores.
    return normalised.permute(0, 3, 1, 2).to(tower.dtype)


def tower_width(name: str, config: PreTrainedConfig) -> int:
    """Of what one feature is read from."""
    if config.model_type == "siglip_text_model":
        return int(config.projection_size)
    if config.model_type == "dpr" and config.projection_dim:
        return int(config.projection_dim)
    if config.model_type == "align_vision_model":
        return int(round_filters(config, config.out_channels[-1]))
    if config.model_type == "efficientnet":
        return int(config.hidden_dim)
    if config.model_type == "mobilevit":
        return int(config.neck_hidden_sizes[-1])
    if config.model_type == "textnet":
        return 4 * int(config.hidden_sizes[-1])  # it pools to 2 x 2
    found = getattr(config, "hidden_size", None) or getattr(config, "hidden_sizes", [None])[-1]
    if found is None:
        raise ValueError(f"{name}: expected a config with hidden_size or hidden_sizes, got {type(config).__name__}")
    return found


def load_tower(name: str, tower: Any) -> nn.Module | PreTrainedConfig:
    """What `CLIPModel.from_towers` takes as a model or config; name is "vision_model" or "text_model"."""
    if isinstance(tower, PreTrainedConfig):
        return tower
    if isinstance(tower, PreTrainedModel):
        return _layers(name, tower)
    return _layers(name, load_model(name, fspath(tower)))


def load_model(name: str, source: str) -> PreTrainedModel:
    """The whole pretrained model that `load_tower` takes a tower of: transformers', or one of two towers of vlmfast.

    Raises:
        FileNotFoundError: there is no such folder or name.
        ValueError: a file is damaged, or weights are missing.
    """
    folder = find(source)
    kind = read_config(folder).get("model_type")
    # Of two towers: ours, whose towers may be of any type, load what transformers' classes saved as well.
    own = model_class(kind) if kind in MODELS else None
    if own is not None and own.strategy == "contrastive":
        return load(own, folder)
    return load_auto(AutoModel, name, folder, new=("pooler.",))


def _layers(name: str, model: PreTrainedModel) -> nn.Module:
    """The tower of a model of two, and what holds the layers of one where that is a module inside, see `_flatten`."""
    part = getattr(model, name, None)
    holds = hasattr(model.config, "vision_config") or type(model) in (
        transformers.CLIPVisionModel,
        transformers.CLIPTextModel,
        transformers.SiglipVisionModel,
        transformers.SiglipTextModel,
    )
    return part if holds and isinstance(part, nn.Module) else model


def normalisation(vision: Any) -> dict[str, Any]:
    """image_mean and image_std of a checkpoint: of its preprocessor_config.json, or its config, as vlmfast has them."""
    source = find(fspath(vision))
    names = ("image_mean", "image_std")
    file, own = Path(source) / "preprocessor_config.json", read_config(source)
    if file.exists():
        settings = read_json(file)
    elif all(name in own for name in names):
        settings = own
    else:
        try:
            settings, _ = BaseImageProcessor.get_image_processor_dict(source)
        except OSError:
            return {}
    return {name: settings[name] for name in names if name in settings}
