"""What can take the place of what: one table per library, imported only for models that have parts of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.nn._features import of_one_dtype
from vlmfast.nn._stem import reason_to_call
from vlmfast.ops._arguments import DTYPES

KINDS = ("patch_embed", "cross_attention", "loss")


@dataclass(frozen=True)
class Rule:
    """Attributes:
    kind: one of KINDS.
    original: the very class that is replaced; subclasses are left alone.
    replace: an instance to what takes its place, a module, or for a loss its new forward. A ValueError or TypeError
        says why it cannot be.
    """

    kind: str
    original: type[nn.Module]
    replace: Callable[[Any], Any]


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module; that which it had, if fully_shard gave it one made of FSDPModule and that."""
    bases = type(module).__bases__
    return bases[1] if bases[0].__name__ == "FSDPModule" else type(module)


def rules_for(model: nn.Module) -> Iterator[Rule]:
    """The rules of the libraries that classes in the model come from."""
    libraries = {class_of(module).__module__.split(".")[0] for module in model.modules()}
    for library, rules in LIBRARIES.items():
        if library in libraries:
            yield from rules()
    if "transformers" in libraries:
        yield from import_module("vlmfast.integrations.language_models").rules(model)
        yield from import_module("vlmfast.integrations.masked_models").rules(model)


def _transformers() -> Iterator[Rule]:
    stems = import_module("vlmfast.nn.transformers")
    for name in (
        "CLIPVisionEmbeddings", "SiglipVisionEmbeddings", "Siglip2VisionEmbeddings", "ViTPatchEmbeddings",
        "ViTEmbeddings", "FlavaImageEmbeddings", "BridgeTowerVisionEmbeddings", "Qwen2VLPatchEmbed",
    ):  # fmt: skip
        stem = getattr(stems, name)
        yield Rule("patch_embed", stem._replaces(), stem.from_original)
    cross = import_module("vlmfast.nn.transformers_cross_attention")
    for name, options in (
        ("IdeficsGatedCrossAttentionLayer", {}),
        ("MllamaCrossAttentionDecoderLayer", {"empty": "all"}),  # what the original computes
    ):
        layer = getattr(cross, name)
        yield Rule("cross_attention", layer.__bases__[0], partial(_cross_attention, layer, options))
    for module, name, loss in (
        ("clip", "CLIPModel", _info_nce),
        ("vision_text_dual_encoder", "VisionTextDualEncoderModel", _info_nce),
        ("align", "AlignModel", _align),
        ("siglip", "SiglipModel", _sigmoid),
        ("siglip2", "Siglip2Model", _sigmoid),
    ):
        library = import_module(f"transformers.models.{module}.modeling_{module}")
        original = getattr(library, name)
        output = library.CLIPOutput if original.__name__.startswith("VisionText") else _output_class(original)
        yield Rule("loss", original, partial(_without_logits, loss=loss, output=output))
    many = "its contrastive loss is one of several inside of its forward; use vlmfast.ops.info_nce on its features"
    heads = f"{many}; its vocabulary heads run on masked rows already"
    yield _left("loss", "transformers.models.flava.modeling_flava", "FlavaForPreTraining", heads)
    bridge = "transformers.models.bridgetower.modeling_bridgetower"
    yield _left("loss", bridge, "BridgeTowerForContrastiveLearning", many)


def _cross_attention(layer: Any, options: dict[str, Any], original: Any) -> nn.Module:
    """IDEFICS' config is its other dropout; Mllama has none."""
    replaced: nn.Module = layer.from_module(original, **options)
    dropout = max(original.cross_attn.dropout, getattr(original, "config", 0))
    if dropout > 0:
        raise ValueError(f"its dropout is {dropout}, and can only be 0: set it in the config before the model is made")
    return replaced


