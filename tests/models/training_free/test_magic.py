"""MAGiC: its search against one without a cache, a candidate at a time; SimCTG's loss in float64; checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from prefix_models import LANGUAGE
from processes import run_processes
from torch import Tensor
from torch.nn import functional as F
from toys import WORDS, word_tokenizer
from transformers import AutoModelForCausalLM

from vlmfast.cli.evaluate import run as evaluate
from vlmfast.data import Collator, Sample, load_tokenizer
from vlmfast.models.contrastive.clip import CLIPConfig, CLIPModel
from vlmfast.models.training_free import MAGiCConfig, MAGiCModel
from vlmfast.models.training_free.magic_batches import TextCollator
from vlmfast.models.training_free.magic_config import DECODING, MAGiCOptions
from vlmfast.models.training_free.magic_search import Prefix, check_candidates, degeneration, simctg

START, END = WORDS.index("sign"), WORDS.index("no")
PIXELS = torch.randint(256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
PROMPTS = [[START], [START, 5, 6, 7], [START, 9, 3]]


def clip() -> CLIPModel:
    """Its tokenizer is the bundled one, which knows other words than the language model's."""
    tokenizer = load_tokenizer()
    config = CLIPConfig.small(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id, max_length=24, image_size=16, vision_width=64, vision_layers=1,
        text_width=64, text_layers=1, embed_dim=32,
    )  # fmt: skip
    torch.manual_seed(5)
    return CLIPModel(config).eval()


def magic(language: str = "gpt2", **settings: Any) -> MAGiCModel:
    torch.manual_seed(1)
    seeing = clip()
    text = LANGUAGE[language](vocab_size=len(WORDS))
    fields = {"k": 6, "length": 8, "start_token_id": START, "end_token_id": None}
    model = MAGiCModel(MAGiCConfig(text, seeing.config, **{**fields, **settings}), clip=seeing).eval()
    model.tokenizer, model.clip_tokenizer = word_tokenizer(), load_tokenizer()
    return model


def left_padded(rows: list[list[int]]) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def step_by_step(model: MAGiCModel, prompt: list[int], pixels: Tensor) -> list[int]:
    """The search of one text as the paper writes it: no cache, no batch, a forward pass for every candidate."""
    config, language, seeing = model.config, model.language_model, model.clip
    collator = Collator(model.clip_tokenizer, max_length=24)
    image = F.normalize(seeing.get_image_features(pixels[None]), dim=1)[0]
    said: list[int] = []
    for _ in range(config.length):
        read = torch.tensor([prompt + said])
        output = language(read, output_hidden_states=True)
        likely = output.logits[0, -1].softmax(0)
        context = output.hidden_states[-1][0]
        tokens = likely.topk(config.k).indices.tolist()
        scores, seen = [], []
        for token in tokens:
            state = language(torch.tensor([prompt + said + [token]]), output_hidden_states=True).hidden_states[-1][
                0, -1
            ]
            alike = max(float(F.cosine_similarity(state, earlier, dim=0)) for earlier in context)
            scores.append((1 - config.alpha) * float(likely[token]) - config.alpha * alike)
            text = model.tokenizer.decode([*said, token][-config.clip_tokens :], skip_special_tokens=True)
            feature = F.normalize(seeing.get_text_features(**collator.tokens([text])), dim=1)[0]
            seen.append(seeing.logit_scale.exp() * (image @ feature))
        f = torch.stack(seen).softmax(0)
        total = torch.tensor(scores) + config.beta * f
        said.append(tokens[int(total.argmax())])
    return said


@pytest.mark.parametrize("language", LANGUAGE)
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.6, 0.0), (0.1, 2.0), (0.6, 0.15)])
def test_the_search_is_the_papers_token_by_token(language: str, alpha: float, beta: float) -> None:
    """Prompts of three lengths in one batch; beta = 0 is contrastive search, alpha = 0 as well greedy search."""
    model = magic(language, alpha=alpha, beta=beta, clip_tokens=5)
    found = model.generate(**left_padded(PROMPTS), pixel_values=PIXELS)
    expected = [step_by_step(model, prompt, pixels) for prompt, pixels in zip(PROMPTS, PIXELS, strict=True)]
    assert found.tolist() == expected
    if not alpha and not beta:
        ids = torch.tensor([PROMPTS[1]])
        greedy = model.language_model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=0
        )
        assert found[1].tolist() == greedy[0, 4:].tolist()


