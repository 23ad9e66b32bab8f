"""Checkpoints and configs from elsewhere: found, read and checked before anything is made of them.

Nothing that a checkpoint names is run or fetched: no code of its own (`auto_map`), no kernel of a hub. All of a model's
weights are the checkpoint's, or it is refused with their names. Every complaint is one line that names the file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch

from vlmfast.data import load_tokenizer

Made = TypeVar("Made")

HUB_SECONDS = 5
"""A hub that has not answered after this long is not there."""
MAX_LAYERS = 1_000
"""What numbers of layers, blocks, experts and the like may be, since each costs Python objects of its own."""
SIZE = re.compile(
    r"(^|_)(size|sizes|dim|dims|width|layers?|heads?|channels|embeddings|positions|embd|blocks?|depths?|experts)$"
    r"|^(d_model|d_ff|d_kv|ffn_dim|n_inner)$"
)
"""Fields of a config that are sizes: their names, in transformers."""
COUNT = re.compile(r"(^|_)(layers?|blocks?|depths?|experts|stages)$")
CODE = "code that comes with a checkpoint is not run"


def find(checkpoint: str, file: str = "config.json") -> str:
    """Where a checkpoint lies: its folder, or a name that a hub may know.

    A hub that does not answer is refused within 10 seconds; a copy in the cache is then used as a folder.

    Args:
        checkpoint: a folder, or name or owner/name on the hub of HF_ENDPOINT.
        file: what a folder must hold.
    Raises:
        FileNotFoundError: there is nothing of that name.
    """
    path = Path(checkpoint)
    if (path / file).is_file():
        return checkpoint
    if path.exists() or path.is_absolute() or checkpoint.startswith((".", "~")) or checkpoint.count("/") > 1:
        raise FileNotFoundError(f"{checkpoint} is not the folder of a checkpoint: it has no {file}")

    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(checkpoint, file)
    except HFValidationError as error:
        raise FileNotFoundError(f"{checkpoint} is neither a folder nor the name of a checkpoint on a hub") from error
    problem = _hub_problem()
    if problem is None:
        return checkpoint
    if isinstance(cached, str):
        return str(Path(cached).parent)
    raise FileNotFoundError(
        f"{checkpoint} is not a folder here nor in the cache, and {constants.ENDPOINT} does not answer: {problem}"
    )


def find_tokenizer(name: str | None) -> Any:
    """The tokenizer in a folder or of a name on a hub; None is the bundled one.

    Raises:
        FileNotFoundError, ValueError: as `find` and `vlmfast.data.load_tokenizer`.
    """
    return load_tokenizer(name if name is None or Path(name).exists() else find(name, "tokenizer_config.json"))


def _hub_problem() -> str | None:
    """Why the hub cannot be asked, after one request; transformers itself tries for more than a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answers: list[str | None] = []

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS - 1).status_code
        except Exception as error:  # what it is depends on the version of the hub's client
            answers.append(_one_line(error))
        else:
            answers.append(f"status {status}" if status >= 500 else None)

    # A thread, as no timeout of a client bounds the look for the name's address.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answers[0] if answers else f"no answer within {HUB_SECONDS} seconds"


