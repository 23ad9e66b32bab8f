"""ClipCap's mappers, its two variants, its stop token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from command_line import write_pairs
from prefix_models import CAPTIONS, batch, gpt2, make, write_language_model, write_tower
from safetensors.torch import load_file
from torch import nn

from vlmfast.cli import main
from vlmfast.data import Sample, load_tokenizer
from vlmfast.models.prefix.clipcap import ClipCapModel, ClipCapOptions, MLPMapper, TransformerMapper


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_mappers_have_the_published_sizes_and_shapes() -> None:
    """Of the public code with CLIP's 512 features and GPT-2's width 768."""
    with torch.device("meta"):
        mlp, ten, forty = (
            MLPMapper(512, 768, 10),
            TransformerMapper(512, 768, 10, 10),
            TransformerMapper(512, 768, 40, 40),
        )
        assert parameters(mlp) == 512 * 3840 + 3840 + 3840 * 7680 + 7680 == 31_468_800
        layer = 2 * 2 * 768 + 4 * 768**2 + 768 + 2 * (768 * 1536) + 1536 + 768
        assert parameters(ten) == 512 * 7680 + 7680 + 10 * 768 + 8 * layer == 41_745_408
        assert parameters(forty) == 512 * 40 * 768 + 40 * 768 + 40 * 768 + 8 * layer == 53_587_968
        features = torch.empty(3, 512)
        assert mlp(features).shape == ten(features).shape == (3, 10, 768)
        assert forty(features).shape == (3, 40, 768)


def test_the_mlp_mapper_is_its_formula() -> None:
    mapper, features = MLPMapper(6, 8, 3).double(), torch.randn(2, 6, dtype=torch.float64)
    hidden = torch.tanh(features @ mapper.hidden.weight.T + mapper.hidden.bias)
    expected = (hidden @ mapper.output.weight.T + mapper.output.bias).view(2, 3, 8)
    torch.testing.assert_close(mapper(features), expected)


def test_the_transformer_mapper_is_its_formula() -> None:
    """One head of two written out; no norm at the end."""
    mapper, features = TransformerMapper(6, 8, 3, 2, layers=1, heads=2).double(), torch.randn(2, 6, dtype=torch.float64)
    layer = mapper.layers[0]

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    x = torch.cat(
        [(features @ mapper.linear.weight.T + mapper.linear.bias).view(2, 2, 8), mapper.constant.expand(2, 3, 8)], 1
    )
    keys, values = (norm(x) @ layer.to_keys_values.weight.T).split(8, dim=-1)
    queries = norm(x) @ layer.to_queries.weight.T
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        weights = (queries[..., h] @ keys[..., h].transpose(1, 2) / 2).softmax(-1)
        heads.append(weights @ values[..., h])
    x = x + torch.cat(heads, -1) @ layer.project.weight.T + layer.project.bias
    x = x + torch.relu(norm(x) @ layer.fc1.weight.T + layer.fc1.bias) @ layer.fc2.weight.T + layer.fc2.bias
    torch.testing.assert_close(mapper(features), x[:, 2:])


def test_constants_that_change_places_change_the_prefix_places() -> None:
    mapper, features = TransformerMapper(6, 8, 4, 2, layers=2, heads=2).double(), torch.randn(2, 6, dtype=torch.float64)
    before, order = mapper(features), torch.tensor([2, 0, 3, 1])
    mapper.constant.data = mapper.constant.data[order]
    torch.testing.assert_close(mapper(features), before[:, order])
    assert not torch.allclose(before, before[:, order])


def test_features_are_normalised_only_where_asked() -> None:
    pixels = batch(CAPTIONS, 3)["pixel_values"]
    plain, unit = (make(ClipCapModel, gpt2(), normalize_prefix=n).image_features(pixels) for n in (False, True))
    assert not torch.allclose(plain.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(unit, plain / plain.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("train", [False, True])
def test_both_variants_from_pretrained_parts(train: bool, tmp_path: Path) -> None:
    """The image tower with its projection is frozen in both, as it is; the language model in one."""
    tokenizer = load_tokenizer()
    source = write_language_model(tmp_path / "lm", gpt2(vocab_size=len(tokenizer)))
    tower = write_tower(tmp_path / "clip")
    given = {
        "language_model": str(source),
        "vision_tower": str(tower),
        "train_language_model": train,
        "mapper": "transformer",
    }
    model = ClipCapModel.build(ClipCapOptions(**given, mapper_layers=1), tokenizer)
    assert set(model.frozen_parts()) == ({model.vision} if train else {model.vision, model.language_model})
    assert model.config.stop_token_id == tokenizer.convert_tokens_to_ids(".")
    assert model.language_model.train(train).training == train
    clip = transformers.CLIPModel.from_pretrained(tower).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = clip.visual_projection(clip.vision_model(pixels).pooler_output)
    torch.testing.assert_close(model.image_features(pixels), expected)
    model.save_pretrained(tmp_path / "saved")
    loaded = ClipCapModel.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[-1] * 10 + [5, 6]])
    features = torch.randn(1, 24)
    found = (m.eval()(ids, labels=ids, image_features=features).loss for m in (model, loaded))
    assert torch.equal(*found)


def test_captions_end_with_the_stop_token() -> None:
    tokenizer, model = load_tokenizer(), make(ClipCapModel, gpt2(vocab_size=4096))
    model.config.stop_token_id = stop = tokenizer.convert_tokens_to_ids(".")
    image = torch.zeros(16, 16, 3, dtype=torch.uint8)
    texts = ("a red square", "a red square.", "red")
    samples = [Sample(image, text, str(k), None) for k, text in enumerate(texts)]
    made = model.collator(ClipCapOptions(max_length=20), tokenizer, train=True)([*samples, None])
    assert made["pixel_values"].shape == (3, 16, 16, 3)
    rows = [[*tokenizer.encode(text.rstrip("."), add_special_tokens=False), stop] for text in texts]
    for k, row in enumerate(rows):
        assert made["input_ids"][k, : 3 + len(row)].tolist() == [-1] * 3 + row
        assert made["labels"][k].tolist() == [-100] * 3 + row + [-100] * (made["labels"].shape[1] - 3 - len(row))
        assert made["attention_mask"][k].sum() == 3 + len(row)
    short = model.collator(ClipCapOptions(max_length=2), tokenizer, train=True)(samples)["labels"]
    assert short[0].tolist() == [-100] * 3 + rows[0][:2]
    prompts = model.prompt_collator(ClipCapOptions(max_length=1), tokenizer)(samples)
    assert prompts.keys() == {"pixel_values", "input_ids", "attention_mask"}
    pads = len(rows[1]) - (len(rows[2]) - 1)  # prompts get no stop token
    assert prompts["attention_mask"][2].tolist() == [0] * pads + [1] * (3 + len(rows[2]) - 1)


def test_several_images_stand_where_the_caption_has_them() -> None:
    tokenizer, model = load_tokenizer(), make(ClipCapModel, gpt2(vocab_size=4096))
    image = torch.zeros(16, 16, 3, dtype=torch.uint8)
    sample = Sample(image, "<image>red<image>green", "k", None, images=[image, image + 1])
    made = model.prompt_collator(ClipCapOptions(), tokenizer)([sample])
    red, green = (tokenizer.encode(text, add_special_tokens=False) for text in ("red", "green"))
    assert made["input_ids"].tolist() == [[-1] * 3 + red + [-1] * 3 + green]
    assert made["pixel_values"][:, 0, 0, 0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="caption of sample 'k': expected <image> 1 times, once for each image"):
        model.prompt_collator(ClipCapOptions(), tokenizer)([Sample(image, "<image><image>", "k", None)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mapper": "linear"}, "--mapper: expected one of mlp, transformer, got 'linear'"),
        ({"clip_length": 5}, "--clip-length 5 has no effect beside --mapper mlp"),
        ({"train_language_model": True}, "--train-language-model True has no effect beside a new language model"),
        ({"language_model": "x", "text_width": 64}, "--text-width 64 has no effect beside --language-model x"),
        ({"language_model": "./gone"}, "./gone"),
        ({"stop": "no such token"}, "--stop: expected a text that is one token"),
    ],
)
def test_wrong_flags_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ClipCapModel.build(ClipCapOptions(**options), load_tokenizer())


def test_command_line_with_frozen_parts_and_cached_features(tmp_path: Path) -> None:
    """Trained, resumed and scored with a frozen language model and tower that no checkpoint holds."""
    tokenizer = load_tokenizer()
    data = tmp_path / "data"
    data.mkdir()
    write_pairs(data, 16)
    source = write_language_model(tmp_path / "lm", gpt2(vocab_size=len(tokenizer)))
    tokenizer.save_pretrained(source)
    out = tmp_path / "out"
    train = [
        "train", "clipcap", f"--data={data}", f"--output-dir={out}", f"--language-model={source}",
        f"--vision-tower={write_tower(tmp_path / 'clip')}", f"--cache-features={tmp_path / 'cache'}",
        "--prefix-length=3", "--per-device-train-batch-size=8", "--save-steps=1", "--logging-steps=1",
        "--report-to=none", "--use-cpu", "--max-length=12", "--dataloader-num-workers=0", "--disable-tqdm=true",
        "--max-steps=2", "--weight-decay=0.5",
    ]  # fmt: skip
    assert main(train) == 0
    for folder in (out, out / "checkpoint-1"):
        assert {name.split(".")[0] for name in load_file(folder / "model.safetensors")} == {"mapper"}
    weights = load_file(out / "model.safetensors")
    for name in ("checkpoint-2", "model.safetensors"):
        (out / name).rename(tmp_path / name)
    assert main([*train, "--resume"]) == 0
    for name, weight in load_file(out / "model.safetensors").items():
        assert torch.equal(weight, weights[name]), name
    scores = ["eval", f"--checkpoint={out}", f"--data={data}", "--device=cpu", "--num-workers=0", "--no-java"]
    assert main([*scores, "--max-new-tokens=3", f"--output={tmp_path / 'scores.json'}"]) == 0
    assert (tmp_path / "scores.json").exists()
