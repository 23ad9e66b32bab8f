"""Flamingo: what text sees of images, what stays frozen, parity with open_flamingo, generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from prefix_models import PAD, POSITIONS, VOCAB, gpt2, llama, vit, write_language_model, write_tower
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from vlmfast.data import load_tokenizer
from vlmfast.data.dataset import Sample
from vlmfast.models.language_model import last_hidden_states, output_head
from vlmfast.models.prefix.flamingo import FlamingoModel
from vlmfast.models.prefix.flamingo_batches import chunk_labels
from vlmfast.models.prefix.flamingo_config import END_TOKEN, IMAGE_TOKEN, FlamingoConfig, FlamingoOptions
from vlmfast.models.prefix.flamingo_parts import rows_of_media
from vlmfast.nn.prefix import positions

END, IMAGE = VOCAB, VOCAB + 1


def opt(**options: Any) -> transformers.OPTConfig:
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "hidden_size": 32, "ffn_dim": 48}
    more = {"num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32, "init_std": 0.3}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return transformers.OPTConfig(**{**sizes, **more, **ends, **options})


def neox(**options: Any) -> transformers.GPTNeoXConfig:
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "hidden_size": 32, "intermediate_size": 48}
    more = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3, "tie_word_embeddings": False}
    return transformers.GPTNeoXConfig(**{**sizes, **more, "bos_token_id": None, "eos_token_id": None, **options})


LANGUAGE: dict[str, Callable[..., Any]] = {"gpt2": gpt2, "llama": llama, "opt": opt, "neox": neox}
SMALL = {"prefix_length": 3, "resampler_layers": 1, "cross_attention_heads": 2, "cross_attention_head_size": 8}


def make(language: str = "llama", *, gates: float = 0.8, **options: Any) -> FlamingoModel:
    """In eval mode; gates open, so that images matter."""
    torch.manual_seed(1)
    fields = {"vision_config": vit(), "text_config": LANGUAGE[language](), "filler_token_id": PAD, **SMALL}
    model = FlamingoModel(FlamingoConfig(**{**fields, "media_token_id": IMAGE, "stop_token_id": END, **options})).eval()
    with torch.no_grad():
        for block in model.mapper.blocks.values():
            block.attn_gate.fill_(gates)
            block.ff_gate.fill_(gates)
        model.mapper.tokens.normal_(std=0.3)
        model.mapper.output_embedding().copy_(model.mapper.tokens[1])
    return model


def freeze_language(model: FlamingoModel) -> FlamingoModel:
    """As where the language model came from elsewhere."""
    model.config.language_model_frozen = model.config.vision_frozen = True
    model.freeze()
    return model


def batch(rows: list[list[int]], *, left: bool = False) -> dict[str, Tensor]:
    size = max(map(len, rows))
    ids = torch.full((len(rows), size), PAD)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        place = slice(size - len(row), size) if left else slice(0, len(row))
        ids[k, place], mask[k, place] = torch.tensor(row), 1
    count = sum(row.count(IMAGE) for row in rows)
    pixels = torch.randint(256, (count, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def labelled(rows: list[list[int]]) -> dict[str, Tensor]:
    given = batch(rows)
    ids = given["input_ids"]
    return {**given, "labels": ids.masked_fill((given["attention_mask"] == 0) | (ids == IMAGE), -100)}


ROWS = [
    [9, IMAGE, 5, 6, END, IMAGE, 7, 8, 11, END, IMAGE, 12, END],
    [IMAGE, 5, 9, END],
    [13, 14, 15],
]
"""Three images with text before them, one, and none."""


def branches(model: FlamingoModel, given: dict[str, Tensor]) -> list[Tensor]:
    """What the attention of each block gives, before its gate."""
    found: list[Tensor] = []
    hooks = [
        block.attn.register_forward_hook(lambda *call: found.append(call[2].detach()))
        for block in model.mapper.blocks.values()
    ]
    model(**given)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("language", LANGUAGE)
def test_closed_gates_are_the_language_model_bit_for_bit(language: str) -> None:
    """And then the gates and the new tokens alone learn."""
    model = freeze_language(make(language, gates=0.0)).train()
    given = labelled(ROWS)
    output = model(**given)
    with torch.no_grad():
        bare = last_hidden_states(
            model.language_model,
            model._embed(given["input_ids"]),
            given["attention_mask"],
            positions(given["attention_mask"]),
        )
    assert torch.equal(output.hidden_states, bare)
    output.loss.backward()
    nonzero = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    gates = {f"mapper.blocks.{layer}.{gate}" for layer in (0, 1) for gate in ("attn_gate", "ff_gate")}
    assert nonzero == gates | {"mapper.tokens"} | ({"mapper.end"} if language in ("llama", "neox") else set())
    assert model.mapper.tokens.grad.any(dim=1).all()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.startswith("mapper."))


def test_text_sees_the_last_image_alone() -> None:
    model = make()
    given = batch(ROWS[:1])
    before = model(**given).hidden_states
    branch = branches(model, given)[0]
    with torch.no_grad():
        given["pixel_values"][1] = 255 - given["pixel_values"][1]
    after, changed = model(**given).hidden_states, branches(model, given)[0]
    second, third = 5, 10
    assert torch.equal(before[:, :second], after[:, :second])
    assert (before[:, second:] != after[:, second:]).any(-1).all()
    assert torch.equal(branch[:, third:], changed[:, third:])
    assert (branch[:, second:third] != changed[:, second:third]).any(-1).all()


def test_text_without_an_image_before_it_gets_zero() -> None:
    branch = branches(make(), batch(ROWS))
    for each in branch:
        assert not each[0, 0].any()
        assert each[0, 1:].any(-1).all()
        assert not each[2].any()


def test_text_that_reads_the_next_image() -> None:
    model = make()
    given = {**batch(ROWS), "reads_next": torch.tensor([True, False, False])}
    branch, usual = branches(model, given)[0], branches(model, batch(ROWS))[0]
    assert branch[0, :11].any(-1).all()
    assert not branch[0, 11:].any()  # after the last image
    assert torch.equal(branch[1:], usual[1:])
    given["pixel_values"][1] = 0
    changed = (branches(model, given)[0] != branch)[0].any(-1)
    assert changed.tolist() == [2 <= place <= 5 for place in range(13)]


def test_images_are_the_rows_own_and_more_than_in_training() -> None:
    model = make()
    given = batch(ROWS)
    swapped = {**given, "pixel_values": given["pixel_values"].flip(0)}
    found, other = model(**given).hidden_states, model(**swapped).hidden_states
    assert not torch.allclose(found[:2], other[:2])
    assert torch.equal(found[2], other[2])
    many = batch([[IMAGE] * 32 + [5, 6]])
    assert model(**many).hidden_states.isfinite().all()
    with pytest.raises(ValueError, match=r"input_ids: expected token 41 once for each of 3 images, got it 4 times"):
        model(**{**given, "pixel_values": given["pixel_values"][1:]})


def test_a_video_gives_as_many_tokens_as_an_image() -> None:
    model = make(max_frames=4)
    pixels = torch.randint(256, (2, 3, 16, 16, 3), dtype=torch.uint8)
    states = model.image_features(pixels)
    assert states.shape == (2, 3, 5, 32)
    media = model.mapper(states)
    assert media.shape == (2, 3, 32)
    assert not torch.allclose(media, model.mapper(states.flip(1)))  # frames have embeddings
    ids = torch.tensor([[IMAGE, 5], [IMAGE, 6]])
    assert model(ids, pixel_values=pixels).hidden_states.isfinite().all()


@pytest.mark.parametrize("language", ["gpt2", "llama"])
def test_pads_change_nothing_wherever_they_are(language: str) -> None:
    model = make(language)
    rows = ROWS[:2]
    right, left = batch(rows), batch(rows, left=True)
    found, other = model(**right).hidden_states, model(**left).hidden_states
    assert torch.equal(found, other)
    alone = model(**{**batch(rows[1:]), "pixel_values": right["pixel_values"][3:]}).hidden_states
    torch.testing.assert_close(found[1, :4], alone[0], rtol=1e-4, atol=1e-5)


def everything_anew(model: FlamingoModel, ids: Tensor, pixels: Tensor) -> Tensor:
    """All logits of one row (L, V + 2), by the output embeddings."""
    hidden = model(ids[None], pixel_values=pixels if len(pixels) else None).hidden_states[0]
    logits = F.pad(output_head(model.language_model)(hidden), (0, 2), value=-torch.inf)
    logits[:, END] = hidden @ model.mapper.output_embedding()
    return logits


def each_row(given: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    ids = [row[mask == 1] for row, mask in zip(given["input_ids"], given["attention_mask"], strict=True)]
    pixels = given["pixel_values"].split([int((row == IMAGE).sum()) for row in ids])
    return list(zip(ids, pixels, strict=True))


@pytest.mark.parametrize("language", ["llama", "neox"])
def test_the_loss_is_the_cross_entropy_of_all_logits(language: str) -> None:
    """With gradients; weights of rows; and match_scores."""
    model = make(language)
    given = labelled(ROWS)
    expected = torch.zeros(3)
    for k, (ids, pixels) in enumerate(each_row(given)):
        labels = ids[1:].masked_fill(ids[1:] == IMAGE, -100)
        logits = everything_anew(model, ids, pixels)[:-1, : END + 1]
        expected = expected + F.one_hot(torch.tensor(k), 3) * F.cross_entropy(logits, labels, reduction="sum")
    weights = torch.tensor([0.5, 2.0, 1.0])
    loss = model(**given, sample_weights=weights).loss
    count = 9 + 3 + 2  # all but images and each row's first
    wanted = (expected * weights).sum() / count
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(model.match_scores(**given), -expected.detach(), rtol=1e-4, atol=1e-4)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, *grads in zip(
        names, torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters), strict=True
    ):
        torch.testing.assert_close(*grads, rtol=1e-3, atol=2e-5, msg=name)


def test_an_end_within_the_vocabulary_stands_for_its_own_row() -> None:
    """Where a language model has more embeddings than its tokenizer has tokens."""
    model = make(media_token_id=VOCAB - 1, stop_token_id=VOCAB - 2)
    row = torch.tensor([VOCAB - 1, 5, 6, VOCAB - 2])
    pixels = batch([[IMAGE]])["pixel_values"]
    hidden = model(row[None], pixel_values=pixels).hidden_states[0]
    logits = output_head(model.language_model)(hidden)
    logits[:, VOCAB - 2] = hidden @ model.mapper.output_embedding()
    loss = model(row[None], pixel_values=pixels, labels=row[None]).loss
    torch.testing.assert_close(loss, F.cross_entropy(logits[:-1], row[1:]))
    assert model.vocabulary == VOCAB


PROMPTS = [[9, IMAGE, 5, END, IMAGE, 7, 8], [IMAGE, 5], [13, 14, 15]]


@pytest.mark.parametrize("language", ["gpt2", "llama"])
def test_greedy_search_is_that_of_computing_everything_anew(language: str) -> None:
    """Prompts of unequal lengths, of two images, one and none; keys and values of images are computed once."""
    model = make(language)
    with torch.no_grad():
        model.mapper.output_embedding().mul_({"gpt2": 2, "llama": 3}[language])  # so that some row ends
    given = batch(PROMPTS, left=True)
    calls: list[int] = []
    hook = model.mapper.blocks["1"].attn.to_kv.register_forward_hook(lambda *call: calls.append(len(call[1][0])))
    found = model.generate(**given, max_new_tokens=8)
    hook.remove()
    assert calls == [3]
    said = []
    with torch.no_grad():
        for ids, pixels in each_row(given):
            row: list[int] = []
            while len(row) < 8 and END not in row:
                row.append(int(everything_anew(model, torch.cat([ids, torch.tensor(row).long()]), pixels)[-1].argmax()))
            said.append(row)
    assert found.tolist() == [row + [PAD] * (found.shape[1] - len(row)) for row in said]
    assert len({tuple(row) for row in said}) == 3
    assert any(END in row for row in said)
    assert min(map(len, said)) < max(map(len, said))


@pytest.mark.parametrize("language", ["gpt2", "llama"])
def test_beam_search_is_that_of_computing_everything_anew(language: str) -> None:
    model = make(language)
    with torch.no_grad():
        model.mapper.output_embedding().zero_()  # never among the best
    given = batch(PROMPTS, left=True)
    found = model.generate(**given, max_new_tokens=4, num_beams=3)
    with torch.no_grad():
        for row, (ids, pixels) in enumerate(each_row(given)):
            beams: list[tuple[float, list[int]]] = [(0.0, [])]
            for _ in range(4):
                longer = []
                for score, tokens in beams:
                    logits = everything_anew(model, torch.cat([ids, torch.tensor(tokens).long()]), pixels)
                    values = logits[-1, : END + 1].log_softmax(-1)
                    longer += [(score + value, [*tokens, token]) for token, value in enumerate(values.tolist())]
                beams = sorted(longer, reverse=True)[:3]
            assert END not in beams[0][1]
            assert found[row].tolist() == beams[0][1]
    assert not torch.equal(found, model.generate(**given, max_new_tokens=4))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[FlamingoModel, Any, FlamingoOptions]:
    folder = tmp_path_factory.mktemp("sources")
    tokenizer = load_tokenizer()
    source = write_language_model(folder / "lm", llama(vocab_size=len(tokenizer)))
    tower = write_tower(folder / "clip")
    tokenizer.add_tokens([END_TOKEN, IMAGE_TOKEN], special_tokens=True)
    options = FlamingoOptions(language_model=str(source), vision_tower=str(tower), prefix_length=3, resampler_layers=1)
    return FlamingoModel.build(options, tokenizer), tokenizer, options


def test_frozen_is_frozen(built: tuple[FlamingoModel, Any, FlamingoOptions], tmp_path: Path) -> None:
    """Bit for bit after steps with weight decay; checkpoints leave it out, and load."""
    model, tokenizer, _ = built
    model.train()
    assert len(tokenizer) == model.vocabulary == model.config.text_config.vocab_size + 2
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"mapper"}
    groups = model.parameter_groups(1e-3, 0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.mapper.parameters()))
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in model.mapper.blocks.parameters()}
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = tokenizer.encode(f"{IMAGE_TOKEN}a cat{END_TOKEN}", add_special_tokens=False)
    assert ids[0] == model.config.media_token_id
    assert ids[-1] == model.config.stop_token_id
    given = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids]), "pixel_values": torch.rand(1, 3, 16, 16)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    losses = []
    for _ in range(6):
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (not name.startswith("mapper.")), name
    assert all(value > 0 for value in model.metrics().values())

    model.save_pretrained(tmp_path / "saved")
    assert {name.split(".")[0] for name in load_file(tmp_path / "saved" / "model.safetensors")} == {"mapper"}
    loaded = FlamingoModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(**given).loss, model.eval()(**given).loss)
    model.save_pretrained(tmp_path / "whole", whole=True)
    assert torch.equal(FlamingoModel.from_pretrained(tmp_path / "whole")(**given).loss, loaded(**given).loss)
    features = model.frozen_features(given.pop("pixel_values"))
    assert torch.equal(loaded(**given, **features).loss, model(**given, **features).loss)


def sample(caption: str, images: int, seed: int = 0, **record: Any) -> Sample:
    pixels = [torch.full((4, 4, 3), k, dtype=torch.uint8) for k in range(images)]
    return Sample(pixels[0], caption, "key", None, seed, record, None, pixels if images > 1 else [])


DOCUMENT = "one <image> two <image> three"


def read(built: tuple[FlamingoModel, Any, FlamingoOptions], *samples: Sample, **flags: Any) -> tuple[Any, list[str]]:
    """A training batch, and each row's tokens with a bar before those that are predicted."""
    model, tokenizer, _ = built
    options = FlamingoOptions(max_length=flags.pop("max_length", 32), **flags)
    made = model.collator(options, tokenizer, train=True)(list(samples))
    texts = []
    for ids, labels, mask in zip(made["input_ids"], made["labels"], made["attention_mask"], strict=True):
        assert labels[labels != -100].tolist() == ids[labels != -100].tolist()
        tokens = [("|" if y >= 0 else "") + tokenizer.decode(i) for i, y in zip(ids, labels, strict=True)]
        texts.append(" ".join("".join(tokens[: int(mask.sum())]).split()))
    return made, texts


