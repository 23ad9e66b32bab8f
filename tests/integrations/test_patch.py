"""patch(model) beside the unpatched original: outputs, losses, gradients, training, checkpoints; and unpatch."""

from __future__ import annotations

import copy
import inspect
import pickle
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from patch_models import MODELS, Known, clip
from torch import Tensor, nn

import vlmfast


@pytest.fixture(params=list(MODELS))
def known(request: pytest.FixtureRequest) -> Known:
    return MODELS[request.param]


def results(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Loss, features or logits, and gradients by the names of parameters."""
    model.zero_grad()
    output = model(**inputs)
    output["loss"].backward()
    if "labels" in inputs and "logits" not in output:  # of a language model that computes its loss without them
        with torch.no_grad():
            output["logits"] = model(**inputs, return_logits=True)["logits"]
    found = {
        name: output[name].detach() for name in ("loss", "image_embeds", "text_embeds", "logits") if name in output
    }
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def one(value: Any) -> Any:
        if isinstance(value, dict):
            return cast(value, dtype)
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: one(value) for name, value in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_err_at_most_twice_as_much_as_the_originals(known: Known, dtype: torch.dtype) -> None:
    model, inputs = known.make()
    model, inputs = model.train().to(dtype), cast(inputs, dtype)
    next(model.parameters()).requires_grad_(False)
    original, exact, keys = copy.deepcopy(model), copy.deepcopy(model).double(), list(model.state_dict())
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    report = vlmfast.patch(model)
    assert {name: kind for name, kind, _ in report.replaced} == known.replaced
    assert tuple(name for name, _, _ in report.left) == known.left, str(report)
    assert list(model.state_dict()) == keys
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == parameters
    truths = results(exact, cast(inputs, torch.float64))
    eager, ours = results(original, inputs), results(model, inputs)
    assert ours.keys() == eager.keys()
    sizes = {name: truth.abs().max().item() for name, truth in truths.items()}
    errors = {name: (eager[name].double() - truth).abs().max().item() for name, truth in truths.items()}
    epsilon, top = torch.finfo(dtype).eps, max(sizes.values())
    # One bias of hundreds may round luckily in the original: it counts as no better than its typical gradient.
    typical = statistics.median(errors[name] / size for name, size in sizes.items() if size > epsilon * top)
    for name, truth in truths.items():
        error, allowed = (ours[name].double() - truth).abs().max().item(), max(errors[name], typical * sizes[name])
        # Some gradients are zero but for rounding, as those of the keys' biases: of what they are summed from.
        bound = 2 * allowed + epsilon * (4 * sizes[name] + 0.01 * top)
        assert error <= bound, f"{name}: error {error:.2e}, the original {allowed:.2e}, bound {bound:.2e}"


def test_training_follows_the_originals_curve(known: Known) -> None:
    """The optimizer is made before the model is patched."""
    model, inputs = known.make()
    original = copy.deepcopy(model.train())
    curves = []
    for each in (original, model):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3)
        if each is model:
            vlmfast.patch(each)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = each(**inputs)["loss"]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=2e-3, abs=2e-3)
    assert curves[0][-1] < curves[0][0]


def test_unpatched_it_is_the_original_bit_for_bit(known: Known) -> None:
    model, inputs = known.make()
    model.train()
    kinds = [type(module) for module in model.modules()]
    before = results(model, inputs)
    with vlmfast.patch(model) as report:
        assert len(report.replaced) == len(known.replaced)
        again = vlmfast.patch(model)
        assert not again.replaced
        assert len(again.left) == len(known.left)
        model.eval()
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module.training for module in model.modules())
    assert not any("forward" in module.__dict__ or "_vlmfast_patch" in module.__dict__ for module in model.modules())
    model.train()
    after = results(model, inputs)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    vlmfast.unpatch(model)


def test_checkpoints_load_into_the_original(known: Known, tmp_path: Path) -> None:
    model, inputs = known.make()
    loaded, _ = known.make()
    assert loaded.train()(**inputs)["loss"] != model.train()(**inputs)["loss"]
    vlmfast.patch(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded.load_state_dict(torch.load(tmp_path / "state.pt"))
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).train()
    assert all(type(module).__module__.split(".")[0] != "vlmfast" for module in loaded.modules())
    torch.testing.assert_close(loaded(**inputs)["loss"], model(**inputs)["loss"], rtol=1e-4, atol=1e-5)


def test_compiled(known: Known) -> None:
    model, inputs = known.shortened()
    expected = results(model.train(), inputs)
    vlmfast.patch(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for name, value in results(compiled, inputs).items():
        floor = 1e-5 * max(1.0, expected[name.removeprefix("_orig_mod.")].abs().max().item())
        torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")], rtol=1e-3, atol=floor)


def test_no_logits_are_built_with_the_loss_and_all_without() -> None:
    model, inputs = clip()
    vlmfast.patch(model)
    with_loss, without = model(**inputs), model(**{**inputs, "return_loss": None})
    assert with_loss.logits_per_image is None
    assert without.logits_per_image.shape == (4, 4)
    assert isinstance(with_loss, type(without))
    assert len(model(**inputs, return_dict=False)) > 2
    positional = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], None, True)
    torch.testing.assert_close(positional.loss, with_loss.loss)


@pytest.mark.parametrize("name", ["clip", "siglip", "dual encoder", "align"])
def test_the_signature_is_the_originals(name: str) -> None:
    """transformers' Trainer drops the columns of a dataset that forward has no argument for."""
    model, _ = MODELS[name].make()
    expected = inspect.signature(model.forward)
    vlmfast.patch(model)
    assert inspect.signature(model.forward) == expected
    assert "pixel_values" in expected.parameters


def test_only_what_is_asked_for() -> None:
    model, _ = clip()
    assert [new for _, _, new in vlmfast.patch(model, only=["loss"]).replaced] == ["forward without the logits"]
    assert [name for name, _, _ in vlmfast.patch(model, only="patch_embed").replaced] == ["vision_model.embeddings"]
    with pytest.raises(ValueError, match=r"only must be of patch_embed, cross_attention, loss; got stem"):
        vlmfast.patch(model, only=["stem"])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got dict"):
        vlmfast.patch({})
    for only in (5, [1]):
        with pytest.raises(TypeError, match=r"only must be a word or a list of words.*; got (5|\[1\])"):
            vlmfast.patch(model, only=only)


def test_two_models_stay_apart() -> None:
    (one, inputs), (other, _) = clip(), clip()
    vlmfast.patch(one)
    assert type(other.vision_model.embeddings).__module__.startswith("transformers")
    assert other(**inputs).logits_per_image is not None
    copied = copy.deepcopy(one)
    with torch.no_grad():
        copied.logit_scale.zero_()
    assert copied(**inputs).loss != one(**inputs).loss
    vlmfast.unpatch(copied)
    assert one(**inputs).logits_per_image is None


def test_what_cannot_be_replaced_is_left_with_a_reason() -> None:
    model, _ = clip()
    convolution = model.vision_model.embeddings.patch_embedding
    handle = convolution.register_forward_hook(lambda *_: None)
    report = vlmfast.patch(model, only=["patch_embed"])
    assert not report.replaced
    ((name, kind, reason),) = report.left
    assert (name, kind) == ("vision_model.embeddings", "CLIPVisionEmbeddings")
    assert "has hooks" in reason
    assert reason in str(report)
    handle.remove()
    assert vlmfast.patch(model, only=["patch_embed"]).replaced


def test_hooks_of_what_is_replaced_go_on_running() -> None:
    model, inputs = clip()
    calls: list[str] = []
    model.vision_model.embeddings.register_forward_hook(lambda *_: calls.append("stem"))
    model.register_forward_hook(lambda *_: calls.append("model"))
    vlmfast.patch(model)
    model(**inputs)
    assert calls == ["stem", "model"]


def test_compiled_in_full_and_patched_afterwards() -> None:
    model, inputs = MODELS["clip"].shortened()
    torch.compiler.reset()
    compiled = torch.compile(model)
    expected = compiled(**inputs)
    assert expected.logits_per_image is not None
    assert len(vlmfast.patch(compiled).replaced) == 2
    found = compiled(**inputs)
    assert found.logits_per_image is None
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-5)
    vlmfast.unpatch(model)
    assert compiled(**inputs).logits_per_image is not None


