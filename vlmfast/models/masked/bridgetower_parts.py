"""BridgeTower's trunk over transformers' modules: each tower once per image or text, then pairs of them fused.

transformers' forward reads one image with one text. Here the towers' layers are computed apart from the layers that
fuse, so that an image is encoded once for all texts that it is paired with, and of the last layer only what is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from typing_extensions import Self

from vlmfast.models.bert_attention import heads_attention
from vlmfast.models.checkpoints import find, load_auto
from vlmfast.models.towers import load_tower
from vlmfast.nn import transformers as stems


class Encoded(NamedTuple):
    """What a tower makes of a batch of images or texts.

    Attributes:
        layers: of each layer that is bridged, (B, L, D), projected and with its type's embedding.
        last (B, L, W): of the last layer; of images after the norm that all image layers share.
        mask (B, 1, 1, L): bool, True at tokens; None where all are.
    """

    layers: list[Tensor]
    last: Tensor
    mask: Tensor | None = None

    def at(self, rows: Tensor) -> Self:
        """Those of some rows (m,), each of which may come more than once."""
        mask = None if self.mask is None else self.mask[rows]
        return type(self)([layer[rows] for layer in self.layers], self.last[rows], mask)


class Trunk(transformers.BridgeTowerModel):
    """transformers' BridgeTowerModel, its parameters under the same names, but for the text tower's unused pooler."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.text_model.pooler = None  # read by nothing; DDP stops at a parameter without gradient
        visual = self.vision_model.visual
        visual.embeddings = stems.BridgeTowerVisionEmbeddings.from_original(
            visual.embeddings, mean=config.image_mean, std=config.image_std
        )
        self.first = len(self.text_model.encoder.layer) - config.num_hidden_layers

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> Encoded:
        """Texts (B, L), padded on the right."""
        states = self.text_model.embeddings(input_ids=input_ids)
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        kept = []
        for number, layer in enumerate(self.text_model.encoder.layer):
            states = layer.feed_forward_chunk(attend(layer.attention, states, states, mask))
            if number >= self.first:
                kept.append(_projected(self.cross_modal_text_transform, states, number - self.first) + self._type(0))
        return Encoded(kept, states, mask)

    def encode_image(self, pixel_values: Tensor) -> Encoded:
        """Images uint8 (B, H, W, 3), or floating point (B, 3, H, W) already normalised."""
        visual = self.vision_model.visual
        states = visual.ln_pre(visual.embeddings(pixel_values))
        kept, normed = [], states
        for number, block in enumerate(visual.transformer.resblocks):
            states = image_block(block, states)
            if number >= self.first:
                normed = visual.ln_post(states)
                kept.append(_projected(self.cross_modal_image_transform, normed, number - self.first) + self._type(1))
        return Encoded(kept, normed)

    def fuse(self, text: Encoded, image: Encoded, keep: str = "all") -> tuple[Tensor, Tensor]:
        """The cross-modal encoder's last states of texts (B, L, D) and images (B, R, D), pair by pair.

        Args:
            keep: of the last layer: "all"; "text", the states of texts, those of images being None; or "first", of both
                the first token alone, (B, 1, D), which the poolers read.
        """
        t, v = self.cross_modal_text_layernorm(text.layers[0]), self.cross_modal_image_layernorm(image.layers[0])
        layers = list(zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True))
        for number, (text_layer, image_layer) in enumerate(layers):
            if number:
                t = self.cross_modal_text_link_tower[number - 1](text.layers[number], t, None)
                v = self.cross_modal_image_link_tower[number - 1](image.layers[number], v, None)
            last = keep if number == len(layers) - 1 else "all"
            read = slice(1) if last == "first" else slice(None)
            # Both read the other's states from before the layer.
            fused_text = cross_layer(text_layer, t, v, text.mask, None, read)
            fused_image = None if last == "text" else cross_layer(image_layer, v, t, None, text.mask, read)
            t, v = fused_text, fused_image
        return t, v

    def _type(self, number: int) -> Tensor:
        embedding: Tensor = self.token_type_embeddings.weight[number]
        return embedding


def _projected(transform: Any, states: Tensor, number: int) -> Tensor:
    """By W, which is one for all layers, or has one for each in a list."""
    found: Tensor = transform[number](states) if isinstance(transform, nn.ModuleList) else transform(states)
    return found


