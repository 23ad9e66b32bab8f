"""What all models with a prefix share, shown on ClipCap: parity, pads, generation, what is frozen, checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from numerics import take_gradients
from prefix_models import (
    CAPTIONS,
    LANGUAGE,
    STOP,
    VOCAB,
    batch,
    gpt2,
    llama,
    make,
    vit,
    write_language_model,
    write_tower,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from vlmfast.models.checkpoints import load
from vlmfast.models.language_model import load_language_model, output_head
from vlmfast.models.prefix.clipcap import ClipCapConfig, ClipCapModel

K = 3


def by_transformers(model: Any, rows: Any, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss of captions by a language model of transformers alone, a sample at a time, and all gradients."""
    language = AutoModelForCausalLM.from_config(LANGUAGE[model.config.text_config.model_type]()).eval()
    language.load_state_dict(model.language_model.state_dict())
    total = torch.zeros(())
    for image, (_, tokens) in zip(model.mapper(model.image_features(pixels)), rows, strict=True):
        ids = torch.tensor(tokens)
        embeddings = torch.cat([image, language.get_input_embeddings()(ids)])[None]
        labels = torch.cat([torch.full((K,), -100), ids])[None]
        total = total + language(inputs_embeds=embeddings, labels=labels).loss * len(ids)
    total = total / sum(len(tokens) for _, tokens in rows)
    total.backward()
    return total, {
        **take_gradients(model),
        **{f"language_model.{name}": g for name, g in take_gradients(language).items()},
    }


@pytest.mark.parametrize("language", LANGUAGE)
def test_loss_and_gradients_are_those_of_transformers(language: str) -> None:
    model = make(ClipCapModel, LANGUAGE[language]())
    given = batch(CAPTIONS, K)
    expected, wanted = by_transformers(model, CAPTIONS, given["pixel_values"])
    loss = model(**given).loss
    loss.backward()
    found = take_gradients(model)
    torch.testing.assert_close(loss, expected)
    assert found.keys() == wanted.keys() >= {"mapper.output.weight", "vision.tower.embeddings.class_embedding"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("language", LANGUAGE)
def test_pads_change_nothing_wherever_they_are(language: str) -> None:
    model = make(ClipCapModel, LANGUAGE[language]())
    right, left = batch(CAPTIONS, K), batch(CAPTIONS, K, left=True)
    assert not torch.equal(right["attention_mask"], left["attention_mask"])
    with torch.no_grad():
        outputs = [model(**given) for given in (right, left)]
        each = zip(CAPTIONS, right["pixel_values"].split(1), strict=True)
        alone = torch.cat([model(**{**batch([row], K), "pixel_values": image}).hidden_states[0] for row, image in each])
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    present = right["attention_mask"] == 1
    torch.testing.assert_close(outputs[0].hidden_states[present], alone, rtol=1e-4, atol=1e-5)


def test_which_logits_count() -> None:
    """Those of the last place of the image and of all tokens but the last; "!" of GPT-2, token 0, is one as any."""
    model = make(ClipCapModel, gpt2())
    given = batch([[None, [0, 5, STOP]]], K)
    hidden = model(**given).hidden_states.detach().requires_grad_()
    logits = output_head(model.language_model)(hidden)
    F.cross_entropy(logits[0, K - 1 : -1], torch.tensor([0, 5, STOP])).backward()
    counts = hidden.grad.abs().sum(-1)[0] > 0
    assert counts.tolist() == [False] * (K - 1) + [True] * 3 + [False]
    states = []
    model.language_model.transformer.ln_f.register_forward_hook(lambda *call: states.append(call[2]))
    loss = model(**given).loss
    found = torch.autograd.grad(loss, states[0])[0].abs().sum(-1)[0] > 0
    assert found.tolist() == counts.tolist()


PROMPTS: list[Any] = [[None, [5, 9]], [None, []], [[11], None, [12, 13], None, [6]]]


def steps(model: Any, given: dict[str, Tensor], row: int, tokens: list[int]) -> Tensor:
    """Log-probabilities (V,) of the next token, everything computed anew and without pads."""
    ids = given["input_ids"][row][given["attention_mask"][row] == 1]
    images = sum(part is None for prompt in PROMPTS[:row] for part in prompt)
    count = sum(part is None for part in PROMPTS[row])
    ids = torch.cat([ids, torch.tensor(tokens, dtype=torch.long)])[None]
    with torch.no_grad():
        hidden = model(ids, pixel_values=given["pixel_values"][images : images + count]).hidden_states
        return output_head(model.language_model)(hidden)[0, -1].log_softmax(-1)


@pytest.mark.parametrize("language", LANGUAGE)
def test_greedy_search_is_that_of_computing_everything_anew(language: str) -> None:
    """Prompts of unequal lengths and of one and two images; one row ends before the others."""
    model = make(ClipCapModel, LANGUAGE[language]())
    given = batch(PROMPTS, K, left=True, labels=False)
    first = steps(model, given, 0, []).argmax().item()
    model.config.stop_token_id = first  # so that the first row ends at once
    found = model.generate(**given, max_new_tokens=6)
    for row, tokens in enumerate(found.tolist()):
        said: list[int] = []
        while len(said) < 6 and first not in said:
            said.append(int(steps(model, given, row, said).argmax()))
        assert tokens == said + [0] * (found.shape[1] - len(said))
    assert found[0].tolist() == [first] + [0] * (found.shape[1] - 1)
    assert found.shape[1] > 1
    assert len({tuple(row) for row in found.tolist()}) == 3


@pytest.mark.parametrize("language", LANGUAGE)
def test_beam_search_is_that_of_computing_everything_anew(language: str) -> None:
    model = make(ClipCapModel, LANGUAGE[language](), stop_token_id=None)
    given = batch(PROMPTS, K, left=True, labels=False)
    found = model.generate(**given, max_new_tokens=4, num_beams=3)
    greedy = model.generate(**given, max_new_tokens=4)
    for row in range(3):
        beams: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(4):
            longer = [
                (score + value, [*tokens, token])
                for score, tokens in beams
                for token, value in enumerate(steps(model, given, row, tokens).tolist())
            ]
            beams = sorted(longer, reverse=True)[:3]
        assert found[row].tolist() == beams[0][1]
    assert not torch.equal(found, greedy)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "gpt2": str(write_language_model(folder / "gpt2", gpt2())),
        "llama": str(write_language_model(folder / "llama", llama())),
        "clip": str(write_tower(folder / "clip")),
    }


