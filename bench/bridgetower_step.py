"""Time and memory of a pre-training step (MLM + ITM) of BridgeTower at base size, beside transformers' two models.

    python bench/bridgetower_step.py                    # each in a process of its own, one after the other

Both have the same weights, images and texts, and the same masked words and wrong images: the losses are compared.
transformers has a model for each loss, so its step is both models' forward and backward, with one trunk.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
import transformers

from vlmfast.models.masked.bridgetower import BridgeTowerForPreTraining
from vlmfast.models.masked.bridgetower_config import BridgeTowerConfig

SIDES = ("vlmfast", "transformers")


def settings(layers: int) -> tuple[transformers.BridgeTowerTextConfig, transformers.BridgeTowerVisionConfig]:
    """The base model's, without dropout, so that the losses can be compared."""
    text = transformers.BridgeTowerTextConfig(
        num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return text, transformers.BridgeTowerVisionConfig(num_hidden_layers=layers)


def batch(size: int, tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50_000, (size, tokens), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, tokens // 2 :], mask[0, tokens // 2 :] = 1, 0
    hidden = (torch.rand(ids.shape, generator=generator) < 0.15) & (mask == 1)
    return {
        "pixel_values": torch.randn(size, 3, 288, 288, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "mlm_input_ids": ids.masked_fill(hidden, 50_264),
        "mlm_labels": ids.masked_fill(~hidden, -100),
        "draws": torch.tensor([[0.1, 0.0], [0.9, 0.0]]).repeat(
            size // 2, 1
        ),  # every other image is that of pair 0 or 1
    }


class Both(torch.nn.Module):
    """transformers' models of either loss, over one trunk."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        text, vision = settings(layers)
        config = transformers.BridgeTowerConfig(text_config=text, vision_config=vision)
        self.mlm = transformers.BridgeTowerForMaskedLM(config)
        with torch.device("meta"):
            self.itm = transformers.BridgeTowerForImageAndTextRetrieval(config)
        self.itm.bridgetower = self.mlm.bridgetower
        self.itm.itm_score = type(self.itm.itm_score)(2 * config.hidden_size)

    def forward(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        common = {"attention_mask": given["attention_mask"]}
        mlm = self.mlm(
            given["mlm_input_ids"], pixel_values=given["pixel_values"], labels=given["mlm_labels"], **common
        ).loss
        size = len(given["input_ids"])
        wrong = given["draws"][:, 0] < 0.5
        other = torch.tensor([1, *[0] * (size - 1)])  # the first column that is not a row's own
        images = given["pixel_values"][torch.where(wrong, other, torch.arange(size))]
        itm = self.itm(given["input_ids"], pixel_values=images, labels=(~wrong).long(), **common).loss
        return mlm + itm


def measure(side: str, arguments: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    given = batch(arguments.batch, arguments.tokens)
    theirs = Both(arguments.layers)
    text, vision = settings(arguments.layers)
    if side == "vlmfast":
        model = BridgeTowerForPreTraining(BridgeTowerConfig(text, vision))
        weights = {**theirs.mlm.state_dict(), **theirs.itm.state_dict()}
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        del theirs, weights
        step = lambda: model.train()(**given).loss  # noqa: E731
    else:
        theirs.train()
        step = lambda: theirs(given)  # noqa: E731
    made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    walls, cpus, loss = [], [], torch.zeros(())
    for _ in range(1 + arguments.steps):
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        loss.backward()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "loss": loss.item(),
        "seconds": min(walls[1:]),
        "processor_seconds": min(cpus[1:]),
        "peak_MiB": peak / 1024,
        "peak_before_the_first_step_MiB": made / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES, help="measure one in this process")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4, help="pairs, an even number")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="of which the fastest counts; one more comes before")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments)))
        return
    found = {}
    for side in SIDES:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        found[side] = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
        print(side, found[side], flush=True)
    ours, theirs = (found[side] for side in SIDES)
    print({name: theirs[name] / ours[name] for name in ("loss", "seconds", "processor_seconds", "peak_MiB")})


if __name__ == "__main__":
    main()
