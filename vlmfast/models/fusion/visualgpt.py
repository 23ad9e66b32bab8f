"""VisualGPT: Chen et al. 2022, "VisualGPT: Data-efficient Adaptation of Pretrained Language Models for Image
Captioning" (2102.10407).

Features f of an image's regions, or the tokens of an image tower, go through three encoder layers of width D; the
states of all of them are kept, and every block of a GPT-2 attends to each::

    x_0 = LN(Dropout(GELU(Linear(W, D)(f))))            # (R, D)
    x_i = layer_i(x_(i-1)), i = 1, 2, 3                 # norm after attention and after the ReLU MLP
    a = h + SelfAttention(ln_1(h))
    e_i = CrossAttention(ln_1(a), ln_1(x_i))            # one cross-attention for all i, with the norm of the text
    s_i = sigmoid(W_i [a, e_i] + b_i)                   # (D,), a gate for each number
    a' = sum over i of (s_i [s_i > tau] a + (1 - s_i) [1 - s_i > tau] e_i) / sqrt(3)
    h' = a' + MLP(ln_2(a'))

There is no residual around the cross-attention: the gate is the only way for a. [.] is a constant for the gradient, so
that a gate that is shut has none, while the other one, open as tau < 1/2, moves s until it opens again (the
self-resurrecting activation unit). The loss is that of `vlmfast.models.captioner`, then perhaps that of
`vlmfast.models.self_critical`.

Everything is trained but the detector, or a pretrained image tower in its place, which is frozen. The GPT-2 begins from
a checkpoint of transformers; encoder, cross-attention and gates are new.

Departures from the public code (Vision-CAIR/VisualGPT):

- Its mask of the regions tests whether features are 0 after a norm, so that it hides some real regions and no padding.
  Here the collator says which regions are padding.
- It computes dropout of the attention's weights and then reads those without. Here GPT-2 has its dropout, on what a
  layer adds; the cross-attention has it on its output.
- It begins captions with "<?", and pads with "+=", which can then not be predicted. Here the tokenizer's own begin and
  end tokens are used, and pads are masked.
- Its command line has tau = 0, where no gate is ever shut. Here tau is the paper's 0.2.
- It leaves out repeated words of what was generated before scoring it. Here captions are scored as they are.
- Its encoder's MLP is 2048 wide at D = 768. Here it is 8/3 D, which is the same there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from vlmfast.models.captioner import Captioner, CrossGPT2
from vlmfast.models.captioner_config import CaptionerConfig, CaptionerOptions
from vlmfast.nn import SelfResurrectingGate
from vlmfast.nn._attention import attend, key_bias, merge_heads, split_heads
from vlmfast.nn.transformers_cross_attention import GPT2CrossAttention


class VisualGPTConfig(CaptionerConfig):
    """CaptionerConfig with the encoder's layers and the gate's threshold.

    Args:
        encoder_layers: of the encoder; the decoder reads the states of each.
        encoder_dropout: of the encoder.
        tau: below it a gate is shut, in [0, 1/2).
        Others as CaptionerConfig.
    Raises:
        ValueError: text_config is not of a GPT-2, a number is not positive, or tau or encoder_dropout out of range.
    """

    model_type = "visualgpt"

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        encoder_layers: int = 3,
        encoder_dropout: float = 0.1,
        tau: float = 0.2,
        **kwargs: Any,
    ) -> None:
        self.encoder_layers = encoder_layers
        self.encoder_dropout = encoder_dropout
        self.tau = tau
        super().__init__(vision_config, text_config, **kwargs)
        self.positive("encoder_layers")
        for name, bound in (("tau", 0.5), ("encoder_dropout", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < bound:
                raise ValueError(f"{name}: expected a number in [0, {bound}), got {value!r}")
        self.with_cross_attention()


@dataclass
class VisualGPTOptions(CaptionerOptions):
    """CaptionerOptions with the gate's threshold."""

    tau: float = field(default=0.2, metadata={"help": "Gates below it are shut, from 0 to below 0.5."})

    new_model: ClassVar[tuple[str, ...]] = (*CaptionerOptions.new_model, "tau")


