"""ViLBERT: its equations in float64 on padded batches, what depends on what, its data, and its heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from regions import DIM, LENGTH, REGIONS, VOCAB, batch, samples, sizes, tokenizer, word_labels, write_bert
from torch import Tensor
from torch.nn import functional as F

from vlmfast.models.checkpoints import load
from vlmfast.models.masked.vilbert import ViLBERTConfig, ViLBERTModel, ViLBERTOptions, phrase_loss, phrase_texts
from vlmfast.models.masked.vilbert_parts import CoLayer

CLASSES = 7
SIZES = {
    **sizes(num_hidden_layers=4),
    "v_feature_size": DIM,
    "v_target_size": CLASSES,
    "v_hidden_size": 24,
    "v_num_hidden_layers": 2,
    "v_num_attention_heads": 3,
    "v_intermediate_size": 24,
    "v_hidden_dropout_prob": 0.0,
    "v_attention_probs_dropout_prob": 0.0,
    "bi_hidden_size": 16,
    "bi_num_attention_heads": 2,
    "t_biattention_id": [2, 3],
    "v_biattention_id": [0, 1],
}


def make(**more: Any) -> ViLBERTModel:
    torch.manual_seed(0)
    return ViLBERTModel(ViLBERTConfig(**{**SIZES, **more})).double().eval()


def training_batch() -> dict[str, Tensor]:
    """Of the third row's regions none is masked, of the first row's two, one of them zeroed."""
    given = batch()
    generator = torch.Generator().manual_seed(3)
    masked = torch.zeros(4, REGIONS, dtype=torch.bool)
    masked[0, :2], masked[1, 1], masked[3, 0] = True, True, True
    source = torch.arange(4 * REGIONS).view(4, REGIONS)
    source[0, 0], source[1, 1] = -1, -1
    targets = torch.rand(4, REGIONS, CLASSES, generator=generator, dtype=torch.float64).softmax(-1)
    return {
        **given,
        "labels": word_labels(given),
        "matched": torch.tensor([1, 0, 1, 1]),
        "masked_regions": masked,
        "region_source": source,
        "region_targets": targets,
    }


def single(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float32, as the loss of words wants it."""
    return {name: value.float() if value.dtype == torch.float64 else value for name, value in given.items()}