def frozen_model(sources: dict[str, str], language: str = "gpt2", **options: Any) -> Any:
    torch.manual_seed(1)
    return ClipCapModel(
        ClipCapConfig(
            vision_config=vit(),
            text_config=LANGUAGE[language](),
            projection_dim=24,
            prefix_length=K,
            stop_token_id=STOP,
            language_model=sources[language],
            language_model_frozen=True,
            vision_tower=sources["clip"],
            vision_frozen=True,
            **options,
        )
    )


@pytest.mark.parametrize("language", LANGUAGE)
def test_frozen_is_frozen(sources: dict[str, str], language: str) -> None:
    """Bit for bit after steps with weight decay, without dropout or gradient; and the mapper learns through it."""
    model = frozen_model(sources, language).train()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("mapper.")}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in model.mapper.parameters()}
    assert not any(part.training for part in (*model.language_model.modules(), *model.vision.modules()))
    given = batch(CAPTIONS, K)
    assert torch.equal(model(**given).loss, model(**given).loss)  # dropout would tell
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)  # all, as a careless user has it
    losses = []
    for _ in range(8):
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, before in frozen.items():
        assert torch.equal(model.get_parameter(name), before), name
        assert model.get_parameter(name).grad is None


def test_what_a_frozen_tower_gives_stands_for_the_pixels(sources: dict[str, str]) -> None:
    model = frozen_model(sources)
    given = batch(CAPTIONS, K)
    features = model.frozen_features(pixel_values=given.pop("pixel_values"))
    assert features["image_features"].shape == (3, 24)
    torch.testing.assert_close(model(**given, **features).loss, model(**batch(CAPTIONS, K)).loss)
    assert model.frozen_fingerprint() == frozen_model(sources).frozen_fingerprint()
    assert model.frozen_fingerprint() != frozen_model(sources, normalize_prefix=True).frozen_fingerprint()
    with pytest.raises(ValueError, match="--cache-features: expected a frozen image tower"):
        make(ClipCapModel, gpt2()).frozen_features(batch(CAPTIONS, K)["pixel_values"])
    with pytest.raises(ValueError, match="image_features: expected None beside pixel_values"):
        model(**batch(CAPTIONS, K), **features)


