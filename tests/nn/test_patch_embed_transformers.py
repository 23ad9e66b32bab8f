from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from stems import MEAN, STD, check_stem, compiled, normalised, randomise, saved_bytes
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

transformers = pytest.importorskip("transformers")

from transformers.models.bridgetower import modeling_bridgetower  # noqa: E402
from transformers.models.clip import modeling_clip  # noqa: E402
from transformers.models.flava import modeling_flava  # noqa: E402
from transformers.models.qwen2_vl import modeling_qwen2_vl  # noqa: E402
from transformers.models.siglip import modeling_siglip  # noqa: E402
from transformers.models.siglip2 import modeling_siglip2  # noqa: E402
from transformers.models.vit import modeling_vit  # noqa: E402

from vlmfast.nn import transformers as stems  # noqa: E402

SIZES = {"hidden_size": 24, "image_size": 12, "patch_size": 4}
TOWER = {**SIZES, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
SIGLIP2 = {"hidden_size": 24, "patch_size": 4, "num_patches": 9}
SHAPES = torch.tensor([[3, 3], [2, 5], [1, 7], [1, 1], [5, 2]])


def images(batch: int = 3, height: int = 12, width: int = 12) -> Tensor:
    return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8)


def mask(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.4


@dataclass
class Case:
    original: Callable[[], nn.Module]
    stem: type[nn.Module]
    args: list[tuple[Any, ...]] = field(default_factory=lambda: [()])
    sizes: list[tuple[int, int]] = field(default_factory=lambda: [(12, 12)])


def layers(model: nn.Module) -> nn.Module:
    """What has the tower's layers: in transformers 5.0 a module inside."""
    return getattr(model, "vision_model", model)


PATCHES_TAKE = inspect.signature(modeling_vit.ViTPatchEmbeddings.forward).parameters
BIGGER = [(12, 12), (16, 8), (9, 14), (13, 12)]
CASES = {
    "clip": Case(
        lambda: modeling_clip.CLIPVisionEmbeddings(transformers.CLIPVisionConfig(**SIZES)),
        stems.CLIPVisionEmbeddings,
    ),
    "clip interpolated": Case(
        lambda: modeling_clip.CLIPVisionEmbeddings(transformers.CLIPVisionConfig(**SIZES)),
        stems.CLIPVisionEmbeddings,
        [(True,)],
        BIGGER,
    ),
    "bridgetower": Case(
        lambda: modeling_bridgetower.BridgeTowerVisionEmbeddings(transformers.BridgeTowerVisionConfig(**SIZES)),
        stems.BridgeTowerVisionEmbeddings,
    ),
    "bridgetower interpolated": Case(
        lambda: modeling_bridgetower.BridgeTowerVisionEmbeddings(transformers.BridgeTowerVisionConfig(**SIZES)),
        stems.BridgeTowerVisionEmbeddings,
        [(True,)],
        BIGGER,
    ),
    "siglip": Case(
        lambda: modeling_siglip.SiglipVisionEmbeddings(transformers.SiglipVisionConfig(**SIZES)),
        stems.SiglipVisionEmbeddings,
        sizes=[(12, 12), (14, 13)],
    ),
    "siglip interpolated": Case(
        lambda: modeling_siglip.SiglipVisionEmbeddings(transformers.SiglipVisionConfig(**SIZES)),
        stems.SiglipVisionEmbeddings,
        [(True,)],
        BIGGER,
    ),
    "vit patches": Case(
        lambda: modeling_vit.ViTPatchEmbeddings(transformers.ViTConfig(**SIZES)),
        stems.ViTPatchEmbeddings,
        # transformers 5.0's take other sizes only when told to.
        sizes=[(12, 12)] if "interpolate_pos_encoding" in PATCHES_TAKE else [(12, 12), (9, 14)],
    ),
    "vit": Case(
        lambda: modeling_vit.ViTEmbeddings(
            transformers.ViTConfig(**SIZES, hidden_dropout_prob=0.0), use_mask_token=True
        ),
        stems.ViTEmbeddings,
        [(), (mask(3, 9),), (mask(3, 9).long(), None)],
    ),
    "vit interpolated": Case(
        lambda: modeling_vit.ViTEmbeddings(transformers.ViTConfig(**SIZES, hidden_dropout_prob=0.0)),
        stems.ViTEmbeddings,
        [(None, True)],
        BIGGER,
    ),
    "flava": Case(
        lambda: modeling_flava.FlavaImageEmbeddings(transformers.FlavaImageConfig(**SIZES), use_mask_token=True),
        stems.FlavaImageEmbeddings,
        [(), (mask(3, 9),), (mask(3, 3, 3),)],
    ),
    "flava interpolated": Case(
        lambda: modeling_flava.FlavaImageEmbeddings(transformers.FlavaImageConfig(**SIZES), use_mask_token=True),
        stems.FlavaImageEmbeddings,
        [(mask(3, 8), True)],
        [(16, 8)],
    ),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    original = randomise(CASES[name].original())
    return original, CASES[name].stem.from_original(original, mean=MEAN, std=STD)


def siglip2() -> tuple[nn.Module, nn.Module]:
    original = randomise(modeling_siglip2.Siglip2VisionEmbeddings(transformers.Siglip2VisionConfig(**SIGLIP2)))
    return original, stems.Siglip2VisionEmbeddings.from_original(original, mean=MEAN, std=STD)


def qwen() -> tuple[nn.Module, nn.Module]:
    original = randomise(modeling_qwen2_vl.PatchEmbed(patch_size=4, temporal_patch_size=2, embed_dim=24))
    return original, stems.Qwen2VLPatchEmbed.from_original(original, mean=MEAN, std=STD)


@pytest.mark.parametrize("name", CASES)
class TestImages:
    def test_floats_give_what_the_original_gives(self, name: str) -> None:
        original, stem = pair(name)
        for size in CASES[name].sizes:
            for args in CASES[name].args:
                check_stem(original, stem, normalised(images(3, *size)), *args)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, name: str, dtype: torch.dtype) -> None:
        original, stem = pair(name)
        original.to(dtype)
        for args in CASES[name].args:
            check_stem(original, stem, normalised(images(3, *CASES[name].sizes[-1])).to(dtype), *args)

    def test_uint8_gives_what_the_original_gives_for_normalised_floats(self, name: str) -> None:
        original, stem = pair(name)
        for size in CASES[name].sizes:
            pixels = images(3, *size)
            floats = normalised(pixels), normalised(pixels, torch.float64)
            check_stem(original, stem, pixels, *CASES[name].args[-1], floats=floats)
        channels_first = CASES[name].stem.from_original(original, mean=MEAN, std=STD, layout="NCHW")
        check_stem(original, channels_first, pixels.permute(0, 3, 1, 2), *CASES[name].args[-1], floats=floats)

    def test_autocast(self, name: str) -> None:
        original, stem = pair(name)
        pixels = images(3, *CASES[name].sizes[-1])
        floats = normalised(pixels), normalised(pixels, torch.float64)
        for args in CASES[name].args:
            check_stem(original, stem, floats[0], *args, autocast=torch.bfloat16)
            check_stem(original, stem, pixels, *args, floats=floats, autocast=torch.bfloat16)

    def test_compiled_in_one_graph(self, name: str) -> None:
        _, stem = pair(name)
        graph, uint8 = compiled(stem), images(3, *CASES[name].sizes[-1])
        # Positions are interpolated for floats as for uint8.
        for pixels in (uint8, normalised(uint8))[: 1 if "interpolated" in name else 2]:
            expected, grads = step(stem, stem, pixels, *CASES[name].args[-1])
            tokens, compiled_grads = step(graph, stem, pixels, *CASES[name].args[-1])
            torch.testing.assert_close(tokens, expected)
            torch.testing.assert_close(compiled_grads, grads)

    def test_parameters_are_the_original_s(self, name: str) -> None:
        original, stem = pair(name)
        assert isinstance(stem, type(original))
        assert list(stem.state_dict()) == list(original.state_dict())
        assert [id(p) for p in stem.parameters()] == [id(p) for p in original.parameters()]
        assert [id(b) for b in stem.buffers()] == [id(b) for b in original.buffers()]
        fresh = randomise(CASES[name].original())
        stem.load_state_dict(fresh.state_dict())
        pixels, args = normalised(images(3, *CASES[name].sizes[-1])), CASES[name].args[-1]
        torch.testing.assert_close(stem(pixels, *args), fresh(pixels, *args))

    def test_copies(self, name: str) -> None:
        _, stem = pair(name)
        pixels, args = images(3, *CASES[name].sizes[-1]), CASES[name].args[-1]
        for twin in (copy.deepcopy(stem), pickle.loads(pickle.dumps(stem))):
            assert torch.equal(twin(pixels, *args), stem(pixels, *args))
            assert not {id(p) for p in twin.parameters()} & {id(p) for p in stem.parameters()}

    def test_backward_keeps_the_pixels_only(self, name: str) -> None:
        _, stem = pair(name)
        pixels = images(16, *CASES[name].sizes[0])
        args = [a.repeat(6, *[1] * (a.dim() - 1))[:16] if isinstance(a, Tensor) else a for a in CASES[name].args[0]]
        masks = sum(a.shape[0] * (a[0].numel() + 1) for a in args if isinstance(a, Tensor))
        matrices = 4 * 3 * sum(side // 4 for side in CASES[name].sizes[0])
        assert saved_bytes(lambda: stem(pixels, *args), list(stem.parameters())) <= pixels.numel() + masks + matrices

    def test_no_longer_eligible(self, name: str) -> None:
        """A hook on what the stem stands in for, as PEFT registers, makes the original run, and the hook."""
        original, stem = pair(name)
        pixels, args = images(3, *CASES[name].sizes[-1]), CASES[name].args[-1]
        expected = original(normalised(pixels), *args)
        projection = next(m for m in stem.modules() if isinstance(m, nn.Conv2d))
        calls = []
        handle = projection.register_forward_hook(lambda *_: calls.append(1))
        assert "hooks" in stem.reason_not_eligible()
        torch.testing.assert_close(stem(pixels, *args), expected)
        assert calls == [1]
        handle.remove()
        assert stem.reason_not_eligible() is None
        torch.testing.assert_close(stem(pixels, *args), expected)
        assert calls == [1]
        stem.double()
        torch.testing.assert_close(stem(normalised(pixels, torch.float64), *args).float(), expected)
        torch.testing.assert_close(stem(pixels, *args).float(), expected)

    def test_uint8_without_mean_and_std_raises(self, name: str) -> None:
        original, _ = pair(name)
        stem = CASES[name].stem.from_original(original)
        with pytest.raises(ValueError, match="uint8 pixels need mean and std"):
            stem(images())


def step(call: Callable[..., Tensor], module: nn.Module, *inputs: Any) -> tuple[Tensor, list[Tensor | None]]:
    module.zero_grad(set_to_none=True)
    tokens = call(*inputs)
    tokens.square().sum().backward()
    return tokens, [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def positions_in_float64(position: Tensor, sizes: Tensor, length: int) -> Tensor:
    """What Siglip2's resize_positional_embeddings computes, in float32 on CPUs."""
    grid, rows = position.permute(2, 0, 1)[None], []
    for size in sizes.tolist():
        row = nn.functional.interpolate(grid, size, mode="bilinear", antialias=True)[0].flatten(1).T
        rows.append(torch.cat([row, row[:1].expand(length - len(row), -1)]))
    return torch.stack(rows)


class TestSiglip2:
    """Patches of images of many sizes, padded to the longest."""

    def check(self, original: nn.Module, stem: nn.Module, pixels: Tensor, **options: Any) -> None:
        exact = copy.deepcopy(original).double()
        exact.resize_positional_embeddings = lambda position, sizes, max_length: positions_in_float64(
            position, sizes, max_length
        )
        check_stem(original, stem, pixels, SHAPES, exact=exact, **options)

    def pixels(self, dtype: torch.dtype | None = None) -> Tensor:
        """The same in every dtype; None is uint8."""
        size = (len(SHAPES), 10, 4 * 4 * 3)
        rows = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
        rows[torch.arange(10) >= SHAPES.prod(1, keepdim=True)] = 0
        if dtype is None:
            return rows
        flat = rows.view(len(SHAPES), 1, -1, 3)
        return normalised(flat, dtype).permute(0, 2, 3, 1).reshape(rows.shape)

    def test_floats_give_what_the_original_gives(self) -> None:
        original, stem = siglip2()
        self.check(original, stem, self.pixels(torch.float32))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, dtype: torch.dtype) -> None:
        original, stem = siglip2()
        original.to(dtype)
        self.check(original, stem, self.pixels(torch.float32).to(dtype))

    def test_uint8_and_autocast(self) -> None:
        original, stem = siglip2()
        pixels = self.pixels()
        floats = self.pixels(torch.float32), self.pixels(torch.float64)
        self.check(original, stem, pixels, floats=floats)
        self.check(original, stem, pixels, floats=floats, autocast=torch.bfloat16)

    def test_compiled_in_one_graph(self) -> None:
        _, stem = siglip2()
        graph = compiled(stem)
        for pixels in (self.pixels(), self.pixels(torch.float32)):
            expected, grads = step(stem, stem, pixels, SHAPES)
            tokens, compiled_grads = step(graph, stem, pixels, SHAPES)
            torch.testing.assert_close(tokens, expected)
            torch.testing.assert_close(compiled_grads, grads)

    def test_backward_keeps_the_pixels_only(self) -> None:
        _, stem = siglip2()
        pixels = self.pixels()
        saved = saved_bytes(lambda: stem(pixels, SHAPES), list(stem.parameters()))
        assert saved <= pixels.numel() + SHAPES.numel() * 8

    def test_nothing_is_read_back_from_the_device(self) -> None:
        """A fake tensor holds nothing to read: whoever tries raises."""
        with FakeTensorMode(), torch.device("cuda"):
            original = modeling_siglip2.Siglip2VisionEmbeddings(transformers.Siglip2VisionConfig(**SIGLIP2))
            stem = stems.Siglip2VisionEmbeddings.from_original(original, mean=MEAN, std=STD)
            pixels = torch.zeros(5, 10, 48, dtype=torch.uint8)
            assert stem(pixels, torch.zeros(5, 2, dtype=torch.int64)).shape == (5, 10, 24)

    def test_model_with_attention_mask(self) -> None:
        config = transformers.Siglip2VisionConfig(**{**TOWER, **SIGLIP2})
        del config.image_size
        model = transformers.Siglip2VisionModel(config).eval()
        pixels = self.pixels(torch.float32)
        attention_mask = (torch.arange(10) < SHAPES.prod(1, keepdim=True)).long()
        expected = model(pixels, pixel_attention_mask=attention_mask, spatial_shapes=SHAPES)
        embeddings = layers(model).embeddings
        layers(model).embeddings = stems.Siglip2VisionEmbeddings.from_original(embeddings)
        out = model(pixels, pixel_attention_mask=attention_mask, spatial_shapes=SHAPES)
        torch.testing.assert_close(out.last_hidden_state, expected.last_hidden_state)
        # What padding holds changes nothing where there is no padding.
        junk = pixels.masked_fill(attention_mask[:, :, None] == 0, 9.0)
        out = model(junk, pixel_attention_mask=attention_mask, spatial_shapes=SHAPES)
        torch.testing.assert_close(out.pooler_output, expected.pooler_output)

    def test_errors(self) -> None:
        original, stem = siglip2()
        with pytest.raises(ValueError, match=r"with at most 10 patches; got \[4, 3\]"):
            stem(self.pixels(torch.float32), torch.tensor([[4, 3]] * 5))
        original.patch_embedding.register_forward_pre_hook(lambda *_: None)
        with pytest.raises(ValueError, match="not eligible: its Linear has hooks"):
            stems.Siglip2VisionEmbeddings.from_original(original)

    def test_no_longer_eligible(self) -> None:
        original, stem = siglip2()
        pixels = self.pixels()
        expected = original(self.pixels(torch.float32), SHAPES)
        stem.patch_embedding.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(stem(pixels, SHAPES), expected)


class TestQwen2VL:
    def pixels(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        rows = torch.randint(0, 256, (11, 3 * 2 * 4 * 4), dtype=torch.uint8)
        values = rows.view(11, 3, -1).permute(0, 2, 1)[:, :, None]
        floats = (normalised(values, dtype).reshape(11, -1) for dtype in (torch.float32, torch.float64))
        return rows, (next(floats), next(floats))

    def test_values(self) -> None:
        original, stem = qwen()
        pixels, floats = self.pixels()
        check_stem(original, stem, floats[0])
        check_stem(original, stem, pixels, floats=floats)
        check_stem(original, stem, floats[0], autocast=torch.bfloat16)
        check_stem(original, stem, pixels, floats=floats, autocast=torch.bfloat16)
        original.bfloat16()
        check_stem(original, stem, floats[0].bfloat16())

    def test_compiled_in_one_graph(self) -> None:
        _, stem = qwen()
        pixels, floats = self.pixels()
        graph = compiled(stem)
        for x in (pixels, floats[0]):
            torch.testing.assert_close(graph(x), stem(x))

    def test_backward_keeps_the_pixels_only(self) -> None:
        _, stem = qwen()
        pixels, _ = self.pixels()
        assert saved_bytes(lambda: stem(pixels), list(stem.parameters())) <= pixels.numel()

    def test_no_longer_eligible(self) -> None:
        original, stem = qwen()
        pixels, floats = self.pixels()
        expected = original(floats[0])
        stem.proj.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(stem(pixels), expected)

    def test_vision_model(self) -> None:
        config = transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(
            depth=1, embed_dim=32, hidden_size=32, num_heads=2, patch_size=4
        )
        visual = modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel._from_config(config).eval()
        rows = torch.randint(0, 256, (4 * 6 + 4 * 4, 3 * 2 * 4 * 4), dtype=torch.uint8)
        values = rows.view(len(rows), 3, -1).permute(0, 2, 1)[:, :, None]
        grid = torch.tensor([[1, 4, 6], [1, 4, 4]])
        expected = visual(normalised(values).reshape(rows.shape), grid_thw=grid).pooler_output
        visual.patch_embed = stems.Qwen2VLPatchEmbed.from_original(visual.patch_embed, mean=MEAN, std=STD)
        torch.testing.assert_close(visual(rows, grid_thw=grid).pooler_output, expected)


def test_swapped_into_a_model_that_trains(tmp_path) -> None:
    """An optimizer made before the swap; ten steps of both models end with the same parameters."""
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER))
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, twin)]
    tower = layers(model)
    tower.embeddings = stems.CLIPVisionEmbeddings.from_original(tower.embeddings, mean=MEAN, std=STD)
    start = tower.embeddings.patch_embedding.weight.detach().clone()
    for _ in range(10):
        pixels = images()
        for optimizer, m, x in zip(optimizers, (model, twin), (pixels, normalised(pixels)), strict=True):
            optimizer.zero_grad()
            m(x).last_hidden_state.square().mean().backward()
            optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    assert (tower.embeddings.patch_embedding.weight - start).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = transformers.CLIPVisionModel.from_pretrained(tmp_path)
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_hook_of_frozen_towers_fires() -> None:
    """transformers' enable_input_require_grads hooks the convolution, for checkpointing under frozen parameters."""
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER)).requires_grad_(False)
    tower = layers(model)
    tower.embeddings = stems.CLIPVisionEmbeddings.from_original(tower.embeddings, mean=MEAN, std=STD)
    assert not model(images()).last_hidden_state.requires_grad
    model.enable_input_require_grads()
    assert model(images()).last_hidden_state.requires_grad


