"""A whole training step, the model as its library has it and after `vlmfast.patch`: `vlmfast bench step`.

Data (uint8 pixels to the model's), towers, loss, backward and AdamW. A size is MODELxBATCH: `b32` and `b16` are
transformers' CLIP with a ViT-B/32 or B/16 at 224 pixels, `flamingo` is frozen language layers with flamingo-pytorch's
resampler and gated cross-attention between them; `tiny` and `tiny-flamingo` are the same, small. Weights are random.
Under autocast for 16-bit dtypes. The error is that of the first loss against the model's own in float64; GFLOP/s
count the operations of the model as its library has it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import vlmfast
from vlmfast.bench.harness import (
    DTYPES,
    Bench,
    NotHere,
    attempt,
    interleave,
    require,
)
from vlmfast.bench.memory import memory_of, peak_of
from vlmfast.bench.report import bars_plot, print_table
from vlmfast.bench.timing import gemm_rates, here, row_of

PROVIDERS = ("vlmfast", "original")
BASELINE = "original"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Case:
    """`model()` makes it on the CPU, `batch(size)` its data; `loss(model, batch)` takes the pixels as uint8."""

    model: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Loss


def normalised(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 (B, H, W, 3) to (B, 3, H, W), as an image processor does on the device."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    return ((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(dtype)


def clip(side: int, patch: int, vision: tuple[int, int], text: tuple[int, int], length: int) -> Case:
    """transformers' CLIPModel; vision and text give width and number of layers, heads are 64 wide."""

    def tower(width: int, layers: int) -> dict[str, int]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        return {**sizes, "num_attention_heads": width // 64}

    def model() -> nn.Module:
        library = require("transformers")
        config = library.CLIPConfig(
            vision_config={**tower(*vision), "image_size": side, "patch_size": patch},
            text_config={**tower(*text), "max_position_embeddings": length},
        )
        made: nn.Module = library.CLIPModel(config)
        return made

    def batch(size: int) -> Batch:
        # The last token is the end of the caption, whose place pools the text.
        ids = torch.randint(3, 49000, (size, length))
        ids[:, -1] = 49407
        pixels = torch.randint(0, 256, (size, side, side, 3)).byte()
        return {"pixels": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        dtype = next(model.parameters()).dtype
        texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found: Tensor = model(pixel_values=normalised(batch["pixels"], dtype), return_loss=True, **texts).loss
        return found

    return Case(model, batch, loss)


class Flamingo(nn.Module):
    """Text tokens (B, L) and uint8 images (B, T, H, W, 3) to logits; only what looks at the images is trained."""

    def __init__(self, dim: int, layers: int, patch: int, images: int, vocabulary: int = 8192) -> None:
        super().__init__()
        library = require("flamingo_pytorch.flamingo_pytorch")
        self.embed, self.head = nn.Embedding(vocabulary, dim), nn.Linear(dim, vocabulary, bias=False)
        self.stem = nn.Conv2d(3, dim, patch, patch)
        self.language = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, dim // 64, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        for part in (self.embed, self.head, self.stem, self.language):
            part.requires_grad_(False)
        self.resampler = library.PerceiverResampler(dim=dim, depth=2, num_latents=64, num_media_embeds=images)
        self.attend = nn.ModuleList(library.GatedCrossAttentionBlock(dim=dim) for _ in range(layers))
        for name, parameter in self.attend.named_parameters():
            if name.endswith("gate"):  # at 0, where training begins, the block is the identity
                nn.init.constant_(parameter, 0.5)

    def forward(self, pixels: Tensor, input_ids: Tensor, media_locations: Tensor) -> Tensor:
        images = normalised(pixels.flatten(0, 1), self.stem.weight.dtype)
        tokens = self.stem(images).flatten(2).transpose(1, 2).unflatten(0, pixels.shape[:2])
        media, x = self.resampler(tokens), self.embed(input_ids)
        future = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        for attend, layer in zip(self.attend, self.language, strict=True):
            x = layer(attend(x, media, media_locations=media_locations), src_mask=future, is_causal=True)
        logits: Tensor = self.head(x)
        return logits


def flamingo(dim: int, layers: int, side: int, patch: int, images: int, length: int) -> Case:
    def batch(size: int) -> Batch:
        places = torch.zeros(size, length, dtype=torch.bool)
        places[:, :: length // images] = True
        pixels = torch.randint(0, 256, (size, images, side, side, 3)).byte()
        return {"pixels": pixels, "input_ids": torch.randint(0, 8192, (size, length)), "media_locations": places}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**batch)[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, batch["input_ids"][:, 1:].flatten())

    return Case(lambda: Flamingo(dim, layers, patch, images), batch, loss)


CASES = {
    "b32": clip(224, 32, (768, 12), (512, 12), 77),
    "b16": clip(224, 16, (768, 12), (512, 12), 77),
    "flamingo": flamingo(512, 4, 224, 16, images=8, length=512),
    "tiny": clip(32, 8, (64, 1), (64, 1), 16),
    "tiny-flamingo": flamingo(64, 1, 32, 8, images=2, length=16),
}
SIZES = ("b32x32", "b16x8", "flamingox2")


def size(text: str) -> tuple[Case, int]:
    """MODELxBATCH."""
    name, _, number = text.rpartition("x")
    if name not in CASES or not number.isdigit() or int(number) < 1:
        raise ValueError(f"it is MODELxBATCH, MODEL one of {', '.join(CASES)}")
    return CASES[name], int(number)


def make(provider: str, text: str, device: str) -> tuple[nn.Module, Batch]:
    """The model, the same for every provider, and its batch, on the device.

    Raises:
        NotHere: the model's library is not installed.
    """
    case, number = size(text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batch = case.model().to(device).train(), case.batch(number)
    if provider == "vlmfast":
        vlmfast.patch(model)
    return model, {name: t.to(device) for name, t in batch.items()}


def loss_of(case: Case, model: nn.Module, batch: Batch, dtype: torch.dtype, device: str) -> Tensor:
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        return case.loss(model, batch)


def trainer(provider: str, text: str, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    """One training step at a time; returns the loss before it."""
    case, _ = size(text)
    model, batch = make(provider, text, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def once() -> Tensor:
        loss = loss_of(case, model, batch, dtype, device)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return once


def exact_and_gflop(text: str, device: str) -> tuple[float, float]:
    """The original's first loss in float64, and GFLOP of its forward and backward."""
    case, _ = size(text)
    model, batch = make(BASELINE, text, device)
    with torch.no_grad():
        exact = case.loss(copy.deepcopy(model).double(), batch).item()
    with FlopCounterMode(display=False) as counter:
        case.loss(model, batch).backward()
    return exact, counter.get_total_flops() / 1e9


def measure(providers: Sequence[str], text: str, dtype_name: str, rounds: int) -> list[dict[str, Any]]:
    device, dtype = here(), DTYPES[dtype_name]
    try:
        exact, gflop = exact_and_gflop(text, device)
    except (NotHere, torch.OutOfMemoryError) as reason:
        print(f"  {text}: no rows ({reason})", flush=True)
        return []
    steps: dict[str, Callable[[], Tensor]] = {}
    errors: dict[str, float] = {}

    def first(provider: str) -> tuple[Callable[[], Tensor], float]:
        """The step, and the error of the first loss."""
        step = trainer(provider, text, dtype, device)
        return step, abs(step().item() - exact)

    for provider in providers:
        if (made := attempt(provider, functools.partial(first, provider))) is not None:
            steps[provider], errors[provider] = made
    measured, gemm = interleave(steps, gemm_rates((1024, 1024, 1024), dtype, device), rounds, device)
    model, _, number = text.rpartition("x")
    steps.clear()
    group = [
        {
            "case": text, "provider": name, "dtype": dtype_name, "device": device, "size": {"batch": int(number)},
            "gflop": gflop, **row_of(times, gflop, gemm), "error": {"value": errors[name]},
            "peak_extra_mb": memory_of("step", name, text, dtype_name),
        }
        for name, times in measured.items()
    ]  # fmt: skip
    print_table(f"step, {model}", BASELINE, group)
    return group


def peak_memory(provider: str, text: str, dtype_name: str) -> float:
    """MB of a step beyond weights and data: activations, gradients and the optimizer's state."""
    device = here()
    return peak_of(trainer(provider, text, DTYPES[dtype_name], device), device)


def check(text: str) -> str:
    size(text)
    return text


BENCH = Bench("step", SIZES, PROVIDERS, check, measure, peak_memory, bars_plot)
