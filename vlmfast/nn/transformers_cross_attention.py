"""Cross-attention of transformers' IDEFICS, Mllama and GPT-2 through media_attention, with the originals' parameters.

Each class is the original with another forward, so constructor, state_dict, initialisation and gradient checkpointing
are the original's; `from_module` makes one of a layer that is there, over the same parameters and submodules. Attention
weights are not returned (output_attentions has none of these layers), and attention dropout, IDEFICS' other dropout
with it, is refused in training.

Projections, norms and feed-forwards are called, whatever stands in their places. A layer's `cross_attn` is not: where
it is not of transformers' very class any more, has hooks or another forward, the original's forward runs and calls it.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.idefics import modeling_idefics as idefics
from transformers.models.mllama import modeling_mllama as mllama

from vlmfast.nn._attention import add_gated, attend, intervals, key_bias, merge_heads, split_heads
from vlmfast.nn._sizes import check_config, check_divides
from vlmfast.nn._stem import forward_replaced, reason_to_call

Layer = TypeVar("Layer", bound=nn.Module)


class IdeficsGatedCrossAttentionLayer(idefics.IdeficsGatedCrossAttentionLayer):
    """IDEFICS' gated cross-attention and gated SwiGLU; a drop-in for transformers' layer of that name.

    A token that no image is for has the attention's 0, with or without cross_attention_gate.

    Args:
        config, layer_idx: transformers'.
    Raises:
        TypeError: a size in config is no integer.
        ValueError: a size in config is less than 1, or its heads do not divide its width.
    """

    def __init__(self, config: Any, layer_idx: int | None = None) -> None:
        _check_heads("IdeficsGatedCrossAttentionLayer", config, "intermediate_size")
        super().__init__(config, layer_idx)

    def reason_not_eligible(self) -> str | None:
        """Why the original's forward runs, or None."""
        return reason_to_call(self.cross_attn, idefics.IdeficsAttention)

    @classmethod
    def from_module(cls, original: nn.Module) -> IdeficsGatedCrossAttentionLayer:
        """One over the parameters and submodules of transformers' layer.

        Raises:
            TypeError: original is not such a layer.
            ValueError: its cross_attn must be called, or its forward was replaced.
        """
        return _over(cls, idefics.IdeficsGatedCrossAttentionLayer, original)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_hidden_states: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        cross_attention_gate: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        media_lo: Tensor | None = None,
        media_hi: Tensor | None = None,
        tokens_per_media: int | None = None,
        media_len: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states after the layer.

        Args:
            hidden_states (B, L, D).
            attention_mask: not looked at.
            image_hidden_states (B, Lk, Dv): tokens of the images, one image after the other; None: those that
                past_key_values holds.
            image_attention_mask (B, 1, L, Lk): 0 where a token sees a key, else very negative; a token sees an
                interval of images. None: as media_lo and media_hi say, else everything.
            cross_attention_gate (B, L): 0 where the attention's output is left out; None: nowhere.
            past_key_values: a cache of the cross-attention alone, not the decoder's: keys and values are computed once
                and kept at layer_idx.
            media_lo, media_hi, tokens_per_media, media_len: of `vlmfast.ops.media_attention`, in place of
                image_attention_mask and without a mask in memory.
        Returns:
            (B, L, D).
        Raises:
            ValueError: there are no images, shapes disagree, both kinds of mask are given, dropout in training, or, on
                a CPU outside torch.compile, a token does not see an interval; where the original's forward runs, what
                that does not take.
        """
        media: dict[str, Any] = {
            "media_lo": media_lo,
            "media_hi": media_hi,
            "tokens_per_media": tokens_per_media,
            "media_len": media_len,
        }
        if reason := self.reason_not_eligible():
            _only_of_the_original("IdeficsGatedCrossAttentionLayer", reason, media)
            out: Tensor = super().forward(
                hidden_states,
                attention_mask,
                image_hidden_states,
                image_attention_mask,
                cross_attention_gate,
                past_key_values,
                **kwargs,
            )
            return out
        attention = self.cross_attn
        _no_attention_dropout("IdeficsGatedCrossAttentionLayer", self, attention.dropout)
        if image_hidden_states is not None:
            k, v = (
                split_heads(t(image_hidden_states), attention.num_heads) for t in (attention.k_proj, attention.v_proj)
            )
            if attention.qk_layer_norms:
                k = attention.k_layer_norm(k).to(v.dtype)
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, attention.layer_idx)
        else:
            k, v = _cached(
                "IdeficsGatedCrossAttentionLayer", "image_hidden_states", past_key_values, attention.layer_idx
            )
        q = split_heads(attention.q_proj(self.input_layernorm(hidden_states)), attention.num_heads)
        if attention.qk_layer_norms:
            q = attention.q_layer_norm(q).to(v.dtype)
        if image_attention_mask is not None:
            media = _media_of_keys("IdeficsGatedCrossAttentionLayer", image_attention_mask, None, k, media)
        out = attention.o_proj(merge_heads(attend(q, k, v, scale=attention.scaling, **media)))
        row_mask = None if cross_attention_gate is None else cross_attention_gate != 0
        gate = _gate(self.alpha_cross_attn, self.act_cross_attn)
        hidden_states = add_gated(hidden_states, out, **gate, row_mask=row_mask)
        out = self.mlp(self.post_attention_layernorm(hidden_states))
        return add_gated(hidden_states, out, **_gate(self.alpha_dense, self.act_dense))


class MllamaCrossAttentionDecoderLayer(mllama.MllamaCrossAttentionDecoderLayer):
    """Mllama's gated cross-attention and gated SwiGLU; a drop-in for transformers' layer of that name.

    Args:
        config, layer_idx: transformers'.
        empty: what the attention gives a token before the first image: "zero", or "all", which is transformers': it
            attends to every key of every image, later ones and padding tiles too.
    Raises:
        TypeError: a size in config is no integer.
        ValueError: a size in config is less than 1, its heads do not divide its width, or those of keys and values not
            its heads; empty is neither.
    """

    def __init__(self, config: Any, layer_idx: int, empty: str = "zero") -> None:
        name = "MllamaCrossAttentionDecoderLayer"
        _check_heads(name, config, "num_key_value_heads", "intermediate_size")
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        check_divides(name, "config.num_key_value_heads", kv_heads, "config.num_attention_heads", heads)
        super().__init__(config, layer_idx)
        self.empty = _known_empty(empty)

    def reason_not_eligible(self) -> str | None:
        """Why the original's forward runs, or None."""
        return reason_to_call(self.cross_attn, mllama.MllamaTextCrossAttention)

    @classmethod
    def from_module(cls, original: nn.Module, empty: str = "zero") -> MllamaCrossAttentionDecoderLayer:
        """One over the parameters and submodules of transformers' layer.

        Raises:
            TypeError, ValueError: as `IdeficsGatedCrossAttentionLayer.from_module`; empty is neither.
        """
        layer = _over(cls, mllama.MllamaCrossAttentionDecoderLayer, original)
        layer.empty = _known_empty(empty)
        return layer

    def forward(
        self,
        hidden_states: Tensor,
        cross_attention_states: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        full_text_row_masked_out_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: Tensor | None = None,
        *,
        media_lo: Tensor | None = None,
        media_hi: Tensor | None = None,
        tokens_per_media: int | None = None,
        media_len: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states after the layer.

        Args:
            hidden_states (B, L, D).
            cross_attention_states: the images' tokens, any shape of B * Lk rows of D, one image after the other; None:
                those that past_key_values holds.
            cross_attention_mask (B, 1, L, Lk): as transformers makes it: 0 where a token sees a key, and in the rows of
                tokens that see none, else very negative. None: as media_lo and media_hi say, else everything.
            full_text_row_masked_out_mask (B, 1, L, 1): 0 for the tokens that see nothing, whose feed-forward is left
                out too; None: there are none.
            past_key_values: keys and values of the images are computed once and kept at layer_idx.
            media_lo, media_hi, tokens_per_media, media_len: of `vlmfast.ops.media_attention`, in place of
                cross_attention_mask and without a mask in memory.
            attention_mask, position_ids, use_cache, position_embeddings: not looked at.
        Returns:
            (B, L, D).
        Raises:
            ValueError: there are no images, shapes disagree, both kinds of mask are given, dropout in training, or, on
                a CPU outside torch.compile, a token does not see an interval; where the original's forward runs, what
                that does not do, empty="zero" among it.
        """
        media: dict[str, Any] = {
            "media_lo": media_lo,
            "media_hi": media_hi,
            "tokens_per_media": tokens_per_media,
            "media_len": media_len,
        }
        if reason := self.reason_not_eligible():
            _only_of_the_original("MllamaCrossAttentionDecoderLayer", reason, media, empty=self.empty)
            out: Tensor = super().forward(
                hidden_states,
                cross_attention_states,
                cross_attention_mask,
                attention_mask,
                full_text_row_masked_out_mask,
                position_ids,
                past_key_values,
                use_cache,
                position_embeddings,
                **kwargs,
            )
            return out
        attention = self.cross_attn
        _no_attention_dropout("MllamaCrossAttentionDecoderLayer", self, attention.dropout)
        if cross_attention_states is not None:
            states = cross_attention_states.reshape(hidden_states.shape[0], -1, cross_attention_states.shape[-1])
            k, v = (split_heads(t(states), attention.num_key_value_heads) for t in (attention.k_proj, attention.v_proj))
            k = attention.k_norm(k).to(v.dtype)
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, attention.layer_idx)
        else:
            k, v = _cached(
                "MllamaCrossAttentionDecoderLayer", "cross_attention_states", past_key_values, attention.layer_idx
            )
        q = split_heads(attention.q_proj(self.input_layernorm(hidden_states)), attention.num_heads)
        q = attention.q_norm(q).to(v.dtype)
        full_rows = full_text_row_masked_out_mask
        row_mask = None if full_rows is None else full_rows[:, 0, :, 0] != 0
        if cross_attention_mask is not None:
            media = _media_of_keys("MllamaCrossAttentionDecoderLayer", cross_attention_mask, row_mask, k, media)
        out = attend(q, k, v, scale=attention.scaling, empty=self.empty, **media)
        hidden_states = add_gated(hidden_states, attention.o_proj(merge_heads(out)), self.cross_attn_attn_gate)
        out = self.mlp(self.post_attention_layernorm(hidden_states))
        if row_mask is not None:
            row_mask = row_mask.expand(hidden_states.shape[:2])
        return add_gated(hidden_states, out, self.cross_attn_mlp_gate, row_mask=row_mask)


class GPT2CrossAttention(gpt2.GPT2Attention):
    """GPT-2's cross-attention; a drop-in for transformers' `GPT2Attention(config, is_cross_attention=True)`.

    A sample whose keys are all masked gets zeros before c_proj; the original, their mean.

    Args:
        config: transformers'.
        is_cross_attention: must be True.
        layer_idx: transformers'.
    Raises:
        TypeError: a size in config is no integer.
        ValueError: a size in config is less than 1, or its heads do not divide its width; is_cross_attention is False.
    """

    def __init__(self, config: Any, is_cross_attention: bool = True, layer_idx: int | None = None) -> None:
        if not is_cross_attention:
            raise ValueError("GPT2CrossAttention: is_cross_attention must be True; got False")
        _check_heads("GPT2CrossAttention", config)
        super().__init__(config, is_cross_attention=True, layer_idx=layer_idx)

    def reason_not_eligible(self) -> str | None:
        """Why forward raises, or None."""
        dropout = self.attn_dropout
        return reason_to_call(dropout, nn.Identity if type(dropout) is nn.Identity else nn.Dropout)

    @classmethod
    def from_module(cls, original: nn.Module) -> GPT2CrossAttention:
        """One over the parameters and submodules of transformers' attention."""
        if not getattr(original, "is_cross_attention", True):
            raise ValueError("GPT2CrossAttention: the original must be a cross-attention; got a self-attention")
        return _over(cls, gpt2.GPT2Attention, original)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The attention's output, and None in place of its weights.

        Args:
            hidden_states (B, L, D).
            past_key_values: keys and values of encoder_hidden_states are computed once and kept at layer_idx; of an
                EncoderDecoderCache, in its cross_attention_cache.
            encoder_hidden_states (B, Lk, D).
            encoder_attention_mask: as transformers makes it: (B, 1, 1 or L, Lk) to be added or bool, or (B, Lk).
            attention_mask, output_attentions: not looked at.
        Returns:
            out (B, L, D), None.
        Raises:
            ValueError: encoder_hidden_states is missing, shapes disagree, attention dropout in training, or, on a CPU
                outside torch.compile, a mask that is not the same for all queries.
        """
        if reason := self.reason_not_eligible():
            raise ValueError(f"GPT2CrossAttention: attn_dropout must be torch's own Dropout or Identity: {reason}")
        _no_attention_dropout("GPT2CrossAttention", self, getattr(self.attn_dropout, "p", 0.0))
        if encoder_hidden_states is None:
            raise ValueError("GPT2CrossAttention: encoder_hidden_states must be a tensor; got None")
        cache, filled = past_key_values, False
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = past_key_values.cross_attention_cache
            filled = bool(past_key_values.is_updated.get(self.layer_idx))
        if filled:
            k, v = _cached("GPT2CrossAttention", "encoder_hidden_states", cache, self.layer_idx)
        else:
            k, v = (split_heads(t, self.num_heads) for t in self.c_attn(encoder_hidden_states).chunk(2, -1))
            if cache is not None:
                k, v = cache.update(k, v, self.layer_idx)
            if isinstance(past_key_values, EncoderDecoderCache):
                past_key_values.is_updated[self.layer_idx] = True
        q = split_heads(self.q_attn(hidden_states), self.num_heads)
        bias = key_bias("GPT2CrossAttention", encoder_attention_mask, q.shape[0], k.shape[2])
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0  # transformers 5.0 has no `scaling`
        if self.scale_attn_by_inverse_layer_idx:
            scale /= self.layer_idx + 1
        out = merge_heads(attend(q, k, v, key_bias=bias, scale=scale))
        return self.resid_dropout(self.c_proj(out)), None


def _check_heads(name: str, config: Any, *sizes: str) -> None:
    check_config(name, config, ("hidden_size", "num_attention_heads", *sizes))
    heads, width = config.num_attention_heads, config.hidden_size
    check_divides(name, "config.num_attention_heads", heads, "config.hidden_size", width)


def _over(cls: type[Layer], base: type[nn.Module], original: nn.Module) -> Layer:
    """original's attributes, parameters and submodules in an object of cls, which adds to base's methods alone."""
    if not isinstance(original, base):
        raise TypeError(
            f"{cls.__name__}: the original must be transformers' {base.__name__}; got {type(original).__name__}"
        )
    layer: Any = copy.copy(original)
    layer.__class__ = cls
    layer.__dict__.pop("forward", None)  # the original's own, put back by those who had taken it
    reason = "its forward was replaced" if forward_replaced(original) else layer.reason_not_eligible()
    if reason:
        raise ValueError(f"{cls.__name__}: the original is not eligible: {reason}")
    return cast(Layer, layer)


def _gate(alpha: Tensor, activation: nn.Module) -> dict[str, Any]:
    """gated_residual's gate: a plain nn.Tanh is computed with the rest, what else stands in its place is called."""
    if reason_to_call(activation, nn.Tanh):
        return {"gate": activation(alpha), "activation": "identity"}
    return {"gate": alpha}


def _only_of_the_original(name: str, reason: str, media: dict[str, Any], *, empty: str = "all") -> None:
    """What only our own forward does must not be lost in silence where the original's runs."""
    asked = [argument for argument, value in media.items() if value is not None]
    asked += ["empty='zero'"] if empty == "zero" else []
    if asked:
        raise ValueError(f"{name}: {', '.join(asked)} cannot be had: the original's forward runs, as {reason}")


def _no_attention_dropout(name: str, layer: nn.Module, probability: float) -> None:
    if layer.training and probability > 0:
        raise ValueError(f"{name}: attention dropout is not supported in training, set it to 0; got {probability}")


def _cached(name: str, argument: str, cache: Cache | None, layer_idx: int | None) -> tuple[Tensor, Tensor]:
    if (
        cache is None
        or layer_idx is None
        or layer_idx >= len(cache.layers)
        or not cache.layers[layer_idx].is_initialized
    ):
        raise ValueError(f"{name}: {argument} must be a tensor where past_key_values holds no keys of it; got None")
    return cache.layers[layer_idx].keys, cache.layers[layer_idx].values


def _media_of_keys(
    name: str, mask: Tensor, row_mask: Tensor | None, k: Tensor, given: dict[str, Any]
) -> dict[str, Any]:
    """media_attention's arguments from a mask over keys, every key a medium. Where row_mask is False a row is empty."""
    if any(value is not None for value in given.values()):
        raise ValueError(f"{name}: media_lo, media_hi, tokens_per_media and media_len must be None beside a mask")
    if row_mask is not None:
        mask = torch.where(row_mask[:, None, :, None], mask if mask.dtype == torch.bool else mask == 0, False)
    lo, hi, length = intervals(name, mask, k.shape[0], k.shape[2])
    return {"media_lo": lo, "media_hi": hi, "tokens_per_media": 1, "media_len": length}


def _known_empty(empty: str) -> str:
    if empty not in ("zero", "all"):
        raise ValueError(f"MllamaCrossAttentionDecoderLayer: empty must be 'zero' or 'all'; got {empty!r}")
    return empty
