"""FLAVA's batches, its codebook, and training on data of three kinds."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import write_pairs
from safetensors.torch import load_file
from torch import Tensor
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from vlmfast import data
from vlmfast.cli import main
from vlmfast.models.masked.flava import FLAVAModel
from vlmfast.models.masked.flava_codebook import codebook_pixels, fit_codebook, load_codebook
from vlmfast.models.masked.flava_collator import FLAVACollator, exchange

TINY = ("--width=64", "--vision-layers=1", "--text-layers=1", "--fusion-layers=1", "--image-size=16", "--max-length=12")


def samples(count: int, *, image: bool = True, caption: bool = True) -> list[data.Sample]:
    return [
        data.Sample(
            torch.zeros(16, 16, 3, dtype=torch.uint8) if image else None,
            f"a thing with number {k} on it and more words" if caption else "",
            str(k),
            None,
            seed=k,
        )
        for k in range(count)
    ]


def collator(**options: float) -> FLAVACollator:
    tokenizer = data.load_tokenizer()
    tokenizer.add_special_tokens(FLAVAModel.special_tokens)
    return FLAVACollator(tokenizer, max_length=16, grid=(2, 2), **options)


def test_a_batch_of_each_kind() -> None:
    collate = collator()
    assert collate(samples(4, caption=False)).keys() == {"pixel_values", "bool_masked_pos"}
    texts = collate(samples(4, image=False))
    assert texts.keys() == {"input_ids_masked", "mlm_labels", "attention_mask"}
    pairs = collate(samples(4))
    assert pairs.keys() == {*texts, "pixel_values", "bool_masked_pos", "input_ids", "itm_labels"}
    chosen = pairs["mlm_labels"] != -100
    assert torch.equal(pairs["mlm_labels"][chosen], pairs["input_ids"][chosen])
    assert torch.equal(pairs["input_ids_masked"][~chosen], pairs["input_ids"][~chosen])
    again = collate(samples(4))
    assert all(torch.equal(value, again[name]) for name, value in pairs.items())
    with pytest.raises(ValueError, match="expected an image in each or in none, got 1 in 2"):
        collate([*samples(1), *samples(1, image=False)])
    with pytest.raises(ValueError, match=r"mismatched: expected a probability, got 2"):
        collator(mismatched=2.0)


def test_captions_of_mismatches_change_places() -> None:
    count = 400
    found = collator(mismatched=0.1)(samples(count))
    own = collator(mismatched=0.0)(samples(count))
    assert own["itm_labels"].all()
    same = (found["input_ids"] == own["input_ids"]).all(1)
    assert torch.equal(same.long(), found["itm_labels"])
    assert 20 <= int((~same).sum()) <= 60  # 40 expected, a deviation of 6
    rows = Counter(map(tuple, found["input_ids"].tolist()))
    assert rows == Counter(map(tuple, own["input_ids"].tolist()))  # no caption twice
    assert exchange(["a", "b", "c"], [True, False, True])[0] == ["c", "b", "a"]
    assert exchange(["a", "b"], [True, False])[1].tolist() == [1, 1]  # nobody to change with
    assert exchange(["a", "b", "a"], [True, False, True])[1].tolist() == [1, 1, 1]  # it still says what is there


def pictures(count: int = 64) -> Tensor:
    """Two-coloured patches of 8 x 8 pixels, 16 an image."""
    generator = np.random.default_rng(0)
    colours = generator.integers(256, size=(count, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    return torch.from_numpy(colours.astype(np.uint8))


def small_codebook(words: int = 32) -> FlavaImageCodebook:
    torch.manual_seed(0)
    return FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=16, num_blocks_per_group=1, vocab_size=words))


def explained(codebook: FlavaImageCodebook, images: Tensor) -> float:
    """Share of the variance of patches that their words tell."""
    pixels = codebook_pixels(images, (4, 4))
    words = codebook.get_codebook_indices(pixels).flatten()
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
    means = torch.zeros(codebook.vocab_size, patches.shape[1]).index_add_(0, words, patches)
    means /= torch.bincount(words, minlength=codebook.vocab_size).clamp(min=1)[:, None]
    return 1 - float((patches - means[words]).square().sum() / (patches - patches.mean(0)).square().sum())


def test_a_fitted_codebook_tells_patches_apart() -> None:
    images, codebook = pictures(), small_codebook()
    before = explained(codebook, images[32:])
    convolutions = {name: value.clone() for name, value in codebook.state_dict().items() if "output" not in name}
    fit_codebook(codebook, list(images[:32]), (4, 4))
    after = explained(codebook, images[32:])
    assert before < 0.2 < 0.5 < after, (before, after)
    assert len(codebook.get_codebook_indices(codebook_pixels(images[:32], (4, 4))).unique()) == 32
    assert all(torch.equal(value, codebook.state_dict()[name]) for name, value in convolutions.items())
    again = small_codebook()
    fit_codebook(again, list(images[:32]), (4, 4))
    assert all(torch.equal(a, b) for a, b in zip(codebook.parameters(), again.parameters(), strict=True))
    few = small_codebook()
    fit_codebook(few, [torch.zeros(32, 32, 3, dtype=torch.uint8)], (4, 4))  # fewer patches than words
    assert all(p.isfinite().all() for p in few.parameters())


def test_a_word_is_the_nearest_centre() -> None:
    """The last convolution's scores order centres as distances do, centres being means of their own features."""
    from vlmfast.models.masked.flava_codebook import _features

    images, codebook = pictures(), small_codebook()
    fit_codebook(codebook, list(images), (4, 4))
    with torch.no_grad():
        pixels = codebook_pixels(images, (4, 4))
        features, words = _features(codebook, pixels), codebook.get_codebook_indices(pixels).flatten()
    middle = features.mean(0)
    centres = codebook.blocks.output.conv.weight[:, :, 0, 0].double() / 2 + middle.double()
    assert torch.equal(torch.cdist(features.double(), centres).argmin(1), words)


