"""VisualBERT: parity with transformers' classes on padded batches, what regions are, its data, and its heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from regions import DIM, LENGTH, REGIONS, VOCAB, batch, samples, sizes, tokenizer, word_labels, write_bert
from torch import Tensor
from torch.nn import functional as F

from vlmfast.cli import main
from vlmfast.models.checkpoints import load
from vlmfast.models.masked.visual_bert import VisualBERTConfig, VisualBERTModel, VisualBERTOptions, phrase_loss
from vlmfast.tasks import task_class

SIZES = sizes(num_hidden_layers=2, visual_embedding_dim=DIM)


def make(**more: Any) -> VisualBERTModel:
    torch.manual_seed(0)
    return VisualBERTModel(VisualBERTConfig(**{**SIZES, **more})).double().eval()


def theirs(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch as transformers' classes take it; regions are of type 0."""
    return {
        "input_ids": given["input_ids"],
        "attention_mask": given["attention_mask"],
        "token_type_ids": given["token_type_ids"],
        "visual_embeds": given["region_features"],
        "visual_attention_mask": given["region_mask"],
        "visual_token_type_ids": torch.zeros_like(given["region_mask"]),
    }


def states(model: VisualBERTModel, given: dict[str, Tensor], **more: Any) -> tuple[Tensor, Tensor]:
    found = model.joint_features(**{**given, **more})
    return found.text, found.image


def test_loss_and_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    """A checkpoint of theirs, padded texts and regions; the visual tables are the checkpoint's."""
    torch.manual_seed(1)
    other = transformers.VisualBertForPreTraining(transformers.VisualBertConfig(**SIZES, pad_token_id=0))
    other.save_pretrained(tmp_path)
    model = load(VisualBERTModel, str(tmp_path), may_be_new=True)
    visual = "visual_bert.embeddings.visual_position_embeddings.weight"
    assert torch.equal(model.state_dict()[visual], other.state_dict()[visual])
    given = batch(dtype=torch.float32)
    labels, matched = word_labels(given), torch.tensor([1, 0, 1, 1])
    padded = F.pad(labels, (0, REGIONS), value=-100)
    expected = other.eval()(**theirs(given), labels=padded, sentence_image_labels=matched)
    found = model.eval()(**given, labels=labels, matched=matched)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.matching_logits, expected.seq_relationship_logits)
    torch.testing.assert_close(model.match_scores(**given), found.matching_logits.log_softmax(1)[:, 1])
    expected.loss.backward()
    found.loss.backward()
    own = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-4, atol=2e-6)
    assert own["attention.query.weight"].grad is None


def test_regions_are_of_type_0() -> None:
    """transformers' default of 1 gives another loss: the test of parity would not pass with it."""
    other = transformers.VisualBertForPreTraining(transformers.VisualBertConfig(**SIZES, pad_token_id=0)).eval()
    other.double()
    given = theirs(batch())
    first = other(**given).seq_relationship_logits
    del given["visual_token_type_ids"]
    assert not torch.allclose(first, other(**given).seq_relationship_logits, atol=1e-3)


def test_regions_have_no_order_unless_words_are_aligned_with_them() -> None:
    model, given, order = make(), batch(1), torch.tensor([3, 0, 4, 1, 2])
    text, image = states(model, given)
    swapped = {**given, "region_features": given["region_features"][:, order]}
    other_text, other_image = states(model, swapped)
    torch.testing.assert_close(other_text, text)
    torch.testing.assert_close(other_image, image[:, order])
    alignment = torch.full((1, REGIONS, 2), -1)
    unaligned, _ = states(model, given, image_text_alignment=alignment)
    torch.testing.assert_close(unaligned, text)  # nothing aligned: a mean of 0, not of 0 / 0
    alignment[0, 1] = torch.tensor([2, 5])
    aligned, _ = states(model, given, image_text_alignment=alignment)
    assert not torch.allclose(aligned, text, atol=1e-3)
    other, _ = states(model, swapped, image_text_alignment=alignment)
    assert not torch.allclose(other, aligned, atol=1e-3)