def read_json(path: Path | str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it holds something else; the message names the file.
    """
    try:
        found = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: expected JSON, got {_one_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object, got {type(found).__name__}")
    return found


def read_config(source: str) -> dict[str, Any]:
    """The config.json of a checkpoint that `find` has found, once its files are known to be whole.

    Raises:
        ValueError: a file is damaged, or the config names a kernel on a hub.
    """
    folder = Path(source)
    if not folder.is_dir():
        from transformers import PreTrainedConfig

        with reading(source):
            settings, _ = PreTrainedConfig.get_config_dict(source)
    else:
        settings = read_json(folder / "config.json")
        for pattern in ("generation_config.json", "preprocessor_config.json", "*.index.json"):
            for path in folder.glob(pattern):
                read_json(path)
        for path in sorted(folder.glob("model*.safetensors")):
            _check_safetensors(path)
    refuse_kernels(source, settings)
    return settings


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ValueError(f"{path} is damaged, or cut off at {size:,} bytes: {_one_line(error)}") from error


def refuse_kernels(where: str, settings: Mapping[str, Any]) -> None:
    """ValueError where a config, or one in it, names an attention that transformers would fetch from a hub."""
    for name, value in settings.items():
        if str(name).strip("_") in ("attn_implementation", "attn_implementation_internal", "experts_implementation"):
            named = value.values() if isinstance(value, dict) else [value]
            for one in named:
                if one not in (None, "eager", "sdpa", "flex_attention"):
                    reason = "kernels that a config names are not fetched"
                    raise ValueError(f"{where}: {name}: expected eager, sdpa or flex_attention, got {one!r}; {reason}")
        elif isinstance(value, dict):
            refuse_kernels(where, value)


@contextmanager
def reading(source: str) -> Iterator[None]:
    """What libraries raise over files from elsewhere as a ValueError of one line that names the checkpoint."""
    try:
        yield
    except Exception as error:  # damaged pickles, unknown types, missing packages, shapes that do not fit, ...
        text = _one_line(error)
        if "trust_remote_code" in text:
            text = CODE
        elif not isinstance(error, ValueError | OSError | ImportError):
            text = f"{type(error).__name__}: {text}"
        raise ValueError(text if source in text else f"{source}: {text}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


FINE_TUNED = "vlmfast_task"
"""The model_type of a model with a head for a task around it, `vlmfast.tasks.heads.TaskModel`."""


def load(cls: Any, checkpoint: str, *, may_be_new: bool = False, **config: Any) -> Any:
    """A model of a checkpoint, all of its weights the checkpoint's; of one fine-tuned for a task, without its head.

    Args:
        cls: a model's class.
        checkpoint: as `find`.
        may_be_new: parts that the model's `new_parts` names may be missing, if the checkpoint is another model's or
            fields of the config are set.
        config: fields of the config that have the last word.
    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: a file is damaged; weights are missing, of another shape or not finite.
    """
    source = find(checkpoint)
    settings = read_config(source)
    given: dict[str, Any] = dict(config)
    if settings.get("model_type") == FINE_TUNED != cls.config_class.model_type:
        settings = settings["model_config"]
        with reading(source):
            inner = cls.config_class.from_dict({**settings, **config})
        given = {"config": inner, "key_mapping": {r"^model\.": ""}}
    made_by = settings.get("architectures") or [cls.__name__]
    other = bool(config) or settings.get("model_type") != cls.config_class.model_type or cls.__name__ not in made_by
    with reading(source):
        model, report = cls.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **given
        )
    check_weights("checkpoint", source, model, report, new=model.new_parts if may_be_new and other else ())
    return model


def load_auto(auto: Any, name: str, source: str, new: tuple[str, ...] = (), **options: Any) -> Any:
    """A pretrained model by one of transformers' Auto classes, its files, sizes and weights checked.

    Args:
        auto: the class, such as AutoModel.
        name: of what is loaded, for messages.
        source: as `find` gives it.
        new: what the names of weights begin with that may be missing.
        options: of from_pretrained, such as dtype.
    Raises:
        ValueError: a file is damaged, a size is out of bounds, or weights are missing.
    """
    from transformers import AutoConfig

    read_config(source)
    with reading(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    check_sizes(source, config, lambda: auto.from_config(config, trust_remote_code=False))
    with reading(source):
        model, report = auto.from_pretrained(
            source,
            config=config,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    check_weights(name, source, model, report, new=new)
    return model


def check_weights(
    name: str, source: str, model: torch.nn.Module, report: Mapping[str, Any], new: tuple[str, ...] = ()
) -> None:
    """ValueError if a loaded model has weights that the checkpoint has not, or that are not finite.

    Args:
        name: of what is loaded, for messages.
        source: of the checkpoint.
        model, report: from `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)`.
        new: what the names of weights begin with that may be missing.
    """
    expected = f"{name}: expected a checkpoint of a {type(model).__name__}, {source}"
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith(new)):
        raise ValueError(f"{expected} lacks {_some(missing)}")
    if shapes := sorted(f"{key} {tuple(got)} for {tuple(want)}" for key, got, want in report["mismatched_keys"]):
        raise ValueError(f"{expected} has weights of another shape: {_some(shapes)}")
    if report.get("error_msgs"):
        raise ValueError(f"{expected} cannot be read: {' '.join(report['error_msgs'])}")
    weights = model.state_dict().items()
    broken = [key for key, value in weights if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"{expected} has weights that are not finite: {_some(broken)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{names[:5]}{more}"


def making(name: str, config: Any, make: Callable[[], Made]) -> Made:
    """What `make` makes of a config whose sizes `check_sizes` finds sane; on the meta device it is made once only."""
    if torch.empty(0).device.type != "meta":
        check_sizes(name, config, make)
        return make()
    check_numbers(name, config)
    with of_config(name, config.model_type):
        model = make()
    _check_memory(name, model)
    return model


def check_sizes(name: str, config: Any, make: Callable[[], Any]) -> None:
    """Whether a model of a config can be made on this machine, before it is: on the meta device it costs no memory.

    Args:
        name: of the config, for messages.
        config: its numbers are looked at.
        make: makes a model of it, on the default device.
    Raises:
        ValueError: a size is not positive, there are more than MAX_LAYERS layers, the weights are larger than this
            machine's memory, or no model can be made of the config.
    """
    from transformers.initialization import no_init_weights

    check_numbers(name, config)
    with of_config(name, config.model_type), torch.device("meta"), no_init_weights():
        model = make()
    _check_memory(name, model)


@contextmanager
def of_config(name: str, model_type: str) -> Iterator[None]:
    """Whatever a wrong number or word in a config leads to, as a ValueError of one line that names the config."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except Exception as error:
        text = _one_line(error)
        if not isinstance(error, ValueError | ImportError | StrictDataclassError):
            text = f"no {model_type!r} can be made of this config: {type(error).__name__}: {text}"
        raise ValueError(text if text.startswith(name) else f"{name}: {text}") from error


def check_numbers(name: str, config: Any) -> None:
    """ValueError for a size of a config that is not positive, or too many layers; configs inside are looked at too."""
    defaults: Any = None
    for field, value in vars(config).items():
        if hasattr(value, "to_dict"):
            check_numbers(field, value)
            continue
        numbers = value if isinstance(value, list | tuple) else [value]
        if not SIZE.search(field) or not all(type(number) is int for number in numbers):
            continue
        if COUNT.search(field) and sum(numbers) > MAX_LAYERS:
            raise ValueError(f"{name}: {field}: expected at most {MAX_LAYERS:,}, got {value}")
        if any(number <= 0 for number in numbers):
            defaults = defaults or type(config)()
            usual = getattr(defaults, field, None)
            usual = usual if isinstance(usual, list | tuple) else [usual]
            if all(type(number) is int and number > 0 for number in usual):
                raise ValueError(f"{name}: {field}: expected a positive number, got {value}")
    sides = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if all(type(side) is int for side in sides) and sides[0] < sides[1]:  # type: ignore[operator]
        raise ValueError(f"{name}: patch_size: expected at most image_size {sides[0]}, got {sides[1]}")


def _check_memory(name: str, model: Any) -> None:
    weights = list(model.parameters())
    needed, there = sum(w.numel() * w.element_size() for w in weights), _memory()
    if there is not None and needed > there:
        count, kind = sum(w.numel() for w in weights), type(model).__name__
        raise ValueError(
            f"{name}: a {kind} of this config has {count:,} parameters, {needed / 2**30:,.1f} GiB; "
            f"expected at most the {there / 2**30:,.1f} GiB of this machine's memory"
        )


def _memory() -> int | None:
    """Bytes of memory that a process can have here; None where the system does not say."""
    sizes = []
    if hasattr(os, "sysconf"):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text().strip()
        except OSError:
            continue
        if limit.isdecimal():
            sizes.append(int(limit))
    return min(sizes, default=None)
