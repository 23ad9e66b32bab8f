"""A step of a captioner over a frozen language model: losses without logits and Flamingo's blocks against their peers.

    OMP_NUM_THREADS=1 python bench/prefix_step.py --rounds 5

The language model has SmolLM2-135M's sizes and random weights; image features are given, as from a cache. A step is
forward, backward and AdamW of what is trained, a step of each provider after the other:

- clipcap: vlmfast's loss against `F.cross_entropy` of all logits, the rest the same.
- flamingo: the same against that loss with open_flamingo's resampler and blocks, of the same weights.
- decode: seconds of a token that follows a prompt with 8 images, whose keys and values vlmfast keeps in each block, and
  open_flamingo computes again.

Processor seconds do not count what else runs on the machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from vlmfast.bench.timing import compared, interleaved
from vlmfast.models import prefix_model
from vlmfast.models.prefix import flamingo
from vlmfast.models.prefix.clipcap import ClipCapConfig, ClipCapModel
from vlmfast.models.prefix.flamingo import FlamingoModel
from vlmfast.models.prefix.flamingo_config import FlamingoConfig

ROWS, LENGTH, PATCHES, VISION = 8, 32, 16, 192
LAYERS, EVERY, MEDIA = 30, 4, 8
WAYS = ("clipcap", "flamingo", "decode")
PROVIDERS = ("vlmfast", "eager")


def language(tiny: bool) -> transformers.LlamaConfig:
    """SmolLM2-135M's."""
    sizes = (
        {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": EVERY}
        if tiny
        else {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": LAYERS}
    )
    heads = {"num_attention_heads": 2 if tiny else 9, "num_key_value_heads": 1 if tiny else 3}
    return transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=2048, tie_word_embeddings=True)


def vision() -> transformers.ViTConfig:
    sizes = {"hidden_size": VISION, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": VISION}
    return transformers.ViTConfig(**sizes, image_size=32, patch_size=8)


def made(way: str, tiny: bool) -> Any:
    """The model with a frozen language model, in training mode, its gates open."""
    torch.manual_seed(0)
    text = language(tiny)
    shared: dict[str, Any] = {"vision_config": vision(), "text_config": text, "filler_token_id": 0, "stop_token_id": 1}
    if way == "clipcap":
        model: Any = ClipCapModel(ClipCapConfig(**shared))
    else:
        more = {"cross_attention_every": EVERY, "media_token_id": text.vocab_size + 1, "prefix_length": 64}
        model = FlamingoModel(FlamingoConfig(**{**shared, **more, "stop_token_id": text.vocab_size}))
        with torch.no_grad():
            for block in model.mapper.blocks.values():
                block.attn_gate.fill_(0.5)
                block.ff_gate.fill_(0.5)
    model.requires_grad_(False).eval()
    model.mapper.requires_grad_(True).train()
    return model


class TheirBlock(nn.Module):
    """open_flamingo's block in the place of ours, called as ours is.

    Args:
        ours: whose weights it has.
        state: `locations` (B, L) of the prompt's media, and `media`.
    """

    def __init__(self, ours: Any, state: dict[str, Tensor]) -> None:
        super().__init__()
        from open_flamingo.src.helpers import GatedCrossAttentionBlock

        inner, visual = ours.attn.to_kv.weight.shape
        heads = ours.attn.heads
        dim = ours.attn.to_out.weight.shape[0]
        block = GatedCrossAttentionBlock(dim=dim, dim_visual=visual, dim_head=inner // 2 // heads, heads=heads)
        block.load_state_dict(ours.state_dict())
        self.block, self.state = block, state

    def forward(self, x: Tensor, media: Tensor | None, cache: Any = None, interval: Any = None) -> Tensor:
        if media is not None:
            self.state["media"] = media
        locations = self.state["locations"]
        found: Tensor = self.block(
            x, self.state["media"], media_locations=locations, use_cached_media=x.shape[1] != locations.shape[1]
        )
        return found


class TheirResampler(nn.Module):
    def __init__(self, ours: Any, config: FlamingoConfig) -> None:
        super().__init__()
        from open_flamingo.src.helpers import PerceiverResampler

        self.resampler = PerceiverResampler(
            dim=ours.latents.shape[1], depth=config.resampler_layers, num_latents=config.prefix_length,
            heads=config.cross_attention_heads, dim_head=config.cross_attention_head_size,
        )  # fmt: skip
        self.resampler.load_state_dict(ours.state_dict())
        self.latents = self.resampler.latents  # FlamingoModel reads its dtype

    def forward(self, states: Tensor) -> Tensor:
        found: Tensor = self.resampler(states[:, None, None])
        return found


def exchange(model: Any, state: dict[str, Tensor]) -> None:
    """open_flamingo's parts for a model's own."""
    from vlmfast.models.prefix.flamingo_parts import BeforeLayer, decoder_layers

    parts = model.mapper
    parts.resampler = TheirResampler(parts.resampler, model.config)
    for name in list(parts.blocks):
        parts.blocks[name] = TheirBlock(parts.blocks[name], state)
        hooks = decoder_layers(model.language_model)[int(name)]._forward_pre_hooks
        (hook,) = (hook for hook in hooks.values() if isinstance(hook, BeforeLayer))
        hook.block = parts.blocks[name]
    parts.requires_grad_(True)


def eager_loss(hidden: Tensor, head: Any, labels: Tensor, *, num_items_in_batch: Any = None) -> Tensor:
    """As transformers computes it: all logits in float32."""
    logits = head(hidden).float()[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def eager_losses(hidden: Tensor, head: Any, end: Tensor, end_id: int, labels: Tensor) -> Tensor:
    """As open_flamingo: the vocabulary's embedding with the new token's row, all logits."""
    logits = torch.cat([head(hidden), (hidden @ end.to(hidden.dtype))[:, None]], dim=1).float()
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)


@contextmanager
def eager() -> Iterator[None]:
    with (
        patch.object(prefix_model, "language_model_loss", eager_loss),
        patch.object(flamingo, "losses_with_end", eager_losses),
    ):
        yield


def batch(way: str, model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.text_config.vocab_size
    ids = torch.randint(2, vocab, (ROWS, LENGTH), generator=generator)
    pixels = {"image_features": torch.randn(ROWS, PATCHES + 1, VISION, generator=generator)}
    if way == "clipcap":
        places = torch.full((ROWS, model.config.prefix_length), -1)
        pixels = {"image_features": pixels["image_features"][:, 0]}
    else:
        places = torch.full((ROWS, 1), model.config.media_token_id)
    labels = torch.cat([torch.full_like(places, -100), ids], dim=1)
    return {"input_ids": torch.cat([places, ids], dim=1), "labels": labels, **pixels}


def step_of(way: str, provider: str, tiny: bool, autocast: bool) -> Callable[[], float]:
    """One step, which returns the loss."""
    model = made(way, tiny)
    given = batch(way, model)
    if way == "flamingo" and provider == "eager":
        exchange(model, {"locations": given["input_ids"] == model.config.media_token_id})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if provider == "eager":
                with eager():
                    loss = model(**given).loss
            else:
                loss = model(**given).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def decoding_of(provider: str, tiny: bool, autocast: bool, count: int) -> Callable[[], list[int]]:
    """Greedy decoding of `count` tokens behind 8 images, which returns the ids."""
    model = made("decode", tiny).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, model.config.text_config.vocab_size, (1, MEDIA * 4), generator=generator)
    ids[:, ::4] = model.config.media_token_id
    features = torch.randn(MEDIA, PATCHES + 1, VISION, generator=generator)
    if provider == "eager":
        exchange(model, {"locations": ids == model.config.media_token_id})

    def decode() -> list[int]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            settings = {"max_new_tokens": count, "min_new_tokens": count}
            return list(model.generate(ids, image_features=features, **settings)[0].tolist())

    return decode


def figures(way: str, tiny: bool, autocast: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds by provider; both must say the same.

    Raises:
        SystemExit: the losses or the tokens differ.
    """
    if way != "decode":
        steps = {provider: step_of(way, provider, tiny, autocast) for provider in PROVIDERS}
        losses = {provider: step() for provider, step in steps.items()}
        if abs(losses["vlmfast"] - losses["eager"]) > (2e-2 if autocast else 1e-3) * losses["eager"]:
            raise SystemExit(f"{way}: the losses differ: {losses}")
        return interleaved(steps, rounds, time.process_time)
    few, many = 2, 4 if tiny else 18
    told = {}
    spent: dict[str, dict[int, list[float]]] = {provider: {} for provider in PROVIDERS}
    for count in (few, many):
        runs = {provider: decoding_of(provider, tiny, autocast, count) for provider in PROVIDERS}
        told = {provider: run() for provider, run in runs.items()}
        for provider, values in interleaved(runs, rounds, time.process_time).items():
            spent[provider][count] = values
    if not autocast and told["vlmfast"] != told["eager"]:
        raise SystemExit(f"decode: the tokens differ: {told}")
    return {
        provider: [(b - a) / (many - few) for a, b in zip(by_count[few], by_count[many], strict=True)]
        for provider, by_count in spent.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights, to try the script")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for way in args.what:
        for dtype in args.dtypes:
            figure = compared(figures(way, args.tiny, dtype == "bfloat16", args.rounds), *PROVIDERS)
            print(f"{way}, {dtype}: {figure.pop('said')} of the processor", flush=True)
            found[f"{way} {dtype}"] = figure
    if args.output:
        args.output.write_text(json.dumps({"threads": torch.get_num_threads(), "figures": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
