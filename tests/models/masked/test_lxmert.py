"""LXMERT: parity with transformers' class, what the six terms read, shared cross attention, and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from regions import DIM, LENGTH, REGIONS, batch, samples, sizes, tokenizer, word_labels, write_bert
from torch import Tensor

from vlmfast.models.checkpoints import load
from vlmfast.models.masked.lxmert import LXMERTConfig, LXMERTModel, LXMERTOptions, read_answers
from vlmfast.models.region_batches import ZEROED

OBJECTS, ATTRIBUTES, ANSWERS = 7, 4, 3
SIZES = sizes(
    l_layers=1,
    r_layers=1,
    x_layers=2,
    visual_feat_dim=DIM,
    num_object_labels=OBJECTS,
    num_attr_labels=ATTRIBUTES,
    num_qa_labels=ANSWERS,
)


def make(**more: Any) -> LXMERTModel:
    torch.manual_seed(0)
    return LXMERTModel(LXMERTConfig(**{**SIZES, **more})).eval()


def training_batch(rows: int = 4) -> dict[str, Tensor]:
    """With everything to predict; a masked region is a zero, another image's region, or what it was."""
    given = batch(rows, dtype=torch.float32)
    generator = torch.Generator().manual_seed(9)
    source = torch.arange(rows * REGIONS).view(rows, REGIONS)
    masked = torch.zeros(rows, REGIONS, dtype=torch.bool)
    masked[0, :3], masked[1, 1] = True, True
    source[0, 0], source[0, 1] = ZEROED, REGIONS
    return {
        **given,
        "region_source": source,
        "masked_regions": masked,
        "labels": word_labels(given),
        "matched": torch.tensor([1, 0, 1, 1])[:rows],
        "object_labels": torch.randint(0, OBJECTS, (rows, REGIONS), generator=generator),
        "object_weights": torch.rand(rows, REGIONS, generator=generator),
        "attribute_labels": torch.randint(0, ATTRIBUTES, (rows, REGIONS), generator=generator),
        "attribute_weights": torch.rand(rows, REGIONS, generator=generator),
        "answer": torch.tensor([2, -100, 0, -100])[:rows],
    }


def theirs(given: dict[str, Tensor]) -> dict[str, Any]:
    """The batch as transformers' class takes it: masked by hand, weights 0 of padding."""
    features, masked = given["region_features"], given["masked_regions"]
    seen = features.clone()
    seen[0, 0], seen[0, 1] = 0, features[1, 0]
    present = given["region_mask"]
    return {
        **{name: given[name] for name in ("input_ids", "attention_mask", "token_type_ids", "labels")},
        "visual_feats": seen,
        "visual_pos": given["region_boxes"],
        "visual_attention_mask": present,
        "matched_label": given["matched"],
        "ans": given["answer"],
        "obj_labels": {
            "obj": (given["object_labels"], given["object_weights"] * present),
            "attr": (given["attribute_labels"], given["attribute_weights"] * present),
            "feat": (features, (masked & (present == 1)).float()),
        },
    }


@pytest.mark.parametrize("padded", [False, True])
def test_loss_and_gradients_are_those_of_transformers(padded: bool, tmp_path: Path) -> None:
    """A checkpoint of theirs. Texts are padded in both; means over regions are there of padding too."""
    torch.manual_seed(1)
    other = transformers.LxmertForPreTraining(transformers.LxmertConfig(**SIZES)).eval()
    other.save_pretrained(tmp_path)
    model = load(LXMERTModel, str(tmp_path)).eval()
    given = training_batch()
    if not padded:
        given["region_mask"] = torch.ones(4, REGIONS, dtype=torch.int64)
    share = float(given["region_mask"].float().mean())
    assert padded == (share < 1)
    other.visual_loss_normalizer /= share
    expected = other(**theirs(given))
    found = model(**given)
    assert all(found[f"{name}_loss"] > 0 for name in ("word", "matching", "object", "attribute", "feature", "answer"))
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.matching_logits, expected.cross_relationship_score)
    expected.loss.backward()
    found.loss.backward()
    own = dict(model.named_parameters())
    assert own.keys() == dict(other.named_parameters()).keys()
    for name, parameter in other.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-3, atol=2e-5)
    embeddings = model.lxmert.embeddings
    for table in (embeddings.position_embeddings, embeddings.token_type_embeddings):
        assert not table.weight.grad[0].any()  # of padding, which they have too
        assert table.weight.grad[1].any()
    plain = {k: v for k, v in given.items() if k in batch()}
    matched = model.match_scores(**plain)
    other_scores = other(**{k: v for k, v in theirs(given).items() if k in ("input_ids", "attention_mask",
        "token_type_ids", "visual_pos", "visual_attention_mask")}, visual_feats=given["region_features"])  # fmt: skip
    torch.testing.assert_close(matched, other_scores.cross_relationship_score.log_softmax(1)[:, 1])


