"""transformers' FlavaForPreTraining with encoders of its own: a fused stem, no probabilities of attention in memory."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import FlavaConfig, FlavaForPreTraining
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.flava.modeling_flava import FlavaSelfAttention

from vlmfast.models.masked.flava_codebook import codebook_pixels
from vlmfast.models.masked.flava_loss import NOT_MASKED
from vlmfast.ops import patch_embed


class SelfAttention(FlavaSelfAttention):
    """FLAVA's self-attention without the probabilities in memory."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        queries: int | None = None,
    ) -> tuple[Tensor, ...]:
        """States (B, L, D) in a tuple, as the parent; of the first `queries` positions alone where that is given.

        Args:
            attention_mask (B, 1, 1, L): bool, or added to the scores.
            output_attentions: the parent's way, with the probabilities.
        """
        if output_attentions:
            found: tuple[Tensor, ...] = super().forward(hidden_states, attention_mask, output_attentions)
            return found
        asking = hidden_states if queries is None else hidden_states[:, :queries]
        query, key, value = (
            layer(states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for layer, states in ((self.query, asking), (self.key, hidden_states), (self.value, hidden_states))
        )
        dropout = self.dropout.p if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=dropout)
        return (context.transpose(1, 2).flatten(2),)


class FLAVATowers(FlavaForPreTraining):
    """The parameters of FlavaForPreTraining, and what each transformer makes of its input.

    Attributes:
        grid: rows and columns of patches.
    """

    config_class = FlavaConfig
    config: FlavaConfig
    _keys_to_ignore_on_save: ClassVar[list[str]] = [
        f"{head}.bias" for head in ("mim_head", "mlm_head", "mmm_image_head", "mmm_text_head")
    ]

    def __init__(self, config: FlavaConfig) -> None:
        widths = {
            name: getattr(part, "hidden_size", None)
            for name, part in {
                "image_config": config.image_config,
                "text_config": config.text_config,
                "multimodal_config": config.multimodal_config,
                "config": config,
            }.items()
        }
        if len(set(widths.values())) > 1:
            raise ValueError(f"hidden_size: expected one width, which the heads read, got {widths}")
        super().__init__(config)
        for module in self.modules():
            if type(module) is FlavaSelfAttention:
                module.__class__ = SelfAttention
        side, patch = config.image_config.image_size, config.image_config.patch_size
        (height, width), (rows, columns) = (x if isinstance(x, list | tuple) else (x, x) for x in (side, patch))
        self.grid = (height // rows, width // columns)

    def get_input_embeddings(self) -> nn.Module:
        words: nn.Module = self.flava.text_model.get_input_embeddings()
        return words

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.flava.text_model.set_input_embeddings(value)

    def patches(self, pixel_values: Tensor, hidden: Tensor | None = None, *, clean: bool = False) -> Tensor:
        """What the image transformer reads (B, 1 + n, W), the hidden patches a learned token in their place.

        With clean, those with nothing hidden come first, (2 B, 1 + n, W), or (B, ...) where `hidden` is None.
        """
        embeddings = self.flava.image_model.embeddings
        projection = embeddings.patch_embeddings.projection
        is_bytes = pixel_values.dtype == torch.uint8
        height, width = pixel_values.shape[1:3] if is_bytes else pixel_values.shape[2:]
        sides = (self.grid[0] * projection.kernel_size[0], self.grid[1] * projection.kernel_size[1])
        if pixel_values.ndim != 4 or (height, width) != sides:
            raise ValueError(f"pixel_values: expected images of {sides}, got shape {tuple(pixel_values.shape)}")
        patches = patch_embed(
            pixel_values,
            projection.weight,
            projection.bias,
            layout="NHWC" if is_bytes else "NCHW",
            mean=OPENAI_CLIP_MEAN if is_bytes else None,
            std=OPENAI_CLIP_STD if is_bytes else None,
        )
        if hidden is not None:
            if hidden.shape != patches.shape[:2]:
                shape = tuple(hidden.shape)
                raise ValueError(f"bool_masked_pos: expected {tuple(patches.shape[:2])} patches, got {shape}")
            masked = torch.where(hidden[..., None], embeddings.mask_token.to(patches.dtype), patches)
            patches = torch.cat([patches, masked]) if clean else masked
        first = embeddings.cls_token.to(patches.dtype).expand(len(patches), -1, -1)
        states: Tensor = embeddings.dropout(torch.cat([first, patches], 1) + embeddings.position_embeddings)
        return states

    def encode(self, model: Any, states: Tensor, keys: Tensor | None, *, clean: int = 0) -> tuple[Tensor, Tensor]:
        """All layers of the image or the text transformer.

        Args:
            states (R, L, W): of which the first `clean` rows are read at [CLS] alone.
            keys: see `keys_of`.
        Returns:
            (R - clean, L, W) before the last layer norm, and (clean, W), [CLS] after it.
        """
        *layers, last = model.encoder.layer
        for layer in layers:
            states = layer(states, keys)[0]
        first = states.new_empty(0, states.shape[-1])
        if clean:
            own = None if keys is None else keys[:clean]
            whole = states[:clean]
            context = last.attention.attention(last.layernorm_before(whole), own, queries=1)[0]
            first = last.attention.output(context, whole) + whole[:, :1]
            first = last.output(last.intermediate(last.layernorm_after(first)), first)
            first = model.layernorm(first[:, 0])
            states, keys = states[clean:], None if keys is None else keys[clean:]
        return last(states, keys)[0] if len(states) else states, first

    def fuse(self, image: Tensor, text: Tensor, attention_mask: Tensor | None) -> Tensor:
        """States (B, 2 + n + L, W) of the multimodal transformer after its last layer norm, of those of the others."""
        flava = self.flava
        model = flava.multimodal_model
        parts = [flava.image_to_mm_projection(image), flava.text_to_mm_projection(text)]
        if model.use_cls_token:
            parts.insert(0, model.cls_token.to(parts[0].dtype).expand(len(image), -1, -1))
        states = torch.cat(parts, 1)
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (states.shape[1] - attention_mask.shape[1], 0), value=1)
        for layer in model.encoder.layer:
            states = layer(states, keys_of(attention_mask))[0]
        normed: Tensor = model.layernorm(states)
        return normed

    def joint(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None) -> Tensor:
        """`_fuse` of an image and a text with nothing hidden."""
        text_model = self.flava.text_model
        image, _ = self.encode(self.flava.image_model, self.patches(pixel_values), None)
        text, _ = self.encode(text_model, text_model.embeddings(input_ids=input_ids), keys_of(attention_mask))
        return self.fuse(image, text, attention_mask)

    def parts(self, states: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Patches and words among the states of the multimodal transformer; before them come [CLS] and the image's."""
        return states[:, -length - self.grid[0] * self.grid[1] : -length], states[:, -length:]

    def words(self, pixel_values: Tensor, hidden: Tensor, labels: Tensor | None, pixels: Tensor | None) -> Tensor:
        """Labels (B, n) of the hidden patches, -100 elsewhere; the codebook's words where none are given."""
        if labels is None:
            if self.image_codebook is None:
                raise ValueError("mim_labels: missing, expected of a model without codebook (init_codebook)")
            if pixels is None:
                pixels = codebook_pixels(pixel_values, self.grid)
            with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
                weight = next(self.image_codebook.parameters())
                labels = self.image_codebook.get_codebook_indices(pixels.to(weight.dtype))
        labels = labels.flatten(1)
        if labels.shape != hidden.shape:
            raise ValueError(f"mim_labels: expected {tuple(hidden.shape)} words, got {tuple(labels.shape)}")
        return labels.masked_fill(~hidden, NOT_MASKED)


def keys_of(attention_mask: Tensor | None) -> Tensor | None:
    """bool (B, 1, 1, L), what may be attended to."""
    return None if attention_mask is None else attention_mask[:, None, None].bool()
