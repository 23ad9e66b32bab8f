"""ALIGN against transformers' AlignModel where that is right, and the differences where it is not."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from vlmfast.models.contrastive.align import ALIGNConfig, ALIGNModel
from vlmfast.models.contrastive.clip import CLIPConfig, CLIPModel
from vlmfast.models.towers import DropConnect

VOCAB, LENGTHS = 50, (12, 7, 3, 5, 9)
VISION = {
    "image_size": 32, "width_coefficient": 1.0, "depth_coefficient": 1.0, "kernel_sizes": [3, 3],
    "in_channels": [32, 16],
    "out_channels": [16, 24], "depthwise_padding": [], "strides": [1, 2], "num_block_repeats": [1, 2],
    "expand_ratios": [1, 6],
}  # fmt: skip
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 12, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


@pytest.fixture
def reference() -> transformers.AlignModel:
    config = transformers.AlignConfig(vision_config=VISION, text_config=TEXT, projection_dim=24)
    model = transformers.AlignModel(config)
    with torch.no_grad():
        model.temperature.fill_(0.05)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.vision_model.train()(torch.randn(8, 3, 32, 32))  # with a new model's statistics all images are alike
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def make(**options: object) -> ALIGNModel:
    torch.manual_seed(1)
    return ALIGNModel(ALIGNConfig(vision_config=VISION, text_config=TEXT, **options))


def batch() -> dict[str, Tensor]:
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(1, VOCAB, mask.shape) * mask
    return {"pixel_values": torch.randn(len(LENGTHS), 3, 32, 32), "input_ids": ids, "attention_mask": mask}


def smoothed(logits: Tensor, smoothing: float = 0.1) -> Tensor:
    labels = torch.arange(len(logits))
    directions = (logits, logits.T)
    return torch.stack([F.cross_entropy(x, labels, label_smoothing=smoothing) for x in directions]).mean()


def loaded(reference: transformers.AlignModel, folder: Path) -> ALIGNModel:
    reference.save_pretrained(folder)
    model, info = ALIGNModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model


def test_features_and_gradients_are_transformers(reference: transformers.AlignModel, tmp_path: Path) -> None:
    """transformers smooths the labels in evaluation too, which our model does in training only."""
    model, inputs = loaded(reference, tmp_path), batch()
    expected, output = reference(**inputs, return_loss=True), model(**inputs)
    torch.testing.assert_close(output.image_features, expected.image_embeds)
    torch.testing.assert_close(output.text_features, expected.text_embeds)
    torch.testing.assert_close(output.logits_per_image(), expected.logits_per_image)
    torch.testing.assert_close(expected.loss, smoothed(expected.logits_per_image))
    torch.testing.assert_close(output.loss, smoothed(expected.logits_per_image, 0.0))
    assert abs(output.loss - expected.loss) > 1e-3
    model.training = True  # the loss's mode alone, towers stay as they are
    loss = model(**inputs).loss
    torch.testing.assert_close(loss, expected.loss)
    loss.backward()
    expected.loss.backward()
    theirs = {name: p.grad for name, p in reference.named_parameters() if ".pooler." not in name}
    ours = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_transformers_reads_ours(tmp_path: Path) -> None:
    model = make().eval()
    model.save_pretrained(tmp_path)
    read, info = transformers.AlignModel.from_pretrained(tmp_path, output_loading_info=True)
    assert {name for name in info["missing_keys"] if "pooler" not in name} == set()
    assert not info["unexpected_keys"]
    inputs = batch()
    torch.testing.assert_close(read(**inputs).logits_per_image, model(**inputs).logits_per_image())


def test_no_trained_layer_comes_after_the_images_mean() -> None:
    model, inputs = make().eval(), batch()
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"vision_model", "text_model", "text_projection", "temperature"}
    states = model.vision_model(inputs["pixel_values"]).last_hidden_state
    expected = F.normalize(states.mean((2, 3)), dim=-1)
    torch.testing.assert_close(model.get_image_features(inputs["pixel_values"]), expected)
    with pytest.raises(ValueError, match="projection_dim: expected the image tower's width 24"):
        ALIGNConfig(vision_config=VISION, text_config=TEXT, projection_dim=32)


def test_smoothing_keeps_the_loss_above_zero() -> None:
    """At a perfect match: the least over the scale is not 0, but it is in evaluation."""
    model = make().train()
    image = torch.eye(6, 24)
    losses = [model.loss(image, image, torch.tensor(t)).item() for t in (1.0, 0.5, 0.25, 0.2, 0.1, 0.05, 0.02)]
    assert min(losses) > 0.2
    assert losses.index(min(losses)) not in (0, len(losses) - 1)
    for t, loss in zip((1.0, 0.25, 0.05), (losses[0], losses[2], losses[5]), strict=True):
        assert loss == pytest.approx(smoothed(image.double() @ image.double().T / t).item(), rel=1e-5)
    assert model.eval().loss(image, image, torch.tensor(0.02)).item() < 1e-6


def test_the_slopes_of_smoothed_labels() -> None:
    """Of a perfect match, certain of itself, in the logits: (0 - e / N) / N beside the pair, and rows sum to 0."""
    model, rows, temperature = make().train(), 6, 0.02
    image, text = torch.eye(rows, 24), torch.eye(rows, 24).requires_grad_()
    (gradient,) = torch.autograd.grad(model.loss(image, text, torch.tensor(temperature)), text)
    slopes = temperature * gradient[:, :rows].T  # of the logits (image, text), as images are a basis
    torch.testing.assert_close(slopes.sum(1), torch.zeros(rows), rtol=0, atol=1e-6)
    torch.testing.assert_close(slopes.sum(0), torch.zeros(rows), rtol=0, atol=1e-6)
    others = ~torch.eye(rows, dtype=torch.bool)
    torch.testing.assert_close(slopes[others], torch.full((30,), -0.1 / rows / rows), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(model.eval().loss(image, text, torch.tensor(temperature)), text)
    assert gradient.abs().max() < 1e-6


def test_smoothing_needs_no_second_pass_over_the_logits() -> None:
    """The closed form: the mean of a row's logits is that of its anchor with the sum of all samples."""
    model = make().train()
    image, text = (F.normalize(torch.randn(7, 24), dim=-1) for _ in range(2))
    x, t, scale, total = image.double(), text.double(), 1 / 0.2, 0.0
    for a, b in ((x, t), (t, x)):
        logits = scale * a @ b.T
        means = scale * a @ b.sum(0) / len(b)
        total += (logits.logsumexp(1) - 0.9 * logits.diagonal() - 0.1 * means).mean() / 2
    assert model.loss(image, text, torch.tensor(0.2)).item() == pytest.approx(total.item(), rel=1e-6)


