"""FIBER, fine stage: fused pyramid, images of any size, texts and their boxes, phrases that are found, checkpoints."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

pytest.importorskip("torchvision")

from vlmfast.cli import main
from vlmfast.data import load_tokenizer
from vlmfast.data.dataset import Sample
from vlmfast.models.checkpoints import load
from vlmfast.models.detection.batches import Sizes
from vlmfast.models.fusion.fiber import FIBERModel
from vlmfast.models.fusion.fiber_config import FIBERConfig, FIBEROptions
from vlmfast.models.fusion.fiber_fine import FIBERFineModel
from vlmfast.models.fusion.fiber_fine_batches import GroundingCollator, prompt, prompts
from vlmfast.models.fusion.fiber_fine_config import FIBERFineConfig, FIBERFineOptions

TOKENIZER = load_tokenizer()
COLOURS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 220), "yellow": (230, 220, 20)}


def towers(**settings: Any) -> dict[str, Any]:
    """The last three of four text layers; of blocks the last of stage 2 and both of stage 3, one of them shifted."""
    text = transformers.RobertaConfig(
        vocab_size=len(TOKENIZER), hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=33, pad_token_id=TOKENIZER.pad_token_id, type_vocab_size=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    vision = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 2, 2], num_heads=[1, 2, 4], window_size=2,
        drop_path_rate=0.0,
    )  # fmt: skip
    return {"vision_config": vision, "text_config": text, "num_fused_layers": 3, **settings}


def config(**settings: Any) -> FIBERFineConfig:
    head = {"head_channels": 32, "head_blocks": 1, "anchor_scale": 3.0, "image_size": 32, "longer_size": 53}
    return FIBERFineConfig(**towers(**{**head, **settings}))


def make(alpha: float = 0.6) -> FIBERFineModel:
    """Open gates, and weights far enough from what they start at for words and images to matter."""
    torch.manual_seed(0)
    model = FIBERFineModel(config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "alpha" in name:
                parameter.fill_(alpha)
            elif parameter.dim() and "bias0" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.head.bias0.fill_(0)
    return model.eval()


def ids(*texts: str) -> dict[str, Tensor]:
    found = TOKENIZER(list(texts), padding=True, return_tensors="pt")
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def pixels(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8) for w, h in sizes]


def padded(images: list[Tensor]) -> dict[str, Tensor]:
    """In one batch, with something else than zeros behind them."""
    height, width = (max(image.shape[side] for image in images) for side in (0, 1))
    batch = torch.full((len(images), height, width, 3), 77, dtype=torch.uint8)
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return {
        "pixel_values": batch,
        "image_sizes": torch.tensor([[image.shape[1], image.shape[0]] for image in images]),
    }


def test_without_gates_the_pyramid_reads_both_towers_as_they_are_alone() -> None:
    """Bit for bit; stages before patches are merged, the last of them behind Swin's norm, and RoBERTa's last norm."""
    model = make(alpha=0)
    own, given = model.towers, ids("a cat on red", "dog")
    read: dict[str, Any] = {}
    model.pyramid.register_forward_pre_hook(lambda module, args: read.update(args[0]))
    model.head.register_forward_pre_hook(lambda module, args: read.update(words=args[1]))
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        model._dense(model._encode(images), **given)
        alone = own.alone(text=own.encode_text(**given))
        assert torch.equal(read["words"], alone)
        seen = given["attention_mask"].bool()
        theirs = own.text_model(**given).last_hidden_state
        torch.testing.assert_close(alone[seen], theirs[seen], rtol=1e-5, atol=1e-5)
        assert [tuple(read[str(k)].shape) for k in range(2)] == [(2, 32, 4, 6), (2, 64, 2, 3)]
        last = own.alone(image=own.encode_image(images)).transpose(1, 2).unflatten(2, (2, 3))
        assert torch.equal(read["1"], last)
        theirs = own.vision_model(images, output_hidden_states=True, output_hidden_states_before_downsampling=True)
        stage = model.level_norms[0](theirs.reshaped_hidden_states[2].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(read["0"], stage, rtol=1e-5, atol=1e-5)


def test_with_gates_each_side_reads_the_other_from_before_the_pair() -> None:
    """The first fused text layer reads the image from before its block; and RoBERTa's last norm is kept."""
    model = make()
    own, given = model.towers, ids("a cat on red", "dog")
    with torch.no_grad():
        stages: list[Any] = []
        image = own.encode_image(torch.randn(2, 3, 32, 32), stages)
        text = own.encode_text(**given)
        words, last = own.fuse(image, text, last_norm=True, stages=stages)
        bare, same = own.fuse(image, text)
        assert torch.equal(own.text_model.encoder.layer[-1].output.LayerNorm(bare), words)
        assert torch.equal(last, same)
        assert torch.equal(last, stages[-1].states)
        assert len(stages) == 3
        other = image._replace(states=image.states + torch.randn_like(image.states))
        assert not torch.allclose(own.fuse(other, text, last_norm=True)[0], words)
        first: list[Tensor] = []
        own.t2i[0].register_forward_pre_hook(lambda module, args: first.append(args[1]))
        own.i2t[0].register_forward_pre_hook(lambda module, args: first.append(args[1]))
        own.fuse(image, text)
        assert torch.equal(first[0], image.states)
        assert torch.equal(first[1], text.states)


