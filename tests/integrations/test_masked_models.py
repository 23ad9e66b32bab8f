"""patch(model) of transformers' masked models: the vocabulary head on labelled rows, and its loss without logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import vlmfast

VOCAB, D = 61, 32
SIZE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
Made = tuple[nn.Module, dict[str, Any]]


def words(length: int = 7) -> dict[str, Tensor]:
    """A padded batch with labels on a third of its words."""
    ids = torch.randint(4, VOCAB, (3, length))
    mask = (torch.arange(length) < torch.tensor([[length], [length - 3], [length - 1]])).long()
    labels = torch.where((torch.arange(length) % 3 == 1) & (mask == 1), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def bert() -> Made:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZE)), words()


def bert_two_losses() -> Made:
    return transformers.BertForPreTraining(transformers.BertConfig(**SIZE)), {
        **words(),
        "next_sentence_label": torch.tensor([0, 1, 1]),
    }


def roberta() -> Made:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZE)), words()


def distilbert() -> Made:
    """Its layer onto the vocabulary is no part of a head."""
    sizes = {"dim": D, "n_layers": 1, "n_heads": 4, "hidden_dim": 64, "dropout": 0.0, "attention_dropout": 0.0}
    return transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(vocab_size=VOCAB, **sizes)), words()


def visual_bert() -> Made:
    model = transformers.VisualBertForPreTraining(transformers.VisualBertConfig(**SIZE, visual_embedding_dim=8))
    given = words()
    given["labels"] = F.pad(given["labels"], (0, 4), value=-100)
    regions = {
        "visual_embeds": torch.randn(3, 4, 8),
        "visual_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]),
        "visual_token_type_ids": torch.ones(3, 4, dtype=torch.long),
    }
    return model, {**given, **regions, "sentence_image_labels": torch.tensor([1, 0, 1])}


def lxmert() -> Made:
    """All of its losses."""
    sizes = {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 8, "num_qa_labels": 5}
    config = transformers.LxmertConfig(
        **{**SIZE, "num_hidden_layers": {"vision": 1, "cross_encoder": 1, "language": 1}}
        | sizes
        | {"num_object_labels": 6, "num_attr_labels": 4}
    )
    boxes = {
        "visual_feats": torch.randn(3, 4, 8),
        "visual_pos": torch.rand(3, 4, 4),
        "visual_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]),
        "matched_label": torch.tensor([1, 0, 1]),
        "ans": torch.tensor([4, 0, 2]),
        "obj_labels": {
            "obj": (torch.randint(6, (3, 4)), torch.rand(3, 4)),
            "attr": (torch.randint(4, (3, 4)), torch.rand(3, 4)),
            "feat": (torch.randn(3, 4, 8), torch.rand(3, 4)),
        },
    }
    return transformers.LxmertForPreTraining(config), {**words(), **boxes}


def bridgetower() -> Made:
    text = transformers.BridgeTowerTextConfig(**{**SIZE, "num_hidden_layers": 2}, pad_token_id=1)
    vision = transformers.BridgeTowerVisionConfig(
        hidden_size=64,
        num_hidden_layers=2,
        patch_size=4,
        image_size=8,  # of heads of 64
    )
    config = transformers.BridgeTowerConfig(
        text_config=text, vision_config=vision, hidden_size=D, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.BridgeTowerForMaskedLM(config), {**words(), "pixel_values": torch.randn(3, 3, 8, 8)}


def t5() -> Made:
    """No masked model, but one whose forward gives its logits to the same loss."""
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=D, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0
    )
    return transformers.T5ForConditionalGeneration(config), {
        **words(),
        "decoder_input_ids": torch.randint(4, VOCAB, (3, 7)),
    }


MAKERS = [t5, bert, bert_two_losses, roberta, distilbert, visual_bert, lxmert, bridgetower]


def results(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return {"loss": output.loss.detach()} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def double(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: double(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return tuple(map(double, value))
    return value.double() if value.is_floating_point() else value


def head_of(model: Any) -> Any:
    return model.get_output_embeddings()


@pytest.mark.parametrize("make", MAKERS)
def test_loss_and_gradients_are_the_originals(make: Any) -> None:
    """And beside float64 they err at most twice as much as the original's."""
    torch.manual_seed(0)
    model, inputs = make()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at first: one that was left out would not be seen
            nn.init.normal_(parameter)
    original, exact, keys = copy.deepcopy(model.train()), copy.deepcopy(model).double(), list(model.state_dict())
    report = vlmfast.patch(model, only="loss")
    assert report.replaced == [("", type(model).__name__, "forward without the logits")], str(report)
    assert list(model.state_dict()) == keys
    ours, theirs, truths = results(model, inputs), results(original, inputs), results(exact, double(inputs))
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)
    top = max(truth.abs().max().item() for truth in truths.values())
    for name, truth in truths.items():
        error, eager = ((found[name].double() - truth).abs().max().item() for found in (ours, theirs))
        assert error <= 2 * eager + 1e-6 * top, name
    vlmfast.unpatch(model)
    assert "forward" not in vars(model)
    again = results(model, inputs)
    assert all(torch.equal(again[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("make", MAKERS)
def test_only_labelled_rows_reach_the_head_and_no_logits_are_made(make: Any) -> None:
    model, inputs = make()
    outputs = model.eval()(**inputs)
    names = [name for name in ("logits", "prediction_logits") if name in outputs]
    vlmfast.patch(model.train(), only="loss")
    rows = []
    for name, module in model.named_modules():
        if name in ("cls.predictions.transform.dense", "mlm_score.transform.dense", "lm_head.dense"):
            module.register_forward_hook(lambda module, given, output: rows.append(output.shape[:-1].numel()))
    output = model(**inputs)
    assert [name in output for name in names] == [False]
    assert set(rows) <= {int((inputs["labels"] != -100).sum())}
    assert bool(rows) == (make not in (distilbert, t5))
    for asked in (model(**inputs, return_logits=True), model.eval()(**inputs)):
        torch.testing.assert_close(asked[names[0]], outputs[names[0]])
    without = {name: value for name, value in inputs.items() if name != "labels"}
    torch.testing.assert_close(model.train()(**without)[names[0]], outputs[names[0]])


@pytest.mark.parametrize("make", [bert, roberta, lxmert, bridgetower, distilbert])
def test_a_batch_without_labels_has_the_loss_0(make: Any) -> None:
    """Where the original's is NaN; other losses stay."""
    model, inputs = make()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    others = {name: value for name, value in inputs.items() if name != "labels"}
    assert model.train()(**inputs).loss.isnan()
    vlmfast.patch(model, only="loss")
    found = results(model, inputs)
    expected = model(**others).loss if make is lxmert else torch.zeros(())
    torch.testing.assert_close(found["loss"], expected)
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_logits_that_serve_something_else_are_made() -> None:
    """BERT of two losses ignores labels without next_sentence_label; a forward may also use its logits twice."""
    model, inputs = bert_two_losses()
    del inputs["next_sentence_label"]
    expected = model.train()(**inputs)
    vlmfast.patch(model)
    torch.testing.assert_close(model(**inputs).prediction_logits, expected.prediction_logits)

    class Confident(transformers.BertForMaskedLM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
            scores = self.cls(self.bert(input_ids, attention_mask)[0])
            loss = nn.CrossEntropyLoss()((scores / 2)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            loss = loss + torch.stack([scores, scores]).square().mean() + scores.size(-1) + scores.shape[0]
            return transformers.modeling_outputs.MaskedLMOutput(loss=loss, logits=scores)

    other = Confident(transformers.BertConfig(**SIZE)).train()
    inputs = words()
    theirs = results(other, inputs)
    assert vlmfast.patch(other).replaced
    torch.testing.assert_close(results(other, inputs), theirs)
    assert other(**inputs).logits.shape == (3, 7, VOCAB)


@pytest.mark.parametrize("weights", [{"weight": torch.rand(VOCAB)}, {"reduction": "sum"}, {"label_smoothing": 0.1}])
def test_another_cross_entropy_is_the_originals(weights: dict[str, Any]) -> None:
    model, inputs = lxmert()
    model.train().loss_fcts["ce"] = nn.CrossEntropyLoss(**weights)
    inputs = {name: inputs[name] for name in inputs if name not in ("matched_label", "ans", "obj_labels")}
    theirs = results(model, inputs)
    vlmfast.patch(model)
    torch.testing.assert_close(results(model, inputs), theirs, rtol=1e-4, atol=1e-6)
    assert ("prediction_logits" in model(**inputs)) == ("label_smoothing" not in weights)


class Wrapped(nn.Module):
    """As adapters wrap."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "place", ["cls", "cls.predictions", "cls.predictions.decoder", "cls.predictions.transform.dense", "hook", "opaque"]
)
def test_a_wrapped_head_is_called(place: str, when: str) -> None:
    """Whatever of the head is wrapped, exchanged or hooked, before or after the patch: it runs."""
    model, inputs = bert()
    original = copy.deepcopy(model.train())
    called: list[int] = []

    def change() -> None:
        if place == "hook":
            model.cls.predictions.register_forward_hook(lambda *args: called.append(1))
            return
        name = "cls.predictions.decoder" if place == "opaque" else place
        parent, _, leaf = name.rpartition(".")
        holder, module = model.get_submodule(parent), model.get_submodule(name)
        setattr(holder, leaf, nn.Sequential(module) if place == "opaque" else Wrapped(module))
        getattr(holder, leaf).register_forward_hook(lambda *args: called.append(1))

    if when == "before":
        change()
    report = vlmfast.patch(model)
    if when == "after":
        change()
    elif place == "cls.predictions.transform.dense":
        assert report.replaced
    else:
        assert [(name, kind) for name, kind, _ in report.left] == [("", "BertForMaskedLM")], str(report)
    output = model(**inputs)
    torch.testing.assert_close(output.loss, original(**inputs).loss)
    assert called == [1]
    vlmfast.unpatch(model)


def test_a_head_that_was_exchanged_for_another_kind_is_left() -> None:
    model, _ = bert()
    model.cls = nn.Sequential(nn.Linear(D, D), nn.Linear(D, VOCAB))
    ((name, kind, reason),) = vlmfast.patch(model).left
    assert (name, kind) == ("", "BertForMaskedLM")
    assert "is not where its class has it" in reason


def test_a_head_that_is_in_another_model_is_left() -> None:
    bert, vit = (
        transformers.BertConfig(**SIZE, is_decoder=True, add_cross_attention=True),
        transformers.ViTConfig(
            hidden_size=D, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=4
        ),
    )
    model = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(vit), decoder=transformers.BertLMHeadModel(bert)
    )
    left = {name: reason for name, _, reason in vlmfast.patch(model, only="loss").left}
    assert left[""] == "its layer onto the vocabulary is in its decoder, a BertLMHeadModel"


def test_copies_gradient_checkpointing_autocast_and_compile() -> None:
    model, inputs = bert()
    expected = model.train()(**inputs).loss
    vlmfast.patch(model)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(model(**inputs).loss, expected)
    model.gradient_checkpointing_disable()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        head_of(copied).weight.normal_()
    assert copied(**inputs).loss != model(**inputs).loss  # bound to itself
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    assert "logits" not in output
    torch.testing.assert_close(output.loss, expected, rtol=2e-2, atol=0)
    compiled = torch.compile(model, backend="eager")(**inputs)
    torch.testing.assert_close(compiled.loss, expected)
    assert compiled.logits is not None  # the original's forward
    assert isinstance(model(**inputs, return_dict=False), tuple)
    exact = copy.deepcopy(model).double()
    output = exact(**double(inputs))
    assert output.logits.dtype == torch.float64