def attend(attention: Any, states: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
    """BERT's attention of states (B, L, D) to memory (B, M, D) with its residual and norm.

    Args:
        attention: a BridgeTowerAttention.
        mask (B, 1, 1, M): bool, True at tokens.
    """
    output: Tensor = attention.output(heads_attention(attention.self, states, memory, mask), states)
    return output


def cross_layer(
    layer: Any, states: Tensor, other: Tensor, mask: Tensor | None, other_mask: Tensor | None, read: slice
) -> Tensor:
    """Self-attention, attention to the other's states, MLP, for those of the states that are read."""
    x = attend(layer.attention, states[:, read], states, mask)
    x = attend(layer.crossattention, x, other, other_mask)
    output: Tensor = layer.feed_forward_chunk(x)
    return output


def image_block(block: Any, x: Tensor) -> Tensor:
    """A block of CLIP's image tower, of x (B, R, D)."""
    own = block.attn
    qkv = F.linear(block.ln_1(x), own.in_proj_weight, own.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, own.num_heads, -1)).permute(2, 0, 3, 1, 4)
    x = x + own.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    h = block.ln_2(x)
    for part in block.mlp.values():
        h = part(h)
    return x + h


def clip_tower(
    source: str, image_size: int | None = None
) -> tuple[transformers.BridgeTowerVisionConfig, dict[str, Tensor]]:
    """The image tower of a CLIP checkpoint: its config, and its weights by BridgeTower's names.

    Args:
        source: a folder or a name on a hub.
        image_size: of the images, where it is to be another; positions are interpolated (bicubic).
    Raises:
        FileNotFoundError: there is no such folder or name.
        ValueError: the tower is none of CLIP's, or one that BridgeTower's has no place for.
    """
    tower: Any = load_tower("vision_model", source)
    config: Any = getattr(tower, "config", None)
    if getattr(config, "model_type", None) != "clip_vision_model":
        raise ValueError(f"--vision-tower: expected a CLIP checkpoint, got {getattr(config, 'model_type', None)!r}")
    fixed = {
        "hidden_act": (config.hidden_act, "quick_gelu"),
        "num_attention_heads": (config.num_attention_heads, config.hidden_size // 64),
        "intermediate_size": (config.intermediate_size, 4 * config.hidden_size),
    }
    for name, (got, wanted) in fixed.items():
        if got != wanted:
            raise ValueError(f"--vision-tower: BridgeTower's image tower has {name} {wanted!r}; got {got!r}")
    made = transformers.BridgeTowerVisionConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        patch_size=config.patch_size,
        image_size=image_size or config.image_size,
        layer_norm_eps=config.layer_norm_eps,
    )
    given = tower.state_dict()
    weights = {f"embeddings.{n}": given[f"embeddings.{n}"] for n in EMBEDDINGS}
    weights["embeddings.position_embedding.weight"] = resized_positions(
        weights["embeddings.position_embedding.weight"], made.image_size // made.patch_size
    )
    for own, clip in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        weights |= _renamed(given, f"{clip}.", f"{own}.")
    for number in range(config.num_hidden_layers):
        own, clip = f"transformer.resblocks.{number}.", f"encoder.layers.{number}."
        for kind in ("weight", "bias"):
            parts = [given[f"{clip}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            weights[f"{own}attn.in_proj_{kind}"] = torch.cat(parts)
        for to, of in BLOCK.items():
            weights |= _renamed(given, f"{clip}{of}.", f"{own}{to}.")
    return made, weights


def resized_positions(positions: Tensor, side: int) -> Tensor:
    """Embeddings of a class token and side x side patches, from those (1 + n * n, D) of n x n patches."""
    old = math.isqrt(len(positions) - 1)
    if old == side:
        return positions
    grid = positions[1:].T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid[0].flatten(1).T])


EMBEDDINGS = ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Modules of a block of BridgeTower's image tower, and what transformers' CLIP calls them."""


def _renamed(given: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new + name.removeprefix(old): value for name, value in given.items() if name.startswith(old)}


def roberta_tower(source: str) -> tuple[transformers.BridgeTowerTextConfig, dict[str, Tensor]]:
    """A RoBERTa checkpoint: its config, and its weights by BridgeTower's names, which are the same.

    Raises:
        FileNotFoundError: there is no such folder or name.
        ValueError: it is none of RoBERTa's kind.
    """
    model = load_auto(transformers.AutoModel, "text_tower", find(source), new=("pooler.",))
    if model.config.model_type != "roberta":
        raise ValueError(f"--text-tower: expected a RoBERTa checkpoint, got {model.config.model_type!r}")
    names = transformers.BridgeTowerTextConfig().to_dict().keys() - {"model_type", "transformers_version"}
    given = {name: value for name, value in model.config.to_dict().items() if name in names}
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("pooler.")}
    return transformers.BridgeTowerTextConfig(**given), weights