def test_padding_does_not_show() -> None:
    model, given = make(), batch()
    alone = {name: value[2:3, : 7 if value.shape[1] == LENGTH else 4] for name, value in given.items()}
    assert alone["attention_mask"].all()
    assert alone["region_mask"].all()
    text, image = states(model, given)
    own_text, own_image = states(model, alone)
    torch.testing.assert_close(text[2:3, :7], own_text)
    torch.testing.assert_close(image[2:3, :4], own_image)
    assert model.phrase_scores(torch.ones(4, 1, LENGTH).bool(), **given)[2, 0, 4] < -1e30


def test_a_new_models_visual_tables_are_the_texts(tmp_path: Path) -> None:
    model = make()
    tables = model.visual_bert.embeddings
    assert torch.equal(tables.visual_position_embeddings.weight, tables.position_embeddings.weight)
    assert torch.equal(tables.visual_token_type_embeddings.weight, tables.token_type_embeddings.weight)
    assert not tables.word_embeddings.weight[0].any()  # of padding, which is 0
    assert tables.word_embeddings.weight[1].any()
    other = transformers.VisualBertModel(transformers.VisualBertConfig(**SIZES)).embeddings
    assert not torch.equal(other.visual_position_embeddings.weight, other.position_embeddings.weight)
    with torch.no_grad():
        tables.visual_position_embeddings.weight.add_(1)
    model.save_pretrained(tmp_path)
    loaded = VisualBERTModel.from_pretrained(tmp_path).visual_bert.embeddings
    assert not torch.equal(loaded.visual_position_embeddings.weight, loaded.position_embeddings.weight)


def test_a_berts_weights_are_taken_and_its_tables_copied(tmp_path: Path) -> None:
    words = tokenizer()
    source = write_bert(tmp_path / "bert", vocab_size=len(words))
    bert = transformers.BertForPreTraining.from_pretrained(source)
    model = VisualBERTModel.build(VisualBERTOptions(text_tower=str(source), region_dim=DIM), words).eval()
    tables = model.visual_bert.embeddings
    assert torch.equal(tables.position_embeddings.weight, bert.bert.embeddings.position_embeddings.weight)
    assert torch.equal(tables.visual_position_embeddings.weight, tables.position_embeddings.weight)
    ids = torch.tensor([[2, 70, 80, 90, 1]])
    with torch.no_grad():
        hidden = bert.eval().bert(ids).last_hidden_state
        seen = model.visual_bert(ids).last_hidden_state
        torch.testing.assert_close(seen, hidden)
        torch.testing.assert_close(model.cls.predictions(seen), bert.cls.predictions(hidden))
    transformers.ViTModel(transformers.ViTConfig(**sizes(num_hidden_layers=1), image_size=8, patch_size=4)) \
        .save_pretrained(tmp_path / "vit")  # fmt: skip
    with pytest.raises(ValueError, match="text_tower"):
        VisualBERTModel.build(VisualBERTOptions(text_tower=str(tmp_path / "vit")), words)