def test_documents_and_pairs(built: tuple[FlamingoModel, Any, FlamingoOptions]) -> None:
    made, texts = read(built, sample(DOCUMENT, 2), sample("<image><image>", 2), sample("a", 1), sample("b<image>", 1))
    assert texts[0].replace(" ", "") == "one<image>|two|<|endofchunk|><image>|three|<|endofchunk|>"
    assert texts[1] == "<image><image>"
    assert texts[2] == "<image>|a|<|endofchunk|>"
    assert texts[3] == "b<image>|<|endofchunk|>"
    assert made["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 0, 1, 0, 0]
    assert set(made) == {"pixel_values", "input_ids", "attention_mask", "labels"}
    _, texts = read(built, sample(f"a{END_TOKEN}two <image>b", 1), max_length=3)
    assert texts[0].replace(" ", "") == "a<|endofchunk|>two<image>"  # cut
    with pytest.raises(ValueError, match="expected <image> 2 times, once for each image, or not at all, got it 1"):
        read(built, sample("a <image>", 2))


def test_text_that_reads_the_next_image_is_predicted(built: tuple[FlamingoModel, Any, FlamingoOptions]) -> None:
    made, texts = read(built, sample(DOCUMENT, 2), sample("a", 1), p_next=1.0)
    assert texts[0].replace(" ", "") == "one|<|endofchunk|><image>|two|<|endofchunk|><image>three"
    assert texts[1] == "<image>|a|<|endofchunk|>"  # nothing stands before its image
    assert made["reads_next"].tolist() == [True, False]
    drawn, _ = read(built, *(sample(DOCUMENT, 2, seed=k) for k in range(200)), p_next=0.5)
    assert 70 < drawn["reads_next"].sum() < 130
    again, _ = read(built, *(sample(DOCUMENT, 2, seed=k) for k in range(200)), p_next=0.5)
    assert torch.equal(drawn["reads_next"], again["reads_next"])
    model, tokenizer, _ = built
    scored = model.collator(FlamingoOptions(p_next=1.0), tokenizer, train=False)([sample(DOCUMENT, 2, weight=2)])
    assert "reads_next" not in scored
    assert "sample_weights" not in scored


def test_data_sets_have_weights(built: tuple[FlamingoModel, Any, FlamingoOptions]) -> None:
    made, _ = read(built, sample("a", 1, weight=0.2), sample("b", 1))
    torch.testing.assert_close(made["sample_weights"], torch.tensor([0.2, 1.0]))
    for wrong in (-1, True, "2", float("nan")):
        with pytest.raises(ValueError, match="weight of sample 'key': expected a number that is not negative"):
            read(built, sample("a", 1, weight=wrong))


def test_labels_are_open_flamingo_s() -> None:
    """Its loops over each token, on random documents."""
    ids = torch.randint(5, 12, (40, 30), generator=torch.Generator().manual_seed(0))
    media, end = 5, 6
    expected = ids.clone()
    for row in expected:
        place = 0
        while place < len(row) and row[place] != media:
            row[place] = -100
            place += 1
        for found in torch.where(row == end)[0].tolist():
            place = found + 1
            while place < len(row) and row[place] != media:
                row[place] = -100
                place += 1
    expected[expected == media] = -100
    found = chunk_labels(ids, torch.ones_like(ids), media, end, torch.zeros(40, dtype=torch.bool))
    assert torch.equal(found, expected)
    assert 0 < (found >= 0).float().mean() < 1


def test_media_of_rows() -> None:
    media = torch.arange(4.0)[:, None, None].expand(4, 2, 3)
    found = rows_of_media(media, torch.tensor([1, 0, 3]))
    assert found.shape == (3, 3, 2, 3)
    assert found[:, :, 0, 0].tolist() == [[0, 0, 0], [0, 0, 0], [1, 2, 3]]
    assert rows_of_media(media[:0], torch.tensor([0, 0])).shape == (2, 1, 2, 3)


def test_wrong_flags_are_named(built: tuple[FlamingoModel, Any, FlamingoOptions]) -> None:
    with pytest.raises(ValueError, match="--p-next: expected a probability, got 2"):
        FlamingoOptions(p_next=2.0)
    with pytest.raises(ValueError, match=r"--stop: expected <\|endofchunk\|>, got '\.'"):
        FlamingoOptions(stop=".")
    with pytest.raises(ValueError, match=r"cross_attention_offset: expected at least 0 and less than .* 2, got 2"):
        make(cross_attention_every=2, cross_attention_offset=2)
    with pytest.raises(ValueError, match=r"cross_attention_every: expected a block .* 2 layers, got 3 with offset 2"):
        make(cross_attention_every=3)
    with pytest.raises(ValueError, match="media_token_id: expected a token, got None"):
        make(media_token_id=None)
    with pytest.raises(ValueError, match=r"tokenizer: expected one with the tokens <\|endofchunk\|>, <image>"):
        FlamingoModel.build(built[2], load_tokenizer())
    assert make(cross_attention_every=2).config.layers() == [1]  # as in open_flamingo
    assert make(cross_attention_every=2, cross_attention_offset=0).config.layers() == [0]  # as in Idefics


class Visual(nn.Module):
    """What open_flamingo asks of open_clip: something pooled, and the states of patches."""

    def __init__(self, model: FlamingoModel) -> None:
        super().__init__()
        self.model = [model]

    def forward(self, pixels: Tensor) -> tuple[None, Tensor]:
        return None, self.model[0].image_features(pixels)[:, 1:]


@pytest.mark.parametrize(("language", "name"), [("opt", "model.decoder.layers"), ("neox", "gpt_neox.layers")])
@pytest.mark.parametrize("every", [1, 2])
def test_open_flamingo_is_equalled_and_its_checkpoints_load(language: str, name: str, every: int) -> None:
    """The whole model on padded documents of unequal numbers of images, from its state dict; both layouts of names."""
    reason = "needs pip install --no-deps open-flamingo: the model that is equalled"
    flamingo = pytest.importorskip("open_flamingo.src.flamingo", reason=reason)
    mixin = pytest.importorskip("open_flamingo.src.flamingo_lm", reason=reason).FlamingoLMMixin
    extend = pytest.importorskip("open_flamingo.src.utils", reason=reason).extend_instance
    heads = {"cross_attention_heads": 8, "cross_attention_head_size": 64}  # its own
    model = make(language, prefix_length=64, resampler_layers=6, cross_attention_every=every, **heads)
    torch.manual_seed(5)
    other = AutoModelForCausalLM.from_config(LANGUAGE[language]()).eval()
    other.load_state_dict(model.language_model.state_dict())
    extend(other, mixin)
    other.set_decoder_layers_attr_name(name)
    other.resize_token_embeddings(VOCAB + 2)
    vision = nn.Module()
    vision.visual = Visual(model)
    theirs = flamingo.Flamingo(vision, other, END, IMAGE, 32, cross_attn_every_n_layers=every).eval()
    with torch.no_grad():
        for block in theirs.lang_encoder.gated_cross_attn_layers:
            if block is not None:
                block.attn_gate.fill_(0.7)
                block.ff_gate.fill_(-0.4)
    state = theirs.state_dict()
    given = batch([row for row in ROWS if IMAGE in row])
    pixels = torch.randn(2, 3, 1, 3, 16, 16)
    with torch.no_grad():
        ids, mask = given["input_ids"], given["attention_mask"]
        expected = theirs(vision_x=pixels, lang_x=ids, attention_mask=mask).logits
    both = [{k: v for k, v in state.items() if "gated_cross_attn_layers." not in k}]
    both.append(
        {"model_state_dict": {f"module.{k}": v for k, v in state.items() if ".gated_cross_attn_layer." not in k}}
    )
    ours = torch.cat([pixels[0, :, 0], pixels[1, :1, 0]])
    for checkpoint in both:
        with torch.no_grad():
            for p in model.mapper.parameters():
                p.zero_()
        model.load_open_flamingo(checkpoint)
        hidden = model(ids, mask, pixel_values=ours).hidden_states
        logits = model._with_end(nn.Module(), (hidden,), output_head(model.language_model)(hidden))
        present = mask == 1
        torch.testing.assert_close(
            logits[..., : END + 1][present], expected[..., : END + 1][present], rtol=1e-4, atol=1e-4
        )
    del state["perceiver.latents"]
    with pytest.raises(ValueError, match=r"checkpoint: expected the weights .* missing: resampler.latents"):
        model.load_open_flamingo(state)
