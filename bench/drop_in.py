"""A training step, forward and backward, of transformers' models as they are and after vlmfast.patch.

    OMP_NUM_THREADS=1 python bench/drop_in.py --rounds 3
    python bench/drop_in.py --tiny                          # seconds, to see that it runs

One model of each kind, of base size, random weights, padded texts, float32. Each is patched and unpatched in turn,
so both steps have the same weights and the same batch. The time is that of the processor (time.process_time), so that
other programs of a shared machine count less; the ratio is that of the sums over the rounds. Memory is what a forward
saves for backward, parameters excepted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import vlmfast

Made = tuple[nn.Module, dict[str, Any]]
TINY = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}


def sizes(tiny: bool, **given: Any) -> dict[str, Any]:
    return {**given, **TINY} if tiny else given


def words(vocab: int, rows: int = 8, length: int = 32, share: float = 0.15) -> dict[str, Tensor]:
    """Padded texts, of which a share of the words has a label; 1 for all that are no padding."""
    ids = torch.randint(5, vocab, (rows, length))
    mask = (torch.arange(length) < torch.randint(length // 2, length + 1, (rows, 1))).long()
    labels = torch.where((torch.rand(rows, length) < share) & (mask == 1), ids, -100)
    labels[:, 1] = ids[:, 1]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def bert(tiny: bool) -> Made:
    config = transformers.BertConfig(**sizes(tiny, **NO_DROPOUT))
    return transformers.BertForMaskedLM(config), words(config.vocab_size)


def visual_bert(tiny: bool) -> Made:
    config = transformers.VisualBertConfig(**sizes(tiny, **NO_DROPOUT, visual_embedding_dim=2048))
    given = words(config.vocab_size)
    given["labels"] = nn.functional.pad(given["labels"], (0, 36), value=-100)
    regions = {
        "visual_embeds": torch.rand(8, 36, 2048),
        "visual_attention_mask": torch.ones(8, 36, dtype=torch.long),
        "visual_token_type_ids": torch.ones(8, 36, dtype=torch.long),
        "sentence_image_labels": torch.arange(8) % 2,
    }
    return transformers.VisualBertForPreTraining(config), {**given, **regions}


def lxmert(tiny: bool) -> Made:
    """Without the terms of regions, of which the patch changes nothing."""
    layers = {"l_layers": 1, "x_layers": 1, "r_layers": 1} if tiny else {}
    config = transformers.LxmertConfig(
        **{name: value for name, value in sizes(tiny, **NO_DROPOUT).items() if name != "num_hidden_layers"}, **layers
    )
    regions = {
        "visual_feats": torch.rand(8, 36, 2048),
        "visual_pos": torch.rand(8, 36, 4),
        "matched_label": torch.arange(8) % 2,
    }
    return transformers.LxmertForPreTraining(config), {**words(config.vocab_size), **regions}


def bridgetower(tiny: bool) -> Made:
    layers = 2 if tiny else 12
    text = transformers.BridgeTowerTextConfig(num_hidden_layers=layers, **NO_DROPOUT)
    vision = transformers.BridgeTowerVisionConfig(num_hidden_layers=layers, image_size=32 if tiny else 224)
    config = transformers.BridgeTowerConfig(
        text_config=text, vision_config=vision, num_hidden_layers=2 if tiny else 6, **NO_DROPOUT
    )
    given = words(text.vocab_size, rows=2)
    images = torch.randn(2, 3, vision.image_size, vision.image_size)
    return transformers.BridgeTowerForMaskedLM(config), {**given, "pixel_values": images}


def gpt2(tiny: bool) -> Made:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**dropout, **({"n_layer": 1, "n_embd": 64, "n_head": 4} if tiny else {}))
    return transformers.GPT2LMHeadModel(config), words(config.vocab_size, share=1)


def clip(tiny: bool) -> Made:
    text, vision = sizes(tiny), sizes(tiny, **SIZE, patch_size=32, image_size=224)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision)
    ids = torch.randint(1, 1000, (8, 32))
    ids[:, -1] = config.text_config.eos_token_id
    return transformers.CLIPModel(config), {
        "input_ids": ids,
        "pixel_values": torch.randn(8, 3, 224, 224),
        "return_loss": True,
    }


def idefics(tiny: bool) -> Made:
    """4 layers, 8 images a sample, of which each token sees the last before it."""
    vision = {"embed_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.IdeficsConfig(
        **{**sizes(tiny, **SIZE), "num_hidden_layers": 4}, vocab_size=4000, cross_layer_interval=1,
        alpha_initializer="ones", vision_config={**vision, "image_size": 112, "patch_size": 14},
    )  # fmt: skip
    given = words(4000, rows=2, length=256, share=1)
    place = torch.arange(256) // 32
    seen = (place[:, None] == torch.arange(8)).long().expand(2, -1, -1)
    images = {"pixel_values": torch.randn(2, 8, 3, 112, 112), "image_attention_mask": seen}
    return transformers.IdeficsForVisionText2Text(config), {**given, **images}


def mllama(tiny: bool) -> Made:
    """4 layers, two of them of cross-attention, 4 images a sample of one tile each."""
    size = 64 if tiny else 768
    vision = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_global_layers": 1,
        "attention_heads": 4, "image_size": 112, "patch_size": 14, "vision_output_dim": 128, "max_num_tiles": 1,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    text = {
        **sizes(tiny, **SIZE), "hidden_size": size, "num_key_value_heads": 4, "cross_attention_layers": [1, 3],
        "num_hidden_layers": 4, "vocab_size": 4000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=4000)
    given = words(4000, rows=2, length=256, share=1)
    place = torch.arange(256) // 64
    images = {
        "pixel_values": torch.randn(2, 4, 1, 3, 112, 112),
        "aspect_ratio_ids": torch.ones(2, 4, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 4, 1, dtype=torch.long),
        "cross_attention_mask": (place[:, None] == torch.arange(4)).long()[None, ..., None].expand(2, -1, -1, 1),
    }
    return transformers.MllamaForConditionalGeneration(config), {**given, **images}


ROWS: dict[str, Callable[[bool], Made]] = {
    "BertForMaskedLM": bert,
    "VisualBertForPreTraining": visual_bert,
    "LxmertForPreTraining": lxmert,
    "BridgeTowerForMaskedLM": bridgetower,
    "GPT2LMHeadModel": gpt2,
    "CLIPModel": clip,
    "IdeficsForVisionText2Text": idefics,
    "MllamaForConditionalGeneration": mllama,
}


def kept(model: nn.Module, inputs: dict[str, Any]) -> float:
    """MB that a forward saves for backward."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, Tensor] = {}

    def see(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        loss = model(**inputs).loss
    total = sum(tensor.untyped_storage().nbytes() for place, tensor in found.items() if place not in own)
    del loss
    return total / 1e6


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[float, float]:
    """Processor seconds and the loss."""
    model.zero_grad(set_to_none=True)
    before = time.process_time()
    loss = model(**inputs).loss
    loss.backward()
    return time.process_time() - before, loss.item()


def measure(make: Callable[[bool], Made], tiny: bool, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = make(tiny)
    model.train()
    seconds: dict[str, list[float]] = {"original": [], "patched": []}
    losses, memory, replaced = {}, {}, 0
    for number in range(rounds + 1):
        for name in seconds:
            with vlmfast.patch(model) if name == "patched" else nullcontext() as report:
                replaced = len(report.replaced) if report else replaced
                taken, losses[name] = step(model, inputs)
                if number:  # the first is not counted
                    seconds[name].append(taken)
                else:
                    memory[name] = kept(model, inputs)
    if not replaced or abs(losses["patched"] - losses["original"]) > 1e-4 * abs(losses["original"]):
        raise SystemExit(f"{type(model).__name__}: {replaced} parts were replaced, and the losses are {losses}")
    ratio = sum(seconds["original"]) / sum(seconds["patched"])
    return {"seconds": seconds, "ratio": ratio, "megabytes": memory, "replaced": replaced, "loss": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="CLASS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a few layers of 64 numbers")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    figures = {}
    for name in args.models:
        figures[name] = found = measure(ROWS[name], args.tiny, args.rounds)
        mean = {side: sum(taken) / len(taken) for side, taken in found["seconds"].items()}
        memory = found["megabytes"]
        print(
            f"{name}: {mean['original']:.2f} s, patched {mean['patched']:.2f} s, {found['ratio']:.2f}x; "
            f"{memory['original']:.0f} MB, patched {memory['patched']:.0f} MB; {found['replaced']} replaced",
            flush=True,
        )
        if args.output:  # after each, so that a run that is stopped leaves what it measured
            run = {"threads": torch.get_num_threads(), "torch": torch.__version__, "models": figures}
            args.output.write_text(json.dumps(run, indent=2) + "\n")


if __name__ == "__main__":
    main()
