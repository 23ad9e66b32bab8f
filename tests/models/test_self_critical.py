"""Self-critical training: the reward is CIDEr-D, the gradient is the policy's, a run goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from captioners import BEGIN, make, pixels, regions
from command_line import tiny, write_pairs
from numerics import take_gradients
from prefix_models import STOP, VOCAB
from safetensors.torch import load_file
from torch import Tensor

from vlmfast.cli import main
from vlmfast.data import ImageTextDataset, load_tokenizer
from vlmfast.models.fusion.vc_gpt import VCGPTModel
from vlmfast.models.fusion.visualgpt import VisualGPTModel
from vlmfast.models.self_critical import BEAMS, CiderReward, SelfCritical

pytest.importorskip("pycocoevalcap")

TRUTH = [
    ["a red square.", "one red square on white"],
    ["two green circles", "green circles on white"],
    ["a red circle", "a small red circle on white"],
    ["nothing at all"],
]


def test_the_reward_is_cider_d_of_the_whole_set() -> None:
    from pycocoevalcap.cider.cider import Cider

    said = ["A red square", "green green circles", "a big red circle on white", "a"]
    plain = [[text.rstrip(".") for text in captions] for captions in TRUTH]
    _, expected = Cider().compute_score(dict(enumerate(plain)), {k: [s.lower()] for k, s in enumerate(said)})
    reward = CiderReward(TRUTH)
    torch.testing.assert_close(reward(said, TRUTH), torch.tensor(expected, dtype=torch.float32))
    assert reward(said, TRUTH)[0] > 1
    # The weights of words are the training set's, whatever is scored with it.
    torch.testing.assert_close(reward(said[2:3], TRUTH[2:3]), torch.tensor(expected[2:3], dtype=torch.float32))
    with pytest.raises(ValueError, match="documents: expected at least 2, got 1"):
        CiderReward(TRUTH[:1])


class Words:
    """A tokenizer whose words are the ids themselves."""

    def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
        return [" ".join(f"w{token}" for token in row if token not in (BEGIN, STOP)) for row in rows]


def reward(captions: Any, references: Any) -> Tensor:
    """How many words of a caption are below 20, of those before its end."""
    assert len(captions) == len(references)
    return torch.tensor([float(sum(int(word[1:]) < VOCAB // 2 for word in text.split())) for text in captions])


@pytest.mark.parametrize("cls", [VisualGPTModel, VCGPTModel])
def test_the_gradient_is_that_of_the_policy(cls: Any) -> None:
    """By the formula, from the logits of each caption alone; without dropout."""
    model = make(cls, region_dim=20)
    with torch.no_grad():
        model.decoder.heads()[-1].weight[STOP] *= 3  # so that captions end
    model.self_critical = SelfCritical(reward, Words(), length=7)
    images, begin = regions(), torch.full((3, 1), BEGIN)
    found = model.generate(
        begin, **images, num_beams=BEAMS, num_return_sequences=BEAMS, max_new_tokens=6, length_penalty=0.0
    ).view(3, BEAMS, -1)
    lengths, total = set(), torch.zeros(())
    for k in range(3):
        image = {name: value[k : k + 1] for name, value in images.items()}
        scores, sums = [], []
        for row in found[k].tolist():
            ids = row[: row.index(STOP) + 1] if STOP in row else row
            lengths.add(len(ids))
            states = model(torch.tensor([[BEGIN, *ids]]), **image).hidden_states
            logits = sum(state[0] @ head.weight.T for head, state in zip(model.decoder.heads(), states, strict=True))
            sums.append(logits[:-1].log_softmax(-1)[range(len(ids)), ids].sum())
            scores.append(reward(Words().batch_decode([ids], True), [None])[0])
        advantage = torch.stack(scores) - torch.stack(scores).mean()
        total = total - (advantage * torch.stack(sums)).mean() / 3 / 6
        # The beams are those that the search says: best first by the sum of log-probabilities.
        assert torch.stack(sums).argsort(descending=True).tolist() == list(range(BEAMS))
    assert len(lengths) > 1
    total.backward()
    expected = take_gradients(model)
    loss = model(begin, **images, references=[["x"]] * 3).loss
    loss.backward()
    ours = take_gradients(model)
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-5)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-2, atol=1e-4, msg=name)


def test_what_is_rewarded_is_said_more_and_more() -> None:
    model = make(VCGPTModel, fusion_layers=1).train()
    model.self_critical = SelfCritical(reward, Words(), length=6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    given = {"input_ids": torch.full((3, 1), BEGIN), "pixel_values": pixels(), "references": [["x"]] * 3}
    rewards = []
    for _ in range(25):
        optimizer.zero_grad()
        model(**given).loss.backward()
        optimizer.step()
        rewards.append(model.metrics()["reward"])
    assert model.training
    assert rewards[0] < 3 < 4.5 < rewards[-1]


def test_the_collator_gives_all_captions_and_the_dataset_their_weights(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path, 3)
    (folder / "000.txt").unlink()
    (folder / "000.json").write_text(json.dumps({"captions": ["red square", "a red thing"]}))
    dataset = ImageTextDataset(folder, transform=lambda image, generator: torch.zeros(16, 16, 3, dtype=torch.uint8))
    model = make(VCGPTModel)
    options = VCGPTModel.Options(self_critical=True, pretrained="x", max_length=9)
    tokenizer = load_tokenizer()
    batch = model.collator(options, tokenizer, train=True)([dataset[0, 0], dataset[0, 1]])
    assert batch["references"] == [["red square", "a red thing"], ["green square number 1"]]
    assert batch["input_ids"].tolist() == [[BEGIN], [BEGIN]]
    assert "labels" not in batch
    assert "references" not in model.collator(options, tokenizer, train=False)([dataset[0]])
    model.training_data(options, dataset, tokenizer)
    direct = CiderReward([["red square", "a red thing"], ["green square number 1"], ["blue square number 2"]])
    said, truth = ["a red square"], [["red square", "a red thing"]]
    assert model.self_critical._reward(said, truth).item() == direct(said, truth).item() > 0
    assert VOCAB  # of the tiny model, which is not asked to read these tokens


@pytest.mark.parametrize("name", ["visualgpt", "vc_gpt"])
def test_a_run_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    data = tmp_path / "pairs"
    data.mkdir()
    write_pairs(data, 8)
    sizes = [f"--{key.replace('_', '-')}={value}" for key, value in tiny(name).items()]

    def train(folder: Path, *options: str) -> int:
        return main([
            "train", name, f"--data={data}", f"--output-dir={folder}", "--per-device-train-batch-size=4", "--use-cpu",
            "--logging-steps=1", "--report-to=none", "--max-length=6", "--dataloader-num-workers=0",
            "--disable-tqdm=true", *options,
        ])  # fmt: skip

    start, whole, part = (tmp_path / place for place in ("start", "whole", "part"))
    assert train(start, *sizes, "--max-steps=60", "--save-strategy=no", "--learning-rate=0.01") == 0
    second = (f"--pretrained={start}", "--self-critical", "--max-steps=3", "--save-steps=1", "--save-total-limit=9")
    assert train(whole, *second) == 0
    part.mkdir()
    (whole / "checkpoint-1").rename(part / "checkpoint-1")
    shutil.copy(whole / "run.json", part)
    assert train(part, *second, "--resume") == 0
    history = [
        json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
        for folder in (whole, part)
    ]
    logged = [[(entry["loss"], entry["reward"]) for entry in each if "loss" in entry] for each in history]
    assert logged[0] == logged[1]
    assert any(reward > 0 for _, reward in logged[0])
    weights = load_file(whole / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in load_file(part / "model.safetensors").items())
    before = load_file(start / "model.safetensors")
    assert any(not torch.equal(value, before[key]) for key, value in weights.items())
