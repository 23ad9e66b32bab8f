"""Sizes are checked when a module is made: the message names class, argument, what was expected and what came."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import vlmfast.nn
from vlmfast.nn import (
    ClipLoss,
    GatedCrossAttentionBlock,
    ImageToTextFusion,
    LinearCrossEntropy,
    MaskedCrossAttention,
    PatchDropout,
    PatchEmbed,
    PerceiverAttention,
    PerceiverResampler,
    SelfResurrectingGate,
    SigLipLoss,
    TextToImageFusion,
    interpolate_position,
)
from vlmfast.nn import transformers as stems
from vlmfast.nn import transformers_cross_attention as cross

SIZE = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SIZE, "image_size": 8, "patch_size": 4}
MLLAMA = {
    **SIZE, "vocab_size": 9, "num_key_value_heads": 1, "cross_attention_layers": [0], "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def of_config(make: Callable[..., nn.Module], kind: type, options: dict[str, Any], *rest: object) -> Callable[..., Any]:
    """A module's constructor whose arguments are its configuration's, set past the configuration's own checks."""

    def made(**given: Any) -> nn.Module:
        config = kind(**options)
        for name, value in given.items():
            object.__setattr__(config, name, value)
        return make(config, *rest)

    return made


MAKERS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "MaskedCrossAttention": (MaskedCrossAttention, {"dim": 8, "dim_visual": 4, "dim_head": 4, "heads": 2}),
    "GatedCrossAttentionBlock": (
        GatedCrossAttentionBlock, {"dim": 8, "dim_visual": 4, "dim_head": 4, "heads": 2, "ff_mult": 2}
    ),
    "PerceiverAttention": (PerceiverAttention, {"dim": 8, "dim_head": 4, "heads": 2}),
    "PerceiverResampler": (
        PerceiverResampler,
        {
            "dim": 8, "depth": 1, "dim_head": 4, "heads": 2, "num_latents": 3, "ff_mult": 2, "max_num_media": 2,
            "max_num_frames": 2, "num_media_embeds": 2,
        },
    ),
    "TextToImageFusion": (TextToImageFusion, {"hidden_size": 8, "num_attention_heads": 2, "image_size": 4}),
    "ImageToTextFusion": (ImageToTextFusion, {"dim": 8, "num_heads": 2, "dim_text": 4}),
    "SelfResurrectingGate": (SelfResurrectingGate, {"dim": 8, "levels": 2, "tau": 0.2}),
    "LinearCrossEntropy": (LinearCrossEntropy, {"in_features": 8, "vocab_size": 9, "label_smoothing": 0.1}),
    "PatchDropout": (PatchDropout, {"prob": 0.5, "num_prefix_tokens": 1}),
    "PatchEmbed": (PatchEmbed, {"img_size": 8, "patch_size": 4, "in_chans": 3, "embed_dim": 8}),
    "ClipLoss": (ClipLoss, {"rank": 0, "world_size": 1}),
    "SigLipLoss": (SigLipLoss, {"rank": 0, "world_size": 1, "chunk_size": 2}),
    "Qwen2VLPatchEmbed": (
        stems.Qwen2VLPatchEmbed, {"patch_size": 4, "temporal_patch_size": 2, "in_channels": 3, "embed_dim": 8}
    ),
    "IdeficsGatedCrossAttentionLayer": (
        of_config(cross.IdeficsGatedCrossAttentionLayer, transformers.IdeficsConfig, SIZE), SIZE
    ),
    "MllamaCrossAttentionDecoderLayer": (
        of_config(
            cross.MllamaCrossAttentionDecoderLayer,
            transformers.models.mllama.configuration_mllama.MllamaTextConfig, MLLAMA, 0,
        ),
        {**SIZE, "num_key_value_heads": 1},
    ),
    "GPT2CrossAttention": (
        of_config(cross.GPT2CrossAttention, transformers.GPT2Config, {"n_embd": 8, "n_head": 2}),
        {"n_embd": 8, "n_head": 2},
    ),
}  # fmt: skip
for stem, config in (
    ("CLIPVisionEmbeddings", transformers.CLIPVisionConfig),
    ("SiglipVisionEmbeddings", transformers.SiglipVisionConfig),
    ("ViTPatchEmbeddings", transformers.ViTConfig),
    ("ViTEmbeddings", transformers.ViTConfig),
    ("FlavaImageEmbeddings", transformers.FlavaImageConfig),
    ("BridgeTowerVisionEmbeddings", transformers.models.bridgetower.BridgeTowerVisionConfig),
):
    given = {"hidden_size": 8, "num_channels": 3, "image_size": 8, "patch_size": 4}
    heads = {} if "BridgeTower" in stem else {"num_attention_heads": 2}
    MAKERS[stem] = (of_config(getattr(stems, stem), config, {**given, **heads}), given)
