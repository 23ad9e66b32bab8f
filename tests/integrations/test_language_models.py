"""patch(model) of transformers' causal language models: the loss of their heads without logits."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlmfast

VOCAB = 61
SIZE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 4}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def gpt2(**options: Any) -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, **{**NO_DROPOUT, **options}))


def opt() -> nn.Module:
    sizes = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 32, "dropout": 0.0}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**SIZE, **sizes))


def gpt_neox() -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZE, intermediate_size=64))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE, intermediate_size=64))


def mixtral() -> nn.Module:
    """Adds the loss of its router to that of its words."""
    config = transformers.MixtralConfig(
        **SIZE, intermediate_size=64, num_local_experts=2, output_router_logits=True, num_key_value_heads=4
    )
    return transformers.MixtralForCausalLM(config)


def gemma2() -> nn.Module:
    """Squashes its logits."""
    config = transformers.Gemma2Config(**SIZE, intermediate_size=64, head_dim=8, num_key_value_heads=4)
    return transformers.Gemma2ForCausalLM(config)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(4, VOCAB, (3, 7))
    labels = ids.clone()
    labels[0, 4:] = -100
    return {"input_ids": ids, "labels": labels}


def results(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return {"loss": output.loss.detach()} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("make", [gpt2, opt, gpt_neox, llama, mixtral])
def test_loss_and_gradients_are_the_originals(make: Any) -> None:
    model, inputs = make().train(), batch()
    original, keys = copy.deepcopy(model), list(model.state_dict())
    report = vlmfast.patch(model)
    assert report.replaced == [("", type(model).__name__, "forward without the logits")], str(report)
    assert list(model.state_dict()) == keys
    assert model(**inputs).logits is None
    for more in ({}, {"num_items_in_batch": torch.tensor(31)}, {"shift_labels": inputs["labels"].roll(-1, 1)}):
        ours, theirs = results(model, {**inputs, **more}), results(original, {**inputs, **more})
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    vlmfast.unpatch(model)
    assert model(**inputs).logits.shape == (3, 7, VOCAB)


def test_logits_where_they_are_asked_for() -> None:
    model, inputs = gpt2().train(), batch()
    expected = model(**inputs)
    vlmfast.patch(model)
    for output in (model(**inputs, return_logits=True), model.eval()(**inputs), model.train()(inputs["input_ids"])):
        torch.testing.assert_close(output.logits, expected.logits)
    assert isinstance(model(**inputs, return_dict=False), tuple)
    assert model.generate(inputs["input_ids"], max_new_tokens=2, do_sample=False).shape == (3, 9)


def test_a_frozen_head_gets_no_gradient_and_a_tied_one_both() -> None:
    model, inputs = gpt2(tie_word_embeddings=True).train(), batch()
    original = copy.deepcopy(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    vlmfast.patch(model)
    torch.testing.assert_close(results(model, inputs), results(original, inputs), rtol=1e-4, atol=1e-6)
    model.zero_grad()
    model.requires_grad_(False)
    embeddings = torch.randn(3, 7, 32, requires_grad=True)
    model(inputs_embeds=embeddings, labels=inputs["labels"]).loss.backward()
    original(inputs_embeds=(other := embeddings.detach().requires_grad_()), labels=inputs["labels"]).loss.backward()
    torch.testing.assert_close(embeddings.grad, other.grad, rtol=1e-4, atol=1e-7)
    assert model.lm_head.weight.grad is None


def test_a_model_that_does_more_with_its_logits_keeps_its_forward() -> None:
    model, inputs = gemma2().train(), batch()
    original = copy.deepcopy(model)
    vlmfast.patch(model)
    with pytest.warns(UserWarning, match="Gemma2ForCausalLM does more with its logits"):
        output = model(**inputs)
    assert torch.equal(output.loss, original(**inputs).loss)
    assert output.logits is not None
    torch.testing.assert_close(results(model, inputs), results(original, inputs))


@pytest.mark.parametrize("change", ["loss_function", "lm_head", "hook"])
def test_what_is_not_known_is_left(change: str) -> None:
    model = gpt2()
    if change == "loss_function":
        model.loss_function = lambda *args, **kwargs: torch.zeros(())
    elif change == "lm_head":
        model.lm_head = nn.Sequential(model.lm_head)
    else:
        model.lm_head.register_forward_hook(lambda *args: None)
    ((name, kind, reason),) = vlmfast.patch(model).left
    assert (name, kind) == ("", "GPT2LMHeadModel")
    assert {"loss_function": "its loss_function is", "lm_head": "is a Sequential", "hook": "has hooks"}[
        change
    ] in reason


def test_what_changes_later_is_honoured() -> None:
    """A hook on the head (LoRA, quantisation) that came after the patch is called again."""
    model, inputs = gpt2().train(), batch()
    vlmfast.patch(model)
    called = []
    model.lm_head.register_forward_hook(lambda *args: called.append(1))
    assert model(**inputs).logits is not None
    assert called == [1]


def test_errors_are_the_callers() -> None:
    model, inputs = gpt2().train(), batch()
    vlmfast.patch(model)
    inputs["labels"][1, 2] = VOCAB
    with pytest.raises(IndexError, match=rf"labels must be in \[0, {VOCAB}\) .* got {VOCAB} in row 8"):
        model(**inputs)
    with pytest.raises(ValueError, match="at the same time"):
        model(**inputs, inputs_embeds=torch.randn(3, 7, 32))


def test_copies_and_checkpoints() -> None:
    model, inputs = gpt2().train(), batch()
    vlmfast.patch(model)
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for other in (copied, loaded):
        with torch.no_grad():
            other.lm_head.weight.zero_()
        assert model(**inputs).loss != other(**inputs).loss  # bound to itself
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(model(**inputs).loss, model(**inputs, return_logits=True).loss)


def test_autocast_and_compile() -> None:
    model, inputs = gpt2().train(), batch()
    expected = model(**inputs).loss
    vlmfast.patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected, rtol=2e-2, atol=0)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**inputs).loss, expected)