def reference(w: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
    """The loss, written from the paper and the names of the authors' parameters."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, heads: int) -> Tensor:
        found = []
        for a, b, c in zip(*(x.chunk(heads, -1) for x in (q, k, v)), strict=True):
            scores = a @ b.transpose(1, 2) / a.shape[-1] ** 0.5
            found.append(scores.masked_fill(mask[:, None] == 0, -torch.inf).softmax(-1) @ c)
        return torch.cat(found, -1)

    def layer(name: str, x: Tensor, mask: Tensor, heads: int) -> Tensor:
        q, k, v = (linear(f"{name}.attention.self.{part}", x) for part in ("query", "key", "value"))
        read = linear(f"{name}.attention.output.dense", attend(q, k, v, mask, heads))
        x = norm(f"{name}.attention.output.LayerNorm", read + x)
        inner = linear(f"{name}.output.dense", gelu(linear(f"{name}.intermediate.dense", x)))
        return norm(f"{name}.output.LayerNorm", inner + x)

    def together(name: str, image: Tensor, text: Tensor, regions: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        def of(number: int, x: Tensor) -> list[Tensor]:
            return [linear(f"{name}.biattention.{part}{number}", x) for part in ("query", "key", "value")]

        (q1, k1, v1), (q2, k2, v2) = of(1, image), of(2, text)
        to_text, to_image = attend(q2, k1, v1, regions, 2), attend(q1, k2, v2, words, 2)
        image = norm(f"{name}.biOutput.LayerNorm1", linear(f"{name}.biOutput.dense1", to_image) + image)
        text = norm(f"{name}.biOutput.LayerNorm2", linear(f"{name}.biOutput.dense2", to_text) + text)
        made = []
        for stream, x in (("v", image), ("t", text)):
            inner = gelu(linear(f"{name}.{stream}_intermediate.dense", x))
            made.append(norm(f"{name}.{stream}_output.LayerNorm", linear(f"{name}.{stream}_output.dense", inner) + x))
        return made[0], made[1]

    ids, words, types = given["input_ids"], given["attention_mask"], given["token_type_ids"]
    table = "bert.embeddings"
    text = w[f"{table}.word_embeddings.weight"][ids] + w[f"{table}.token_type_embeddings.weight"][types]
    text = norm(f"{table}.LayerNorm", text + w[f"{table}.position_embeddings.weight"][: ids.shape[1]])

    present = given["region_mask"]
    features = given["region_features"].clone()
    features[given["region_source"] == -1] = 0
    mean = torch.stack([row[there == 1].mean(0) for row, there in zip(features, present, strict=True)])
    features = torch.cat([mean[:, None], features], 1)
    boxes = given["region_boxes"]
    area = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))[..., None]
    whole = torch.tensor([0.0, 0, 1, 1, 1], dtype=torch.float64).expand(len(boxes), 1, 5)
    places = torch.cat([whole, torch.cat([boxes, area], -1)], 1)
    regions = F.pad(present, (1, 0), value=1)
    image = linear("bert.v_embeddings.image_embeddings", features)
    image = norm("bert.v_embeddings.LayerNorm", image + linear("bert.v_embeddings.image_location_embeddings", places))

    encoder = "bert.encoder"
    for number in (0, 1):
        text = layer(f"{encoder}.layer.{number}", text, words, 4)
    image, text = together(f"{encoder}.c_layer.0", image, text, regions, words)
    image, text = layer(f"{encoder}.v_layer.0", image, regions, 3), layer(f"{encoder}.layer.2", text, words, 4)
    image, text = together(f"{encoder}.c_layer.1", image, text, regions, words)
    image, text = layer(f"{encoder}.v_layer.1", image, regions, 3), layer(f"{encoder}.layer.3", text, words, 4)

    def head(name: str, x: Tensor) -> Tensor:
        return norm(f"{name}.transform.LayerNorm", gelu(linear(f"{name}.transform.dense", x)))

    rows = given["labels"] != -100
    logits = head("cls.predictions", text[rows]) @ w[f"{table}.word_embeddings.weight"].T + w["cls.predictions.bias"]
    word_loss = -logits.log_softmax(-1).gather(1, given["labels"][rows][:, None]).mean()
    masked = given["masked_regions"]
    p = linear("cls.imagePredictions.decoder", head("cls.imagePredictions", image[:, 1:][masked])).log_softmax(-1)
    q = given["region_targets"][masked]
    region_loss = (q * (q.log() - p)).sum() / masked.sum()  # over masked regions, not over regions times classes
    pooled = linear("bert.t_pooler.dense", text[:, 0]).relu() * linear("bert.v_pooler.dense", image[:, 0]).relu()
    both = linear("cls.bi_seq_relationship", pooled).log_softmax(-1)
    matching_loss = -both.gather(1, 1 - given["matched"][:, None]).mean()  # 0 is aligned
    return torch.stack([word_loss, region_loss, matching_loss])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients_are_the_papers(attention: str) -> None:
    model = make().float()
    model.config._attn_implementation = attention
    for each in model.bert.encoder.v_layer:
        each.attention.self.config._attn_implementation = attention
    given = training_batch()
    found = model(**single(given))
    leaves = {name: value.detach().double().requires_grad_() for name, value in model.state_dict().items()}
    terms = reference(leaves, given)
    torch.testing.assert_close(
        torch.stack([found.word_loss, found.region_loss, found.matching_loss]).double(), terms, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(found.loss.double(), terms.sum(), rtol=1e-5, atol=1e-6)
    found.loss.backward()
    terms.sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("vision_logit"):
            assert parameter.grad is None
            continue
        want = leaves[name].grad
        assert want.abs().max() > 0 or "key" in name, name
        torch.testing.assert_close(
            parameter.grad, want.float(), rtol=1e-3, atol=2e-5, msg=lambda text, at=name: f"{at}: {text}"
        )


def test_what_depends_on_what() -> None:
    """Words are read without the image before the first co-attention, regions without words; then both as they were."""
    model, given = make(), {name: value for name, value in training_batch().items() if name in batch()}
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, args: seen.setdefault(name, []).append(args[0].detach().clone()))

    encoder, order = model.bert.encoder, []
    for name, layers in (("T", encoder.layer), ("V", encoder.v_layer), ("C", encoder.c_layer)):
        for number, each in enumerate(layers):
            each.register_forward_pre_hook(lambda *_, at=f"{name}{number}": order.append(at))
    watch("text of C0", encoder.c_layer[0].biattention.query2)
    watch("text of T2", encoder.layer[2])
    watch("image of C0", encoder.c_layer[0].biattention.query1)
    watch("embedding", model.bert.v_embeddings.dropout)
    model.joint_features(**given)
    assert order == ["T0", "T1", "C0", "V0", "T2", "C1", "V1", "T3"] or order == [
        "T0", "T1", "C0", "T2", "V0", "C1", "T3", "V1"
    ]  # fmt: skip
    other = {**given, "region_features": given["region_features"] + 1}
    model.joint_features(**other)
    words = {**given, "input_ids": (given["input_ids"] + 1) % VOCAB}
    model.joint_features(**words)
    assert torch.equal(*seen["text of C0"][:2])
    assert not torch.allclose(*seen["text of T2"][:2])
    assert torch.equal(seen["image of C0"][0], seen["image of C0"][2])
    assert torch.equal(seen["image of C0"][0], seen["embedding"][0])

    layer = CoLayer(model.config).double().eval()
    image, text = torch.randn(2, 3, 24).double(), torch.randn(2, 4, 32).double()
    mask = torch.ones(2, 1, 1, 3, dtype=torch.bool), torch.ones(2, 1, 1, 4, dtype=torch.bool)
    before = layer(image, mask[0], text, mask[1])
    with torch.no_grad():
        layer.biOutput.LayerNorm1.bias.add_(3)  # moves the image's new states, which the text does not read
    after = layer(image, mask[0], text, mask[1])
    assert torch.equal(before[1], after[1])
    assert not torch.allclose(before[0], after[0])


def test_padding_does_not_show_and_nothing_masked_is_no_nan() -> None:
    model, given = make(), training_batch()
    plain = {name: given[name] for name in batch()}
    alone = {
        name: value[2:3, : LENGTH - 2 if value.shape[1] == LENGTH else REGIONS - 1] for name, value in plain.items()
    }
    found, own = model.joint_features(**plain), model.joint_features(**alone)
    torch.testing.assert_close(found.pooled[2:3], own.pooled)
    torch.testing.assert_close(found.image[2:3, : REGIONS - 1], own.image)
    given["labels"] = torch.full_like(given["labels"], -100)
    given["masked_regions"] = torch.zeros_like(given["masked_regions"])
    found = model.float()(**single(given))
    assert found.word_loss == 0
    assert found.region_loss == 0
    found.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_data() -> None:
    words = tokenizer()
    kept, options = samples(600), ViLBERTOptions(max_length=40, region_dim=DIM, region_classes=CLASSES)
    for sample in kept:
        rows = len(sample.features["boxes"])
        sample.features["probabilities"] = F.one_hot(torch.full((rows,), CLASSES - 1), CLASSES).float()
    collator = make(vocab_size=len(words)).collator(options, words, train=True)
    given = collator(kept)
    present, masked, source = given["region_mask"] == 1, given["masked_regions"], given["region_source"]
    assert not (masked & ~present).any()
    assert (masked.sum() / present.sum()).item() == pytest.approx(0.15, abs=0.025)
    assert ((source == -1) & masked).sum().item() / masked.sum().item() == pytest.approx(0.9, abs=0.05)
    assert (given["region_targets"][..., 0] == 1)[present].all()  # background comes first
    assert given["matched"].float().mean().item() == pytest.approx(0.5, abs=0.07)
    again = collator(kept)
    assert all(torch.equal(value, again[name]) for name, value in given.items())
    del kept[0].features["probabilities"]
    with pytest.raises(ValueError, match="expected 'probabilities' of every sample"):
        collator(kept)


def test_grounding_reads_each_phrase_alone() -> None:
    model, given = make(), batch()
    phrases = torch.zeros(4, 2, LENGTH, dtype=torch.bool)
    phrases[:, 0, 1:3], phrases[:3, 1, 4] = True, True
    scores = model.phrase_scores(phrases, **given)
    assert scores.shape == (4, 2, REGIONS)
    one = given["input_ids"][1, [0, 1, 2, LENGTH - 2]][None]  # of 8 tokens
    own = {name: given[name][1:2] for name in ("region_features", "region_boxes", "region_mask")}
    _, states = model._read(one, None, **own)
    torch.testing.assert_close(scores[1, 0, :REGIONS], model.vision_logit(states[0, 1:, :])[:, 0])
    _, mask = phrase_texts(given["input_ids"], given["attention_mask"], phrases)
    assert mask.sum(1).tolist() == [4, 3, 4, 3, 4, 3, 4, 2]
    overlap = torch.rand(4, 2, REGIONS, generator=torch.Generator().manual_seed(1))
    loss = model(**given, phrase_mask=phrases, phrase_overlap=overlap).loss
    want, there = 0.0, given["region_mask"]
    for row in range(4):
        for k in range(2):
            if phrases[row, k].any():
                p, q = scores[row, k].sigmoid(), (overlap[row, k] >= 0.5).double()
                each = -(q * p.log() + (1 - q) * (1 - p).log())
                want += each[there[row] == 1].sum()
    torch.testing.assert_close(loss.double(), want / 7, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert model.vision_logit.weight.grad.abs().sum() > 0
    assert phrase_loss(scores, overlap, torch.zeros_like(phrases), None) == 0


def test_starts_from_a_bert_and_loads_what_it_saved(tmp_path: Path) -> None:
    words = tokenizer()
    folder = write_bert(tmp_path / "bert", vocab_size=len(words))
    options = ViLBERTOptions(text_tower=str(folder), region_dim=DIM, region_classes=CLASSES, region_width=64)
    model = ViLBERTModel.build(options, words)
    source = load_region_text(folder)
    own = model.state_dict()
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.attention.self.query.weight"):
        assert torch.equal(own[name], source[name])
    assert torch.equal(own["cls.predictions.transform.dense.weight"], source["cls.predictions.transform.dense.weight"])
    model.save_pretrained(tmp_path / "saved")
    loaded = load(ViLBERTModel, str(tmp_path / "saved"))
    assert all(torch.equal(value, own[name]) for name, value in loaded.state_dict().items())
    # As in the authors' checkpoints: two layers more, which nothing reads.
    state = {**own, "bert.encoder.c_layer.0.biOutput.q_dense1.weight": torch.zeros(2, 2)}
    state = {name: value.clone() for name, value in state.items()}
    torch.save(state, tmp_path / "saved" / "pytorch_model.bin")
    (tmp_path / "saved" / "model.safetensors").unlink()
    again = load(ViLBERTModel, str(tmp_path / "saved"))
    assert torch.equal(again.bert.v_pooler.dense.weight, model.bert.v_pooler.dense.weight)


def load_region_text(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t_biattention_id": [2]}, "expected as many of both"),
        ({"t_biattention_id": [2, 9]}, "t_biattention_id: expected rising places from 0 to 4, got"),
        ({"v_biattention_id": [1, 1]}, "v_biattention_id: expected rising places from 0 to 2, got"),
        ({"bi_num_attention_heads": 3}, "bi_hidden_size: expected a multiple of bi_num_attention_heads, got 16"),
        ({"dynamic_attention": True}, "dynamic_attention: expected none of later papers' options, got True"),
        ({"pooling_method": "sum"}, "pooling_method: expected 'mul', got 'sum'"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViLBERTConfig(**{**SIZES, **change})


def test_flags_that_would_be_ignored() -> None:
    with pytest.raises(ValueError, match="--region-classes 7 has no effect beside a new image tower"):
        ViLBERTOptions(region_classes=CLASSES).check()
    with pytest.raises(ValueError, match="--region-width: expected a multiple of 64, got 65"):
        ViLBERTOptions(region_width=65).check()
    model, given = make(v_target_size=5).float(), single(training_batch())
    with pytest.raises(ValueError, match=r"region_targets: expected 5 classes \(v_target_size\), got 7"):
        model(**given)
