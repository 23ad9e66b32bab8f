"""What comes from elsewhere: missing, damaged, of another shape, with code of its own, too large, of a wrong kind."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vlmfast.cli import main
from vlmfast.data import load_tokenizer
from vlmfast.models.checkpoints import find, find_tokenizer, load, read_json
from vlmfast.models.contrastive import CLIPConfig, CLIPModel, DeCLIPModel
from vlmfast.models.towers import load_tower, normalisation

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 1}
WEIGHT = "text_model.final_layer_norm.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with a tokenizer, and a ViT in the folder inside."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = load_tokenizer()
    text = {**TEXT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=16)).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(folder / "vit")
    return folder


@pytest.fixture
def clip(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "clip", tmp_path / "clip"))


@pytest.fixture
def vit(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "vit", tmp_path / "vit"))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def refused(folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which `vlmfast eval` refuses a checkpoint."""
    assert main(["eval", "--checkpoint", str(folder), "--data", str(data), "--device=cpu"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("vlmfast eval: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(WEIGHT), rf"lacks \['{WEIGHT}'\]"),
        (lambda w: w.clear(), r"lacks \['logit_scale', .*\] and \d+ more"),
        (lambda w: w.update({WEIGHT: torch.zeros(3)}), rf"another shape: \['{WEIGHT} \(3,\) for \(32,\)'\]"),
        (lambda w: w.update({WEIGHT: torch.full((32,), torch.nan)}), rf"not finite: \['{WEIGHT}'\]"),
    ],
    ids=["one", "all", "shape", "nan"],
)
def test_weights_that_are_not_the_models(
    clip: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change_weights(clip, change)
    with pytest.raises(ValueError, match=f"expected a checkpoint of a CLIPModel, {clip} .*{message}"):
        load(CLIPModel, str(clip))
    options = CLIPModel.Options(pretrained=str(clip))
    with pytest.raises(ValueError, match=message):
        CLIPModel.build(options, load_tokenizer())
    assert "expected a checkpoint of a CLIPModel" in refused(clip, clip, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layernorm.weight"), r"lacks \['layernorm.weight'\]"),
        (lambda w: w.update({"layernorm.weight": torch.zeros(3)}), r"layernorm.weight \(3,\) for \(32,\)"),
        (lambda w: w.update({"layernorm.weight": torch.full((32,), torch.inf)}), r"not finite: \['layernorm.weight'\]"),
    ],
    ids=["missing", "shape", "inf"],
)
def test_weights_that_are_not_the_towers(
    vit: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    change_weights(vit, change)
    with pytest.raises(ValueError, match=f"vision_model: expected a checkpoint of a ViTModel, {vit} .*{message}"):
        load_tower("vision_model", vit)


def test_parts_that_another_model_lacks_may_be_new(clip: Path) -> None:
    """But not in an evaluation, and not in a checkpoint of the model itself."""
    words = load_tokenizer()
    words.add_special_tokens({"mask_token": "<|mask|>"})
    model = DeCLIPModel.build(DeCLIPModel.Options(pretrained=str(clip)), words)
    with pytest.raises(ValueError, match=r"DeCLIPModel, .* lacks \['bank"):
        load(DeCLIPModel, str(clip))
    model.save_pretrained(clip)
    change_weights(clip, lambda weights: weights.pop("predictor.0.weight"))
    with pytest.raises(ValueError, match=r"DeCLIPModel, .* lacks \['predictor.0.weight'\]"):
        load(DeCLIPModel, str(clip), may_be_new=True)
    change_weights(clip, lambda weights: weights.pop(WEIGHT))
    with pytest.raises(ValueError, match=rf"lacks \['{WEIGHT}'\]"):
        load(DeCLIPModel, str(clip), may_be_new=True, logit_scale_min=0.5)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "list": lambda content: b"[]",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"]
)
def test_a_damaged_file_is_named(clip: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = clip / name
    if name == "preprocessor_config.json":
        path.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
        assert normalisation(clip) == {"image_mean": [0.5, 0.5, 0.5]}
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert str(path) in refused(clip, clip, capsys)
    if name == "preprocessor_config.json":
        with pytest.raises(ValueError, match=f"{path} is damaged"):
            normalisation(clip)
    if name.startswith("tokenizer"):
        with pytest.raises(ValueError, match=f"{path} is damaged"):
            find_tokenizer(str(clip))


@pytest.mark.parametrize("damage", ["empty", "cut"])
def test_damaged_weights_of_a_tower_are_named(vit: Path, damage: str) -> None:
    path = vit / "model.safetensors"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path} is damaged, or cut off at "):
        load_tower("vision_model", vit)


def test_a_damaged_pickle_is_a_line(vit: Path) -> None:
    (vit / "model.safetensors").unlink()
    for content in (b"", b"no pickle"):
        (vit / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=f"^{vit}: .*$"):
            load_tower("vision_model", vit)


def test_json_that_is_none(tmp_path: Path) -> None:
    for content in ("", "{", "[]", "1", "[" * 100_000, '{"a": "\\ud8"}'):
        path = tmp_path / "run.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=f"{path} is damaged: expected"):
            read_json(path)


CODE = """
open({trace!r}, "w").write("was run")
from transformers import PreTrainedConfig, PreTrainedModel
class OwnConfig(PreTrainedConfig):
    model_type = "own"
class OwnModel(PreTrainedModel):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("model_type", ["own", "vit"])
def test_code_of_a_checkpoint_is_not_run(
    vit: Path, model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor offered to be run, whatever is on standard input."""
    trace = tmp_path / "trace"
    (vit / "own.py").write_text(CODE.format(trace=str(trace)))
    change_config(vit, model_type=model_type, auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    if model_type == "own":
        with pytest.raises(ValueError, match=f"{vit}: code that comes with a checkpoint is not run"):
            load_tower("vision_model", vit)
    else:
        assert isinstance(load_tower("vision_model", vit), transformers.ViTModel)  # transformers' own
    assert not trace.exists()


def test_code_of_a_tokenizer_is_not_run(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "trace"
    (clip / "own.py").write_text(f"open({str(trace)!r}, 'w')")
    for name in ("tokenizer.json", "config.json"):
        (clip / name).unlink()
    auto_map = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    (clip / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "tokenizer_class": "OwnTokenizer"}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match="name_or_path: no tokenizer at"):
        load_tokenizer(clip)
    assert not trace.exists()


@pytest.mark.parametrize("kernel", ["somebody/kernel", "somebody/kernel@v1:flash", "flash_attention_2"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_kernel_that_a_config_names_is_not_fetched(clip: Path, vit: Path, key: str, kernel: str) -> None:
    change_config(vit, **{key: kernel})
    with pytest.raises(ValueError, match=f"{vit}: {key}: expected eager, sdpa or flex_attention, got '{kernel}'"):
        load_tower("vision_model", vit)
    settings = json.loads((clip / "config.json").read_text())
    settings["text_config"][key] = kernel
    with pytest.raises(ValueError, match=f"text_config: {key}: .* kernels that a config names are not fetched"):
        CLIPConfig.from_dict(settings)
    (clip / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"{clip}: {key}: .* got '{kernel}'"):
        load(CLIPModel, str(clip))


@pytest.mark.parametrize("value", [0, -1, 10**9, 10**18])
@pytest.mark.parametrize(
    ("tower", "field"),
    [
        ("vision_config", "hidden_size"),
        ("vision_config", "intermediate_size"),
        ("vision_config", "num_hidden_layers"),
        ("vision_config", "num_attention_heads"),
        ("vision_config", "image_size"),
        ("vision_config", "patch_size"),
        ("vision_config", "num_channels"),
        ("text_config", "vocab_size"),
        ("text_config", "max_position_embeddings"),
        ("text_config", "hidden_size"),
        ("text_config", "num_hidden_layers"),
    ],
)
def test_sizes_that_cannot_be(tower: str, field: str, value: int) -> None:
    towers = {"vision_config": dict(VISION), "text_config": dict(TEXT)}
    towers[tower][field] = value
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"{tower}: ") as error:
        CLIPModel(CLIPConfig(**towers))
    assert time.monotonic() - start < 20  # no memory is taken, and no layer is made
    assert "\n" not in str(error.value)


def test_the_limits_are_stated() -> None:
    def message(**vision: int) -> str:
        with pytest.raises(ValueError, match="vision_config: ") as error:
            CLIPModel(CLIPConfig(vision_config={**VISION, **vision}, text_config=TEXT))
        return str(error.value)

    assert message(num_hidden_layers=1001) == "vision_config: num_hidden_layers: expected at most 1,000, got 1001"
    assert message(num_channels=-3) == "vision_config: num_channels: expected a positive number, got -3"
    assert "parameters" in message(hidden_size=2**22)
    assert "GiB of this machine's memory" in message(hidden_size=2**22)
    assert message(patch_size=17) == "vision_config: patch_size: expected at most image_size 16, got 17"
    with pytest.raises(ValueError, match="projection_dim: expected a positive number, got -4"):
        CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=-4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "nonsense"}, "no 'clip_vision_model' can be made of this config: KeyError: 'nonsense'"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"model_type": "convnext", "depths": [1, 1, 10**9, 1]}, "depths: expected at most 1,000, got"),
        ({"model_type": "convnext", "hidden_sizes": [8, 8, -8, 8]}, "hidden_sizes: expected a positive number"),
        ({"model_type": "nothing"}, "Unrecognized model identifier: nothing"),
        ({"model_type": "gpt2"}, "expected a model that reads pixel_values alone, got 'gpt2'"),
        ({"model_type": "bert"}, "expected a model that reads pixel_values alone, got 'bert'"),
        ({"model_type": "vilt"}, "expected a model that reads pixel_values alone, got 'vilt'"),
        ({"model_type": "data2vec-vision"}, "expected a tower with a pooler, got 'data2vec-vision'"),
        ({"model_type": "siglip2_vision_model"}, "needs .*spatial_shapes"),
    ],
)
def test_configs_of_which_no_image_tower_can_be_made(changes: dict[str, Any], message: str) -> None:
    settings = dict(changes) if changes.get("model_type") == "convnext" else {**VISION, **changes}
    with pytest.raises(ValueError, match=message) as error:
        CLIPModel(CLIPConfig(vision_config=settings, text_config=TEXT))
    assert "vision_config: " in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "vit"}, "expected a model that reads input_ids alone, got 'vit'"),
        ({"model_type": "gpt2"}, "expected a tower with pooler_output, got 'gpt2'"),
        ({"model_type": "llama"}, "expected a tower with pooler_output, got 'llama'"),
        ({"model_type": "t5"}, "expected a tower with pooler_output, got 't5'"),
    ],
)
def test_text_towers_of_a_wrong_kind(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"text_config: {message}"):
        CLIPModel(CLIPConfig(vision_config=VISION, text_config={**SIZES, **settings}))