def test_frozen_parameters_get_no_gradient() -> None:
    original, stem = pair("clip")
    original.patch_embedding.requires_grad_(False)
    original.class_embedding.requires_grad_(False)
    step(stem, stem, images())
    assert stem.patch_embedding.weight.grad is stem.class_embedding.grad is None
    assert stem.position_embedding.weight.grad.abs().min() > 0


@pytest.mark.parametrize("name", ["vit", "flava"])
def test_dropout_is_the_original_s(name: str) -> None:
    original, stem = pair(name)
    original.dropout.p = 0.5
    pixels = normalised(images())
    for mode in (stem.train, stem.eval):
        mode()
        original.train(stem.training)
        torch.manual_seed(5)
        expected = original(pixels)
        torch.manual_seed(5)
        torch.testing.assert_close(stem(pixels), expected)
    assert (original.train()(pixels) == 0).float().mean() > 0.3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stride": 2}, r"its stride \(2, 2\) is not its kernel \(4, 4\)"),
        ({"padding": 1}, r"padding \(1, 1\)"),
        ({"dilation": 2}, r"dilation \(2, 2\)"),
        ({"groups": 3}, "3 groups"),
        ({"dtype": torch.float64}, "its weight is torch.float64"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_not_eligible_convolutions_are_refused_with_the_reason(options: dict[str, Any], reason: str) -> None:
    original, _ = pair("clip")
    original.patch_embedding = nn.Conv2d(3, 24, 4, **{"stride": 4, **options})
    with pytest.raises(ValueError, match=f"CLIPVisionEmbeddings.from_original: module is not eligible: .*{reason}"):
        stems.CLIPVisionEmbeddings.from_original(original)


def test_not_eligible_modules_are_refused_with_the_reason() -> None:
    def refused(change: Callable[[nn.Module], Any], reason: str) -> None:
        original, _ = pair("vit")
        change(original)
        with pytest.raises(ValueError, match=reason):
            stems.ViTEmbeddings.from_original(original)

    refused(lambda m: m.patch_embeddings.register_forward_hook(lambda *_: None), "its ViTPatchEmbeddings has hooks")
    refused(lambda m: m.patch_embeddings.projection.register_full_backward_hook(lambda *_: None), "Conv2d has hooks")
    refused(lambda m: m.patch_embeddings.projection.register_full_backward_pre_hook(lambda *_: None), "has hooks")
    refused(lambda m: nn.utils.parametrizations.weight_norm(m.patch_embeddings.projection), "it is a Parametrized")
    refused(
        lambda m: setattr(m.patch_embeddings.projection, "forward", lambda x: x), "forward of its Conv2d was replaced"
    )
    refused(lambda m: setattr(m, "forward", lambda x: x), "not eligible: its forward was replaced")
    refused(lambda m: setattr(m.patch_embeddings, "projection", nn.Identity()), "it is a Identity")


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_hooked_positions_are_refused(name: str) -> None:
    original, _ = pair(name)
    original.position_embedding.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="its Embedding has hooks"):
        CASES[name].stem.from_original(original)


