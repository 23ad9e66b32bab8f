"""FLAVA's image codebook: what it reads, where it comes from, and a small one made of the images at hand.

The codebook is transformers' FlavaImageCodebook, the encoder of DALL-E's discrete VAE, which gives a word of its
vocabulary for each patch of 8 x 8 pixels. The paper's has weights from OpenAI, which `load_codebook` reads. Without
them, `fit_codebook` makes one: the convolutions stay random, and the last one becomes a quantiser by k-means, since
with centres c_k the nearest to a feature f is argmax_k 2 <c_k, f> - |c_k|^2, a convolution of 1 x 1. Such a codebook
tells patches by colour and edges; it was never trained to rebuild an image, as a discrete VAE is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import FlavaImageCodebook
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vlmfast.models.checkpoints import check_weights, find, read_config, reading

SIDE = 8  # pixels of the side of what one word stands for
LAPLACE = 0.1  # DALL-E's logit-Laplace epsilon: pixels in [0, 1] become [0.1, 0.9]
SAMPLES, ROUNDS = 16384, 20  # features that k-means sees, and its iterations


def load_codebook(source: str) -> FlavaImageCodebook:
    """The codebook of a checkpoint of FlavaImageCodebook, its weights checked.

    Args:
        source: a folder, or a name on a hub such as facebook/flava-image-codebook.
    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another type, or weights are missing.
    """
    place = find(source)
    if (kind := read_config(place).get("model_type")) != "flava_image_codebook":
        raise ValueError(f"--codebook {source}: expected a checkpoint of FlavaImageCodebook, got model_type {kind!r}")
    with reading(place):
        codebook, report = FlavaImageCodebook.from_pretrained(
            place, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    check_weights("--codebook", place, codebook, report)
    loaded: FlavaImageCodebook = codebook
    return loaded


def codebook_pixels(pixel_values: Tensor, grid: tuple[int, int]) -> Tensor:
    """What the codebook reads of the image that the model sees, one word for each of the model's patches.

    Args:
        pixel_values: uint8 (B, H, W, 3), or floating point (B, 3, H, W) normalised with CLIP's mean and deviation.
        grid: rows and columns of the model's patches.
    Returns:
        (B, 3, 8 * rows, 8 * columns), float, in [0.1, 0.9] for pixels in range.
    """
    if pixel_values.dtype == torch.uint8:
        pixels = pixel_values.permute(0, 3, 1, 2).float() / 255
    else:
        mean, std = (pixel_values.new_tensor(each).view(3, 1, 1) for each in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        pixels = pixel_values * std + mean
    size = (SIDE * grid[0], SIDE * grid[1])
    if pixels.shape[2:] != size:
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
    return (1 - 2 * LAPLACE) * pixels + LAPLACE


@torch.no_grad()
def fit_codebook(codebook: FlavaImageCodebook, images: Sequence[Tensor], grid: tuple[int, int]) -> None:
    """Makes the last convolution a quantiser by k-means over the features of images; the same result for the same ones.

    Where the images have fewer different patches than the codebook has words, words are left that stand for none.

    Args:
        codebook: its other convolutions stay as they are.
        images: uint8 (H, W, 3) each, of one size, on the CPU.
        grid: rows and columns of patches of an image.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    for start in range(0, len(images), 64):
        pixels = codebook_pixels(torch.stack(list(images[start : start + 64])), grid)
        rows.append(_features(codebook, pixels.to(codebook.dtype)))
    features = torch.cat(rows).float()
    middle = features.mean(0)
    features = (features - middle)[torch.randperm(len(features), generator=generator)[:SAMPLES]]
    different = features.unique(dim=0)
    words = codebook.vocab_size
    centres = different[torch.randperm(len(different), generator=generator)[torch.arange(words) % len(different)]]
    for _ in range(ROUNDS):
        scores = torch.addmm(-centres.square().sum(1), features, centres.T, alpha=2)
        best, word = scores.max(1)
        counts = torch.bincount(word, minlength=words)
        sums = torch.zeros_like(centres).index_add_(0, word, features)
        centres = torch.where(counts[:, None] == 0, centres, sums / counts.clamp(min=1)[:, None])
        empty = (counts == 0).nonzero()[: len(features), 0]  # each takes a feature that is farthest from its own centre
        centres[empty] = features[(features.square().sum(1) - best).topk(len(empty)).indices]
    output = codebook.blocks.output.conv
    output.weight.copy_(2 * centres[..., None, None])
    output.bias.copy_(-centres.square().sum(1) - 2 * centres @ middle)


def _features(codebook: Any, pixels: Tensor) -> Tensor:
    """(B * rows * columns, C), what the last convolution reads."""
    states = pixels
    for name, block in codebook.blocks.named_children():
        states = block.relu(states) if name == "output" else block(states)
    return states.permute(0, 2, 3, 1).flatten(0, 2)