def test_both_directions_share_one_cross_attention() -> None:
    model = make()
    layer = model.lxmert.encoder.x_layers[0]

    def count(module: Any) -> int:
        return sum(p.numel() for p in module.parameters())

    attention = 4 * (32 * 32 + 32) + 2 * 32
    feed_forward = (32 * 48 + 48) + (48 * 32 + 32) + 2 * 32
    assert count(layer) == 3 * attention + 2 * feed_forward  # one across, two within
    given = batch(2, dtype=torch.float32)
    before = model.joint_features(**given)
    with torch.no_grad():
        layer.visual_attention.att.query.weight.mul_(-1)
    after = model.joint_features(**given)
    assert not torch.allclose(before.text, after.text, atol=1e-3)
    assert not torch.allclose(before.image, after.image, atol=1e-3)


def test_confidence_weighs_every_region_and_features_are_of_masked_ones() -> None:
    model, given = make(), training_batch()
    first = model(**given)
    given["object_weights"][0, 4] += 0.5  # not masked
    given["attribute_weights"][0, 4] += 0.5
    second = model(**given)
    for name, same in (("object_loss", False), ("attribute_loss", False), ("feature_loss", True), ("word_loss", True)):
        assert torch.equal(first[name], second[name]) == same, name
    assert not given["masked_regions"][0, 4]

    rows = given["masked_regions"] & (given["region_mask"] == 1)
    regions = model.joint_features(**{k: v for k, v in given.items() if k in batch() or k == "region_source"}).image
    head = model.obj_predict_head
    found = head.decoder_dict["feat"](head.transform(regions[rows])).double()
    gap = (found - given["region_features"][rows]).abs()  # the original features
    huber = torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean(1).sum()
    torch.testing.assert_close(second.feature_loss.double(), 6.67 * huber / given["region_mask"].sum())
    logits = head.decoder_dict["obj"](head.transform(regions)).double().log_softmax(-1)
    each = -logits.gather(2, given["object_labels"][..., None])[..., 0]
    weighted = (each * given["object_weights"] * given["region_mask"]).sum() / given["region_mask"].sum()
    torch.testing.assert_close(second.object_loss.double(), 6.67 * weighted)


def test_padding_does_not_show_and_nothing_to_predict_is_no_nan() -> None:
    model, given = make(), training_batch()
    plain = {name: given[name] for name in batch()}
    alone = {name: value[2:3, : 7 if value.shape[1] == LENGTH else 4] for name, value in plain.items()}
    found, own = model.joint_features(**plain), model.joint_features(**alone)
    torch.testing.assert_close(found.pooled[2:3], own.pooled)
    torch.testing.assert_close(found.image[2:3, :4], own.image)
    given["labels"] = torch.full_like(given["labels"], -100)
    given["answer"] = torch.full_like(given["answer"], -100)
    given["masked_regions"] = torch.zeros_like(given["masked_regions"])
    given["object_weights"] = torch.zeros_like(given["object_weights"])
    found = model(**given)
    assert [found[name].item() for name in ("word_loss", "answer_loss", "feature_loss", "object_loss")] == [0, 0, 0, 0]
    found.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_training_data() -> None:
    """Regions masked 80 / 10 / 10, sentences matched in half, labels and confidences of the detector."""
    words = tokenizer()
    kept, options = samples(600), LXMERTOptions(max_length=40, region_dim=DIM)
    given = make().collator(options, words, train=True)(kept)
    present, masked, source = given["region_mask"] == 1, given["masked_regions"], given["region_source"]
    own = torch.arange(source.numel()).view_as(source)
    assert abs(float(masked[present].float().mean()) - 0.15) < 0.04
    assert abs(float((source[masked] == ZEROED).float().mean()) - 0.8) < 0.1
    assert 0.03 < float((source[masked] == own[masked]).float().mean()) < 0.2
    assert (source == own)[~masked].all()
    assert abs(float(given["matched"].float().mean()) - 0.5) < 4 * 0.5 / 600**0.5
    assert given["object_labels"][4].tolist() == [0, 1, 2, 3, 4]
    assert given["object_weights"][1].tolist() == [0.5, 0.5, 0, 0, 0]
    assert given["attribute_weights"][0].tolist() == [0.25, 0, 0, 0, 0]
    torch.testing.assert_close(given["region_boxes"][1, 1], torch.tensor([0.1, 0, 0.2, 1.0]))
    ids = torch.where(given["labels"] == -100, given["input_ids"], given["labels"])
    for row, each in enumerate(kept):
        text = words.decode(ids[row], skip_special_tokens=True).strip()
        assert (text == each.caption) == bool(given["matched"][row])
    evaluated = make().collator(options, words, train=False)(kept[:2])
    assert set(evaluated) == set(batch())