def test_uint8_pixels_into_open_clip() -> None:
    both, _ = MODELS["open_clip"].make()
    model, visual = both.model, both.model.visual
    visual.image_mean, visual.image_std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)  # as create_model does
    uint8 = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values) for values in (visual.image_mean, visual.image_std))
    expected = model.encode_image(((uint8 / 255 - mean) / std).permute(0, 3, 1, 2))
    vlmfast.patch(model)
    torch.testing.assert_close(model.encode_image(uint8), expected, rtol=1e-4, atol=1e-4)


def test_losses_of_open_clip_keep_what_they_return() -> None:
    open_clip = pytest.importorskip("open_clip")
    features = nn.functional.normalize(torch.randn(2, 4, 8), dim=-1)
    logits, labels, scale = torch.randn(4, 3, 7), torch.randint(7, (4, 3)), torch.tensor(9.0)
    for weight in (0.5, 0.0):
        loss = open_clip.loss.CoCaLoss(2.0, weight)
        arguments = (*features, logits, labels, scale)
        expected, as_dict = loss(*arguments), loss(*arguments, output_dict=True)
        assert vlmfast.patch(loss).replaced
        torch.testing.assert_close(loss(*arguments), expected)
        torch.testing.assert_close(loss(*arguments, output_dict=True), as_dict)
    loss = open_clip.loss.DistillClipLoss()
    ((_, kind, reason),) = vlmfast.patch(loss).left
    assert kind == "DistillClipLoss"
    assert "teacher" in reason