def test_a_checkpoint_of_a_wrong_kind(vit: Path) -> None:
    with pytest.raises(ValueError, match="text_config: expected a model that reads input_ids alone, got 'vit'"):
        CLIPModel.from_towers(transformers.CLIPVisionConfig(**VISION), vit)
    change_config(vit, num_hidden_layers=10**9)
    with pytest.raises(ValueError, match=f"{vit}: num_hidden_layers: expected at most 1,000"):
        load_tower("vision_model", vit)


class Session:
    """A hub's client that does not answer, or with a status."""

    def __init__(self, answer: Callable[[], int]) -> None:
        self.answer = answer

    def head(self, *_: Any, **__: Any) -> Any:
        return type("Response", (), {"status_code": self.answer()})


def unreachable() -> int:
    raise OSError("Name or service not known")


def silent() -> int:
    time.sleep(30)
    return 200


@pytest.mark.parametrize(
    ("answer", "message"),
    [(unreachable, "Name or service not known"), (silent, "no answer within"), (lambda: 503, "status 503")],
)
def test_a_hub_that_does_not_answer(
    answer: Callable[[], int], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: Session(answer))
    monkeypatch.setattr("vlmfast.models.checkpoints.HUB_SECONDS", 0.5)
    monkeypatch.chdir(tmp_path)
    for look in (
        lambda: load(CLIPModel, "nobody/nothing"),
        lambda: load_tower("vision_model", "nothing"),
        lambda: find_tokenizer("nobody/nothing"),
        lambda: normalisation("nobody/nothing"),
    ):
        with pytest.raises(FileNotFoundError, match=f"nor in the cache, .* does not answer: {message}"):
            look()


def test_a_copy_in_the_cache_is_used_without_a_hub(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--somebody--clip" / "snapshots" / ("0" * 40)
    shutil.copytree(saved / "clip", snapshot)
    (tmp_path / "models--somebody--clip" / "refs").mkdir()
    (tmp_path / "models--somebody--clip" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find("somebody/clip") == str(snapshot)
    assert isinstance(load(CLIPModel, "somebody/clip"), CLIPModel)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "a/b/c", "no body/x y"])
def test_what_can_be_no_checkpoint(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"^{name} is "):
        find(name)