def test_questions_are_answered_where_they_match(tmp_path: Path) -> None:
    words, path = tokenizer(), tmp_path / "answers.txt"
    path.write_text("yes\nno\n\n2\n")
    assert read_answers(str(path)) == ["yes", "no", "2"]
    asked = [{"question": "is there a dog?", "answers": ["no"]}, {"question": "how many?", "answers": ["2", "two"]}]
    kept = samples(400, questions=asked)
    options = LXMERTOptions(max_length=40, region_dim=DIM, answers=str(path), text_layers=1, text_width=64)
    model = LXMERTModel.build(options, words)
    assert model.answer_head.logit_fc[-1].out_features == 3
    given = model.collator(options, words, train=True)(kept)
    ids = torch.where(given["labels"] == -100, given["input_ids"], given["labels"])
    expected = {"is there a dog?": 1, "how many?": 2}
    for row in range(400):
        text = words.decode(ids[row], skip_special_tokens=True).strip()
        assert int(given["answer"][row]) == (expected.get(text, -100) if given["matched"][row] else -100)
    share = float((given["answer"] != -100).float().mean())
    assert abs(share - 2 / 3 * float(given["matched"].float().mean())) < 0.12
    loss = model.eval()(**given).answer_loss
    assert 0.5 < loss.item() < 2
    path.write_text("yes\nyes\n")
    with pytest.raises(ValueError, match=r"--answers .*each once"):
        read_answers(str(path))
    with pytest.raises(ValueError, match="answers: expected num_qa_labels 3 of them, got 1"):
        LXMERTConfig(answers=["yes"], num_qa_labels=3)


def test_a_berts_first_layers_are_taken(tmp_path: Path) -> None:
    words = tokenizer()
    source = write_bert(tmp_path / "bert", vocab_size=len(words), layer_norm_eps=1e-12)
    bert = transformers.BertModel.from_pretrained(source).eval()
    options = LXMERTOptions(text_tower=str(source), text_layers=1, region_layers=1, cross_layers=1, region_dim=DIM)
    model = LXMERTModel.build(options, words).eval()
    ids = torch.tensor([[2, 70, 80, 90, 1]])
    hidden = model.lxmert.embeddings(ids, torch.zeros_like(ids))
    hidden = model.lxmert.encoder.layer[0](hidden, torch.zeros(1, 1, 1, 5))[0]
    torch.testing.assert_close(hidden, bert(ids, output_hidden_states=True).hidden_states[1])
    with pytest.raises(ValueError, match="--text-layers: expected at most the 2 of --text-tower, got 3"):
        LXMERTModel.build(LXMERTOptions(text_tower=str(source), text_layers=3), words)
    wrong = LXMERTOptions(tower_width=16, config_overrides=["visual_feat_dim=12"], text_layers=1)
    with pytest.raises(ValueError, match="visual_feat_dim: expected 16, the width of region_tower, got 12"):
        LXMERTModel.build(wrong, words)


def test_new_tokens_have_room() -> None:
    model = make()
    model.resize_vocabulary(60)
    given = batch(2, dtype=torch.float32)
    given["input_ids"][:, 1] = 59
    loss = model(**given, labels=torch.where(given["input_ids"] == 59, 59, -100)).loss
    loss.backward()
    assert model.vocabulary == 60
    assert model.cls.predictions.bias.grad[59] != 0