def test_images_and_penalty_decide_something() -> None:
    """Without this the test above could pass with both left out."""
    greedy, contrastive, seeing = (
        magic(alpha=alpha, beta=beta).generate(**left_padded(PROMPTS), pixel_values=PIXELS).tolist()
        for alpha, beta in ((0.0, 0.0), (0.6, 0.0), (0.6, 2.0))
    )
    assert greedy != contrastive != seeing
    other = magic(alpha=0.6, beta=2.0).generate(**left_padded(PROMPTS), pixel_values=PIXELS.flip(0))
    assert other.tolist() != seeing


def test_the_image_chooses_among_the_likeliest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """f sums to 1 over the k candidates at every step; however large beta is, each token is one of them."""
    model, steps = magic(alpha=0.0, beta=1e6), []
    scores = MAGiCModel.image_scores

    def watched(self: MAGiCModel, image: Tensor, said: Tensor, tokens: Tensor) -> Tensor:
        f = scores(self, image, said, tokens)
        steps.append((tokens, f))
        return f

    monkeypatch.setattr(MAGiCModel, "image_scores", watched)
    found = model.generate(**left_padded(PROMPTS), pixel_values=PIXELS)
    assert len(steps) == 8
    for place, (tokens, f) in enumerate(steps):
        torch.testing.assert_close(f.sum(dim=1), torch.ones(3))
        assert torch.equal(found[:, place], tokens.gather(1, f.argmax(dim=1, keepdim=True))[:, 0])
        likely = [prompt + row[:place] for prompt, row in zip(PROMPTS, found.tolist(), strict=True)]
        for row, read in enumerate(likely):
            best = model.language_model(torch.tensor([read])).logits[0, -1].topk(6).indices
            assert set(tokens[row].tolist()) == set(best.tolist())


def test_keys_and_values_of_the_prefix_are_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = magic(), []
    take = Prefix.take

    def watched(self: Prefix, states: Tensor, choice: Tensor) -> None:
        shapes.append(self.cache.layers[0].keys.shape)
        take(self, states, choice)
        shapes.append(self.cache.layers[0].keys.shape)

    monkeypatch.setattr(Prefix, "take", watched)
    model.generate(**left_padded(PROMPTS), pixel_values=PIXELS, max_new_tokens=2)
    assert shapes == [(3, 4, 10, 8), (3, 4, 5, 8), (3, 4, 11, 8), (3, 4, 6, 8)]


def test_the_penalty_is_the_largest_cosine_and_leaves_padding_out() -> None:
    states = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    context = torch.tensor([[[0.0, 9.0], [3.0, 3.0], [-1.0, 0.0]]])
    mask = torch.tensor([[0, 1, 1]])
    torch.testing.assert_close(degeneration(states, context, mask), torch.tensor([[0.5**0.5, 0.5**0.5]]))
    torch.testing.assert_close(degeneration(states, context, mask + 1), torch.tensor([[0.5**0.5, 1.0]]))


