"""What trainer, command line and tasks ask of a model. All that they know of a model is in the model's own file.

A model is a class `XModel(Pretrainable, PreTrainedModel)`; `Pretrainable` comes first, so that its `train` is the one
that is called. Its forward takes what its collator makes, as keyword arguments, and returns a ModelOutput with `loss`.

Methods that only some models have are not here. Whoever wants one asks whether the model has it:

    loss(**features)                    of the whole batch, from `model(**batch, return_loss=False)`; for --cache-chunk
    frozen_features(**batch)            what a frozen part makes of a batch, as keyword arguments of forward that stand
                                        for the inputs it has read; no gradient; --cache-features keeps them on disk
    frozen_fingerprint()                a hash of what decides `frozen_features`
    training_data(options, dataset, tokenizer)     what to pretrain on, made of the ImageTextDataset of --data: with
                                        other data beside it, or after a look at it; called once, before the first step
    parameter_groups(lr, weight_decay)  for the optimizer, where layers have learning rates of their own
    after_optimizer_step()              clamps
    metrics()                           name -> float, logged beside the loss: temperature, gates
    regions(images, least=, most=, threshold=)    of whole images by name what `vlmfast regions` keeps of each: "boxes",
                                        "features" and more; with frozen_fingerprint()

and what tasks ask for, on batches that `collator(..., train=False)` makes; a task that has a question or a caption of
its own puts it into `Sample.caption` first, and in training says in `Sample.prompt` how much of it is given:

    get_image_features(pixel_values), get_text_features(input_ids, attention_mask)     unit-norm (B, D)
    similarities(image, text)           (B, C) float32 of such features of B images and C texts, where these are not
                                        their products; widths may differ then, and of several prompts of a class
                                        the highest counts
    match_scores(**batch)               (B,) log-probability that image and text belong together
    generate(**batch, ...)              token ids (B, L) of what follows the prompt, without it, on batches of
                                        `prompt_collator(options, tokenizer)`: `Sample.caption` is the prompt or "".
                                        With examples in the prompt `Sample.images` has several, the caption `<image>`
                                        for each, and `example_end` behind each example, "\\n" where there is none
    joint_features(**batch)             `JointFeatures`; for vqa on batches of `question_collator(options, tokenizer)`
                                        where the model has one, since it reads its answer in a place of its own
    phrase_scores(**batch)              (B, P, R), the score of each region for each phrase; the batch has
                                        `phrase_mask` too, bool (B, P, L), the tokens of `input_ids` that a phrase spans
                                        A model that finds regions itself returns beside the scores, -inf of none,
                                        their boxes (B, R, 4) in pixels of what is given.
                                        To be trained (`--task grounding`) forward takes `phrase_mask` and
                                        `phrase_overlap` float32 (B, P, R), the IoU of each region with the phrase's
                                        nearest box, and its loss is that of the scores
    detect(pixel_values, phrases=None)  of each image "boxes" (N, 4) in pixels of what is given, "scores", "labels":
                                        places in the image's list `phrases` where `open_vocabulary` is True, which is
                                        then given `tokenizer` too, else those of config.id2label; with `image_sizes`
                                        too where the batch has it, int64 (B, 2), the widths and heights of images that
                                        are padded
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from vlmfast.data import Collator, Transform, eval_transform, train_transform


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; on leaving, with or without an error, every submodule gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass
class Options:
    """The flags that every model has. A model's `Options` adds its own; their defaults make a small model for a CPU.

    Field `image_size` is the flag --image-size. `metadata={"help": ...}` is what --help shows.
    """

    pretrained: str | None = field(default=None, metadata={"help": "Name or folder of a checkpoint to start from."})
    config: str | None = field(default=None, metadata={"help": "A config.json, to train from scratch."})
    config_overrides: list[str] | None = field(
        default=None, metadata={"help": "Fields of the model's config as name=value; a value is JSON or else a string."}
    )

    new_model: ClassVar[tuple[str, ...]] = ()
    """Fields that only say how a new model is made: beside --pretrained or --config they are an error."""
    pretraining: ClassVar[tuple[str, ...]] = ()
    """Fields that only pretraining reads: beside --task they are an error."""
    typed: ClassVar[frozenset[str]] = frozenset()
    """Names that stood on the command line, which sets it on the object."""

    def __post_init__(self) -> None:
        """Sizes and counts are at least 1.

        Raises:
            ValueError: one is not; the message names the flag.
        """
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"{flag(each.name)}: expected at least 1, got {value}")

    def is_given(self, name: str) -> bool:
        """Whether a field was asked for: typed on the command line, or another value than the default."""
        default = next(f for f in dataclasses.fields(self) if f.name == name).default
        return name in self.typed or getattr(self, name) != default

    def refuse(self, names: Iterable[str], because: str) -> None:
        """ValueError for the first of the fields that is given: it would be ignored.

        Args:
            names: of fields; those that this model's options do not have are passed over.
            because: what makes them useless, such as "--pretrained, whose config decides".
        """
        own = {f.name for f in dataclasses.fields(self)}
        for name in names:
            if name in own and self.is_given(name):
                raise ValueError(f"{flag(name)} {getattr(self, name)} has no effect beside {because}")

    def check(self) -> None:
        """ValueError where flags exclude each other, or one would be ignored."""
        if self.pretrained and self.config:
            raise ValueError("--pretrained and --config exclude each other")
        made = "--pretrained" if self.pretrained else "--config" if self.config else None
        if made:
            self.refuse(self.new_model, f"{made}, which says how the model is made")

    def tokenizer_source(self) -> str | None:
        """Name or folder whose tokenizer is the default one; None for the bundled tokenizer."""
        return self.pretrained


@dataclass
class ImageTextOptions(Options):
    """Options of a model that reads images and texts."""

    image_size: int = field(
        default=64, metadata={"help": "Side of the images, pixels; a pretrained image tower may have its own."}
    )
    max_length: int = field(default=32, metadata={"help": "Tokens of a text at most, special tokens included."})
    crop_scale: float = field(default=0.6, metadata={"help": "Least share of an image's area in a random crop."})
    flip: float = field(default=0.0, metadata={"help": "Probability of a left-right flip."})
    jitter: float = field(default=0.0, metadata={"help": "Strength of brightness, contrast and saturation jitter."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("crop_scale", "flip", "jitter"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "crop_scale" and value == 0):
                raise ValueError(f"{flag(name)}: expected a number from 0 to 1, got {value}")


class JointFeatures(NamedTuple):
    """What the heads of vqa, hateful and reasoning read; all float, of one width each.

    Attributes:
        pooled (B, D): what the paper's heads read.
        text (B, L, D'), image (B, R, D''): of every token and every region or patch.
        text_mask (B, L), image_mask (B, R): 1 where there is one; None when all are.
    """

    pooled: Tensor
    text: Tensor
    image: Tensor
    text_mask: Tensor | None = None
    image_mask: Tensor | None = None


class Pretrainable:
    """Mixin without state for every model; see the top of this file for the methods that are optional."""

    Options: ClassVar[type[Options]] = Options
    strategy: ClassVar[str] = ""
    """contrastive, prefix, frozen prefix, fusion, masked, detection, no training."""
    paper: ClassVar[str] = ""
    """Authors, year and arXiv number."""
    training_defaults: ClassVar[Mapping[str, Any]] = {}
    """Of TrainingArguments, where the paper wants others than `PretrainingArguments` has."""
    special_tokens: ClassVar[Mapping[str, str]] = {}
    """What the tokenizer must have, such as {"mask_token": "<|mask|>"}; added where it is missing."""
    extra_tokens: ClassVar[tuple[str, ...]] = ()
    """Special tokens that are none of those that every tokenizer has a name for, such as "<image>"; added likewise."""
    tasks: ClassVar[tuple[str, ...]] = ()
    """Names in vlmfast.tasks.TASKS; the first serves --eval-strategy."""
    new_parts: tuple[str, ...] = ()
    """What names of weights begin with that a checkpoint of another model, or of other settings, need not have."""
    made_by: ClassVar[str] = "train"
    """The command of `vlmfast` that makes a checkpoint of it; another than "train" where nothing is trained."""
    requires: ClassVar[tuple[str, ...]] = ("caption",)
    """Fields of a sample's record without which it cannot be trained on."""
    reads_features: ClassVar[bool] = False
    """Whether the collator reads `Sample.features`, such as a detector's regions; for --features."""
    reads_text: ClassVar[bool] = True
    """Whether the model has a tokenizer; without one, it is None wherever a tokenizer is asked for."""

    # What transformers' classes have, for type checkers.
    config: Any
    config_class: Any

    @classmethod
    def build(cls, options: Any, tokenizer: Any) -> Self:
        """The model that the options ask for: a checkpoint, a config file, or a new one by `create`.

        Args:
            options: of the class `cls.Options`.
            tokenizer: a transformers tokenizer that has `special_tokens`; None for a model that reads no text.
        Raises:
            ValueError: flags exclude each other or would be ignored, a field of the config is wrong, or the tokenizer
                has more tokens than the model.
        """
        from huggingface_hub.errors import StrictDataclassError

        from vlmfast.models.checkpoints import load, read_json

        options.check()
        chosen = cls.overrides(options)
        try:
            if options.pretrained:
                model = load(cls, options.pretrained, may_be_new=True, **chosen)
            elif options.config:
                model = cls(cls.config_class.from_dict({**read_json(options.config), **chosen}))  # type: ignore[call-arg]
            else:
                model = cls.create(options, tokenizer, **chosen)
        except StrictDataclassError as error:  # neither a ValueError nor a TypeError
            raise ValueError(" ".join(str(error).split())) from error
        if tokenizer is not None:
            model._fit_vocabulary(tokenizer)
        return model

    @classmethod
    def create(cls, options: Any, tokenizer: Any, **overrides: Any) -> Self:
        """A new model from the options, its towers new or pretrained ones.

        Args:
            options, tokenizer: as `build`.
            overrides: fields of the config that have the last word.
        """
        raise NotImplementedError(f"{cls.__name__}.create")

    @classmethod
    def overrides(cls, options: Any) -> dict[str, Any]:
        """Fields of the config that the options set, of new models and of checkpoints alike."""
        return parse_overrides(cls.config_class, options.config_overrides or ())

    def transform(self, options: Any, *, train: bool) -> Transform:
        """Of images: size, and in training augmentation."""
        side = self.image_size(options)
        if not train:
            return eval_transform(side)
        return train_transform(side, scale=(options.crop_scale, 1.0), flip=options.flip, jitter=options.jitter)

    def image_size(self, options: Any) -> int:
        """The side of the images, pixels: the image tower's own, or --image-size where it has none.

        Raises:
            ValueError: --image-size is another than the tower's own.
        """
        own = own_image_size(self.config)
        if own is None:
            return int(options.image_size)
        if options.is_given("image_size") and options.image_size != own:
            raise ValueError(f"--image-size {options.image_size} has no effect: the image tower has its own, {own}")
        return own

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """Samples to the keyword arguments of forward, and nothing else.

        With train=False nothing is random, and the batch is one that the methods of tasks take.
        """
        return Collator(tokenizer, max_length=options.max_length)

    def frozen_parts(self) -> Iterable[nn.Module]:
        """Modules in eval mode and without gradient, hence in no optimizer, whatever mode the model is in."""
        return ()

    def freeze(self) -> None:
        """Puts `frozen_parts` into that state; for the end of __init__. `train` repeats it, and from_pretrained calls
        `eval` once it has made its parameters."""
        for part in self.frozen_parts():
            part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """As nn.Module's, but `frozen_parts` stay as they are."""
        super().train(mode)  # type: ignore[misc]
        self.freeze()
        return self

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has embeddings of."""
        return int(getattr(self.config, "text_config", self.config).vocab_size)

    @property
    def max_text_length(self) -> int:
        """Tokens of a text at most."""
        return int(getattr(self.config, "text_config", self.config).max_position_embeddings)

    def resize_vocabulary(self, size: int) -> None:
        """Makes room for tokens at the end; what was there stays."""
        self.resize_token_embeddings(size)  # type: ignore[attr-defined]

    def _fit_vocabulary(self, tokenizer: Any) -> None:
        """Room for this model's special tokens, where a pretrained part does not know them yet."""
        before = self.vocabulary
        if len(tokenizer) <= before:
            return
        new = {getattr(tokenizer, f"{name}_id") for name in self.special_tokens}
        if not set(range(before, len(tokenizer))) <= new:
            raise ValueError(f"--tokenizer has {len(tokenizer)} tokens, more than the {before} of the text tower")
        self.resize_vocabulary(len(tokenizer))


def own_image_size(config: Any) -> int | None:
    """Side of the images that a config's image tower is made for, pixels; None where any will do."""
    tower = getattr(config, "vision_config", None) or getattr(config, "image_config", None) or config
    side: int | None = getattr(tower, "image_size", None)
    return side


def flag(name: str) -> str:
    """image_size -> --image-size"""
    return f"--{name.replace('_', '-')}"


def settings(config_class: Any) -> list[str]:
    """Names of what a config class has beside PreTrainedConfig's fields and the configs of towers."""
    from transformers import PreTrainedConfig

    if hasattr(config_class, "settings"):
        return sorted(config_class.settings())
    common = {*signature(PreTrainedConfig.__init__).parameters, *vars(PreTrainedConfig())}
    towers = set(getattr(config_class, "sub_configs", None) or ())
    own = {
        name
        for parent in config_class.__mro__
        if issubclass(parent, PreTrainedConfig) and parent is not PreTrainedConfig
        for name in signature(parent.__init__).parameters
    }
    return sorted(own - common - towers - {"kwargs", "args"})


def parse_overrides(config_class: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """Fields of a config by name, from name=value; a value is JSON, or else a string.

    Raises:
        ValueError: there is no "=", or config_class has no such field, a tower's config not being one.
    """
    names = settings(config_class) if overrides else []
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


def vision_fingerprint(config: Any, *modules: nn.Module, **more: Any) -> str:
    """`fingerprint` of an image tower: its config without what does not decide features, and how pixels are normalised.

    Args:
        config: of the model; it has vision_config, image_mean and image_std.
        modules: whose weights count.
        more: other settings that decide the features.
    """
    settings = config.vision_config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        settings.pop(name, None)
    settings["pixels"] = [list(config.image_mean), list(config.image_std)]
    return fingerprint({**settings, **more}, *modules)


def fingerprint(settings: Mapping[str, Any], *modules: nn.Module) -> str:
    """A hash of settings and of the weights of modules, for `frozen_fingerprint`."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for module in modules:
        for name, weight in module.state_dict().items():
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