def test_pixels_of_the_codebook() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 16, 16, 3)
    found = codebook_pixels(images, (2, 2))
    assert found.shape == (2, 3, 16, 16)
    torch.testing.assert_close(found[:, 0, 0, 0], torch.tensor([0.1, 0.9]))
    assert codebook_pixels(images, (1, 1)).shape == (2, 3, 8, 8)


def test_a_codebook_of_transformers_is_taken(tmp_path: Path) -> None:
    codebook = small_codebook(20)
    codebook.save_pretrained(tmp_path)
    tokenizer = data.load_tokenizer()
    model = FLAVAModel.build(
        FLAVAModel.Options(codebook=str(tmp_path), width=64, vision_layers=1, text_layers=1, fusion_layers=1), tokenizer
    )
    assert model.config.image_config.vocab_size == model.mim_head.decoder.out_features == 20
    own = model.image_codebook.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in load_codebook(str(tmp_path)).state_dict().items())
    assert not model.codebook_is_new
    model.save_pretrained(tmp_path / "flava")
    with pytest.raises(ValueError, match="expected a checkpoint of FlavaImageCodebook, got model_type 'flava'"):
        load_codebook(str(tmp_path / "flava"))


def test_three_sources_train_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rounds of three batches move the heads of all kinds, and the codebook stays what k-means made of it.

    A run that goes on between the rounds ends where the whole one does.
    """
    (tmp_path / "pairs").mkdir()
    pairs = write_pairs(tmp_path / "pairs", 16)
    (tmp_path / "texts.txt").write_text("\n".join(f"a line of text, number {k}" for k in range(5)))
    out = tmp_path / "out"
    command = [
        "train", "flava", f"--data={pairs}", f"--image-data={pairs}", f"--text-data={tmp_path / 'texts.txt'}", *TINY,
        f"--output-dir={out}", "--per-device-train-batch-size=8", "--num-train-epochs=1", "--logging-steps=1",
        "--report-to=none", "--use-cpu", "--dataloader-num-workers=0", "--disable-tqdm=true", "--codebook-size=16",
        "--save-steps=3", "--warmup-steps=0", "--learning-rate=0.01", "--weight-decay=0",
    ]  # fmt: skip
    assert main(command) == 0
    history = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert history[-2]["step"] == 6 or history[-1]["step"] == 6
    terms = {"global_contrastive", "itm", "mmm_image", "mmm_text", "mim", "mlm"}
    assert terms <= history[5].keys()
    first, last = (FLAVAModel.from_pretrained(out / f"checkpoint-{step}") for step in (3, 6))
    moved = {name for name, value in last.state_dict().items() if not torch.equal(value, first.state_dict()[name])}
    for head in ("mim_head", "mlm_head", "mmm_image_head", "mmm_text_head", "itm_head", "flava.image_projection"):
        assert f"{head}.weight" in moved or any(name.startswith(f"{head}.") for name in moved), head
    assert not any(name.startswith("image_codebook.") or "model.pooler" in name for name in moved)
    part = tmp_path / "part"
    part.mkdir()
    shutil.copytree(out / "checkpoint-3", part / "checkpoint-3")
    shutil.copy(out / "run.json", part)
    resumed = [f"--output-dir={part}" if option.startswith("--output-dir") else option for option in command]
    assert main([*resumed, "--resume"]) == 0
    weights = load_file(out / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in load_file(part / "model.safetensors").items())
    for flag in ("--text-data=x", "--image-data=x", "--mismatched=0.2"):
        tuning = ["train", "flava", "--task=vqa", f"--pretrained={out}", f"--data={pairs}", f"--output-dir={out}", flag]
        assert main(tuning) == 1
        assert "has no effect beside --task vqa" in capsys.readouterr().err
    record = json.loads((out / "run.json").read_text())
    assert record["model"]["text_data"].endswith("texts.txt")
    with pytest.raises(ValueError, match="lengths: expected one batch of 32 in the first part"):
        data.Mixture([data.TextsAlone(tmp_path / "texts.txt")]).sampler(32, 0)
