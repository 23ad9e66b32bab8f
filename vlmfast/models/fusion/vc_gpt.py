"""VC-GPT: Luo et al. 2022, "A Frustratingly Simple Approach for End-to-End Image Captioning" (2201.12723).

A language model of width D reads the caption without the image; its last hidden states h_G (L, D) are those that it has
without any image. New decoder layers on top of them attend to the tokens v of an image tower::

    h_fuse = layers(h_G, v)                             # causal self-attention, cross-attention to v, MLP
    logits = W_G h_G + W_fuse h_fuse                    # self-ensemble; W_G begins as the embedding of tokens

A linear ensemble of logits, with one cross-entropy of their sum, which is computed as one product of [h_G, h_fuse] with
[W_G, W_fuse] and without the logits. Two of the paper's ablations are settings:

- `fusion="plain"`: logits = W_fuse h_fuse, "without self-ensemble";
- `fusion="vanilla"`: no layers on top; cross-attention inside of each of a GPT-2's blocks, as in transformers'
  VisionEncoderDecoderModel.

All parts are trained. Tokens of another width than D go through one linear map.

There is no public code, and the text of the paper leaves open what is a setting here: `fusion_layers` is how many
layers there are; they are GPT-2's, with a norm before each part and one at the end, and the language model's number of
heads; `tie_language_head` keeps W_G the embedding of tokens instead of a copy that is trained apart. The language model
may be any causal one of transformers whose logits are linear in its last hidden states, but for "vanilla".
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, GPT2Config, GPT2Model, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlmfast.models.captioner import Captioner, CrossGPT2
from vlmfast.models.captioner_config import CaptionerConfig, CaptionerOptions
from vlmfast.models.language_model import check_language_model, new_language_model, output_head
from vlmfast.nn.transformers_cross_attention import GPT2CrossAttention

FUSIONS = ("self_ensemble", "plain", "vanilla")


class VCGPTConfig(CaptionerConfig):
    """CaptionerConfig with the layers on top of the language model.

    Args:
        fusion: "self_ensemble", "plain" or "vanilla".
        fusion_layers: how many layers there are; none in "vanilla".
        tie_language_head: whether W_G is the language model's own output head, which may be tied to its embedding of
            tokens; else it is a copy. Only of "self_ensemble".
        Others as CaptionerConfig.
    Raises:
        ValueError: fusion is another, fusion_layers not positive, or text_config not of a GPT-2 in "vanilla".
    """

    model_type = "vc_gpt"

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        fusion: str = "self_ensemble",
        fusion_layers: int = 6,
        tie_language_head: bool = False,
        **kwargs: Any,
    ) -> None:
        self.fusion = fusion
        self.fusion_layers = fusion_layers
        self.tie_language_head = tie_language_head
        super().__init__(vision_config, text_config, **kwargs)
        self.positive("fusion_layers")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion: expected one of {', '.join(FUSIONS)}, got {fusion!r}")
        if fusion == "vanilla":
            self.with_cross_attention()
        elif fusion == "self_ensemble" and not tie_language_head:
            self.text_config.tie_word_embeddings = False


@dataclass
class VCGPTOptions(CaptionerOptions):
    """CaptionerOptions with the layers on top of the language model."""

    fusion: str = field(
        default="self_ensemble",
        metadata={"help": "self_ensemble; plain, without it; or vanilla, cross-attention inside of a GPT-2."},
    )
    fusion_layers: int = field(default=2, metadata={"help": "New layers on top of the language model."})

    new_model: ClassVar[tuple[str, ...]] = (*CaptionerOptions.new_model, "fusion", "fusion_layers")

    def check(self) -> None:
        super().check()
        if self.fusion not in FUSIONS:
            raise ValueError(f"--fusion: expected one of {', '.join(FUSIONS)}, got {self.fusion!r}")
        if self.fusion == "vanilla":
            self.refuse(("fusion_layers",), "--fusion vanilla, which has no layers on top")


class VCGPTModel(Captioner):
    """Layers that read the image on top of a language model that does not; see the top of this file."""

    config: VCGPTConfig
    config_class = VCGPTConfig
    paper = "Luo et al. 2022 (2201.12723)"
    Options = VCGPTOptions
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-4, "adam_beta2": 0.999, "adam_epsilon": 1e-8}

    def add_parts(self, width: int) -> None:
        text = self.config.text_config
        if self.config.fusion == "vanilla":
            self.decoder = CrossGPT2(text)
            hidden = int(text.hidden_size)
        else:
            self.decoder = FusionDecoder(text, self.config.fusion_layers, ensemble=self.config.fusion != "plain")
            hidden = self.decoder.width
        self.project = nn.Identity() if width == hidden else nn.Linear(width, hidden)

    def encode(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """The tokens, (B, R, D)."""
        states: Tensor = self.project(features)
        return states

    def frozen_parts(self) -> tuple[nn.Module, ...]:
        """As Captioner's; and a language model's own output head in "plain", where nothing reads it."""
        unread = self.decoder.unread() if isinstance(self.decoder, FusionDecoder) else ()
        return (*super().frozen_parts(), *unread)

    @classmethod
    def settings(cls, options: Any) -> dict[str, Any]:
        return {"fusion": options.fusion, "fusion_layers": options.fusion_layers}


class FusionDecoder(PreTrainedModel, GenerationMixin):
    """A language model and decoder layers on top of it that attend to an image.

    Args:
        config: of the language model.
        layers: on top.
        ensemble: whether the language model's own logits are added.
    Raises:
        ValueError: no such language model can be made, its logits are not linear in its last hidden states, or its
            number of heads does not divide their width.
    """

    config: Any
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: Any, layers: int, *, ensemble: bool) -> None:
        super().__init__(deepcopy(config))
        self.ensemble = ensemble
        self.language_model: Any = new_language_model(config)
        if torch.empty(0).device.type != "meta":
            check_language_model("text_config", self.language_model)
        head: Any = output_head(self.language_model)
        vocabulary, self.width = head.weight.shape
        self.fusion: Any = GPT2Model(
            GPT2Config(
                vocab_size=1,
                n_positions=1,
                n_embd=self.width,
                n_layer=layers,
                n_head=config.num_attention_heads,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                add_cross_attention=True,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        self.fusion.wte = None
        self.fusion.wpe = NoPositions()
        for block in self.fusion.h:
            block.crossattention = GPT2CrossAttention.from_module(block.crossattention)
        self.head = nn.Linear(self.width, vocabulary, bias=False)
        self.post_init()
        if torch.empty(0).device.type != "meta":
            self._begin_as_embedding()

    @torch.no_grad()
    def _begin_as_embedding(self) -> None:
        head: Any = output_head(self.language_model)
        embedding = self.language_model.get_input_embeddings()
        if head.weight is not embedding.weight and head.weight.shape == embedding.weight.shape:
            head.weight.copy_(embedding.weight)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.02)

    @classmethod
    def is_custom_code(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Module:
        """Of the language model's tokens."""
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def take(self, language_model: PreTrainedModel) -> None:
        """The weights of a language model of the same config; W_G those of its output head."""
        self.language_model.load_state_dict(language_model.state_dict())

    def heads(self) -> tuple[nn.Module, ...]:
        """W_G, where there is an ensemble, and W_fuse."""
        return (output_head(self.language_model), self.head) if self.ensemble else (self.head,)

    def unread(self) -> tuple[nn.Module, ...]:
        """The language model's output head, where it is not its embedding of tokens too and nothing reads it."""
        head = output_head(self.language_model)
        tied = head.weight is self.get_input_embeddings().weight
        return () if self.ensemble or tied else (head,)

    def states(self, input_ids: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        """What the heads read: h_G, where there is an ensemble, and h_fuse, (B, L, D) each."""
        return self._states(input_ids, **inputs)[0]

    def _states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
    ) -> tuple[tuple[Tensor, ...], Any]:
        below = above = None
        if use_cache:
            if not isinstance(past_key_values, EncoderDecoderCache):
                own = past_key_values if past_key_values is not None else DynamicCache(config=self.config)
                past_key_values = EncoderDecoderCache(own, EncoderDecoderCache(DynamicCache(), DynamicCache()))
            below, above = past_key_values.self_attention_cache, past_key_values.cross_attention_cache
        base: Any = self.language_model.base_model
        takes = {} if position_ids is None or not _reads_positions(base) else {"position_ids": position_ids}
        text = base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=below,
            use_cache=bool(use_cache),
            **takes,
        ).last_hidden_state
        fused = self.fusion(
            inputs_embeds=text,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=above,
            use_cache=bool(use_cache),
        ).last_hidden_state
        return (text, fused) if self.ensemble else (fused,), past_key_values

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V), for generation; arguments as of transformers' GPT2LMHeadModel."""
        states, cache = self._states(
            input_ids,
            attention_mask,
            position_ids,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            use_cache,
        )
        last = slice(-logits_to_keep if logits_to_keep else None, None)
        parts = [head(state[:, last]) for head, state in zip(self.heads(), states, strict=True)]
        return CausalLMOutputWithPast(logits=torch.stack(parts).sum(0), past_key_values=cache)


class NoPositions(nn.Module):
    """In the place of an embedding of positions: the language model below has its own."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device)


def _reads_positions(base: nn.Module) -> bool:
    return "position_ids" in signature(base.forward).parameters