def test_the_temperature_divides() -> None:
    model = make().train()
    image, text = (F.normalize(torch.randn(5, 24), dim=-1) for _ in range(2))
    temperature = torch.tensor(0.3, requires_grad=True)
    (slope,) = torch.autograd.grad(model.loss(image, text, temperature), temperature)
    logits = (image @ text.T / 0.3).double().requires_grad_()
    (gradient,) = torch.autograd.grad(smoothed(logits), logits)
    assert slope.item() == pytest.approx(-(gradient * logits).sum().item() / 0.3, rel=1e-4)


def test_the_temperature_stays_positive() -> None:
    model = make()
    assert model.temperature.item() == 1.0
    with torch.no_grad():
        model.temperature.fill_(-0.5)
    model.after_optimizer_step()
    assert model.temperature.item() == pytest.approx(0.01)


def test_batch_norms_forget_slowly(reference: transformers.AlignModel) -> None:
    """0.99 is Keras' share of the old mean; transformers gives it to torch as that of the new one, but in expand_bn."""
    theirs = {module.momentum for module in reference.modules() if isinstance(module, nn.BatchNorm2d)}
    assert theirs == {0.99, 0.1}
    model = make().train()
    ours = [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert ours == [pytest.approx(0.01)] * len(ours)
    before = model.vision_model.embeddings.batchnorm.running_mean.clone()
    pixels = batch()["pixel_values"]
    seen = model.vision_model.embeddings.convolution(model.vision_model.embeddings.padding(pixels)).mean((0, 2, 3))
    model.get_image_features(pixels)
    after = model.vision_model.embeddings.batchnorm.running_mean
    torch.testing.assert_close(after, 0.99 * before + 0.01 * seen, rtol=1e-4, atol=1e-6)


def test_drop_connect_drops_samples() -> None:
    x = torch.randn(1000, 3, 2, 2)
    drop = DropConnect(0.25)
    out = drop(x)
    kept = out.flatten(1).any(1)
    assert 0.68 < kept.float().mean() < 0.82
    torch.testing.assert_close(out[kept], x[kept] / 0.75)
    assert torch.equal(drop.eval()(x), x)
    found = [m for m in make().vision_model.modules() if isinstance(m, DropConnect)]
    assert len(found) == 3
    assert max(m.probability for m in found) > 0
    assert not any(isinstance(m, nn.Dropout) and m.p for m in make().vision_model.encoder.modules())


@pytest.mark.parametrize("cls", [CLIPModel, ALIGNModel])
def test_every_model_s_efficientnet_is_put_right(cls: type[CLIPModel]) -> None:
    """transformers' own type too; of a ResNet, batch norms have the momentum that they had."""
    tower = {**VISION, "model_type": "efficientnet", "hidden_dim": 1280}
    text = {**TEXT, "model_type": "bert"}
    model = cls(cls.config_class(vision_config=tower, text_config=text, projection_dim=1280)).train()
    norms = [module.momentum for module in model.vision_model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms == [pytest.approx(0.01)] * len(norms)
    assert sum(isinstance(module, DropConnect) for module in model.vision_model.modules()) == 3
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    assert model.get_image_features(pixels).shape == (4, 1280)
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    other = CLIPModel(CLIPConfig(vision_config=resnet, text_config=text))
    assert {m.momentum for m in other.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_a_dropped_sample_leaves_its_block_as_it_came() -> None:
    """In the tower, not the module alone: a block that drops gives back, sample by sample, what it was given."""
    model = make().train()
    block = next(b for b in model.vision_model.encoder.blocks if b.projection.apply_dropout)
    block.projection.dropout.probability = 0.5
    x = torch.randn(64, block.projection.project_bn.num_features, 8, 8)
    same = (block(x) == x).flatten(1)
    assert torch.equal(same.all(1), same.any(1))
    assert 10 < same.all(1).sum() < 54


def test_small_has_an_eighth_of_the_size_at_its_end() -> None:
    config = ALIGNConfig.small(vocab_size=VOCAB, eos_token_id=1, image_size=48, vision_width=64, vision_layers=5)
    model = ALIGNModel(config).eval()
    states = model.vision_model(torch.randn(1, 3, 48, 48)).last_hidden_state
    assert states.shape == (1, 64, 6, 6)
    assert len(model.vision_model.encoder.blocks) == 5
    with pytest.raises(ValueError, match="vision_layers: expected at least 3"):
        ALIGNConfig.small(vocab_size=VOCAB, eos_token_id=1, vision_layers=2)
