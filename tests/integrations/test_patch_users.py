"""What people do to models beside patching them: adapters, pruning, parametrisations, compiling, copying, exporting."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from patch_models import MODELS, Known, clip
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import vlmfast

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)


class LoRA(nn.Module):
    """As peft's: it calls what it adapts, and shows that one's weight and bias."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        nn.init.constant_(self.down.weight, 0.1)
        nn.init.constant_(self.up.weight, -0.2)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def parts(model: nn.Module, known: Known) -> Iterator[nn.Module]:
    for part in known.replaced:
        if part not in ("", "loss"):
            yield model.get_submodule(part)


def layers(model: nn.Module, known: Known) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parent, name and module of everything inside of the parts."""
    for part in parts(model, known):
        for parent in list(part.modules()):
            for name, child in list(parent.named_children()):
                yield parent, name, child


def adapters(model: nn.Module, known: Known) -> None:
    for parent, name, child in layers(model, known):
        if type(child) is nn.Linear:
            setattr(parent, name, LoRA(child))


def weight_norm(model: nn.Module, known: Known) -> None:
    for _, _, child in layers(model, known):
        if isinstance(child, LAYERS):
            parametrizations.weight_norm(child)
            nn.init.constant_(child.parametrizations.weight.original0, 0.3)


def pruning(model: nn.Module, known: Known) -> None:
    for _, _, child in layers(model, known):
        if isinstance(child, (*LAYERS, nn.Embedding)):
            prune.l1_unstructured(child, "weight", 0.5)


def parametrised_part(model: nn.Module, known: Known) -> None:
    for part in parts(model, known):
        name = next(name for name, parameter in part._parameters.items() if parameter is not None)
        parametrize.register_parametrization(part, name, Twice())


def compiled_children(model: nn.Module, known: Known) -> None:
    for part in parts(model, known):
        for name, child in list(part.named_children()):
            if not isinstance(child, nn.ModuleList):
                setattr(part, name, torch.compile(child, backend="eager"))


def compiled_in_place(model: nn.Module, known: Known) -> None:
    for part in parts(model, known):
        part.compile(backend="eager")


def compiled_parts(model: nn.Module, known: Known) -> None:
    for path in known.replaced:
        if path not in ("", "loss"):
            owner, _, leaf = path.rpartition(".")
            part = model.get_submodule(path)
            setattr(model.get_submodule(owner), leaf, torch.compile(part, backend="eager"))


def tables_with_a_largest_norm(model: nn.Module, known: Known) -> None:
    for _, _, child in layers(model, known):
        if isinstance(child, nn.Embedding):
            child.max_norm = 0.5


def other_eps(model: nn.Module, known: Known) -> None:
    for _, _, child in layers(model, known):
        if hasattr(child, "eps"):
            child.eps = 0.1


def results(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**inputs)["loss"]
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        floor = 2e-5 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=floor, msg=lambda m, n=name: f"{n}: {m}")


# What cannot be unpatched once it was done to a patched model, in which, and why.
KEPT = {
    "parametrised_part": (("clip", "mllama", "flamingo"), "became a Parametrized"),
    "compiled_parts": (("clip", "mllama", "flamingo"), "is inside of a OptimizedModule"),
    "pruning": (("flamingo",), "has other parameters"),
}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        *itertools.product(
            [adapters, weight_norm, pruning, parametrised_part, other_eps], ["clip", "mllama", "flamingo"]
        ),
        *itertools.product(
            [compiled_children, compiled_in_place, compiled_parts, tables_with_a_largest_norm], ["clip"]
        ),
    ],
)
def test_changed_before_and_after_it_is_patched(change: Callable[[nn.Module, Known], None], name: str) -> None:
    torch.manual_seed(0)
    known = MODELS[name]
    model, inputs = known.make()
    before, after = copy.deepcopy(model), copy.deepcopy(model)
    change(model, known)
    expected = results(model, inputs)
    change(before, known)
    report = vlmfast.patch(before)
    # A compiled part has another name, and one with parametrisations is a subclass: left, both.
    places = {place.replace("._orig_mod", "") for place, _, _ in report.replaced + report.left}
    assert places == set(known.replaced), str(report)
    assert_same(results(before, inputs), expected)
    vlmfast.unpatch(before)
    assert_same(results(before, inputs), expected)
    vlmfast.patch(after)
    change(after, known)
    assert_same(results(after, inputs), expected)
    names, why = KEPT.get(change.__name__, ((), ""))
    if name in names:
        with pytest.raises(ValueError, match=f"^unpatch: its .* {why}"):
            vlmfast.unpatch(after)
    else:
        vlmfast.unpatch(after)
        assert not any(type(module).__module__.startswith("vlmfast") for module in after.modules())
    assert_same(results(after, inputs), expected)


@pytest.mark.parametrize("name", list(MODELS))
def test_copied_pickled_and_saved_while_patched(name: str) -> None:
    model, inputs = MODELS[name].make()
    model.eval()
    expected, keys = results(model, inputs), list(model.state_dict())
    vlmfast.patch(model)
    ours = results(model, inputs)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)
    for other in copies:
        assert_same(results(other, inputs), ours)
        assert not vlmfast.patch(other).replaced
        vlmfast.unpatch(other)
        assert not any(type(module).__module__.startswith("vlmfast") for module in other.modules())
        assert list(other.state_dict()) == keys
        found = results(other, inputs)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert_same(results(model, inputs), ours)


@pytest.mark.parametrize("name", ["clip", "vit", "mllama", "idefics", "open_clip", "flamingo", "timm"])
def test_what_was_set_while_patched_stays(name: str) -> None:
    """Attributes, buffers, hooks, modes and submodules, of parts and of what is in them."""
    known = MODELS[name]
    model, inputs = known.make()
    originals = list(parts(model, known))
    for part in originals:
        part.there_before = 1
    vlmfast.patch(model)
    calls: list[str] = []
    for part in parts(model, known):
        del part.there_before
        part._private, part.public = 2, 3
        part.register_buffer("extra", torch.ones(2), persistent=False)
        part.register_forward_hook(lambda *_: calls.append("forward"))
        part.register_full_backward_hook(lambda *_: calls.append("backward"))
        part.register_module("more", nn.Identity())
        part.eval()
        inner = next(child for child in part.children())
        inner._inner = 4
        inner.register_forward_hook(lambda *_: calls.append("inner"))
    results(model, inputs)
    patched_calls, n = sorted(calls), len(originals)
    vlmfast.unpatch(model)
    assert list(parts(model, known)) == originals
    for part in originals:
        assert not hasattr(part, "there_before")
        assert (part._private, part.public, next(iter(part.children()))._inner) == (2, 3, 4)
        assert "extra" in dict(part.named_buffers())
        assert "extra" not in part.state_dict()
        assert type(part.more) is nn.Identity
        assert not part.training
        assert not any(module.training for module in part.modules())
    calls.clear()
    results(model, inputs)
    assert sorted(calls) == patched_calls
    assert calls.count("forward") == calls.count("backward") == n


def test_submodules_put_into_new_modules_while_patched_go_to_the_originals() -> None:
    """Ours in place of flamingo's has submodules of its own; a wrapper around one of them gets the original's."""
    model, inputs = MODELS["flamingo"].make()
    to_q, norm, attn = model.attend.attn.to_q, model.attend.attn.norm, model.attend.attn
    vlmfast.patch(model)
    model.attend.attn.to_q = LoRA(model.attend.attn.to_q)
    model.attend.attn = Around(model.attend.attn)
    model.attend.ff = nn.Sequential(*model.attend.ff, nn.Dropout(0.0))
    expected = results(model, inputs)
    vlmfast.unpatch(model)
    assert model.attend.attn.inner is attn
    assert attn.norm is norm
    assert attn.to_q.base_layer is to_q
    assert len(model.attend.ff) == 5
    assert not any(type(module).__module__.startswith("vlmfast") for module in model.modules())
    assert_same(results(model, inputs), expected)


@pytest.mark.parametrize("name", ["mllama", "idefics"])
def test_gradient_checkpointing_set_while_patched_stays(name: str) -> None:
    model, inputs = MODELS[name].make()
    expected = results(model.train(), inputs)
    vlmfast.patch(model)
    model.gradient_checkpointing_enable()
    assert_same(results(model, inputs), expected)
    vlmfast.unpatch(model)
    assert_same(results(model, inputs), expected)
    vlmfast.patch(model)
    model.gradient_checkpointing_disable()
    vlmfast.unpatch(model)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_a_forward_put_back_by_others_is_no_obstacle() -> None:
    accelerate = pytest.importorskip("accelerate")
    for name in ("clip", "vit", "mllama", "flamingo"):
        known = MODELS[name]
        model, inputs = known.make()
        expected = results(model, inputs)

        def on_and_off(model: nn.Module) -> None:
            accelerate.cpu_offload(model, execution_device="cpu")
            accelerate.hooks.remove_hook_from_submodules(model)

        on_and_off(model)
        report = vlmfast.patch(model)
        assert {path for path, _, _ in report.replaced} == set(known.replaced), str(report)
        on_and_off(model)
        vlmfast.unpatch(model)
        found = results(model, inputs)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        assert not any(type(module).__module__.startswith("vlmfast") for module in model.modules())


def test_subclasses_are_left_with_the_reason() -> None:
    model, _ = clip()
    stem = model.vision_model.embeddings
    stem.__class__ = type("Mine", (type(stem),), {})
    model.__class__ = type("MyModel", (type(model),), {})
    report = vlmfast.patch(model)
    assert not report.replaced
    assert report.left == [
        ("", "MyModel", "it is a subclass of CLIPModel, and may compute something else"),
        ("vision_model.embeddings", "Mine", "it is a subclass of CLIPVisionEmbeddings, and may compute something else"),
    ]


def test_losses_of_open_clips_main_branch() -> None:
    """They have no use_horovod, and SigLipLoss a chunk_size."""
    losses = pytest.importorskip("open_clip.loss")
    image, text, scale = *nn.functional.normalize(torch.randn(2, 6, 8), dim=-1), torch.tensor(9.0)
    for loss, rest in (
        (losses.ClipLoss(), (scale,)),
        (losses.CoCaLoss(2.0, 0.5), (torch.randn(6, 3, 7), torch.randint(7, (6, 3)), scale)),
        (losses.SigLipLoss(), (scale, torch.tensor(-1.0))),
    ):
        expected = loss(image, text, *rest)
        loss.__dict__.pop("use_horovod", None)
        loss.chunk_size = 2
        assert vlmfast.patch(loss).replaced
        torch.testing.assert_close(loss(image, text, *rest), expected)
    loss = losses.ClipLoss()
    loss.use_horovod = True
    assert vlmfast.patch(loss).left == [("", "ClipLoss", "it uses horovod")]


def test_towers_of_two_dtypes_under_autocast() -> None:
    model, inputs = clip()
    model.text_projection.register_forward_hook(lambda _, args, out: out.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**inputs)
        vlmfast.patch(model)
        found = model(**inputs)
    assert found.image_embeds.dtype != found.text_embeds.dtype or found.logits_per_image is None
    torch.testing.assert_close(found.loss, expected.loss.float(), rtol=0.02, atol=0.02)


def test_dynamic_quantisation_of_a_patched_model() -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no engine for quantised products here")
    for name in ("mllama", "flamingo"):
        model, inputs = MODELS[name].make()
        model.eval()
        quantised = [
            torch.ao.quantization.quantize_dynamic(each, {nn.Linear}, dtype=torch.qint8)
            for each in (model, vlmfast.patch(copy.deepcopy(model)).model)
        ]
        with torch.no_grad():
            expected, found = (each(**inputs)["loss"] for each in quantised)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
        assert vlmfast.patch(quantised[0]).left or name == "mllama"


class Call(nn.Module):
    def __init__(self, inner: nn.Module, names: list[str], fixed: dict[str, Any]) -> None:
        super().__init__()
        self.inner, self.names, self.fixed = inner, names, fixed

    def forward(self, a: Tensor, b: Tensor | None = None) -> Any:
        return self.inner(**dict(zip(self.names, (a, b), strict=False)), **self.fixed)


IMAGES = torch.randn(4, 3, 32, 32)
NOTHING = dict.fromkeys(["cross_attention_mask", "attention_mask", "full_text_row_masked_out_mask"])


@pytest.mark.parametrize(
    ("name", "path", "names", "tensors", "fixed"),
    [
        ("clip", "vision_model.embeddings", ["pixel_values"], [IMAGES], {}),
        ("vit", "vit.embeddings", ["pixel_values"], [IMAGES], {}),
        ("qwen2-vl", "model.visual.patch_embed", ["hidden_states"], [torch.randn(4, 96)], {}),
        ("timm", "model.patch_embed", ["x"], [IMAGES], {}),
        ("naflex, convolution", "model.embeds", ["x"], [IMAGES], {}),
        ("naflex", "model.embeds", ["x"], [IMAGES], {}),
        (
            "mllama", "model.language_model.layers.1", ["hidden_states", "cross_attention_states"],
            [torch.randn(4, 7, 32), torch.randn(4, 10, 32)], NOTHING,
        ),
        (
            "idefics", "model.gated_cross_attn_layers.0", ["hidden_states", "image_hidden_states"],
            [torch.randn(4, 7, 64), torch.randn(4, 10, 32)], {},
        ),
        ("flamingo", "attend", ["x", "media"], [torch.randn(4, 7, 32), torch.randn(4, 2, 5, 32)], {}),
        ("flamingo", "resampler", ["x"], [torch.randn(4, 2, 5, 32)], {}),
    ],
)  # fmt: skip
def test_exported_with_a_batch_of_any_size(
    name: str, path: str, names: list[str], tensors: list[Tensor], fixed: dict[str, Any]
) -> None:
    model, _ = MODELS[name].make()
    vlmfast.patch(model.eval())
    part = Call(model.get_submodule(path), names, fixed)
    assert type(part.inner).__module__.startswith("vlmfast.nn")
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in tensors)
    exported = torch.export.export(part, tuple(tensors), dynamic_shapes=dynamic, strict=False).module()
    for batch in (4, 2):
        given = [t[:batch] for t in tensors]
        torch.testing.assert_close(exported(*given), part(*given))


def test_gpt2_cross_attention_exported_with_a_batch_of_any_size() -> None:
    from vlmfast.nn.transformers_cross_attention import GPT2CrossAttention

    config = transformers.GPT2Config(n_embd=32, n_head=2, n_layer=1, attn_pdrop=0.0)
    part = Call(GPT2CrossAttention(config, layer_idx=0).eval(), ["hidden_states", "encoder_hidden_states"], {})
    tensors = torch.randn(4, 5, 32), torch.randn(4, 6, 32)
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in tensors)
    exported = torch.export.export(part, tensors, dynamic_shapes=dynamic, strict=False).module()
    given = [t[:2] for t in tensors]
    torch.testing.assert_close(exported(*given)[0], part(*given)[0])
