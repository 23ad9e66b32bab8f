"""LiT against transformers' VisionTextDualEncoderModel where that is right; what is locked stays locked."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from processes import run_processes
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from vlmfast.models.contrastive import lit
from vlmfast.models.contrastive.lit import LiTConfig, LiTModel
from vlmfast.training.grad_cache import forward_backward

EOS, PAD, VOCAB = 49, 0, 50
LENGTHS = (12, 7, 3, 5, 9)
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def vit(**options: object) -> transformers.ViTConfig:
    return transformers.ViTConfig(**{**SIZE, "image_size": 16, "patch_size": 8, **options})


def clip_vision() -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(**SIZE, image_size=16, patch_size=8)


def clip_text() -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        **SIZE, vocab_size=VOCAB, max_position_embeddings=12, bos_token_id=48, eos_token_id=EOS, pad_token_id=PAD
    )


def bert(**options: object) -> transformers.BertConfig:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertConfig(**{**SIZE, "vocab_size": VOCAB, "max_position_embeddings": 12, **still, **options})


def make(**options: object) -> LiTModel:
    torch.manual_seed(1)
    return LiTModel(LiTConfig(**{"vision_config": vit(), "text_config": bert(), **options}))


def batch() -> dict[str, Tensor]:
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(1, 48, mask.shape)
    ids[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] = EOS
    pixels = torch.randn(len(LENGTHS), 3, 16, 16)
    return {"pixel_values": pixels, "input_ids": ids.where(mask == 1, PAD), "attention_mask": mask}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if not name.startswith("vision_model.")}


class TestParity:
    def test_features_loss_and_gradients_of_transformers(self) -> None:
        """With CLIP towers, whose pooler_output has no tanh, an image head, and no biases in the heads."""
        configs = (clip_vision(), clip_text())
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(*configs, projection_dim=24)
        reference = transformers.VisionTextDualEncoderModel(config).eval()
        model = make(vision_config=configs[0], text_config=configs[1], projection_dim=24, image_head=True)
        problems = model.load_state_dict(reference.state_dict(), strict=False)
        assert problems.missing_keys == ["visual_projection.bias", "text_projection.bias"]
        assert not problems.unexpected_keys
        inputs = batch()
        expected, output = reference(**inputs, return_loss=True), model(**inputs)
        torch.testing.assert_close(output.image_features, expected.image_embeds)
        torch.testing.assert_close(output.text_features, expected.text_embeds)
        torch.testing.assert_close(output.logits_per_image(), expected.logits_per_image)
        torch.testing.assert_close(output.loss, expected.loss)
        expected.loss.backward()
        output.loss.backward()
        theirs, ours = gradients(reference), gradients(model)
        assert set(ours) == trained_names(model)
        for name in set(ours) & set(theirs):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)

    def test_poolers_with_tanh_are_not_read(self) -> None:
        towers = transformers.ViTModel(vit()).eval(), transformers.BertModel(bert()).eval()
        model, inputs = LiTModel.from_towers(*towers), batch()
        assert not any("pooler" in name for name in model.state_dict())
        image = towers[0](inputs["pixel_values"])
        text = towers[1](inputs["input_ids"], inputs["attention_mask"])
        output = model(**inputs)
        torch.testing.assert_close(output.image_features, F.normalize(image.last_hidden_state[:, 0], dim=1))
        head = model.text_projection
        torch.testing.assert_close(output.text_features, F.normalize(head(text.last_hidden_state[:, 0]), dim=1))
        assert not torch.allclose(output.text_features, F.normalize(head(text.pooler_output), dim=1), atol=0.1)
        assert not torch.allclose(output.image_features, F.normalize(image.pooler_output, dim=1), atol=0.1)

    def test_mean_pooling_passes_over_padding(self) -> None:
        model, inputs = make(text_pooling="mean").eval(), batch()
        features = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        for row, length in enumerate(LENGTHS):
            states = model.text_model(inputs["input_ids"][row : row + 1, :length]).last_hidden_state
            expected = F.normalize(model.text_projection(states.mean(1)), dim=1)
            torch.testing.assert_close(features[row : row + 1], expected)
            alone = model.get_text_features(inputs["input_ids"][row : row + 1, :length])
            torch.testing.assert_close(alone, expected)


class TestConfig:
    def test_images_have_no_head_unless_asked(self) -> None:
        model = make()
        assert model.config.projection_dim == 32
        assert not [name for name in model.state_dict() if "visual_projection" in name]
        assert model.text_projection.bias is not None
        assert make(image_head=True, projection_dim=24).visual_projection.weight.shape == (24, 32)
        with pytest.raises(ValueError, match=r"projection_dim: expected the image tower's width 32, .* got 24"):
            LiTConfig(vision_config=vit(), text_config=bert(), projection_dim=24)
        with pytest.raises(ValueError, match="text_pooling: expected 'first' or 'mean', got 'last'"):
            LiTConfig(vision_config=vit(), text_config=bert(), text_pooling="last")

    def test_temperature_starts_at_ten_and_is_not_clamped(self) -> None:
        model = make()
        torch.testing.assert_close(model.logit_scale.exp(), torch.tensor(10.0), rtol=1e-6, atol=0)
        assert not hasattr(model, "after_optimizer_step")

    def test_heads_start_with_unit_gain(self) -> None:
        head = make(vision_config=vit(hidden_size=256)).text_projection
        assert head.weight.std().item() == pytest.approx(32**-0.5, rel=0.05)
        assert (head.bias == 0).all()

    def test_small(self) -> None:
        config = LiTConfig.small(vocab_size=300, eos_token_id=7, bos_token_id=6, pad_token_id=5, vision_layers=1)
        model = LiTModel(config)
        pixels = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
        output = model(pixel_values=pixels, input_ids=torch.full((2, 32), 7))
        assert output.image_features.shape == output.text_features.shape == (2, 192)
        assert config.text_config.pad_token_id == 5


class TestLocked:
    @pytest.mark.parametrize("image_head", [False, True])
    def test_ten_steps_with_decay_dropout_and_batch_norm_change_nothing(self, image_head: bool) -> None:
        """Parameters, running statistics and features of the image tower stay bit-identical."""
        for vision in (
            vit(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5),
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 32], depths=[1, 1], layer_type="basic"),
        ):
            model, inputs = make(vision_config=vision, image_head=image_head).train(), batch()
            before = copy.deepcopy(model.vision_model.state_dict())
            features = model.encode_locked(inputs["pixel_values"])
            text_before = copy.deepcopy(model.text_model.state_dict())
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
            for _ in range(10):
                model.train()
                optimizer.zero_grad()
                model(**inputs).loss.backward()
                optimizer.step()
            assert {name for name, p in model.named_parameters() if p in optimizer.state} == trained_names(model)
            torch.testing.assert_close(model.vision_model.state_dict(), before, rtol=0, atol=0)
            assert torch.equal(model.encode_locked(inputs["pixel_values"]), features)
            assert not torch.equal(
                model.text_model.state_dict()["embeddings.word_embeddings.weight"],
                text_before["embeddings.word_embeddings.weight"],
            )

    def test_train_leaves_the_image_tower_in_eval_mode(self) -> None:
        model = make().train()
        assert model.text_model.training
        assert not any(module.training for module in model.vision_model.modules())

    def test_saved_activations_do_not_depend_on_the_image_towers_depth(self) -> None:
        def saved(layers: int) -> int:
            model, inputs, total = make(vision_config=vit(num_hidden_layers=layers)).train(), batch(), 0

            def pack(tensor: Tensor) -> Tensor:
                nonlocal total
                total += tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model(**inputs)
            return total

        assert saved(1) == saved(6) > 0

    def test_from_pretrained_locks_again(self, tmp_path: Path) -> None:
        model = make()
        model.save_pretrained(tmp_path)
        loaded, info = LiTModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not {key: value for key, value in info.items() if value}
        assert not any(p.requires_grad for p in loaded.vision_model.parameters())
        assert all(p.requires_grad for name, p in loaded.named_parameters() if name in trained_names(loaded))
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
        inputs = batch()
        assert torch.equal(loaded(**inputs).loss, model.eval()(**inputs).loss)
        assert loaded.frozen_fingerprint() == model.frozen_fingerprint()

    def test_no_gradient_of_the_images_is_computed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, inputs = make(), batch()
        seen = []

        class Spy(lit.ClipLoss):
            def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
                seen.append((image.requires_grad, text.requires_grad))
                return super().forward(image, text, scale)

        monkeypatch.setattr(lit, "ClipLoss", Spy)
        model(**inputs).loss.backward()
        features = {n: v.detach().requires_grad_() for n, v in model(**inputs, return_loss=False).items()}
        model.loss(**features).backward()  # as GradCache does
        assert seen == [(False, True)] * 2


class TestCachedFeatures:
    def test_they_stand_for_the_pixels(self) -> None:
        for options in ({}, {"image_head": True}):
            model, inputs = make(**options), batch()
            plain = model(**inputs)
            plain.loss.backward()
            expected = gradients(model)
            model.zero_grad()
            pixels = inputs.pop("pixel_values")
            features = model.encode_locked(pixels)
            assert features.dtype == torch.float32
            assert not model.encode_locked(pixels.requires_grad_()).requires_grad
            calls = []
            model.vision_model.register_forward_hook(lambda *args, calls=calls: calls.append(1))
            cached = model(**inputs, locked_features=features)
            cached.loss.backward()
            assert not calls
            assert torch.equal(cached.loss, plain.loss)
            torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)

    def test_fingerprint_is_of_what_decides_them(self) -> None:
        model = make()
        before = model.frozen_fingerprint()
        with torch.no_grad():
            model.text_projection.weight.add_(1)
        assert model.frozen_fingerprint() == before
        assert make(image_mean=[0.5, 0.5, 0.5]).frozen_fingerprint() != before
        assert make(vision_config=vit(layer_norm_eps=1e-3)).frozen_fingerprint() != before
        with torch.no_grad():
            next(model.vision_model.parameters()).view(-1)[0] += 1e-3
        assert model.frozen_fingerprint() != before
        towers = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 32], depths=[1, 1], layer_type="basic")
        model = make(vision_config=towers)
        before = model.frozen_fingerprint()
        model.vision_model.embedder.embedder.normalization.running_mean.add_(1)
        assert model.frozen_fingerprint() != before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"locked_features": torch.zeros(5, 32)}, "pixel_values: expected input_ids, and either"),
            ({"pixel_values": None}, "pixel_values: expected input_ids, and either"),
            ({"input_ids": None}, "input_ids: expected input_ids, and either"),
            ({"pixel_values": None, "locked_features": torch.zeros(5, 31)}, r"locked_features: expected \(B, 32\)"),
            ({"pixel_values": None, "locked_features": torch.zeros(4, 32)}, "input_ids: expected 4 texts, .* got 5"),
        ],
    )
    def test_bad_input_names_the_argument(self, change: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()(**{**batch(), **change})


class TestTowers:
    def test_from_folders_models_and_configs(self, tmp_path: Path) -> None:
        vision, text = transformers.ViTModel(vit()), transformers.BertModel(bert())
        vision.save_pretrained(tmp_path / "vision")
        text.save_pretrained(tmp_path / "text")
        for towers in ((tmp_path / "vision", str(tmp_path / "text")), (vision, text), (tmp_path / "vision", bert())):
            model = LiTModel.from_towers(*towers)
            assert not model.training
            for mine, given, tower in ((model.vision_model, vision, towers[0]), (model.text_model, text, towers[1])):
                same = all(torch.equal(value, given.state_dict()[name]) for name, value in mine.state_dict().items())
                assert same == (not isinstance(tower, transformers.BertConfig))

    def test_timm(self) -> None:
        pytest.importorskip("timm")
        config = transformers.TimmWrapperConfig(architecture="tf_efficientnet_lite0", hidden_size=1280)
        model = make(vision_config=config).train()
        output = model(**{**batch(), "pixel_values": torch.randn(5, 3, 32, 32)})
        assert output.image_features.shape == (5, 1280)
        output.loss.backward()
        assert set(gradients(model)) == trained_names(model)


class TestTraining:
    def test_chunks_give_the_gradients_of_the_plain_step(self) -> None:
        plain, inputs = make().train(), batch()
        cached = copy.deepcopy(plain)
        expected = plain(**inputs).loss
        expected.backward()
        loss = forward_backward(
            lambda chunk: dict(cached(**chunk, return_loss=False)),
            lambda features: cached.loss(**features),
            inputs,
            2,
        )
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradients(cached), gradients(plain), rtol=1e-4, atol=1e-6)

    def test_autocast(self) -> None:
        model, inputs = make(), batch()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**inputs)
        assert output.image_features.dtype == output.text_features.dtype == output.loss.dtype == torch.float32
        torch.testing.assert_close(output.loss, model(**inputs).loss, rtol=0.05, atol=0)
        output.loss.backward()
        assert all(grad.isfinite().all() for grad in gradients(model).values())


ROWS = [3, 2]


def _step_on_each_rank(rank: int, world_size: int, inputs: dict[str, Tensor], path: Path) -> None:
    model = make().train()
    wrapped = DistributedDataParallel(model)
    loss = wrapped(**{name: value.split(ROWS)[rank] for name, value in inputs.items()}).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.save((mean / world_size, gradients(model)), path / f"{rank}.pt")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    inputs, model = batch(), make().train()
    run_processes(_step_on_each_rank, 2, inputs, tmp_path)
    loss = model(**inputs).loss
    loss.backward()
    for rank in range(2):
        rank_loss, rank_gradients = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(rank_loss, loss.detach())
        torch.testing.assert_close(rank_gradients, gradients(model), rtol=1e-4, atol=1e-6)