def test_errors() -> None:
    original, stem = pair("clip")
    with pytest.raises(TypeError, match=r"must be a transformers.models.clip.*; got CLIPVisionEmbeddings"):
        stems.CLIPVisionEmbeddings.from_original(stem)
    with pytest.raises(TypeError, match=r"must be a transformers.models.vit.*; got CLIPVisionEmbeddings"):
        stems.ViTEmbeddings.from_original(original)
    with pytest.raises(ValueError, match="mean and std must be given together"):
        stems.CLIPVisionEmbeddings.from_original(original, mean=MEAN)
    with pytest.raises(ValueError, match="layout must be NHWC or NCHW; got 'HWC'"):
        stems.CLIPVisionEmbeddings.from_original(original, layout="HWC")
    with pytest.raises(ValueError, match=r"must be \(12, 12\) as configured.*; got \(16, 12\)"):
        stem(images(1, 16, 12))
    with pytest.raises(ValueError, match="pixels must have 4 dimensions"):
        stem(images()[0])
    with pytest.raises(ValueError, match=r"must be NHWC with 3 channels, see layout; got \(3, 3, 12, 12\)"):
        stem(images().permute(0, 3, 1, 2), True)  # never guessed
    original = CASES["vit interpolated"].original()
    stem = stems.ViTEmbeddings.from_original(original)
    with pytest.raises(ValueError, match="needs a mask token"):
        stem(normalised(images()), mask(3, 9))
