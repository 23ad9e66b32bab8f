"""Models by name; each is one file. A line here is all that registers one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

MODELS = {
    "clip": "vlmfast.models.contrastive.clip:CLIPModel",
    "cloob": "vlmfast.models.contrastive.cloob:CLOOBModel",
    "align": "vlmfast.models.contrastive.align:ALIGNModel",
    "declip": "vlmfast.models.contrastive.declip:DeCLIPModel",
    "lit": "vlmfast.models.contrastive.lit:LiTModel",
    "siglip": "vlmfast.models.contrastive.siglip:SigLIPModel",
    "simvlm": "vlmfast.models.prefix.simvlm:SimVLMModel",
    "virtex": "vlmfast.models.prefix.virtex:VirTexModel",
    "frozen": "vlmfast.models.prefix.frozen:FrozenModel",
    "clipcap": "vlmfast.models.prefix.clipcap:ClipCapModel",
    "mapl": "vlmfast.models.prefix.mapl:MAPLModel",
    "flamingo": "vlmfast.models.prefix.flamingo:FlamingoModel",
    "visualgpt": "vlmfast.models.fusion.visualgpt:VisualGPTModel",
    "vc_gpt": "vlmfast.models.fusion.vc_gpt:VCGPTModel",
    "fiber": "vlmfast.models.fusion.fiber:FIBERModel",
    "fiber_fine": "vlmfast.models.fusion.fiber_fine:FIBERFineModel",
    "visual_bert": "vlmfast.models.masked.visual_bert:VisualBERTModel",
    "vilbert": "vlmfast.models.masked.vilbert:ViLBERTModel",
    "lxmert": "vlmfast.models.masked.lxmert:LXMERTModel",
    "bridgetower": "vlmfast.models.masked.bridgetower:BridgeTowerForPreTraining",
    "flava": "vlmfast.models.masked.flava:FLAVAModel",
    "faster_rcnn": "vlmfast.models.detection.faster_rcnn:FasterRCNNModel",
    "asif": "vlmfast.models.training_free.asif:ASIFModel",
    "magic": "vlmfast.models.training_free.magic:MAGiCModel",
}
"""By the model_type of their configs: "module:Class"."""


def model_type(checkpoint: str, settings: Mapping[str, Any] | None = None) -> str:
    """The model_type of a checkpoint, a folder or a name on a hub, one of MODELS.

    Args:
        checkpoint: where it lies.
        settings: of its config.json, where they have been read already.
    Raises:
        ValueError: it is none of them.
    """
    from vlmfast.models.checkpoints import find, read_config

    name = (read_config(find(checkpoint)) if settings is None else settings).get("model_type")
    if name not in MODELS:
        raise ValueError(f"{checkpoint}: expected a checkpoint of {', '.join(MODELS)}; got model_type {name!r}")
    return str(name)


def model_class(name: str) -> Any:
    """The class of a model: one of MODELS, or "package.module:Class" for one of your own.

    Raises:
        ValueError: there is no such model, module or class, or the class is not a `Pretrainable`.
    """
    from vlmfast.models.contract import Pretrainable

    place = MODELS.get(name, name)
    module, colon, attribute = place.partition(":")
    if not colon:
        raise ValueError(f"MODEL must be one of {', '.join(MODELS)}, or package.module:Class; got {name!r}")
    try:
        found = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if name in MODELS or error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # what the module imports is missing
        raise ValueError(f"MODEL: no module named {error.name!r}, of {name!r}") from error
    except AttributeError as error:
        raise ValueError(f"MODEL: {module} has no class {attribute!r}") from error
    if not (isinstance(found, type) and issubclass(found, Pretrainable)):
        raise ValueError(f"MODEL: expected a class that extends Pretrainable, got {place}")
    return found
