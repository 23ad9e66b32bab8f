"""SigLIP against transformers' SiglipModel, and where that differs from what was published."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from vlmfast.models.contrastive.siglip import SigLIPConfig, SigLIPModel

VOCAB, PAD, POSITIONS = 50, 1, 12
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWERS = {
    "vision_config": {**SIZE, "image_size": 16, "patch_size": 8},
    "text_config": {**SIZE, "vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "pad_token_id": PAD,
                    "bos_token_id": 48, "eos_token_id": 49},
}  # fmt: skip


def batch(rows: int = 5) -> dict[str, Tensor]:
    """Texts padded to all positions, as Siglip is trained."""
    ids = torch.randint(2, VOCAB, (rows, POSITIONS))
    for row in range(rows):
        ids[row, 3 + 2 * row :] = PAD
    return {"pixel_values": torch.randn(rows, 3, 16, 16), "input_ids": ids}


@pytest.fixture
def reference() -> transformers.SiglipModel:
    model = transformers.SiglipModel(transformers.SiglipConfig(**TOWERS))
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-2.0)
    return model.eval()


def test_features_loss_and_gradients_are_transformers(reference: transformers.SiglipModel, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    model, info = SigLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    inputs = batch()
    expected, output = reference(**inputs, return_loss=True), model(**inputs)
    torch.testing.assert_close(output.image_features, expected.image_embeds)
    torch.testing.assert_close(output.text_features, expected.text_embeds)
    torch.testing.assert_close(output.logits_per_image(), expected.logits_per_image)
    torch.testing.assert_close(output.loss, expected.loss)
    expected.loss.backward()
    output.loss.backward()
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    ours = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_transformers_reads_ours(tmp_path: Path) -> None:
    model = SigLIPModel(SigLIPConfig(**TOWERS)).eval()
    model.save_pretrained(tmp_path)
    loaded, info = transformers.SiglipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    inputs = batch()
    torch.testing.assert_close(loaded(**inputs, return_loss=True).loss, model(**inputs).loss)


def test_padding_to_the_longest_changes_transformers_features_and_not_ours(reference, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    model, ids = SigLIPModel.from_pretrained(tmp_path), batch(2)["input_ids"]
    whole, short = model.get_text_features(ids), model.get_text_features(ids[:, :5])
    torch.testing.assert_close(short, whole)
    theirs = [F.normalize(reference.get_text_features(t).pooler_output, dim=-1) for t in (ids, ids[:, :5])]
    torch.testing.assert_close(theirs[0], whole)
    assert (theirs[1] - whole).abs().max() > 0.01
    # What the mask calls padding is padding, whatever the tokenizer wrote there.
    other = ids.masked_fill(ids == PAD, 7)
    torch.testing.assert_close(model.get_text_features(other, (ids != PAD).long()), whole)


def test_the_loss_is_the_papers() -> None:
    """Algorithm 1, in float64; at the start it is what the bias makes of it."""
    model = SigLIPModel(SigLIPConfig(**TOWERS))
    assert model.logit_scale.item() == pytest.approx(math.log(10))
    assert model.logit_bias.item() == -10
    assert model.logit_scale.requires_grad
    assert model.logit_bias.requires_grad
    image, text = (F.normalize(torch.randn(7, 32), dim=-1) for _ in range(2))
    logits = image.double() @ text.double().T * 10 - 10
    labels = 2 * torch.eye(7, dtype=torch.float64) - 1
    expected = -F.logsigmoid(labels * logits).sum() / 7
    found = model.loss(image, text, model.logit_scale[0], model.logit_bias[0])
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_neither_scalar_is_clamped() -> None:
    assert not hasattr(SigLIPModel, "after_optimizer_step")


def test_other_towers_have_projections() -> None:
    bert = transformers.BertConfig(**SIZE, vocab_size=VOCAB)
    model = SigLIPModel(SigLIPConfig(vision_config=TOWERS["vision_config"], text_config=bert, projection_dim=32))
    assert isinstance(model.visual_projection, torch.nn.Identity)
    assert model.text_projection.weight.shape == (32, 32)
    wider = SigLIPModel(SigLIPConfig(**TOWERS, projection_dim=24))
    assert wider.visual_projection.weight.shape == wider.text_projection.weight.shape == (24, 32)
    wider(**batch()).loss.backward()
    assert wider.visual_projection.weight.grad.any()