def test_what_clip_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was generated, its last tokens, without the prompt."""
    model, texts = magic(clip_tokens=3), []
    decode = type(model.tokenizer).batch_decode

    def watched(self: Any, ids: Any, **options: Any) -> list[str]:
        texts.append(ids)
        return decode(self, ids, **options)

    monkeypatch.setattr(type(model.tokenizer), "batch_decode", watched)
    found = model.generate(**left_padded(PROMPTS[1:2]), pixel_values=PIXELS[:1])[0].tolist()
    assert [len(step) for step in texts] == [6] * 8
    for place, step in enumerate(texts):
        assert {tuple(text[:-1]) for text in step} == {tuple(found[max(0, place - 2) : place])}


def test_a_text_ends_with_its_end() -> None:
    """The search of a batch goes on until all have ended; what stands behind an end is the end."""
    free = magic().generate(**left_padded(PROMPTS), pixel_values=PIXELS)
    end = int(free[0, 2])
    ending = magic(end_token_id=end).generate(**left_padded(PROMPTS), pixel_values=PIXELS)
    for row, whole in zip(ending.tolist(), free.tolist(), strict=True):
        place = whole.index(end) if end in whole else 8
        assert row[:place] == whole[:place]
        assert set(row[place:]) <= {end}
    first = free[0].tolist().index(end)
    one = magic(end_token_id=end).generate(**left_padded(PROMPTS[:1]), pixel_values=PIXELS[:1])
    assert one.tolist() == [free[0, : first + 1].tolist()]


def test_without_clip_it_is_contrastive_search_of_the_prompt() -> None:
    blind = MAGiCModel(MAGiCConfig(LANGUAGE["gpt2"](vocab_size=len(WORDS)), k=6, alpha=0.6, length=8)).eval()
    model = magic(alpha=0.6, beta=0.0)
    blind.language_model.load_state_dict(model.language_model.state_dict())
    assert blind.config.beta == 0
    expected = model.generate(**left_padded(PROMPTS), pixel_values=PIXELS)
    assert torch.equal(blind.generate(**left_padded(PROMPTS)), expected)


# Language models


def test_language_models_that_cannot_share_a_prefix_are_refused() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    opt = transformers.OPTConfig(**sizes, ffn_dim=48, max_position_embeddings=48, word_embed_proj_dim=32)
    check_candidates("opt", AutoModelForCausalLM.from_config(opt))
    check_candidates("eager", AutoModelForCausalLM.from_config(LANGUAGE["gpt2"](), attn_implementation="eager"))
    bloom = transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match="counts positions by position_ids; 'bloom' does not"):
        check_candidates("language_model", AutoModelForCausalLM.from_config(bloom))
    mistral = transformers.MistralConfig(**sizes, intermediate_size=48, num_key_value_heads=2, sliding_window=4)
    with pytest.raises(ValueError, match="keeps keys and values of all, got 'mistral'"):
        check_candidates("language_model", AutoModelForCausalLM.from_config(mistral))


# SimCTG

TEXTS = [[START, 5, 9, 11, END], [START, 6, END], [START, 12, 13, 5, 5, 9, END]]


def right_padded(rows: list[list[int]]) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_loss(language: Any, rows: list[list[int]], margin: float) -> Tensor:
    """Both terms, a text at a time, in loops over tokens, float64."""
    predicted, pairs, count, of = [], [], 0, 0
    for row in rows:
        output = language(torch.tensor([row]), output_hidden_states=True)
        predicted.append(F.cross_entropy(output.logits[0, :-1], torch.tensor(row[1:]), reduction="sum"))
        count += len(row) - 1
        states = output.hidden_states[-1][0]
        for i in range(len(row)):
            for j in range(len(row)):
                if i != j:
                    own = F.cosine_similarity(states[i], states[i], dim=0)
                    other = F.cosine_similarity(states[i], states[j], dim=0)
                    pairs.append((margin - own + other).clamp(min=0))
                    of += 1
    return torch.stack(predicted).sum() / count + torch.stack(pairs).sum() / of


@pytest.mark.parametrize("language", LANGUAGE)
def test_loss_and_gradients_are_simctgs(language: str) -> None:
    """A padded batch in float32 beside texts one by one in float64."""
    model = magic(language, margin=0.5)
    exact = AutoModelForCausalLM.from_config(LANGUAGE[language](vocab_size=len(WORDS))).double().eval()
    exact.load_state_dict(model.language_model.state_dict())
    loss = model(**right_padded(TEXTS)).loss
    expected = plain_loss(exact, TEXTS, 0.5)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    for name, parameter in exact.named_parameters():
        found = model.language_model.get_parameter(name).grad
        torch.testing.assert_close(found.double(), parameter.grad, rtol=1e-3, atol=1e-6)
    assert simctg(model(**right_padded(TEXTS)).hidden_states, right_padded(TEXTS)["attention_mask"], 0.5)[1] == 68
    assert not any(parameter.requires_grad for parameter in model.clip.parameters())


def half(rank: int, world_size: int, expected: Tensor, gradient: Tensor) -> None:
    """What the trainer makes of two processes: losses by all tokens, times processes, and DDP's mean."""
    model = magic()
    rows = TEXTS[:1] if rank == 0 else TEXTS[1:]
    loss = model(**right_padded(rows), num_items_in_batch=torch.tensor(12)).loss * world_size
    loss.backward()
    weight = model.get_input_embeddings().weight.grad
    both = torch.cat([loss.detach().reshape(1), weight.flatten()])
    torch.distributed.all_reduce(both)
    both /= world_size
    torch.testing.assert_close(both[0], expected)
    torch.testing.assert_close(both[1:], gradient, rtol=1e-4, atol=1e-6)