def test_an_image_and_its_text_give_the_same_in_any_batch() -> None:
    """Images of several sizes, and texts of several lengths. The first is one window in the last stage."""
    model, texts = make(), ["cat", "a dog on yellow left of a red cat", "a cat"]
    images = pixels((9, 14), (40, 32), (33, 50))
    given = ids(*texts)
    mask = torch.zeros(3, 2, given["input_ids"].shape[1], dtype=torch.bool)
    mask[:, 0, 0] = mask[:, 1, 1] = True
    scores, boxes = model.phrase_scores(**padded(images), **given, phrase_mask=mask)
    names = [["red", "old cat"], [], ["dog"]]
    found = model.detect(**padded(images), phrases=names, tokenizer=TOKENIZER)
    assert [len(one["boxes"]) > 0 for one in found] == [True, False, True]
    for place in (2, 1, 0):
        length = int(given["attention_mask"][place].sum())
        alone, where = model.phrase_scores(
            images[place][None], given["input_ids"][[place], :length], mask[[place], :, :length]
        )
        count = alone.shape[2]
        torch.testing.assert_close(scores[place, :, :count], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(boxes[place, :count], where[0], rtol=1e-4, atol=1e-3)
        assert (scores[place, :, count:] == -torch.inf).all()
        width, height = images[place].shape[1], images[place].shape[0]
        assert (boxes[place, :count] <= torch.tensor([width, height, width, height])).all()
        one = model.detect(images[place][None], [names[place]], tokenizer=TOKENIZER)[0]
        for name, value in one.items():
            torch.testing.assert_close(found[place][name], value, rtol=1e-4, atol=1e-3)


def test_scores_of_phrases_are_means_over_their_words() -> None:
    """sqrt(mean of sigmoid(S) * sigmoid(centerness)), of the places that are best for any phrase."""
    model, given, image = make(), ids("a cat on red"), pixels((32, 32))[0][None]
    mask = torch.zeros(1, 2, given["input_ids"].shape[1], dtype=torch.bool)
    mask[0, 0, 1:3] = True
    mask[0, 1, 4] = True
    scores, boxes = model.phrase_scores(image, **given, phrase_mask=mask)
    with torch.no_grad():
        groups = model._groups(image, None)
        dense = model._dense(model._encode(groups[0].images), **given)
    p, c = dense.logits[0].double().sigmoid(), dense.centerness[0].double().sigmoid()
    expected = torch.stack([((p[:, 1] + p[:, 2]) / 2 * c).sqrt(), (p[:, 4] * c).sqrt()])
    order = expected.amax(0).argsort(descending=True)
    assert scores.shape[2] == 4 * 4 + 2 * 2 + 1 + 1
    torch.testing.assert_close(scores[0].double(), expected[:, order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(boxes[0], dense.boxes[0][order].clamp(0, 32))


def test_names_that_do_not_fit_are_asked_for_in_several_texts() -> None:
    model, image = make(), pixels((32, 32))[0][None]
    names = ["cat", "dog", "old car", "tree", "ice cream", "red flag"]
    made = prompts(TOKENIZER, names, 9)
    assert len(made) > 2
    assert [place for one in made for place in one.names] == list(range(6))
    assert all(len(TOKENIZER(one.text)["input_ids"]) <= 9 for one in made)
    assert [one.text[slice(*span)] for one in made for span in one.spans] == names
    whole = model.detect(image, [names], tokenizer=TOKENIZER, max_length=9)[0]
    parts: dict[int, list[float]] = {}
    for one in made:
        own = model.detect(image, [[names[place] for place in one.names]], tokenizer=TOKENIZER)[0]
        for label, score in zip(own["labels"].tolist(), own["scores"].tolist(), strict=True):
            parts.setdefault(one.names[label], []).append(score)
    assert len(whole["scores"]) <= 100
    assert (whole["scores"].diff() <= 0).all()
    for label, score in zip(whole["labels"].tolist(), whole["scores"].tolist(), strict=True):
        assert min(abs(score - other) for other in parts[label]) < 1e-5
    assert set(whole["labels"].tolist()) == set(range(6))


@pytest.mark.parametrize("phrases", [None, [], [["cat"], ["dog"]], ["cat"], [["cat", " "]]])
def test_phrases_are_lists_of_words(phrases: Any) -> None:
    with pytest.raises(ValueError, match=r"^phrases: expected"):
        make().detect(pixels((32, 32))[0][None], phrases, tokenizer=TOKENIZER)


def sample(seed: int = 0, **record: Any) -> Sample:
    objects = [
        {"box": [8, 8, 24, 24], "name": "cat"},
        {"box": [30, 0, 60, 90], "name": "dog"},
        {"name": "no box"},
        {"box": [0, 0, 0.5, 50], "name": "thin"},
        {"box": [30, 30, 60, 60], "name": "cat"},
        {"box": [0, 0, float("inf"), 9], "name": "endless"},
        {"box": [0, "0", 9, 9], "name": "words"},
    ]
    caption = "two cats beside a dog"
    phrases = [{"span": [0, 8], "objects": [0, 4]}, {"span": [16, 21], "objects": [1, 2]}]
    image = torch.zeros(64, 64, 3, dtype=torch.uint8)
    return Sample(image, caption, "k", None, seed, {"objects": objects, "phrases": phrases, **record})


def said(batch: dict[str, Tensor], image: int, box: int) -> str:
    """The words of a box."""
    return TOKENIZER.decode(batch["input_ids"][image][batch["box_words"][image, box]]).strip()


def test_boxes_beside_the_words_of_a_caption() -> None:
    collate = GroundingCollator(Sizes(32, 53), TOKENIZER, 32, ["cat", "dog"], caption_share=1.0)
    batch = collate([sample(), None, sample(phrases=[])])
    assert batch["pixel_values"].shape == (2, 32, 32, 3)
    assert batch["boxes"][0, :3].tolist() == [[4, 4, 12, 12], [15, 15, 30, 30], [15, 0, 30, 32]]
    assert [said(batch, 0, box) for box in range(3)] == ["two cats", "two cats", "a dog"]
    # Without phrases it is a list of names.
    assert sorted(said(batch, 1, box) for box in range(3)) == ["cat", "cat", "dog"]
    short = GroundingCollator(Sizes(32, 53), TOKENIZER, 5, ["cat", "dog"], caption_share=1.0)([sample()])
    assert short["box_words"].any(2).sum() == 2  # the dog was cut off


def test_lists_of_names_have_those_that_are_there_and_as_many_others_as_fit() -> None:
    others = ["tree", "flag", "moon", "house", "arrow", "book", "clock"]
    names = sorted([*others, "cat", "dog", "thin"])
    collate = GroundingCollator(Sizes(32, 53), TOKENIZER, 16, names, caption_share=0.0)
    texts = set()
    for seed in range(6):
        batch = collate([sample(seed)])
        text = TOKENIZER.decode(batch["input_ids"][0], skip_special_tokens=True)
        texts.add(text)
        asked = text.strip(". ").split(". ")
        assert {"cat", "dog"} < set(asked) <= {"cat", "dog", *names}
        assert len(asked) == len(set(asked)) >= 5
        assert batch["input_ids"].shape[1] <= 16
        assert sorted(said(batch, 0, box) for box in range(3)) == ["cat", "cat", "dog"]
        for name, value in collate([sample(seed)]).items():
            assert torch.equal(value, batch[name])
    assert len(texts) > 3
    assert prompt(["a", "b c"]).text == "a. b c."


def coarse(objective: str) -> FIBERModel:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "queued_pairs": 2, "queued_tokens": 9}
    model = FIBERModel(FIBERConfig(**towers(objective=objective, **sizes)))
    for name, parameter in model.named_parameters():
        if "alpha" in name:
            torch.nn.init.constant_(parameter, 0.25)
    return model


@pytest.mark.parametrize("objective", ["pretraining", "contrast"])
def test_a_coarse_checkpoint_is_what_training_begins_with(objective: str, tmp_path: Path) -> None:
    """Towers, and fusions where there are some; the head is new, and images may have another size."""
    model = coarse(objective)
    model.save_pretrained(tmp_path)
    options = FIBERFineOptions(pretrained=str(tmp_path), image_size=40, head_width=16, head_blocks=1)
    fine = FIBERFineModel.build(options, TOKENIZER)
    own, theirs = fine.towers.state_dict(), model.towers.state_dict()
    assert theirs.keys() <= own.keys()
    assert all(torch.equal(own[name], value) for name, value in theirs.items())
    gates = [value for name, value in own.items() if "alpha" in name]
    assert all((gate == (0.25 if objective == "pretraining" else 0)).all() for gate in gates)
    assert (fine.config.image_size, fine.config.longer_size, fine.config.head_channels) == (40, 67, 16)
    assert not {"objective", "queued_pairs", "hidden_size"} & fine.config.to_dict().keys()
    assert fine.head.bias0.sigmoid().item() == pytest.approx(0.01)
    assert (fine.head.log_scale.item(), make().head.log_scale.abs().item() < 0.5) == (-2, True)
    assert fine.image_size(FIBERFineOptions()) == 40
    fine.save_pretrained(tmp_path / "fine")
    again = load(FIBERFineModel, str(tmp_path / "fine"))
    assert all(torch.equal(value, fine.state_dict()[name]) for name, value in again.state_dict().items())
    larger = FIBERFineModel.build(FIBERFineOptions(pretrained=str(tmp_path / "fine"), image_size=48), TOKENIZER)
    assert (larger.config.image_size, larger.config.longer_size) == (48, 80)
    with pytest.raises(ValueError, match="--head-width 16 has no effect beside --pretrained"):
        FIBERFineModel.build(FIBERFineOptions(pretrained=str(tmp_path / "fine"), head_width=16), TOKENIZER)
    with pytest.raises(ValueError, match="--width 64 has no effect beside --pretrained"):
        FIBERFineModel.build(FIBERFineOptions(pretrained=str(tmp_path), width=64), TOKENIZER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_fused_layers": 4}, "num_fused_layers: expected 1 to 3"),
        ({"head_blocks": 0}, "head_blocks: expected a positive integer, got 0"),
        ({"longer_size": 31}, "longer_size: expected at least image_size 32, got 31"),
        ({"anchor_scale": 0.0}, "anchor_scale: expected a positive number"),
    ],
)
def test_configs_that_make_no_model(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_flags_that_make_no_model() -> None:
    with pytest.raises(ValueError, match="--caption-share: expected a probability, got 2"):
        FIBERFineOptions(caption_share=2)
    with pytest.raises(ValueError, match="training_data to be called first"):
        make().collator(FIBERFineOptions(), TOKENIZER, train=True)
    with pytest.raises(ValueError, match="boxes and box_words: expected those of a training batch"):
        make()(pixels((32, 32))[0][None], **ids("cat"))
    assert "queued_pairs" in FIBEROptions.new_model


def picture(places: dict[str, tuple[int, int]]) -> tuple[Image.Image, dict[str, Any]]:
    """Squares of 14 pixels on grey."""
    canvas = np.full((40, 40, 3), 128, dtype=np.uint8)
    objects = []
    for name, (x, y) in places.items():
        canvas[y : y + 14, x : x + 14] = COLOURS[name]
        objects.append({"box": [x, y, x + 14, y + 14], "name": name})
    first = next(iter(places))
    record = {
        "objects": objects,
        "caption": f"a {first} thing",
        "phrases": [{"span": [0, 2 + len(first)], "objects": [0]}],
    }
    return Image.fromarray(canvas), record


def test_four_images_are_learnt_and_their_boxes_found_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line: trained, scored on both tasks, and asked for names of which two are there."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    scenes = [
        {"red": (2, 3), "green": (22, 20)}, {"blue": (20, 4), "yellow": (4, 22)}, {"green": (3, 12)},
        {"yellow": (23, 14), "red": (4, 22)},
    ]  # fmt: skip
    for number, places in enumerate(scenes):
        image, record = picture(places)
        image.save(data / f"{number}.png")
        (data / f"{number}.json").write_text(json.dumps(record))
    common = [f"--data={data}", "--batch-size=4", "--device=cpu", "--num-workers=0"]
    assert main([
        "train", "fiber_fine", f"--data={data}", f"--output-dir={out}", "--image-size=40", "--swin-width=32",
        "--swin-depths=1,2", "--width=64", "--layers=2", "--fused-layers=1", "--head-width=32", "--head-blocks=1",
        "--anchor-scale=2", "--max-length=12", "--per-device-train-batch-size=4", "--max-steps=80",
        "--caption-share=0.2", "--learning-rate=2e-3", "--warmup-steps=10", "--adam-beta2=0.98", "--report-to=none",
        "--config-overrides", "lr_factor=1",
        "--use-cpu", "--dataloader-num-workers=0", "--disable-tqdm=true",
    ]) == 0  # fmt: skip
    rows = {}
    for task in ("detection", "grounding"):
        scores = tmp_path / f"{task}.json"
        assert main(["eval", f"--checkpoint={out}", f"--task={task}", f"--output={scores}", *common]) == 0
        rows[task] = json.loads(scores.read_text())["scores"]
    assert rows["detection"]["model"]["mAP50"] > 0.9
    assert rows["detection"]["chance"]["mAP50"] < 0.6
    assert rows["detection"]["blind"]["mAP50"] < 0.3
    assert rows["grounding"]["model"]["accuracy"] == 1
    assert rows["grounding"]["blind"]["accuracy"] < 1
    assert rows["grounding"]["chance"]["accuracy"] < 0.5
    seen = tmp_path / "seen.json"
    assert main([
        "predict", str(out), str(data / "0.png"), "--text", *COLOURS, f"--output={seen}", "--device=cpu",
        f"--report={tmp_path / 'seen.png'}",
    ]) == 0  # fmt: skip
    (prediction,) = json.loads(seen.read_text())[0]["predictions"]
    assert prediction["scores"] == sorted(prediction["scores"], reverse=True)
    best = dict(zip(prediction["lines"][1::-1], prediction["boxes"][1::-1], strict=True))
    assert best.keys() == {"red", "green"}
    assert best["red"] == pytest.approx([2, 3, 16, 17], abs=2)
    assert best["green"] == pytest.approx([22, 20, 36, 34], abs=2)
    assert Image.open(tmp_path / "seen.png").width > 100
    capsys.readouterr()
    assert main(["predict", str(out), str(data / "0.png"), "--device=cpu"]) == 2
    assert "--text is needed: names for FIBERFineModel to look for" in capsys.readouterr().err


def test_gates_learn_faster_and_every_weight_has_a_gradient() -> None:
    model = make().train()
    collate = GroundingCollator(Sizes(32, 53), TOKENIZER, 32, ["cat", "dog", "tree"], caption_share=0.5)
    out = model(**collate([sample(0), sample(1), sample(2)]))
    torch.testing.assert_close(out.loss, out.words + out.boxes + out.centerness)
    out.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    groups = model.parameter_groups(1e-3, 0.1)
    by_id = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = by_id[id(parameter)]
        assert group["lr"] == (5e-3 if "t2i" in name or "i2t" in name else 1e-3)
        assert group["weight_decay"] == (0.1 if parameter.dim() >= 2 else 0)
    assert {"loss_words", "loss_boxes", "loss_centerness", "alpha_t2i", "alpha_i2t"} == model.metrics().keys()
    copy.deepcopy(model)
