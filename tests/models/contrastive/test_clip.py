"""CLIP against transformers' CLIPModel: checkpoints, features, loss, gradients; and where it departs on purpose."""

import copy
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.generic import can_return_loss

from vlmfast.models.contrastive import CLIPConfig, CLIPModel

EOS, PAD = 49, 0
LENGTHS = (12, 7, 3, 5, 9)


def clip_towers(**text: object) -> dict:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 48, "eos_token_id": EOS, "pad_token_id": PAD}
    return {
        "vision_config": {**size, "image_size": 16, "patch_size": 8},
        "text_config": {**size, "vocab_size": 50, "max_position_embeddings": 12, **special, **text},
        "projection_dim": 24,
    }


def mixed_towers() -> dict:
    return {
        "vision_config": transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
        ),
        "text_config": transformers.BertConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        ),
        "projection_dim": 24,
    }


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def reference() -> transformers.CLIPModel:
    model = transformers.CLIPModel(transformers.CLIPConfig(**clip_towers())).eval()
    with torch.no_grad():  # norms and biases at their initial 1 and 0 would hide a wrong one
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def model() -> CLIPModel:
    return CLIPModel(CLIPConfig(**clip_towers())).eval()


def text_batch(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """Rows of the given lengths, end-of-text token included, padded on the right."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 48, mask.shape)
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = EOS
    return {"input_ids": ids.where(mask == 1, PAD), "attention_mask": mask}


def batch() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(len(LENGTHS), 3, 16, 16), **text_batch()}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    grads = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        grads[name] = parameter.grad
    return grads


def load(path: Path, cls: type = CLIPModel) -> tuple[transformers.PreTrainedModel, dict]:
    loaded, info = cls.from_pretrained(path, output_loading_info=True)
    return loaded, {key: value for key, value in info.items() if value}


def assert_same_state(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    torch.testing.assert_close(actual.state_dict(), expected.state_dict(), rtol=0, atol=0)


class TestParity:
    def test_features_loss_and_gradients(self, reference: transformers.CLIPModel, tmp_path: Path) -> None:
        reference.save_pretrained(tmp_path)
        model, problems = load(tmp_path)
        assert not problems
        inputs = batch()
        expected = reference(**inputs, return_loss=True)
        output = model(**inputs, return_loss=True)
        torch.testing.assert_close(output.image_features, expected.image_embeds)
        torch.testing.assert_close(output.text_features, expected.text_embeds)
        torch.testing.assert_close(output.logits_per_image(), expected.logits_per_image)
        torch.testing.assert_close(output.loss, expected.loss)
        expected.loss.backward()
        output.loss.backward()
        torch.testing.assert_close(gradients(model), gradients(reference))

    def test_same_argument_order(self, reference: transformers.CLIPModel, tmp_path: Path) -> None:
        reference.save_pretrained(tmp_path)
        inputs = batch()
        inputs["attention_mask"][:, 1] = 0  # behind the end-of-text token, causality alone hides the padding
        positions = torch.arange(12).flip(0).expand(len(LENGTHS), -1)
        args = (inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], positions, True)
        torch.testing.assert_close(CLIPModel.from_pretrained(tmp_path)(*args).loss, reference(*args).loss)

    def test_eos_token_id_2_pools_at_the_highest_id(self, tmp_path: Path) -> None:
        reference = transformers.CLIPModel(transformers.CLIPConfig(**clip_towers(eos_token_id=2))).eval()
        reference.save_pretrained(tmp_path)
        model = CLIPModel.from_pretrained(tmp_path)
        inputs = batch()  # the highest id of the vocabulary, 49, ends each row
        torch.testing.assert_close(model(**inputs).text_features, reference(**inputs).text_embeds)
        inputs["input_ids"][1][inputs["input_ids"][1] == 49] = 5
        with pytest.raises(ValueError, match=r"input_ids: .* token 49 .* row 1"):
            model(**inputs)


class TestCheckpoints:
    def test_transformers_reads_ours(self, model: CLIPModel, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path)
        loaded, problems = load(tmp_path, transformers.CLIPModel)
        assert not problems
        assert_same_state(loaded, model)
        inputs = batch()
        torch.testing.assert_close(loaded(**inputs, return_loss=True).loss, model(**inputs).loss)

    @pytest.mark.parametrize("towers", [clip_towers, mixed_towers])
    def test_round_trip_is_bit_equal(self, towers: object, tmp_path: Path) -> None:
        config = CLIPConfig(**towers(), image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
        model = CLIPModel(config)
        model.save_pretrained(tmp_path)
        loaded, problems = load(tmp_path)
        assert not problems
        assert_same_state(loaded, model)
        assert type(loaded.vision_model) is type(model.vision_model)
        assert type(loaded.text_model) is type(model.text_model)
        assert list(loaded.config.image_mean) == [0.1, 0.2, 0.3]
        assert list(loaded.config.image_std) == [0.4, 0.5, 0.6]

    def test_missing_weights_are_initialised_and_the_rest_kept(self, tmp_path: Path) -> None:
        towers = clip_towers()
        for name in ("vision_config", "text_config"):
            towers[name].update(hidden_size=128, num_attention_heads=2)
        model = CLIPModel(CLIPConfig(**towers))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7.0)
        model.save_pretrained(tmp_path)
        missing = {
            "logit_scale": None,
            "visual_projection.weight": 128**-0.5,
            "text_model.encoder.layers.0.self_attn.q_proj.weight": 128**-0.5,
            "vision_model.encoder.layers.1.self_attn.out_proj.weight": 128**-0.5 * 4**-0.5,
            "vision_model.encoder.layers.1.mlp.fc1.weight": 256**-0.5,
        }
        state = load_file(tmp_path / "model.safetensors")
        kept = {name: weight for name, weight in state.items() if name not in missing}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        loaded, problems = load(tmp_path)
        assert problems == {"missing_keys": set(missing)}
        for name, parameter in loaded.named_parameters():
            if name == "logit_scale":
                assert parameter.item() == torch.tensor(math.log(1 / 0.07)).item()
            elif name in missing:
                assert_std(parameter, missing[name])
            else:
                assert (parameter == 7).all(), name

    def test_logit_scale_stays_float32(self, model: CLIPModel, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path)
        loaded = CLIPModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert loaded.logit_scale.dtype == torch.float32
        assert loaded.visual_projection.weight.dtype == torch.bfloat16
        assert torch.equal(loaded.logit_scale, model.logit_scale)
        output = loaded(pixel_values=torch.zeros(5, 16, 16, 3, dtype=torch.uint8), **text_batch())
        assert output.image_features.dtype == output.text_features.dtype == output.loss.dtype == torch.float32


class TestConfig:
    def test_towers_without_model_type_are_clip(self) -> None:
        config = CLIPConfig(vision_config={"hidden_size": 64, "num_attention_heads": 1}, text_config={})
        assert type(config.vision_config) is transformers.CLIPVisionConfig
        assert type(config.text_config) is transformers.CLIPTextConfig
        assert config.vision_config.hidden_size == 64

    def test_dict_with_model_type(self) -> None:
        config = CLIPConfig(vision_config={"model_type": "vit", "hidden_size": 96}, text_config={"model_type": "bert"})
        assert type(config.vision_config) is transformers.ViTConfig
        assert type(config.text_config) is transformers.BertConfig

    def test_second_copy_of_a_tower_config_wins_as_in_transformers(self) -> None:
        keywords = {"text_config": {"hidden_size": 64}, "text_config_dict": {"hidden_size": 128}}
        assert CLIPConfig(**keywords).text_config.hidden_size == 128
        assert transformers.CLIPConfig(**keywords).text_config.hidden_size == 128

    def test_small(self) -> None:
        config = CLIPConfig.small(vocab_size=300, eos_token_id=7, bos_token_id=6, pad_token_id=5, text_width=128)
        assert (config.text_config.eos_token_id, config.text_config.bos_token_id) == (7, 6)
        assert config.text_config.pad_token_id == 5
        assert config.vision_config.num_attention_heads == 3
        assert config.text_config.num_attention_heads == 2
        model = CLIPModel(config)
        pixels = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
        output = model(pixel_values=pixels, input_ids=torch.full((2, 32), 7))
        assert output.image_features.shape == output.text_features.shape == (2, 256)

    @pytest.mark.parametrize(
        ("keywords", "message"),
        [
            ({"vision_width": 100}, "vision_width: .* multiple of 64 .* 100"),
            ({"text_width": 0}, "text_width: .* multiple of 64"),
            ({"image_size": 60}, "image_size: .* multiple of patch_size 8, got 60"),
            ({"eos_token_id": 2}, "eos_token_id: .* but 2, .* got 2"),
            ({"eos_token_id": 300}, "eos_token_id: .* below 300 .* got 300"),
        ],
    )
    def test_small_refuses(self, keywords: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            CLIPConfig.small(**{"vocab_size": 300, "eos_token_id": 7, **keywords})


def assert_std(weight: Tensor, std: float) -> None:
    """Mean zero and the standard deviation expected, within five standard errors of a normal sample of this size."""
    standard_error = std / math.sqrt(weight.numel())
    assert abs(weight.mean().item()) < 5 * standard_error
    assert abs(weight.std().item() - std) < 5 * standard_error / math.sqrt(2)


def test_initialisation_is_openais() -> None:
    width, layers = 128, 3
    sizes = {"vision_width": width, "text_width": width, "vision_layers": layers, "text_layers": layers}
    model = CLIPModel(CLIPConfig.small(vocab_size=500, eos_token_id=499, **sizes))
    residual = width**-0.5 * (2 * layers) ** -0.5
    for tower in (model.vision_model, model.text_model):
        for layer in tower.encoder.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                assert_std(projection.weight, width**-0.5)
            assert_std(layer.self_attn.out_proj.weight, residual)
            assert_std(layer.mlp.fc1.weight, (2 * width) ** -0.5)
            assert_std(layer.mlp.fc2.weight, residual)
    assert_std(model.text_model.embeddings.token_embedding.weight, 0.02)
    assert_std(model.text_model.embeddings.position_embedding.weight, 0.01)
    assert_std(model.vision_model.embeddings.position_embedding.weight, width**-0.5)
    assert_std(model.vision_model.embeddings.class_embedding, width**-0.5)
    assert_std(model.vision_model.embeddings.patch_embedding.weight, (3 * 3 * 8 * 8) ** -0.5)
    assert_std(model.visual_projection.weight, width**-0.5)
    assert_std(model.text_projection.weight, width**-0.5)
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    assert biases
    assert all((bias == 0).all() for bias in biases)
    assert model.logit_scale.shape == ()
    assert model.logit_scale.item() == torch.tensor(math.log(1 / 0.07), dtype=torch.float32).item()


class TestText:
    def test_only_tokens_up_to_the_first_eos_count(self, model: CLIPModel) -> None:
        text = text_batch((6, 6))
        text = {name: torch.nn.functional.pad(value, (0, 4)) for name, value in text.items()}
        before = model.get_text_features(**text)
        text["input_ids"][:, 6:] = torch.tensor([17, EOS, 3, 8])
        assert torch.equal(model.get_text_features(**text), before)
        text["input_ids"][0, 2] = text["input_ids"][0, 2] % 47 + 1
        after = model.get_text_features(**text)
        assert not torch.allclose(after[0], before[0], atol=1e-3)
        assert torch.equal(after[1], before[1])

    def test_padding_does_not_count(self, model: CLIPModel) -> None:
        text = text_batch()
        together = model.get_text_features(**text)
        alone = [model.get_text_features(ids[None, :n]) for ids, n in zip(text["input_ids"], LENGTHS, strict=True)]
        torch.testing.assert_close(together, torch.cat(alone))

    def test_row_without_eos_raises(self, model: CLIPModel) -> None:
        inputs = batch()
        inputs["input_ids"][2, LENGTHS[2] - 1] = 5
        with pytest.raises(ValueError, match=r"input_ids: .* token 49 .* row 2 and 0 others"):
            model(**inputs)


class TestImages:
    def test_uint8_equals_normalising_by_hand(self) -> None:
        mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
        model = CLIPModel(CLIPConfig(**clip_towers(), image_mean=mean, image_std=std)).eval()
        pixels = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
        normalised = (pixels / 255 - torch.tensor(mean)) / torch.tensor(std)
        expected = model.get_image_features(normalised.permute(0, 3, 1, 2))
        torch.testing.assert_close(model.get_image_features(pixels), expected)
        assert not torch.allclose(expected[0], expected[1], atol=1e-3)

    def test_zero_features_have_finite_gradients(self, model: CLIPModel) -> None:
        torch.nn.init.zeros_(model.visual_projection.weight)
        output = model(**batch())
        assert (output.image_features == 0).all()
        output.loss.backward()
        assert all(grad.isfinite().all() for grad in gradients(model).values())


class TestLogitScale:
    @pytest.mark.parametrize(("shift", "limit"), [(0, math.log(100)), (1, 0.0)])
    def test_clamped_after_a_huge_step(self, model: CLIPModel, shift: int, limit: float) -> None:
        features = torch.eye(4, 24)  # matched with itself, a larger scale is better; with its neighbour, a smaller
        optimizer = torch.optim.SGD([model.logit_scale], lr=1e9)
        model.loss(features, features.roll(shift, 0), model.logit_scale).backward()
        optimizer.step()
        assert model.logit_scale.item() != torch.tensor(limit).item()
        parameter = model.logit_scale
        model.after_optimizer_step()
        assert model.logit_scale is parameter
        assert parameter.requires_grad
        assert torch.equal(parameter, torch.tensor(limit, dtype=torch.float32))

    def test_inside_the_interval_it_stays(self, model: CLIPModel) -> None:
        before = model.logit_scale.item()
        model.after_optimizer_step()
        assert model.logit_scale.item() == before


class TestTowers:
    def test_mixed_towers_pool_as_documented(self) -> None:
        model = CLIPModel(CLIPConfig(**mixed_towers())).eval()
        inputs = batch()
        image = model.vision_model(inputs["pixel_values"]).pooler_output.flatten(1)
        text = model.text_model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state[:, 0]
        output = model(**inputs)
        unit = torch.nn.functional.normalize
        torch.testing.assert_close(output.image_features, unit(model.visual_projection(image)))
        torch.testing.assert_close(output.text_features, unit(model.text_projection(text)))

    @pytest.mark.parametrize(
        ("vision", "text"),
        [
            (
                {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
                {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            ),
            (
                {"model_type": "convnext", "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]},
                {"model_type": "distilbert", "dim": 32, "n_layers": 1, "n_heads": 2},
            ),
            (
                {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
                {"model_type": "clip_text_model", "hidden_size": 32, "num_hidden_layers": 1, "eos_token_id": EOS},
            ),
        ],
    )
    def test_every_parameter_of_any_tower_is_trained(self, vision: dict, text: dict) -> None:
        vision = {"image_size": 64, **vision}
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config={"vocab_size": 50, **text}, projection_dim=24))
        inputs = {"pixel_values": torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8), **text_batch()}
        model(**inputs).loss.backward()
        assert all(grad.isfinite().all() for grad in gradients(model).values())

    def test_causal_text_tower_without_pooler_is_refused(self) -> None:
        towers = {**mixed_towers(), "text_config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}}
        with pytest.raises(ValueError, match=r"text_config: expected a tower with pooler_output, got 'gpt2'"):
            CLIPModel(CLIPConfig(**towers)).get_text_features(torch.ones(1, 4, dtype=torch.long))

    def test_decoder_is_refused(self) -> None:
        towers = mixed_towers()
        towers["text_config"].is_decoder = True
        with pytest.raises(ValueError, match=r"text_config: expected an encoder, got 'bert' with a decoder"):
            CLIPModel(CLIPConfig(**towers))

    def test_attention_implementation_reaches_the_towers(self, model: CLIPModel, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path)
        eager = CLIPModel.from_pretrained(tmp_path, attn_implementation="eager")
        for name in ("vision_model", "text_model"):
            assert getattr(model, name).config._attn_implementation == "sdpa"
            assert getattr(eager, name).config._attn_implementation == "eager"
        inputs = batch()
        torch.testing.assert_close(eager(**inputs).loss, model(**inputs).loss)
        model.set_attn_implementation("eager")
        assert model.text_model.config._attn_implementation == "eager"
        assert torch.equal(eager(**inputs).loss, model(**inputs).loss)


class TestTraining:
    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
    def test_gradient_checkpointing_recomputes_to_the_same_gradients(self, model: CLIPModel) -> None:
        model.train()
        inputs = batch()
        checkpointed = copy.deepcopy(model)
        checkpointed.gradient_checkpointing_enable()
        calls = []
        for tower in (checkpointed.vision_model, checkpointed.text_model):
            tower.encoder.layers[0].layer_norm1.register_forward_hook(lambda module, *_: calls.append(module))
        model(**inputs).loss.backward()
        checkpointed(**inputs).loss.backward()
        assert len(calls) == 4
        torch.testing.assert_close(gradients(checkpointed), gradients(model))

    def test_features_are_float32_under_autocast(self, model: CLIPModel) -> None:
        inputs = batch()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**inputs)
        for features in (output.image_features, output.text_features):
            assert features.dtype == torch.float32
            torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(LENGTHS)))
        torch.testing.assert_close(output.loss, model(**inputs).loss, rtol=0.05, atol=0)

    def test_compiles_without_graph_breaks(self, model: CLIPModel) -> None:
        inputs = {**batch(), "pixel_values": torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)}
        compiled = copy.deepcopy(model)
        output = torch.compile(compiled, backend="aot_eager", fullgraph=True)(**inputs)
        expected = model(**inputs)
        torch.testing.assert_close(output.loss, expected.loss)
        output.loss.backward()
        expected.loss.backward()
        torch.testing.assert_close(gradients(compiled), gradients(model))

    def test_trainer_contract(self, model: CLIPModel) -> None:
        assert can_return_loss(CLIPModel)
        inputs = batch()
        output = model(**inputs)
        assert next(iter(output)) == "loss"
        assert torch.equal(model(**inputs, return_dict=False)[0], output.loss)
        assert torch.equal(model.loss(output.image_features, output.text_features, output.logit_scale), output.loss)
        assert model(**inputs, return_loss=False).loss is None
        with pytest.raises(TypeError, match="num_items_in_batch"):
            model(**inputs, num_items_in_batch=4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pixel_values": None}, ValueError, "pixel_values: missing"),
        ({"input_ids": None}, ValueError, "input_ids: missing"),
        ({"pixel_values": torch.zeros(5, 3, 16)}, ValueError, r"pixel_values: .* \(B, C, H, W\), .* \(5, 3, 16\)"),
        ({"pixel_values": torch.zeros(5, 3, 24, 16)}, ValueError, r"pixel_values: .* \(16, 16\), got \(24, 16\)"),
        ({"pixel_values": torch.zeros(5, 3, 16, 16, dtype=torch.int64)}, TypeError, "pixel_values: .* torch.int64"),
        ({"pixel_values": torch.zeros(5, 3, 16, 16, dtype=torch.uint8)}, ValueError, r"pixel_values: .*\(B, H, W, 3\)"),
        ({"pixel_values": torch.zeros(5, 8, 16, 3, dtype=torch.uint8)}, ValueError, r"pixel_values: .* got \(8, 16\)"),
        ({"pixel_values": torch.zeros(4, 3, 16, 16)}, ValueError, "input_ids: expected 4 texts, one per image, got 5"),
        ({"input_ids": torch.zeros(5, dtype=torch.int64)}, ValueError, r"input_ids: expected \(B, L\), .* \(5,\)"),
        ({"input_ids": torch.zeros(5, 12)}, TypeError, "input_ids: expected integers, got torch.float32"),
        ({"input_ids": torch.full((5, 13), EOS)}, ValueError, "input_ids: expected at most 12 tokens, got 13"),
        ({"attention_mask": torch.ones(5, 11)}, ValueError, r"attention_mask: .*\(5, 12\) of input_ids, got \(5, 11\)"),
    ],
)
def test_bad_input_names_the_argument(model: CLIPModel, change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model(**{**batch(), **change})


def test_numbers_of_images_and_texts_may_differ_without_loss(model: CLIPModel) -> None:
    output = model(pixel_values=torch.randn(2, 3, 16, 16), **text_batch(), return_loss=False)
    assert output.logits_per_image().shape == (2, 5)