def test_two_processes_are_one() -> None:
    model = magic()
    loss = model(**right_padded(TEXTS), num_items_in_batch=torch.tensor(12)).loss
    torch.testing.assert_close(loss, model(**right_padded(TEXTS)).loss)
    loss.backward()
    run_processes(half, 2, loss.detach(), model.get_input_embeddings().weight.grad.flatten())


# Batches, checkpoints, flags


def sample(caption: str, image: Tensor | None = None) -> Sample:
    return Sample(image, caption, "0", None)


def test_batches() -> None:
    tokenizer = word_tokenizer()
    red, sign = WORDS.index("red"), WORDS.index("sign")
    train = TextCollator(tokenizer, START, END, max_length=4)
    batch = train([sample("red sign"), None, sample("red"), sample("red red red red")])
    assert batch["input_ids"].tolist() == [[START, red, sign, END], [START, red, END, 0], [START, red, red, red]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, red, sign, END], [-100, red, END, -100], [-100, red, red, red]]
    prompts = TextCollator(tokenizer, START)([sample("", PIXELS[0]), sample("red sign", PIXELS[1])])
    assert prompts["input_ids"].tolist() == [[0, 0, START], [START, red, sign]]
    assert prompts["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert torch.equal(prompts["pixel_values"], PIXELS[:2])


def test_a_checkpoint_holds_everything(tmp_path: Path) -> None:
    model = magic(alpha=0.3, end_token_id=END)
    model.save_pretrained(tmp_path)
    loaded = MAGiCModel.from_pretrained(tmp_path)
    assert type(loaded.clip) is CLIPModel
    assert loaded.config.clip_config.model_type == "clip"
    assert (loaded.config.alpha, loaded.config.beta) == (0.3, 2.0)
    expected = model.generate(**left_padded(PROMPTS), pixel_values=PIXELS)
    assert torch.equal(loaded.generate(**left_padded(PROMPTS), pixel_values=PIXELS), expected)
    assert not any(part.training for part in loaded.train().clip.modules())


def test_it_is_made_of_a_language_model_and_a_clip(tmp_path: Path) -> None:
    """With the settings of stories; tokens for begin and end are added where a tokenizer has none."""
    seeing, language = clip(), AutoModelForCausalLM.from_config(LANGUAGE["llama"](vocab_size=len(WORDS)))
    seeing.save_pretrained(tmp_path / "clip")
    load_tokenizer().save_pretrained(tmp_path / "clip")
    language.save_pretrained(tmp_path / "language")
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens(dict(MAGiCModel.special_tokens))
    options = MAGiCOptions(language_model=str(tmp_path / "language"), clip=str(tmp_path / "clip"), decoding="story")
    model = MAGiCModel.build(options, tokenizer)
    assert {name: getattr(model.config, name) for name in DECODING["story"]} == DECODING["story"]
    assert model.vocabulary == len(WORDS) + 2
    assert (model.config.start_token_id, model.config.end_token_id) == (len(WORDS), len(WORDS) + 1)
    assert len(model.clip_tokenizer) == len(load_tokenizer())
    up = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.language_model.get_parameter(up), language.get_parameter(up))
    assert torch.equal(model.clip.text_projection.weight, seeing.text_projection.weight)
    model.config.length = 3
    assert model.generate(torch.tensor([[len(WORDS)]]), pixel_values=PIXELS[:1]).shape[1] <= 3