def test_checkpoints_leave_out_what_is_frozen_and_name_it(sources: dict[str, str], tmp_path: Path) -> None:
    model = frozen_model(sources)
    given = batch(CAPTIONS, K)
    loss = model(**given).loss
    model.save_pretrained(tmp_path / "part")
    assert {name.split(".")[0] for name in load_file(tmp_path / "part" / "model.safetensors")} == {"mapper"}
    loaded = load(ClipCapModel, str(tmp_path / "part"))
    assert torch.equal(loaded(**given).loss, loss)
    assert not any(p.requires_grad for p in loaded.language_model.parameters())

    model.save_pretrained(tmp_path / "whole", whole=True)
    saved = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert saved["language_model"] is saved["vision_tower"] is None
    assert model.config.language_model == sources["gpt2"]
    alone = load(ClipCapModel, str(tmp_path / "whole"))
    assert torch.equal(alone(**given).loss, loss)
    assert set(alone.frozen_parts()) == {alone.language_model, alone.vision}
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() > {"vision.projection.weight"}
    alone.save_pretrained(tmp_path / "again")
    assert torch.equal(load(ClipCapModel, str(tmp_path / "again"))(**given).loss, loss)

    half = ClipCapModel.from_pretrained(tmp_path / "part", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "kind"), [("language_model", "gpt2"), ("vision_tower", "clip")])
def test_a_source_that_is_gone_or_changed_is_named(
    sources: dict[str, str], tmp_path: Path, name: str, kind: str
) -> None:
    mine = {key: str(shutil.copytree(folder, tmp_path / key)) for key, folder in sources.items()}
    model = frozen_model(mine)
    model.save_pretrained(tmp_path / "saved")
    moved = shutil.move(mine[kind], tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=mine[kind]):
        ClipCapModel.from_pretrained(tmp_path / "saved")
    found = ClipCapModel.from_pretrained(tmp_path / "saved", **{name: str(moved)})
    given = batch(CAPTIONS, K)
    assert torch.equal(found(**given).loss, model(**given).loss)
    kinds = {"gpt2": transformers.GPT2LMHeadModel, "clip": transformers.CLIPModel}
    other = kinds[kind].from_pretrained(moved)
    weights = other.get_input_embeddings() if kind == "gpt2" else other.visual_projection
    weights.weight.data[3, 3] += 1e-3
    other.save_pretrained(mine[kind])
    with pytest.raises(ValueError, match=f"{name}: expected the weights that this model was trained with"):
        ClipCapModel.from_pretrained(tmp_path / "saved")


def test_a_language_model_with_other_logits_is_refused(tmp_path: Path) -> None:
    config = transformers.GemmaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    capped = transformers.Gemma2Config(**{**config.to_dict(), "final_logit_softcapping": 0.5})
    folder = write_language_model(tmp_path, capped)
    with pytest.raises(ValueError, match="expected logits that are linear in the last hidden states, got 'gemma2'"):
        load_language_model(str(folder))


def test_too_long_is_refused() -> None:
    model = make(ClipCapModel, gpt2())
    given = batch([[None, [5] * 46]], K, labels=False)
    with pytest.raises(ValueError, match="input_ids: expected at most the language model's 48 positions, got 49"):
        model(**given)
    short = batch([[None, [5] * 40]], K, labels=False)
    with pytest.raises(ValueError, match="48 positions for the prompt and 7 new tokens, got 49"):
        model.generate(**short, max_new_tokens=7)
    assert model.generate(**short, max_new_tokens=6).shape[1] <= 6