def test_grounding_is_transformers_head_at_the_last_word_of_a_phrase() -> None:
    torch.manual_seed(1)
    config = transformers.VisualBertConfig(**SIZES, pad_token_id=0)
    other = transformers.VisualBertForRegionToPhraseAlignment(config).double().eval()
    model = make()
    model.load_state_dict({k: v for k, v in other.state_dict().items() if not k.startswith("attention.value")})
    given = batch()
    spans = torch.zeros(4, 2, LENGTH, dtype=torch.bool)
    spans[:, 0, 1:4] = True
    spans[:, 1, 4] = True
    overlap = torch.tensor([[0.9, 0.1, 0.5, 0, 0], [0.2, 0.6, 0, 0, 0]]).repeat(4, 1, 1)
    overlap[3] = 0  # no region of these phrases
    target = torch.tensor([[0.5, 0, 0.5, 0, 0], [0, 1.0, 0, 0, 0]]).repeat(4, 1, 1).double()
    target[3] = 0
    places = torch.tensor([[3, 4]]).repeat(4, 1)
    expected = other(**theirs(given), region_to_phrase_position=places, labels=target)
    present = given["region_mask"][:, None].bool().expand(-1, 2, -1)
    found = model.phrase_scores(spans, **given)
    torch.testing.assert_close(found[present], expected.logits[present])
    loss = model(**given, phrase_mask=spans, phrase_overlap=overlap).loss
    torch.testing.assert_close(loss.double(), expected.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(phrase_loss(found, torch.zeros(4, 2, 5)), torch.tensor(0.0))


def test_a_question_is_read_at_a_mask_before_its_end() -> None:
    words, model = tokenizer(), make(vocab_size=5000, max_position_embeddings=32)
    collate = model.question_collator(VisualBERTOptions(max_length=9), words)
    given = collate(samples(3))
    assert given["attention_mask"].shape[1] == 9  # longer captions lose words, not the mask
    assert torch.equal(given["read_at"], given["attention_mask"].sum(1) - 2)
    assert (given["input_ids"].gather(1, given["read_at"][:, None]) == words.mask_token_id).all()
    ends = given["input_ids"].gather(1, given["read_at"][:, None] + 1)
    assert (ends == words.eos_token_id).all()
    given["region_features"] = given["region_features"].double()
    found = model.joint_features(**given)
    torch.testing.assert_close(found.pooled, found.text[torch.arange(3), given["read_at"]])
    other = transformers.VisualBertForQuestionAnswering(
        transformers.VisualBertConfig(**{**SIZES, "vocab_size": 5000, "max_position_embeddings": 32}, pad_token_id=0)
    ).double().eval()  # fmt: skip
    other.visual_bert.load_state_dict(model.visual_bert.state_dict())
    logits = other(**theirs(given)).logits
    torch.testing.assert_close(other.cls(found.pooled), logits)


def test_training_texts_are_a_true_caption_and_another_that_matches_in_half(tmp_path: Path) -> None:
    words, model = tokenizer(), make()
    options = VisualBERTOptions(max_length=40, region_dim=DIM)
    kept = samples(400)
    for each in kept:
        each.record["captions"] = [each.caption, f"again picture {int(each.key)}"]
    given = model.collator(options, words, train=True)(kept)
    labels, matched = given["labels"], given["matched"]
    ids = torch.where(labels == -100, given["input_ids"], labels)
    for row, each in enumerate(kept):
        text = words.decode(ids[row][given["attention_mask"][row] == 1][1:-1])
        first, second = (part.strip() for part in text.split(words.eos_token))
        assert first == each.caption
        assert (second == each.record["captions"][1]) == bool(matched[row])
        assert second.startswith("again" if matched[row] else "the caption")
        types = given["token_type_ids"][row]
        assert types[given["attention_mask"][row] == 1].diff().sum() == 1
        assert types[0] == 0
    assert abs(float(matched.float().mean()) - 0.5) < 4 * 0.5 / 20
    assert labels.shape == given["input_ids"].shape  # of the text alone
    assert 0.1 < float((labels != -100).sum() / given["attention_mask"].sum()) < 0.2
    again = model.collator(options, words, train=True)(kept)
    assert all(torch.equal(value, again[name]) for name, value in given.items())

    single = model.collator(options, words, train=True)(samples(100))
    assert not single["token_type_ids"].any()
    assert 0 < int(single["matched"].sum()) < 100
    later = make(matching=False).collator(options, words, train=True)(samples(100))
    assert "matched" not in later


def test_what_is_missing_or_useless_is_named() -> None:
    with pytest.raises(ValueError, match="bypass_transformer: expected False"):
        VisualBERTConfig(bypass_transformer=True)
    with pytest.raises(ValueError, match="--image-size 64 has no effect beside --region-dim 12"):
        VisualBERTModel.build(VisualBERTOptions(region_dim=DIM, image_size=64), tokenizer())
    with pytest.raises(ValueError, match="--text-layers 2 has no effect beside --text-tower"):
        VisualBERTModel.build(VisualBERTOptions(text_tower="bert", text_layers=2), tokenizer())
    with pytest.raises(ValueError, match="--text-width: expected a multiple of 64"):
        VisualBERTModel.build(VisualBERTOptions(text_width=100), tokenizer())
    with pytest.raises(ValueError, match=r"region_features: expected .B, R, D., got None"):
        make()(torch.zeros(1, 3).long())
    with pytest.raises(ValueError, match=r"expected .B, R, 12., got .1, 2, 8.; --region-dim"):
        make()(torch.zeros(1, 3).long(), region_features=torch.zeros(1, 2, 8))
    model = VisualBERTModel.build(VisualBERTOptions(text_width=64, text_layers=1, tower_width=16), tokenizer())
    with pytest.raises(ValueError, match="pixel_values and region_boxes"):
        model(torch.zeros(1, 3).long())
    assert model.config.visual_embedding_dim == 16
    assert VOCAB < model.vocabulary == len(tokenizer())


def write_halves(folder: Path, count: int) -> Path:
    """Two halves of different colours; the caption names both, in an order that says nothing of the sides."""
    colours = ("red", "green", "blue", "yellow")
    for number in range(count):
        left, right = colours[number % 4], colours[(number + 1 + number // 4 % 3) % 4]
        image = Image.new("RGB", (32, 16), left)
        image.paste(right, (16, 0, 32, 16))
        image.save(folder / f"{number:02}.png")
        first, second = (left, right) if number % 2 else (right, left)
        record = {
            "caption": f"{first} and {second}",
            "objects": [
                {"box": [0, 0, 16, 16], "name": left},
                {"box": [16, 0, 32, 16], "name": right},
                {"box": [12, 0, 20, 16], "name": "border"},
            ],
            "phrases": [
                {"span": [0, len(first)], "objects": [int(first == right)]},
                {"span": [len(first) + 5, len(first) + 5 + len(second)], "objects": [int(second == right)]},
            ],
        }
        (folder / f"{number:02}.json").write_text(json.dumps(record))
    return folder


def test_grounding_is_learned_from_the_boxes_of_records(tmp_path: Path) -> None:
    words, data = tokenizer(), write_halves(tmp_path, 48)
    torch.manual_seed(0)
    options = VisualBERTOptions(
        text_width=64, text_layers=1, tower_width=32, image_size=32, max_length=12,
        config_overrides=["initializer_range=0.1", "hidden_dropout_prob=0", "attention_probs_dropout_prob=0"],
    )  # fmt: skip
    model = VisualBERTModel.build(options, words)
    task = task_class("grounding")()
    made = task.trainable(model, data, words, options)
    assert made.model is model
    first = made.collator([made.dataset[0], made.dataset[1]])
    # The border overlaps each half by a quarter of it, of which the two have 4 / 28 in common.
    expected = torch.tensor([[0, 1, 4 / 20], [1, 0, 4 / 20]])
    torch.testing.assert_close(first["phrase_overlap"][0], expected)
    torch.testing.assert_close(first["phrase_overlap"][1], expected.flip(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(40):
        batch = made.collator([made.dataset[(0, (step * 16 + k) % 48)] for k in range(16)])
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = task.evaluate(model, data, words, options, progress=False)
    assert scores.rows["model"]["accuracy"] > 0.9
    assert scores.rows["blind"]["accuracy"] < 0.75
    assert scores.rows["upper bound"]["accuracy"] == 1


def test_features_are_refused_where_they_are_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--data=nowhere", "--output-dir=nowhere", "--use-cpu"]
    assert main(["train", "clip", "--features=regions", *common]) != 0
    assert "--features regions: clip reads no features of regions" in capsys.readouterr().err
    assert main(["train", "visual_bert", "--val-features=regions", *common]) != 0
    assert "--val-features has no effect without --val-data" in capsys.readouterr().err
    assert main(["train", "visual_bert", "--features=a", "--cache-features=b", *common]) != 0
    assert "--features and --cache-features exclude each other" in capsys.readouterr().err