def test_clip_may_be_transformers_own(tmp_path: Path) -> None:
    """With its tokenizer beside it; its images have one size."""
    seeing, tokenizer = clip(), load_tokenizer()
    configs = {name: getattr(seeing.config, name).to_dict() for name in ("vision_config", "text_config")}
    own = transformers.CLIPModel(transformers.CLIPConfig(**configs, projection_dim=32)).eval()
    own.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = MAGiCModel.build(MAGiCOptions(clip=str(tmp_path), text_width=64, text_layers=1), tokenizer)
    assert model.config.beta == 2
    tokens = Collator(tokenizer, max_length=24).tokens(["a red square"])
    expected = own.text_projection(own.text_model(**tokens).pooler_output)
    torch.testing.assert_close(model.clip.get_text_features(**tokens), F.normalize(expected, dim=1))
    with pytest.raises(ValueError, match="--image-size 32 has no effect: the image tower has its own, 16"):
        MAGiCModel.build(MAGiCOptions(clip=str(tmp_path), image_size=32, text_width=64, text_layers=1), tokenizer)


def test_wrong_settings(tmp_path: Path) -> None:
    for field, value, message in (
        ("k", 0, "k: expected a positive integer, got 0"),
        ("alpha", 1.5, "alpha: expected a number from 0 to 1, got 1.5"),
        ("beta", -1, "beta: expected a number from 0 to inf, got -1"),
        ("beta", 2.0, "beta: expected 0 without a model that compares images and texts, got 2.0"),
        ("clip_config", {"model_type": "bert"}, "clip_config: expected a model of clip, .*, got model_type 'bert'"),
    ):
        with pytest.raises(ValueError, match=message):
            MAGiCConfig(**{field: value})
    with pytest.raises(ValueError, match="--decoding: expected one of coco, flickr30k, story, got 'poem'"):
        MAGiCOptions(decoding="poem")
    with pytest.raises(ValueError, match="--text-width 64 has no effect beside --language-model x"):
        MAGiCOptions(language_model="x", text_width=64).check()
    with pytest.raises(ValueError, match="--clip-tokenizer x has no effect beside a model without --clip"):
        MAGiCOptions(clip_tokenizer="x").check()
    model = magic()
    with pytest.raises(ValueError, match="num_beams: the search has its own settings"):
        model.generate(**left_padded(PROMPTS), pixel_values=PIXELS, num_beams=2)
    with pytest.raises(ValueError, match="pixel_values: expected an image for each of 3 prompts, got none"):
        model.generate(**left_padded(PROMPTS))
    with pytest.raises(ValueError, match="48 positions for the prompt and 8 new tokens, got a prompt of 45"):
        model.generate(torch.full((1, 45), START), pixel_values=PIXELS[:1])
    model.clip_tokenizer = None
    with pytest.raises(ValueError, match="clip_tokenizer: expected the model to have one"):
        model.generate(**left_padded(PROMPTS), pixel_values=PIXELS)
    faster = {"model_type": "clipcap"}
    with pytest.raises(ValueError, match="clip_config: expected a model with features of images and texts"):
        MAGiCModel(MAGiCConfig(LANGUAGE["gpt2"](), faster))


def test_eval_overrides_the_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    magic().save_pretrained(tmp_path)
    arguments = [f"--checkpoint={tmp_path}", "--data=nowhere", "--config-overrides"]
    with pytest.raises(ValueError, match=r"--config-overrides: expected name=value of .*beta.*; got 'gamma=2'"):
        evaluate([*arguments, "gamma=2"])
    with pytest.raises(ValueError, match="alpha: expected a number from 0 to 1, got 2"):
        evaluate([*arguments, "alpha=2"])
