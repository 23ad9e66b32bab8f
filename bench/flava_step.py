"""FLAVA's step on pairs, forward and backward, and that of transformers' FlavaForPreTraining, same weights and batch.

The optimizer's step is the same for both and is left out. Rounds are interleaved. The time is that of the processor
(time.process_time) unless --wall, so that other programs of a shared machine count less; the least of all rounds is
what is compared. Memory is what is kept for backward: the sum of the storages that autograd saves, parameters excepted.

    python bench/flava_step.py                    base size, 224 pixels, 77 tokens, batch 4
    python bench/flava_step.py --tiny             seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor
from transformers import FlavaConfig, FlavaForPreTraining

from vlmfast.models.masked.flava import FLAVAModel


def config(tiny: bool) -> FlavaConfig:
    if not tiny:
        return FlavaConfig()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return FlavaConfig(
        image_config={**sizes, "image_size": 32, "patch_size": 8, "vocab_size": 64},
        text_config={**sizes, "vocab_size": 100, "max_position_embeddings": 77},
        multimodal_config=sizes,
        image_codebook_config={"hidden_size": 8, "vocab_size": 64},
        hidden_size=32,
        projection_dim=32,
    )


def batch(config: FlavaConfig, rows: int) -> dict[str, Tensor]:
    """Random; padded texts, 38 % of patches and 15 % of words hidden, one pair in ten (the last at least) no match."""
    torch.manual_seed(0)
    image, words = config.image_config, config.text_config.vocab_size
    side = image.image_size // image.patch_size
    mask = (torch.arange(77) < torch.randint(8, 78, (rows, 1))).long()
    ids = torch.randint(1000 % words, words, (rows, 77)) * mask
    labels = torch.where((torch.rand(rows, 77) < 0.15) & (mask == 1), ids, -100)
    labels[:, 1] = ids[:, 1]
    hidden = torch.rand(rows, side * side).argsort(1).argsort(1) < round(side * side * 75 / 196)
    matches = torch.ones(rows, dtype=torch.int64)
    matches[-max(1, rows // 10) :] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "input_ids_masked": torch.where(labels == -100, ids, 5),
        "mlm_labels": labels,
        "pixel_values": torch.randn(rows, 3, image.image_size, image.image_size),
        "codebook_pixel_values": torch.rand(rows, 3, 8 * side, 8 * side),
        "bool_masked_pos": hidden,
        "itm_labels": matches,
    }


def kept(model: Any, inputs: dict[str, Tensor]) -> int:
    """Bytes that a forward pass saves for backward beside the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        loss = model(**inputs).loss
    total = sum(size for place, size in found.items() if place not in own)
    del loss
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--wall", action="store_true", help="Wall-clock time, on a machine with nothing else to do.")
    args = parser.parse_args()
    clock = time.perf_counter if args.wall else time.process_time
    settings = config(args.tiny)
    models: dict[str, Any] = {"transformers": FlavaForPreTraining(settings).train()}
    models["vlmfast"] = FLAVAModel(settings).train()
    # One copy of the weights, gradients of each model's own.
    models["vlmfast"].load_state_dict(models["transformers"].state_dict(), assign=True)
    models["vlmfast"].train()
    inputs = batch(settings, args.batch)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    losses: dict[str, float] = {}
    for number in range(args.rounds + 1):
        for name, model in models.items():
            start = clock()
            loss = model(**{key: value.clone() for key, value in inputs.items()}).loss
            loss.backward()
            if number:  # the first is not counted
                seconds[name].append(clock() - start)
            losses[name] = loss.item()
            model.zero_grad(set_to_none=True)
            del loss
    memory = {name: kept(model, inputs) / 1e6 for name, model in models.items()}
    kind = "wall clock" if args.wall else "processor"
    print(f"batch {args.batch}, {torch.get_num_threads()} threads, {kind} seconds of a step, float32")
    for name in models:
        times = ", ".join(f"{value:.2f}" for value in seconds[name])
        print(f"{name:>13}: least {min(seconds[name]):.2f} of {times}; {memory[name]:.0f} MB; loss {losses[name]:.4f}")
    ratio = min(seconds["transformers"]) / min(seconds["vlmfast"])
    print(f"ratio of time {ratio:.2f}, of memory {memory['transformers'] / memory['vlmfast']:.2f}")


if __name__ == "__main__":
    main()
