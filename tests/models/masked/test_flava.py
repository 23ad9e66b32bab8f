"""FLAVA against transformers' FlavaForPreTraining and against the paper's statements, on tiny random models."""

from __future__ import annotations

import math
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import FlavaConfig, FlavaForPreTraining

from vlmfast.data import load_tokenizer
from vlmfast.models.checkpoints import load
from vlmfast.models.masked.flava import FLAVAModel
from vlmfast.models.masked.flava_loss import loss_terms
from vlmfast.training import grad_cache

ROOT = Path(__file__).parents[3]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
GRID, WORDS, VOCABULARY = 4, 40, 60


def config(**more: Any) -> FlavaConfig:
    return FlavaConfig(
        image_config={**SIZES, "image_size": 8 * GRID, "patch_size": 8, "vocab_size": WORDS},
        text_config={**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 12},
        multimodal_config=dict(SIZES),
        image_codebook_config={"hidden_size": 8, "num_blocks_per_group": 1, "vocab_size": WORDS},
        hidden_size=32,
        projection_dim=16,
        **more,
    )


def original() -> FlavaForPreTraining:
    """With no weight that is 0, as class tokens and positions of a new one are."""
    torch.manual_seed(0)
    model = FlavaForPreTraining(config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def ours(weights: dict[str, Tensor] | None = None) -> FLAVAModel:
    model = FLAVAModel(config())
    model.load_state_dict(original().state_dict() if weights is None else weights)
    return model.train()


def pairs(rows: int = 4) -> dict[str, Tensor]:
    """Padded, with two texts that are not the image's own."""
    torch.manual_seed(1)
    mask = (torch.arange(9) < torch.tensor([9, 5, 7, 9] * (rows // 4))[:, None]).long()
    ids = torch.randint(6, VOCABULARY, (rows, 9)) * mask
    labels = torch.where((torch.rand(rows, 9) < 0.3) & (mask == 1), ids, -100)
    labels[0, 1] = ids[0, 1]
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(rows, 3, 8 * GRID, 8 * GRID),
        "attention_mask": mask,
        "input_ids_masked": torch.where(labels == -100, ids, 5),
        "mlm_labels": labels,
        "bool_masked_pos": torch.rand(rows, GRID * GRID) < 0.4,
        "itm_labels": torch.tensor([1, 0, 1, 0] * (rows // 4)),
        "codebook_pixel_values": torch.rand(rows, 3, 8 * GRID, 8 * GRID),
    }


KINDS = {
    "pairs": tuple(pairs()),
    "images": ("pixel_values", "bool_masked_pos", "codebook_pixel_values"),
    "texts": ("input_ids_masked", "mlm_labels", "attention_mask"),
}
TERMS = {"pairs": {"global_contrastive", "itm", "mmm_image", "mmm_text"}, "images": {"mim"}, "texts": {"mlm"}}


def batch(kind: str) -> dict[str, Tensor]:
    return {name: value for name, value in pairs().items() if name in KINDS[kind]}


@pytest.mark.parametrize("kind", KINDS)
def test_terms_and_gradients_are_those_of_transformers(kind: str) -> None:
    """By the rule that the error is at most twice that of the eager model, both against float64."""
    inputs = batch(kind)
    theirs = {**inputs, **({"input_ids": pairs()["input_ids"]} if kind == "texts" else {})}  # it asks for both
    eager, exact, own = original(), original().double(), ours()
    runs = []
    for model, given in ((exact, theirs), (eager, theirs), (own, inputs)):
        given = {
            name: value.to(next(model.parameters()).dtype) if value.is_floating_point() else value.clone()
            for name, value in given.items()
        }
        output = model(**given)
        output.loss.backward()
        terms = model.last_terms if model is own else {k: v for k, v in output.loss_info.items() if v is not None}
        runs.append((terms, {n: p.grad for n, p in model.named_parameters()}))
    reference, twice, found = runs
    assert reference[0].keys() == found[0].keys() == TERMS[kind]
    for which in (0, 1):
        for name, value in reference[which].items():
            if value is None:
                assert found[which][name] is None, name
                continue
            error = (found[which][name].double() - value).abs().max()
            bound = 2 * (twice[which][name].double() - value).abs().max() + 4e-6 * value.abs().max() + 1e-8
            assert error <= bound, (name, error.item(), bound.item())


def test_checkpoints_of_transformers_load_and_save(tmp_path: Path) -> None:
    theirs = original().eval()
    theirs.save_pretrained(tmp_path / "theirs")
    own = load(FLAVAModel, str(tmp_path / "theirs"))
    own.save_pretrained(tmp_path / "ours")
    back, report = FlavaForPreTraining.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    weights = theirs.state_dict()
    assert back.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in back.state_dict().items())
    inputs = pairs()
    with torch.no_grad():
        expected = theirs.flava(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
        image = F.normalize(theirs.flava.image_projection(expected.image_embeddings[:, 0]), dim=-1)
        text = F.normalize(theirs.flava.text_projection(expected.text_embeddings[:, 0]), dim=-1)
        shown = {name: inputs[name] for name in ("input_ids", "pixel_values", "attention_mask")}
        torch.testing.assert_close(own.get_image_features(inputs["pixel_values"]), image)
        torch.testing.assert_close(own.get_text_features(inputs["input_ids"], inputs["attention_mask"]), text)
        joint = own.joint_features(**shown)
        torch.testing.assert_close(joint.pooled, expected.multimodal_embeddings[:, 0])
        torch.testing.assert_close(joint.image, expected.multimodal_embeddings[:, 2 : 2 + GRID * GRID])
        torch.testing.assert_close(joint.text, expected.multimodal_embeddings[:, 2 + GRID * GRID :])
        matched = theirs.itm_head(expected.multimodal_embeddings).log_softmax(-1)[:, 1]
        torch.testing.assert_close(own.match_scores(**shown), matched)


def test_pixels_in_bytes_are_normalised_as_clip_does() -> None:
    own = ours().eval()
    pixels = torch.randint(256, (2, 8 * GRID, 8 * GRID, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    floats = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(own.get_image_features(pixels), own.get_image_features(floats), rtol=1e-4, atol=1e-5)
    hidden = torch.rand(2, GRID * GRID) < 0.5
    words = [own.words(each, hidden, None, None) for each in (pixels, floats)]
    assert torch.equal(*words)
    smaller = own.words(pixels.repeat_interleave(2, 1).repeat_interleave(2, 2), hidden, None, None)
    assert (smaller == words[0]).float().mean() > 0.8  # the same picture, twice the size


# The spec's honest test.


def terms_of(model: FLAVAModel, **inputs: Tensor) -> dict[str, Tensor]:
    model(**inputs)
    return dict(model.last_terms)


def test_the_contrastive_term_never_sees_a_mask_token() -> None:
    model, inputs = ours(), pairs()
    before = terms_of(model, **inputs)
    with torch.no_grad():
        model.flava.image_model.embeddings.mask_token.add_(1)
    after = terms_of(model, **inputs)
    assert torch.equal(before["global_contrastive"], after["global_contrastive"])
    assert all(before[name] != after[name] for name in ("mmm_image", "mmm_text", "itm"))
    hidden_words = terms_of(model, **{**inputs, "input_ids_masked": inputs["input_ids_masked"].flip(1)})
    assert torch.equal(after["global_contrastive"], hidden_words["global_contrastive"])
    assert hidden_words["itm"] != after["itm"]


def test_the_multimodal_transformer_reads_states_before_the_last_layer_norm() -> None:
    model, inputs = ours(), pairs()
    before = terms_of(model, **inputs)
    with torch.no_grad():
        for tower in (model.flava.image_model, model.flava.text_model):
            tower.layernorm.weight.mul_(torch.linspace(0.5, 2, 32))
    after = terms_of(model, **inputs)
    assert before["global_contrastive"] != after["global_contrastive"]
    assert all(torch.equal(before[name], after[name]) for name in ("mmm_image", "mmm_text", "itm"))


def test_pairs_that_do_not_match_have_no_row_and_stay_columns() -> None:
    model, inputs = ours(), pairs()
    output = model(**inputs)
    x, t = output.image_features.double(), output.text_features.double()
    logits, kept = output.logit_scale.double().exp() * x @ t.T, torch.tensor([0, 2])
    expected = (F.cross_entropy(logits[kept], kept) + F.cross_entropy(logits.T[kept], kept)) / 2
    torch.testing.assert_close(model.last_terms["global_contrastive"].double(), expected, rtol=1e-5, atol=1e-6)
    alone = logits[kept][:, kept]
    assert (F.cross_entropy(alone, torch.arange(2)) - expected).abs() > 1e-3  # without the others as negatives
    for name, labels in (("mmm_text", inputs["mlm_labels"]), ("mmm_image", inputs["bool_masked_pos"])):
        only = {**inputs, "mlm_labels": inputs["mlm_labels"].clone(), "bool_masked_pos": inputs["bool_masked_pos"]}
        if name == "mmm_text":
            assert (labels[1] != -100).any()
            only["mlm_labels"][[1, 3]] = -100
            assert torch.equal(terms_of(model, **only)[name], model.last_terms[name])
    none = terms_of(model, **{**inputs, "itm_labels": torch.zeros(4, dtype=torch.int64)})
    every = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
    torch.testing.assert_close(none["global_contrastive"].double(), every, rtol=1e-5, atol=1e-6)


def test_labels_of_patches_belong_to_patches() -> None:
    """Position 0 is the multimodal [CLS], 1 the image's own, patches begin at 2."""
    model, inputs = ours(), pairs()
    states = model.joint(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
    image, text = model.parts(states, 9)
    assert torch.equal(image, states[:, 2 : 2 + GRID * GRID])
    assert torch.equal(text, states[:, 2 + GRID * GRID :])
    words = model.words(inputs["pixel_values"], inputs["bool_masked_pos"], None, inputs["codebook_pixel_values"])
    codes = model.image_codebook(inputs["codebook_pixel_values"]).argmax(1).flatten(1)
    assert torch.equal(words, codes.masked_fill(~inputs["bool_masked_pos"], -100))


def test_the_codebook_is_frozen_and_a_pair_has_no_unimodal_terms() -> None:
    model = ours()
    model(**pairs()).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.image_codebook.parameters())
    assert not model.image_codebook.training
    assert all(p.grad is None for head in (model.mim_head, model.mlm_head) for p in head.parameters())
    assert model.last_terms.keys() == TERMS["pairs"]


def test_nothing_masked_is_zero_and_not_nan() -> None:
    model = ours()
    loss = model(**{**batch("texts"), "mlm_labels": torch.full((4, 9), -100)}).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_padding_does_not_change_a_text() -> None:
    model = ours().eval()
    inputs = pairs()
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"]
    found = model.get_text_features(ids, mask)
    other = model.get_text_features(torch.where(mask == 1, ids, 7), mask)
    torch.testing.assert_close(found, other)
    torch.testing.assert_close(found[1:2], model.get_text_features(ids[1:2, :5], None))
    shown = {"input_ids": ids, "pixel_values": inputs["pixel_values"], "attention_mask": mask}
    changed = {**shown, "input_ids": torch.where(mask == 1, ids, 7)}
    torch.testing.assert_close(model.match_scores(**shown), model.match_scores(**changed))


def test_the_temperature_stays_in_its_range() -> None:
    model = ours()
    for start, end in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        model.flava.logit_scale.data.fill_(start)
        model.after_optimizer_step()
        assert model.flava.logit_scale.item() == pytest.approx(end)


def test_chunks_equal_the_whole_batch() -> None:
    """GradCache, with fewer matches in one chunk than in the other."""
    inputs = pairs(8) | {"itm_labels": torch.tensor([1, 1, 1, 0, 0, 0, 1, 0])}
    whole, parts = ours(), ours()
    loss = whole(**inputs).loss
    loss.backward()

    def encode(chunk: Any) -> dict[str, Tensor]:
        output = parts(**chunk, return_loss=False)
        return {name: value for name, value in output.items() if isinstance(value, Tensor)}

    found = grad_cache.forward_backward(encode, lambda features: parts.loss(**features), inputs, 4)
    torch.testing.assert_close(found, loss.detach())
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


def each_kind(rank: int, world_size: int, weights: dict[str, Tensor], inputs: dict[str, Tensor], folder: Path) -> None:
    """This process's share of a batch of each kind: 5 pairs with 3 matches, or 3 with none."""
    model = DistributedDataParallel(ours(weights), find_unused_parameters=True)
    found = {}
    for kind, names in KINDS.items():
        model.module.last_terms = {}
        model(**{name: inputs[name].split([5, 3])[rank] for name in names}).loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.module.named_parameters() if p.grad is not None}
        found[kind] = (model.module.last_terms, gradients)
        model.zero_grad(set_to_none=True)
    torch.save(found, folder / f"{rank}.pt")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Terms and gradients, by DDP as the trainer wraps a model, of which each kind of batch leaves parts unused."""
    inputs = pairs(8) | {"itm_labels": torch.tensor([1, 1, 0, 1, 0, 0, 0, 0])}
    model = ours()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    run_processes(each_kind, 2, weights, inputs, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for kind, names in KINDS.items():
        model.zero_grad(set_to_none=True)
        model.last_terms = {}
        model(**{name: inputs[name] for name in names}).loss.backward()
        for name, term in model.last_terms.items():
            both = (first[kind][0][name] + second[kind][0][name]) / 2
            torch.testing.assert_close(both, term, rtol=1e-5, atol=1e-6, msg=f"{kind} {name}")
        for name, parameter in model.named_parameters():
            expected = parameter.grad
            for gradients in (first[kind][1], second[kind][1]):
                if expected is None:
                    assert name not in gradients or not gradients[name].any(), (kind, name)
                else:
                    torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-5, msg=f"{kind} {name}")


def test_weights_of_terms() -> None:
    model, inputs = ours(), pairs()
    whole = model(**inputs).loss
    terms = dict(model.last_terms)
    model.config.itm_weight, model.config.mmm_text_weight = 0.0, 3.0
    expected = whole - terms["itm"] + 2 * terms["mmm_text"]
    torch.testing.assert_close(model(**inputs).loss, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "input_ids: missing, expected in a batch of pairs"),
        ({"bool_masked_pos": None}, "bool_masked_pos: missing, expected in a batch of pairs"),
        ({"pixel_values": None, "mlm_labels": None}, "mlm_labels: missing, expected in a batch of texts"),
        ({"pixel_values": torch.zeros(4, 3, 8, 8)}, "pixel_values: expected images of"),
        ({"pixel_values": torch.zeros(3, 3, 32, 32)}, "bool_masked_pos: expected|input_ids: expected 3 texts"),
        ({"bool_masked_pos": torch.zeros(4, 9)}, "mim_labels: expected|bool_masked_pos: expected"),
        ({"mim_labels": torch.zeros(4, 9, dtype=torch.int64)}, r"mim_labels: expected \(4, 16\) words, got \(4, 9\)"),
    ],
)
def test_wrong_batches_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours()(**{**pairs(), **change})


def test_heads_need_one_width() -> None:
    other = config()
    other.multimodal_config.hidden_size = 64
    with pytest.raises(ValueError, match="hidden_size: expected one width"):
        FLAVAModel(other)


def test_a_vocabulary_grows_at_the_end() -> None:
    model = ours()
    words, head = model.get_input_embeddings().weight.clone(), model.mlm_head.decoder.weight.clone()
    loss = model(**pairs()).loss
    model.resize_vocabulary(VOCABULARY + 1)
    assert model.vocabulary == VOCABULARY + 1
    assert torch.equal(model.get_input_embeddings().weight[:-1], words)
    assert torch.equal(model.mlm_head.decoder.weight[:-1], head)
    assert model.mlm_head.bias is model.mlm_head.decoder.bias
    with torch.no_grad():
        for each in (model.mlm_head, model.mmm_text_head):
            each.decoder.bias[-1] = -1e4  # a word that is never said changes nothing
    torch.testing.assert_close(model(**pairs()).loss, loss)


def test_wrong_flags_are_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    for options, message in (
        ({"width": 100}, "--width: expected a multiple of 64, got 100"),
        ({"image_size": 30}, "--image-size: expected a multiple of 8, got 30"),
        ({"codebook": "x", "codebook_size": 9}, "--codebook-size 9 has no effect beside --codebook x"),
        ({"codebook": str(tmp_path)}, "is not the folder of a checkpoint"),
        ({"pretrained": "x", "width": 64}, "--width 64 has no effect beside --pretrained"),
        ({"mismatched": 1.5}, "--mismatched: expected a probability, got 1.5"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            FLAVAModel.build(FLAVAModel.Options(**options), tokenizer)


def test_terms_of_what_a_batch_has() -> None:
    """Sums and counts of rows are divided once, over the whole batch."""
    sums, counts = torch.tensor([3.0, 5.0, 7.0]), torch.tensor([1.0, 4.0, 0.0])
    found = loss_terms(masked_text_loss=sums, num_masked_tokens=counts)
    assert found.keys() == {"mlm"}
    assert found["mlm"] == 15 / 5


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_losses_and_features_in_float32(kind: str) -> None:
    model = ours()
    exact = model(**batch(kind)).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch(kind))
    assert all(value.dtype == torch.float32 for value in output.values())
    torch.testing.assert_close(output.loss, exact, rtol=0.02, atol=0.02)
    output.loss.backward()


def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["flava_step.py", "--tiny", "--rounds=1"])
    runpy.run_path(str(ROOT / "bench" / "flava_step.py"), run_name="__main__")
    printed = capsys.readouterr().out
    losses = re.findall(r"loss ([\d.]+)", printed)
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=2e-4)
    assert float(re.findall(r"of memory ([\d.]+)", printed)[0]) > 1