def test_hooks_inside_of_a_cross_attention_leave_it() -> None:
    model, inputs = MODELS["flamingo"].make()
    calls: list[str] = []
    handle = model.attend.attn.to_q.register_forward_hook(lambda *_: calls.append("to_q"))
    report = vlmfast.patch(model)
    assert [name for name, _, _ in report.replaced] == ["resampler"]
    assert [(name, reason) for name, _, reason in report.left] == [
        ("attend", "its Linear has hooks, which would not run")
    ]
    model(**inputs)
    assert calls == ["to_q"]
    handle.remove()
    assert [name for name, _, _ in vlmfast.patch(model).replaced] == ["attend"]


def test_unpatched_it_keeps_the_parameters_that_it_has() -> None:
    model, inputs = MODELS["flamingo"].make()
    other, _ = MODELS["flamingo"].make()
    vlmfast.patch(model)
    model.load_state_dict(other.state_dict(), assign=True)
    expected, parameters = model(**inputs)["loss"], [id(p) for p in model.parameters()]
    vlmfast.unpatch(model)
    assert [id(p) for p in model.parameters()] == parameters
    torch.testing.assert_close(model(**inputs)["loss"], expected, rtol=1e-4, atol=1e-5)


def test_it_is_not_unpatched_with_other_parameters() -> None:
    model, _ = MODELS["flamingo"].make()
    vlmfast.patch(model)
    model.attend.attn.to_q.register_parameter("bias", nn.Parameter(torch.zeros(32)))
    with pytest.raises(ValueError, match="unpatch: its GatedCrossAttentionBlock has other parameters"):
        vlmfast.unpatch(model)
    assert all(type(child).__module__.startswith("vlmfast") for child in model.children())


def test_patched_and_unpatched_through_a_wrapper_made_in_between() -> None:
    model, inputs = clip()
    vlmfast.patch(model)
    wrapper = nn.ModuleDict({"module": model})
    assert not vlmfast.patch(wrapper).replaced
    vlmfast.unpatch(wrapper)
    assert model(**inputs).logits_per_image is not None
    vlmfast.patch(wrapper)
    vlmfast.unpatch(model)
    assert model(**inputs).logits_per_image is not None


def test_a_model_of_nothing_known() -> None:
    report = vlmfast.patch(nn.Sequential(nn.Linear(2, 2)))
    assert (report.replaced, report.left) == ([], [])


@pytest.mark.parametrize("name", ["clip", "siglip", "align"])
def test_a_loss_of_unequal_batches_is_refused(name: str) -> None:
    model, inputs = MODELS[name].make()
    vlmfast.patch(model)
    with pytest.raises(ValueError, match=r"return_loss=True needs a text for each image; got 3 images and 4 texts"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:3]})