def _open_clip() -> Iterator[Rule]:
    stem = import_module("vlmfast.nn.open_clip").VisionTransformer

    def replace(visual: Any) -> nn.Module:
        mean, std = getattr(visual, "image_mean", None), getattr(visual, "image_std", None)
        given = mean is not None and std is not None
        return stem.from_original(visual, mean=mean, std=std) if given else stem.from_original(visual)

    yield Rule("patch_embed", stem._replaces(), replace)
    losses, ours = import_module("open_clip.loss"), import_module("vlmfast.nn")

    def clip_loss(loss: Any) -> Any:
        if getattr(loss, "use_horovod", False):  # open_clip's main branch has none
            raise ValueError("it uses horovod")
        options = ("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size")
        return ours.ClipLoss(**{name: getattr(loss, name) for name in options}).forward

    def siglip_loss(loss: Any) -> Any:
        return ours.SigLipLoss(loss.cache_labels, loss.rank, loss.world_size, loss.dist_impl).forward

    yield Rule("loss", losses.ClipLoss, clip_loss)
    yield Rule("loss", losses.SigLipLoss, siglip_loss)
    yield Rule("loss", losses.CoCaLoss, lambda loss: _CoCaLoss(loss, clip_loss(loss)))
    yield _left("loss", "open_clip.loss", "DistillClipLoss", "it compares the logits themselves with the teacher's")


def _timm() -> Iterator[Rule]:
    stem = import_module("vlmfast.nn").PatchEmbed
    yield Rule("patch_embed", stem._replaces(), stem.from_original)
    naflex = import_module("vlmfast.nn.naflex").NaFlexEmbeds
    yield Rule("patch_embed", naflex._replaces(), naflex.from_original)


def _flamingo(module_name: str) -> Callable[[], Iterator[Rule]]:
    def rules() -> Iterator[Rule]:
        ours, module = import_module("vlmfast.nn"), import_module(module_name)

        def block(original: Any) -> nn.Module:
            _without_hooks(original)
            uniform = getattr(original.attn, "only_attend_immediate_media", True) is False
            options = {"before_media": "uniform"} if uniform else {}
            replaced: nn.Module = ours.GatedCrossAttentionBlock.from_module(original, **options)
            return replaced

        def resampler(original: Any) -> nn.Module:
            _without_hooks(original)
            replaced: nn.Module = ours.PerceiverResampler.from_module(original)
            return replaced

        yield Rule("cross_attention", module.GatedCrossAttentionBlock, block)
        yield Rule("cross_attention", module.PerceiverResampler, resampler)

    return rules


def _without_hooks(original: nn.Module) -> None:
    """Ours has submodules of its own: what was hung on the original's would not be where people look for it."""
    if reason := next(filter(None, map(reason_to_call, list(original.modules())[1:])), None):
        raise ValueError(reason)


LIBRARIES: dict[str, Callable[[], Iterator[Rule]]] = {
    "transformers": _transformers,
    "open_clip": _open_clip,
    "timm": _timm,
    "flamingo_pytorch": _flamingo("flamingo_pytorch.flamingo_pytorch"),
    "open_flamingo": _flamingo("open_flamingo.src.helpers"),
}


def _left(kind: str, module: str, name: str, reason: str) -> Rule:
    """A part that people may expect to be replaced, and is not."""

    def refuse(original: Any) -> Any:
        raise ValueError(reason)

    return Rule(kind, getattr(import_module(module), name), refuse)


Loss = Callable[[Any, Tensor, Tensor], Tensor]


def _info_nce(model: Any, image: Tensor, text: Tensor) -> Tensor:
    from vlmfast.ops import info_nce

    return info_nce(image, text, model.logit_scale.float().exp())


def _align(model: Any, image: Tensor, text: Tensor) -> Tensor:
    """transformers smooths labels by 0.1 in training and in evaluation."""
    from vlmfast.ops import info_nce

    return info_nce(image, text, 1 / model.temperature.float(), label_smoothing=0.1)


def _sigmoid(model: Any, image: Tensor, text: Tensor) -> Tensor:
    from vlmfast.ops import sigmoid_loss

    scale, bias = (t.float().reshape(()) for t in (model.logit_scale, model.logit_bias))
    return sigmoid_loss(image, text, scale.exp(), bias)