class VisualGPTModel(Captioner):
    """A GPT-2 that reads an image at three levels through a self-resurrecting gate; see the top of this file."""

    config: VisualGPTConfig
    config_class = VisualGPTConfig
    paper = "Chen et al. 2022 (2102.10407)"
    Options = VisualGPTOptions
    freezes_vision = True
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-4, "adam_beta2": 0.999, "adam_epsilon": 1e-8}

    def add_parts(self, width: int) -> None:
        text, config = self.config.text_config, self.config
        self.project = nn.Linear(width, text.hidden_size)
        self.dropout = nn.Dropout(config.encoder_dropout)
        self.norm = nn.LayerNorm(text.hidden_size)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(
                text.hidden_size,
                text.num_attention_heads,
                8 * text.hidden_size // 3,
                dropout=config.encoder_dropout,
                batch_first=True,
            )
            for _ in range(config.encoder_layers)
        )
        self.decoder = VisualGPT2(text, config.encoder_layers, config.tau)

    def encode(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """The states of all layers, one beside the other, (B, R, levels * D)."""
        states = self.norm(self.dropout(F.gelu(self.project(features), approximate="tanh")))
        # An image without regions attends to its padding, since a softmax over nothing is NaN; the decoder sees none.
        padding = None if mask is None else (mask == 0) & (mask != 0).any(1, keepdim=True)
        levels = []
        for layer in self.encoder:
            states = layer(states, src_key_padding_mask=padding)
            levels.append(states)
        return torch.cat(levels, -1)

    @classmethod
    def settings(cls, options: Any) -> dict[str, Any]:
        return {"tau": options.tau}


class VisualGPT2(CrossGPT2):
    """GPT-2 with VisualGPT's blocks.

    Args:
        config: of a GPT-2 with add_cross_attention.
        levels: of the encoder; encoder_hidden_states (B, R, levels * D) hold them one beside the other.
        tau: as `vlmfast.nn.SelfResurrectingGate`.
    """

    def __init__(self, config: Any, levels: int, tau: float) -> None:
        super().__init__(config)
        blocks = (VisualGPTBlock(config, index, levels, tau) for index in range(config.num_hidden_layers))
        self.transformer.h = nn.ModuleList(blocks)
        self.post_init()


class VisualGPTBlock(GPT2Block):
    """GPT-2's block with `crossattention` and `cross_gate` between self-attention and MLP.

    Args:
        config, layer_idx: transformers', with add_cross_attention.
        levels, tau: as `VisualGPT2`.
    """

    def __init__(self, config: Any, layer_idx: int, levels: int, tau: float) -> None:
        super().__init__(config, layer_idx)
        del self.ln_cross_attn
        self.levels = levels
        self.crossattention = LevelCrossAttention(config, layer_idx=layer_idx)
        self.cross_gate = SelfResurrectingGate(config.hidden_size, levels, tau)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (B, L, D) after the block; arguments as of GPT2Block, encoder_hidden_states as VisualGPT2."""
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states: expected the encoder's levels, got None")
        found, _ = self.attn(
            self.ln_1(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        text = hidden_states + found
        visual = self.crossattention(
            self.ln_1(text), lambda: self._keys_from(encoder_hidden_states), past_key_values, encoder_attention_mask
        )
        mixed = self.cross_gate(text, visual)
        added: Tensor = mixed + self.mlp(self.ln_2(mixed))
        return added

    def _keys_from(self, encoder_hidden_states: Tensor) -> Tensor:
        normed: Tensor = self.ln_1(encoder_hidden_states.unflatten(-1, (self.levels, -1)))
        return normed


class LevelCrossAttention(GPT2CrossAttention):
    """GPT-2's cross-attention to several levels at once: one weight, queries computed once.

    Keys and values of a level are heads of their own, so that a cache holds all levels of a layer.
    """

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, levels: Any, past_key_values: Any = None, mask: Tensor | None = None
    ) -> Tensor:
        """What the text finds at each level, (B, levels, L, D).

        Args:
            hidden_states (B, L, D).
            levels: gives (B, R, levels, D); not called where the cache holds their keys.
            past_key_values: an EncoderDecoderCache; keys and values are computed once and kept at layer_idx.
            mask: over the R keys, as transformers makes it.
        """
        filled = past_key_values is not None and past_key_values.is_updated.get(self.layer_idx)
        if filled:
            layer = past_key_values.cross_attention_cache.layers[self.layer_idx]
            k, v = layer.keys, layer.values
        else:
            states = levels()
            heads = self.num_heads * states.shape[2]
            k, v = (split_heads(part.flatten(2), heads) for part in self.c_attn(states).chunk(2, -1))
            if past_key_values is not None:
                k, v = past_key_values.cross_attention_cache.update(k, v, self.layer_idx)
                past_key_values.is_updated[self.layer_idx] = True
        count = k.shape[1] // self.num_heads
        q = split_heads(self.q_attn(hidden_states), self.num_heads).repeat(1, count, 1, 1)
        bias = key_bias("LevelCrossAttention", mask, q.shape[0], k.shape[2])
        found = attend(q, k, v, key_bias=bias, scale=self.head_dim**-0.5)
        each: Tensor = self.c_proj(merge_heads(found).unflatten(-1, (count, -1)))
        return self.resid_dropout(each).transpose(1, 2)