@pytest.mark.parametrize(
    ("name", "part"),
    [("open_clip", "model.visual.transformer"), ("vit", "vit.embeddings.dropout"), ("flamingo", "attend.ff")],
)
def test_modes_of_submodules_stay(name: str, part: str) -> None:
    model, _ = MODELS[name].make()
    model.train().get_submodule(part).eval()
    modes = {path: module.training for path, module in model.named_modules()}
    vlmfast.patch(model)
    assert {path: module.training for path, module in model.named_modules()} == modes
    model.get_submodule(part).train()
    model.get_submodule(part.rpartition(".")[0]).training = False
    modes = {path: module.training for path, module in model.named_modules()}
    vlmfast.unpatch(model)
    assert {path: module.training for path, module in model.named_modules()} == modes


def test_changed_submodules_of_flamingo_are_left() -> None:
    def another_activation(model: Any) -> None:
        model.attend.ff[2] = nn.ReLU()

    def approximate(model: Any) -> None:
        model.attend.ff[2].approximate = "tanh"

    def another_eps(model: Any) -> None:
        model.attend.attn.norm.eps = 0.1

    def one_more(model: Any) -> None:
        model.attend.ff.append(nn.Dropout(0.1))

    for change, reason in (
        (
            another_activation,
            r"ff.2 must be torch.nn.modules.activation.GELU(approximate=none); got torch.nn.modules.a",
        ),
        (approximate, r"(approximate=none); got torch.nn.modules.activation.GELU(approximate=tanh)"),
        (another_eps, r"attn.norm must be torch.nn.modules.normalization.LayerNorm(eps=1e-05); got torch"),
        (one_more, r"ff.4 must be none; got torch.nn.modules.dropout.Dropout()"),
    ):
        model, _ = MODELS["flamingo"].make()
        change(model)
        report = vlmfast.patch(model)
        assert [name for name, _, _ in report.replaced] == ["resampler"]
        ((name, _, found),) = report.left
        assert name == "attend"
        assert reason in found


@pytest.mark.parametrize("name", ["idefics", "mllama"])
def test_a_cross_attention_with_dropout_is_left_and_trains(name: str) -> None:
    model, inputs = MODELS[name].make()
    layers = [module for module in model.modules() if hasattr(module, "cross_attn")]
    for layer in layers:
        layer.cross_attn.dropout = 0.1
    report = vlmfast.patch(model.train())
    assert not [path for path, _, _ in report.replaced if path]  # "" is the loss of the whole model
    left = [reason for path, _, reason in report.left if path]
    assert len(left) == len(layers)
    assert "its dropout is 0.1" in left[0]
    model(**inputs)["loss"].backward()


def test_the_other_dropout_of_idefics_counts_too() -> None:
    model, _ = MODELS["idefics"].make()
    model.model.gated_cross_attn_layers[0].config = 0.2
    left = vlmfast.patch(model).left
    assert [reason[:19] for path, _, reason in left if path] == ["its dropout is 0.2,"]


def test_cast_to_float64_it_is_the_original() -> None:
    model, inputs = clip()
    vlmfast.patch(model)
    model.double()
    out = model(**cast(inputs, torch.float64))
    assert out.loss.dtype == torch.float64
    assert out.logits_per_image is not None