class _CoCaLoss:
    """The forward of open_clip's CoCaLoss with the contrastive part by our ClipLoss; the captions' is open_clip's."""

    def __init__(self, loss: Any, contrastive: Callable[..., Tensor]) -> None:
        self.loss, self.contrastive = loss, contrastive
        self.__signature__ = inspect.signature(loss.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.__signature__.bind(*args, **kwargs).arguments
        loss, logits = self.loss, given["logits"]
        clip_loss = torch.tensor(0, device=logits.device)
        if loss.clip_loss_weight:
            features = given["image_features"], given["text_features"], given["logit_scale"]
            clip_loss = loss.clip_loss_weight * self.contrastive(*features)
        caption_loss = loss.caption_loss_weight * loss.caption_loss(logits.permute(0, 2, 1), given["labels"])
        if given.get("output_dict"):
            return {"contrastive_loss": clip_loss, "caption_loss": caption_loss}
        return clip_loss, caption_loss


class Method:
    """function bound to a module, for the module's __dict__.

    It has what Python's methods have, for those who bind its function anew (accelerate); in copies and pickles of the
    module it is bound to the copy.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.__func__, self.__self__ = function, module
        # transformers' Trainer chooses a dataset's columns by the forward's argument names.
        self.__signature__ = inspect.signature(MethodType(function, module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)


def _without_logits(model: Any, loss: Loss, output: Any) -> Method:
    return Method(_WithoutLogits(model, loss, output), model)


class _WithoutLogits:
    """The forward of one of transformers' two-tower models; with return_loss=True it does not build (N, N) logits.

    The output is then the original's class with loss, image_embeds, text_embeds and the towers' outputs, and None for
    both logits. Anything else, return_dict=False and float64 features too, is the original's forward.
    """

    def __init__(self, model: Any, loss: Loss, output: Any) -> None:
        self.loss, self.output = loss, output
        self.__signature__ = inspect.signature(type(model).forward)
        self.explicit = {side: set(inspect.signature(_encoder(model, side)).parameters) for side in ("image", "text")}

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(self.__signature__.bind(model, *args, **kwargs).arguments)
        given.pop("self")
        given.update(given.pop("kwargs", {}))
        wanted = given.pop("return_loss", None)
        as_dict = given.pop("return_dict", None)
        if not wanted or as_dict is False or not model.config.return_dict:
            return type(model).forward(model, *args, **kwargs)
        outputs = {}
        for side, other in (("image", "text"), ("text", "image")):
            others = self.explicit[other] - self.explicit[side]
            passed = {name: value for name, value in given.items() if name not in others}
            outputs[side] = _encoder(model, side)(**passed)
        image, text = of_one_dtype(*(_unit(outputs[side]) for side in ("image", "text")))
        if len(image) != len(text):
            raise ValueError(
                f"{type(model).__name__}: return_loss=True needs a text for each image; got {len(image)} images and "
                f"{len(text)} texts"
            )
        if image.dtype not in DTYPES:
            return type(model).forward(model, *args, **kwargs)
        return self.output(
            loss=self.loss(model, image, text),
            image_embeds=image,
            text_embeds=text,
            vision_model_output=_model_output(outputs["image"]),
            text_model_output=_model_output(outputs["text"]),
        )


def _encoder(model: Any, side: str) -> Any:
    """Of the class: the original's forward does not look for one that the instance was given."""
    return MethodType(getattr(type(model), f"get_{side}_features"), model)


def _unit(output: Any) -> Tensor:
    """Features as transformers normalises them."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features / torch.linalg.vector_norm(features, dim=-1, keepdim=True)


def _model_output(output: Any) -> Any:
    return None if isinstance(output, Tensor) else output


def _output_class(model: type[nn.Module]) -> Any:
    """CLIPOutput of CLIPModel, and so on."""
    return getattr(inspect.getmodule(model), model.__name__.replace("Model", "Output"))
