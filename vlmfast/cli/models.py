"""Which models there are, and how one is made from the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

MODELS = {
    "clip": ("vlmfast.models.contrastive.clip", "CLIPModel"),
    "cloob": ("vlmfast.models.contrastive.cloob", "CLOOBModel"),
    "align": ("vlmfast.models.contrastive.align", "ALIGNModel"),
    "declip": ("vlmfast.models.contrastive.declip", "DeCLIPModel"),
    "lit": ("vlmfast.models.contrastive.lit", "LiTModel"),
    "siglip": ("vlmfast.models.contrastive.siglip", "SigLIPModel"),
}
"""By the model_type of their configs."""

DECLIP_WEIGHTS = {
    "released": "RELEASED_WEIGHTS",
    "released-88m-vit": "RELEASED_88M_VIT_WEIGHTS",
    "paper": "PAPER_WEIGHTS",
}
"""Presets of DeCLIPConfig."""


@dataclass
class ModelArguments:
    """The model: a pretrained checkpoint, a config file, pretrained towers, or small ones from a few numbers."""

    model: str = field(default="clip", metadata={"help": "Which model.", "choices": list(MODELS)})
    pretrained: str | None = field(default=None, metadata={"help": "Name or folder of a checkpoint to start from."})
    config: str | None = field(default=None, metadata={"help": "A config.json, to train from scratch."})
    vision_tower: str | None = field(
        default=None, metadata={"help": "Name or folder of a pretrained image model; LiT locks it."}
    )
    text_tower: str | None = field(
        default=None, metadata={"help": "Name or folder of a pretrained text model; its tokenizer is the default one."}
    )
    image_size: int = field(
        default=64, metadata={"help": "Side of the images, pixels; a pretrained vision transformer has its own."}
    )
    patch_size: int = field(default=8, metadata={"help": "Side of a patch, pixels."})
    vision_width: int = field(default=192, metadata={"help": "Width of the vision transformer, a multiple of 64."})
    vision_layers: int = field(default=4, metadata={"help": "Layers of the vision transformer."})
    text_width: int = field(default=192, metadata={"help": "Width of the text transformer, a multiple of 64."})
    text_layers: int = field(default=2, metadata={"help": "Layers of the text transformer."})
    embed_dim: int = field(default=256, metadata={"help": "Dimension of the features that are compared."})
    declip_weights: str | None = field(
        default=None,
        metadata={
            "help": "DeCLIP: weights of its terms; those of the released configurations by default.",
            "choices": list(DECLIP_WEIGHTS),
        },
    )
    config_overrides: list[str] | None = field(
        default=None,
        metadata={
            "help": "Fields of the model's config as name=value, such as text_pooling=mean or image_ssl_weight=0."
        },
    )


def model_class(name: str) -> Any:
    module, model = MODELS[name]
    return getattr(import_module(module), model)


def build_model(args: ModelArguments, tokenizer: Any, max_length: int) -> Any:
    """The model that the arguments ask for, its text tower as large as the tokenizer's vocabulary or larger."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        model = _build(model_class(args.model), args, tokenizer, max_length)
    except StrictDataclassError as error:  # neither a ValueError nor a TypeError
        raise ValueError(f"--model {args.model}: {' '.join(str(error).split())}") from error
    vocabulary = model.config.text_config.vocab_size
    if args.model == "declip" and tokenizer.mask_token_id == vocabulary == len(tokenizer) - 1:
        model.resize_vocabulary(len(tokenizer))  # of a tower that was trained without masks
        return model
    if len(tokenizer) > vocabulary:
        raise ValueError(f"--tokenizer has {len(tokenizer)} tokens, more than the {vocabulary} of the text tower")
    return model