SIGLIP2 = {"hidden_size": 8, "num_channels": 3, "num_patches": 4, "patch_size": 4}
MAKERS["Siglip2VisionEmbeddings"] = (
    of_config(stems.Siglip2VisionEmbeddings, transformers.Siglip2VisionConfig, SIGLIP2), SIGLIP2
)  # fmt: skip

FREE = {  # what may be 0, or is no size
    ("LinearCrossEntropy", "label_smoothing"), ("PatchDropout", "prob"),
    ("PatchDropout", "num_prefix_tokens"), ("SelfResurrectingGate", "tau"),
    ("ClipLoss", "rank"), ("ClipLoss", "world_size"), ("SigLipLoss", "rank"), ("SigLipLoss", "world_size"),
    ("SigLipLoss", "chunk_size"),
}  # fmt: skip
UNUSED = {"num_hidden_layers"}  # of a layer
ARGUMENTS = [
    (name, argument) for name, (_, options) in MAKERS.items() for argument in options if argument not in UNUSED
]
NAMES = {"n_embd": "hidden_size", "n_head": "num_attention_heads"}


def refused(error: type[Exception], name: str, argument: str, value: object, expected: str) -> None:
    make, options = MAKERS[name]
    pattern = f"^{name}: (config.)?{NAMES.get(argument, argument)} must .*{expected}.*; got {re.escape(str(value))}"
    with pytest.raises(error, match=pattern):
        make(**{**options, argument: value})


def test_every_class_is_here() -> None:
    classes = {name for name in vlmfast.nn.__all__ if isinstance(getattr(vlmfast.nn, name), type)} - {"MediaCache"}
    for module in (stems, cross):
        classes |= {
            name for name, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module.__name__ and name[0] != "_"
        }  # fmt: skip
    assert classes == set(MAKERS)


@pytest.mark.parametrize("name", list(MAKERS))
def test_right_sizes_are_taken_also_as_integers_of_numpy(name: str) -> None:
    make, options = MAKERS[name]
    make(**options)
    make(**{key: np.int64(value) if isinstance(value, int) else value for key, value in options.items()})


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_sizes_below_one_and_of_another_type_are_refused(name: str, argument: str) -> None:
    if (name, argument) not in FREE:
        refused(ValueError, name, argument, 0, "")
    if argument != "rank":
        refused(ValueError, name, argument, -3, "")
    for value in ("4", [4, 4, 4], 2 + 1j):
        make, options = MAKERS[name]
        with pytest.raises((TypeError, ValueError), match=f"^{name}: .*{NAMES.get(argument, argument)} must"):
            make(**{**options, argument: value})
    if argument not in ("prob", "tau", "ff_mult", "label_smoothing"):
        refused(TypeError, name, argument, 2.0, "an integer")
        refused(TypeError, name, argument, True, "an integer") if argument != "num_prefix_tokens" else None


@pytest.mark.parametrize(
    ("name", "argument", "value", "expected"),
    [
        ("TextToImageFusion", "num_attention_heads", 3, "divide hidden_size 8"),
        ("ImageToTextFusion", "num_heads", 3, "divide dim 8"),
        ("IdeficsGatedCrossAttentionLayer", "num_attention_heads", 3, "divide config.hidden_size 8"),
        ("MllamaCrossAttentionDecoderLayer", "num_attention_heads", 3, "divide config.hidden_size 8"),
        ("MllamaCrossAttentionDecoderLayer", "num_key_value_heads", 4, "divide config.num_attention_heads 2"),
        ("GPT2CrossAttention", "n_head", 3, "divide config.hidden_size 8"),
        ("PatchEmbed", "patch_size", (9, 9), "at most image_size 8"),
        ("PatchEmbed", "patch_size", (4, 0), "at least 1"),
        ("ViTEmbeddings", "patch_size", 9, "at most image_size 8"),
        ("GatedCrossAttentionBlock", "ff_mult", 0.1, "at least one column"),
        ("GatedCrossAttentionBlock", "ff_mult", math.nan, "at least one column"),
        ("PerceiverResampler", "ff_mult", math.inf, "at least one column"),
        ("SelfResurrectingGate", "tau", 0.5, r"in \[0, 0.5\)"),
        ("LinearCrossEntropy", "label_smoothing", 1.5, r"in \[0, 1\]"),
        ("PatchDropout", "prob", 1.0, r"in \[0, 1\)"),
        ("PatchDropout", "prob", math.nan, r"in \[0, 1\)"),
    ],
)
def test_sizes_that_do_not_go_together(name: str, argument: str, value: Any, expected: str) -> None:
    make, options = MAKERS[name]
    shown = "0" if value == (4, 0) else re.escape(str(value))
    with pytest.raises(
        ValueError, match=f"^{name}: (config.)?{NAMES.get(argument, argument)} must .*{expected}.*; got {shown}"
    ):
        make(**{**options, argument: value})