def test_in_float64_it_is_the_original(known: Known) -> None:
    """Cast after it was patched, as before: no kernel takes float64, and PyTorch computes it."""
    model, inputs = known.make()
    model, inputs = model.double(), cast(inputs, torch.float64)
    expected = results(model, inputs)
    model.float()
    vlmfast.patch(model)
    found = results(model.double(), inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_pickled_and_copied_its_forward_is_its_own() -> None:
    model, inputs = clip()
    vlmfast.patch(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.logit_scale.zero_()
        assert other(**inputs).logits_per_image is None
        assert other(**inputs).loss != model(**inputs).loss
        vlmfast.unpatch(other)
        assert other(**inputs).logits_per_image is not None


def test_replicas_of_data_parallel_use_themselves() -> None:
    model, inputs = clip()
    vlmfast.patch(model)
    replica = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        replica._modules[name] = child
    replica._parameters = {"logit_scale": torch.zeros(())}
    assert replica(**inputs).logits_per_image is None
    assert replica(**inputs).loss != model(**inputs).loss
    vlmfast.unpatch(model)
    assert "_replicate_for_data_parallel" not in vars(model)


def test_wrapped_and_unwrapped_by_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # a run in this process has left its own
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model, inputs = clip()
    vlmfast.patch(model)
    expected = model(**inputs).loss
    wrapped = accelerator.prepare_model(model)
    assert wrapped(**inputs).logits_per_image is None
    with pytest.raises(ValueError, match="unpatch: the forward of its CLIPModel was replaced since it was patched"):
        vlmfast.unpatch(model)
    assert wrapped(**inputs).logits_per_image is None
    unwrapped = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert torch.equal(unwrapped(**inputs).loss, expected)
    vlmfast.unpatch(unwrapped)
    assert unwrapped(**inputs).logits_per_image is not None


def test_a_with_block_undoes_its_own_changes_alone() -> None:
    model, inputs = clip()
    vlmfast.patch(model, only="loss")
    with vlmfast.patch(model) as report:
        assert [name for name, _, _ in report.replaced] == ["vision_model.embeddings"]
    assert type(model.vision_model.embeddings).__module__.startswith("transformers")
    assert model(**inputs).logits_per_image is None
    with vlmfast.patch(model):
        vlmfast.unpatch(model)
        assert model(**inputs).logits_per_image is not None
        vlmfast.patch(model)
    assert model(**inputs).logits_per_image is None


def test_a_forward_that_was_deleted_is_replaced_again() -> None:
    model, inputs = clip()
    vlmfast.patch(model)
    del model.forward
    assert model(**inputs).logits_per_image is not None
    assert [name for name, _, _ in vlmfast.patch(model).replaced] == [""]
    vlmfast.unpatch(model)
    assert model(**inputs).logits_per_image is not None


def test_attributes_set_since_are_kept_by_unpatch() -> None:
    both, _ = MODELS["open_clip"].make()
    visual = both.model.visual
    visual.image_mean = visual.image_std = (0.5, 0.5, 0.5)
    vlmfast.patch(both)
    both.model.visual.output_tokens = True
    vlmfast.unpatch(both)
    assert both.model.visual is visual
    assert visual.output_tokens
    assert not {"mean", "std", "layout"} & vars(visual).keys()
    model, inputs = MODELS["timm"].make()
    vlmfast.patch(model)
    model.model.set_input_size(img_size=64)
    images = torch.randn(4, 3, 64, 64)
    expected = model(images, inputs["labels"])["loss"]
    vlmfast.unpatch(model)
    torch.testing.assert_close(model(images, inputs["labels"])["loss"], expected, rtol=1e-4, atol=1e-5)


def test_what_was_taken_out_or_exchanged_since_stays_so() -> None:
    both, _ = MODELS["open_clip"].make()
    vlmfast.patch(both)
    del both.model.visual
    vlmfast.unpatch(both)
    assert not hasattr(both.model, "visual")
    model, _ = MODELS["flamingo"].make()
    vlmfast.patch(model)
    model.attend = nn.Identity()
    vlmfast.unpatch(model)
    assert type(model.attend) is nn.Identity
    assert type(model.resampler).__module__.startswith("flamingo_pytorch")


def test_it_is_not_unpatched_inside_of_a_wrapper() -> None:
    model, _ = MODELS["vit"].make()
    vlmfast.patch(model)
    stem = model.vit.embeddings
    model.vit.embeddings = nn.Sequential(stem)
    with pytest.raises(ValueError, match="unpatch: its ViTEmbeddings is inside of a Sequential since it was patched"):
        vlmfast.unpatch(model)
    model.vit.embeddings = stem
    stem.forward = partial(stem.forward)
    with pytest.raises(ValueError, match="unpatch: the forward of its ViTEmbeddings was replaced since"):
        vlmfast.unpatch(model)


def test_a_module_under_two_names_is_replaced_at_both() -> None:
    model, _ = MODELS["flamingo"].make()
    model.again = model.attend
    report = vlmfast.patch(model)
    assert [name for name, _, _ in report.replaced] == ["resampler", "attend", "again"]
    assert model.again is model.attend
    vlmfast.unpatch(model)
    assert model.again is model.attend
    assert type(model.attend).__module__.startswith("flamingo_pytorch")