def _build(cls: Any, args: ModelArguments, tokenizer: Any, max_length: int) -> Any:
    towers = args.vision_tower or args.text_tower
    given = [f"--{name}" for name in ("pretrained", "config") if getattr(args, name)]
    if len(given) > 1 or (given and towers):
        others = "--vision-tower and --text-tower" if towers else given[1]
        raise ValueError(f"{given[0]} and {others} exclude each other")
    chosen = _overrides(cls.config_class, args)
    if args.pretrained:
        return cls.from_pretrained(existing(args.pretrained), **chosen)
    if args.config:
        settings = json.loads(Path(args.config).read_text(encoding="utf-8"))
        return cls(cls.config_class.from_dict({**settings, **chosen}))
    if args.model == "lit" and not args.vision_tower:
        raise ValueError("--model lit needs the --vision-tower that it locks, --config or --pretrained")
    if tokenizer.eos_token_id is None and not args.text_tower:
        raise ValueError(
            f"--tokenizer {tokenizer.name_or_path} has no end-of-text token; pass --text-tower or --config"
        )
    names = ("image_size", "patch_size", "vision_width", "vision_layers", "text_width", "text_layers", "embed_dim")
    small = cls.config_class.small(
        vocab_size=len(tokenizer),
        eos_token_id=0 if args.text_tower else tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_length=max_length,
        **{name: getattr(args, name) for name in names},
    )
    if not towers:
        return cls(cls.config_class.from_dict({**small.to_dict(), **chosen}) if chosen else small)
    # The others' features are as wide as the image tower.
    width = {"projection_dim": args.embed_dim} if args.model in ("clip", "cloob", "declip") else {}
    return cls.from_towers(
        small.vision_config if args.vision_tower is None else existing(args.vision_tower),
        small.text_config if args.text_tower is None else existing(args.text_tower),
        **{**width, **chosen},
    )


def _overrides(config_class: Any, args: ModelArguments) -> dict[str, Any]:
    """The fields of the config that --declip-weights and --config-overrides set, the latter's word being the last."""
    found: dict[str, Any] = {}
    if args.declip_weights is not None:
        if args.model != "declip":
            raise ValueError(f"--declip-weights needs --model declip; got {args.model}")
        found.update(getattr(config_class, DECLIP_WEIGHTS[args.declip_weights]))
    return {**found, **parse_overrides(config_class, args.config_overrides or ())}


def parse_overrides(config_class: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """Fields of a config by name, from name=value; a value is JSON, or else a string.

    Raises:
        ValueError: there is no "=", or config_class has no such field, a tower's config not being one.
    """
    names = sorted(config_class.settings())
    found: dict[str, Any] = {}
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or name not in names:
            raise ValueError(f"--config-overrides: expected name=value of {', '.join(names)}; got {override!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def existing(checkpoint: str) -> str:
    """What can only be a path is looked for here; owner/name may also be on a hub, where transformers looks."""
    path = Path(checkpoint)
    only_a_path = path.exists() or path.is_absolute() or checkpoint.startswith(".") or checkpoint.count("/") > 1
    if only_a_path and not (path / "config.json").exists():
        raise FileNotFoundError(f"{checkpoint} is not the folder of a checkpoint: it has no config.json")
    return checkpoint


def model_type(checkpoint: str) -> str:
    """The model_type of a checkpoint, one of MODELS.

    Raises:
        ValueError: it is none of them.
    """
    from transformers import PreTrainedConfig

    found, _ = PreTrainedConfig.get_config_dict(existing(checkpoint))
    name = found.get("model_type")
    if name not in MODELS:
        raise ValueError(f"{checkpoint}: expected a checkpoint of {', '.join(MODELS)}; got model_type {name!r}")
    return str(name)


def image_size(model: Any, otherwise: int | None) -> int:
    """The vision tower's own image size; convolutional towers may have none in their config."""
    size = getattr(model.config.vision_config, "image_size", None) or otherwise
    if size is None:
        raise ValueError("--image-size is needed: the vision_config of this checkpoint has no image_size")
    return int(size)