@pytest.mark.parametrize(
    ("argument", "error", "value", "message"),
    [
        ("mean", ValueError, (0.5,), "mean must be 3 finite numbers, one per channel"),
        ("std", ValueError, (0.5, 0.5), "std must be 3 finite numbers"),
        ("mean", ValueError, (0.5, 0.5, math.nan), "mean must be 3 finite numbers"),
        ("std", ValueError, (0.5, 0.0, 0.5), "std must be above 0"),
        ("std", ValueError, (0.5, -1.0, 0.5), "std must be above 0"),
        ("mean", TypeError, 0.5, "mean must be a number per channel; got 0.5"),
        ("std", TypeError, "abc", "std must be a number per channel; got 'abc'"),
    ],
)
def test_mean_and_std(argument: str, error: type[Exception], value: Any, message: str) -> None:
    given = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), argument: value}
    with pytest.raises(error, match=f"^PatchEmbed: {message}"):
        PatchEmbed(8, 4, **given)
    original = transformers.models.clip.modeling_clip.CLIPVisionEmbeddings(transformers.CLIPVisionConfig(**VISION))
    with pytest.raises(error, match=f"^CLIPVisionEmbeddings: {message}"):
        stems.CLIPVisionEmbeddings.from_original(original, **given)
    assert PatchEmbed(8, 4, mean=torch.full((3,), 0.5), std=np.full(3, 0.5)).mean == (0.5, 0.5, 0.5)


def test_stems_of_other_libraries() -> None:
    timm = pytest.importorskip("timm")
    pytest.importorskip("open_clip")
    from vlmfast.nn.naflex import NaFlexEmbeds
    from vlmfast.nn.open_clip import VisionTransformer

    assert timm
    naflex = {"patch_size": 4, "in_chans": 3, "embed_dim": 8, "reg_tokens": 1, "pos_embed_grid_size": (2, 2)}
    vision = {"image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "heads": 2, "mlp_ratio": 2.0, "output_dim": 4}
    NaFlexEmbeds(**naflex)
    VisionTransformer(**vision)
    for kind, options in ((NaFlexEmbeds, naflex), (VisionTransformer, vision)):
        for argument in options.keys() - {"mlp_ratio"}:
            for error, value in ((ValueError, -1), (TypeError, 2.5)):
                with pytest.raises(error, match=f"^{kind.__name__}: {argument} must .*; got {value}"):
                    kind(**{**options, argument: value})
    with pytest.raises(ValueError, match=r"^VisionTransformer: heads must divide width 8; got 3"):
        VisionTransformer(**{**vision, "heads": 3})


def test_positions_with_a_negative_prefix() -> None:
    with pytest.raises(ValueError, match=r"^interpolate_position: prefix_tokens must be at least 0; got -1"):
        interpolate_position(torch.randn(3, 4), (3, 3), prefix_tokens=-1)
    with pytest.raises(ValueError, match=r"^interpolate_position: position must have a row for each of -2"):
        interpolate_position(torch.randn(4, 4), (3, 3), old_size=(-2, -2))


@pytest.mark.parametrize("loss", [ClipLoss, SigLipLoss])
def test_ranks(loss: Callable[..., nn.Module]) -> None:
    for world_size, rank in ((2, 2), (2, -1), (4, 7)):
        with pytest.raises(ValueError, match=rf"rank must be in \[0, world_size\); got rank {rank}, world_size"):
            loss(rank=rank, world_size=world_size)
