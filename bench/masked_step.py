"""A pre-training step of VisualBERT and LXMERT against transformers' own class, on the same weights and the same batch.

    OMP_NUM_THREADS=1 python bench/masked_step.py --rounds 5

Base size, batch 16, float32: forward, backward and AdamW, a step of each after the other. Texts have 32 tokens
(LXMERT 20), 15 % of them predicted, and images 36 regions of 2048. Processor seconds do not count what else runs on the
machine; with --device cuda they are seconds by the clock. Memory is what a step holds at its highest beyond the
weights, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from vlmfast.bench.memory import peak_of
from vlmfast.bench.timing import compared, interleaved
from vlmfast.models.masked.lxmert import LXMERTConfig, LXMERTModel
from vlmfast.models.masked.visual_bert import VisualBERTConfig, VisualBERTModel

ROWS, REGIONS, DIM, VOCAB = 16, 36, 2048, 30522
LENGTHS = {"visual_bert": 32, "lxmert": 20}
PROVIDERS = ("vlmfast", "transformers")
TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 200}


def batch(name: str, vocab: int) -> dict[str, Tensor]:
    """As vlmfast's classes take it."""
    generator = torch.Generator().manual_seed(0)
    length = LENGTHS[name]
    ids = torch.randint(5, vocab, (ROWS, length), generator=generator)
    labels = torch.where(torch.rand(ROWS, length, generator=generator) < 0.15, ids, -100)
    found = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "region_features": torch.rand(ROWS, REGIONS, DIM, generator=generator),
        "region_boxes": torch.rand(ROWS, REGIONS, 4, generator=generator),
        "region_mask": torch.ones(ROWS, REGIONS, dtype=torch.int64),
        "labels": labels,
        "matched": torch.arange(ROWS) % 2,
    }
    if name == "lxmert":
        masked = torch.rand(ROWS, REGIONS, generator=generator) < 0.15
        found |= {
            "masked_regions": masked,
            "region_source": torch.where(masked, -1, torch.arange(ROWS * REGIONS).view(ROWS, REGIONS)),
            "object_labels": torch.randint(0, 1600, (ROWS, REGIONS), generator=generator),
            "object_weights": torch.rand(ROWS, REGIONS, generator=generator),
            "attribute_labels": torch.randint(0, 400, (ROWS, REGIONS), generator=generator),
            "attribute_weights": torch.rand(ROWS, REGIONS, generator=generator),
        }
    return found


def theirs(name: str, given: dict[str, Tensor]) -> dict[str, Any]:
    """The same batch as transformers' classes take it."""
    words = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    if name == "visual_bert":
        nothing = torch.full((ROWS, REGIONS), -100)
        return {
            **words,
            "visual_embeds": given["region_features"],
            "visual_attention_mask": given["region_mask"],
            "visual_token_type_ids": torch.zeros(ROWS, REGIONS, dtype=torch.int64),
            "labels": torch.cat([given["labels"], nothing], dim=1),
            "sentence_image_labels": given["matched"],
        }
    masked = given["masked_regions"]
    return {
        **words,
        "visual_feats": given["region_features"] * ~masked[..., None],
        "visual_pos": given["region_boxes"],
        "visual_attention_mask": given["region_mask"],
        "labels": given["labels"],
        "matched_label": given["matched"],
        "obj_labels": {
            "obj": (given["object_labels"], given["object_weights"]),
            "attr": (given["attribute_labels"], given["attribute_weights"]),
            "feat": (given["region_features"], masked.float()),
        },
    }


def made(name: str, provider: str, tiny: bool) -> nn.Module:
    """The model, its weights those that seed 0 draws, without dropout, so that losses can be compared."""
    sizes: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **(TINY if tiny else {})}
    torch.manual_seed(0)
    if name == "visual_bert":
        sizes |= {"visual_embedding_dim": DIM, "pad_token_id": 0}
        sizes |= {"num_hidden_layers": 2} if tiny else {}
        ours, other = VisualBERTModel, transformers.VisualBertForPreTraining
        configs = VisualBERTConfig(**sizes), transformers.VisualBertConfig(**sizes)
    else:
        sizes |= {"task_qa": False} | ({"l_layers": 1, "r_layers": 1, "x_layers": 1} if tiny else {})
        ours, other = LXMERTModel, transformers.LxmertForPreTraining
        configs = LXMERTConfig(**sizes), transformers.LxmertConfig(**sizes)
    original = other(configs[1])
    if provider == "transformers":
        return original.train()
    model = ours(configs[0])
    model.load_state_dict(original.state_dict(), strict=False)
    return model.train()


def moved(found: Any, device: str) -> Any:
    """Tensors in dicts and tuples, to the device."""
    if isinstance(found, dict):
        return {key: moved(value, device) for key, value in found.items()}
    return tuple(moved(value, device) for value in found) if isinstance(found, tuple) else found.to(device)


def step_of(name: str, provider: str, tiny: bool, device: str = "cpu") -> Callable[[], float]:
    """One step, which returns the loss."""
    model = made(name, provider, tiny).to(device)
    given = batch(name, TINY["vocab_size"] if tiny else VOCAB)
    if provider == "transformers":
        given = theirs(name, given)
    given = moved(given, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())  # on a GPU, once all is done

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(LENGTHS), choices=LENGTHS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights, to try the script")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--no-memory", action="store_true", help="measure time alone")
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "PROVIDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(peak_of(step_of(*args.memory, args.tiny, args.device), args.device))
        return
    clock = time.perf_counter if args.device == "cuda" else time.process_time
    figures = {}
    for name in args.models:
        steps = {provider: step_of(name, provider, args.tiny, args.device) for provider in PROVIDERS}
        losses = {provider: step() for provider, step in steps.items()}
        if abs(losses["vlmfast"] - losses["transformers"]) > 1e-3 * losses["transformers"]:
            raise SystemExit(f"{name}: the losses differ: {losses}")
        found = compared(interleaved(steps, args.rounds, clock), *PROVIDERS)
        memory = {}
        for provider in () if args.no_memory else PROVIDERS:
            command = [sys.executable, __file__, "--memory", name, provider, "--device", args.device]
            command += ["--tiny"] if args.tiny else []
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            memory[provider] = float(done.stdout.split()[-1])
        said = found.pop("said")
        figures[name] = {"loss": losses, **found, "megabytes": memory}
        held = f"; {memory['vlmfast']:.0f} MB against {memory['transformers']:.0f} MB" if memory else ""
        print(f"{name}: {said}{held}", flush=True)
    if args.output:
        args.output.write_text(
            json.dumps({"threads": torch.get_num_threads(), "device": args.device, "models": figures}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
