"""Causal language models of transformers: made of a config, or loaded from a folder, a name on a hub or a GGUF file."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from vlmfast.data.text import gguf_file
from vlmfast.models.checkpoints import find, load_auto, making, reading
from vlmfast.models.contract import eval_mode

POSITIONS = 512  # of a small GPT-2: four examples with their images, and a question


def small_gpt2(tokenizer: Any, width: int, layers: int) -> transformers.GPT2Config:
    """A GPT-2's config from a few numbers: heads of 64, as many tokens as the tokenizer has.

    Raises:
        ValueError: the width is not a multiple of 64.
    """
    if width <= 0 or width % 64:
        raise ValueError(f"text_width: expected a positive multiple of 64 (the head size), got {width}")
    return transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def new_language_model(config: Any, name: str = "text_config") -> PreTrainedModel:
    """A language model of random weights.

    Raises:
        ValueError: transformers has no causal language model of the type, or `check_sizes` refuses the config.
    """
    return making(name, config, lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=False))


def load_language_model(source: str) -> PreTrainedModel:
    """A pretrained language model, float32, in eval mode; all of its weights are the checkpoint's.

    Args:
        source: a folder that save_pretrained wrote, a name on a hub, or a folder that holds one .gguf file.
    Raises:
        FileNotFoundError: there is no such folder or name; the message has it.
        ValueError: a file is damaged, weights are missing, or the model is not one that reads `inputs_embeds` and
            whose logits are a linear function of its last hidden states.
    """
    name = "language_model"
    gguf = gguf_file(source)
    if gguf is not None:
        with reading(source):
            model = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=gguf, dtype=torch.float32, trust_remote_code=False
            )
        for leftover in ("quantization_config", "_pre_quantization_dtype"):  # the weights are plain numbers by now
            if hasattr(model.config, leftover):
                delattr(model.config, leftover)
    else:
        source = find(source)
        model = load_auto(AutoModelForCausalLM, name, source, dtype=torch.float32)
    # What a checkpoint recommends, such as sampling, is not what a caller who asks for nothing gets.
    tokens = {key: getattr(model.generation_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**tokens)
    check_language_model(f"{name} {source}", model)
    found: PreTrainedModel = model.eval()
    return found


@torch.no_grad()
def check_language_model(name: str, model: PreTrainedModel) -> None:
    """Whether a model's logits are its output embedding of its last hidden states, tried on two tokens.

    Raises:
        ValueError: they are something else, such as capped or scaled; or the model reads no inputs_embeds.
    """
    needed = {"inputs_embeds", "attention_mask"} - signature(model.base_model.forward).parameters.keys()
    if needed:
        raise ValueError(f"{name}: expected a language model that reads {' and '.join(sorted(needed))}")
    embeddings = model.get_input_embeddings()(torch.arange(2, device=model.device)[None])
    mask = torch.ones(1, 2, dtype=torch.long, device=model.device)
    with eval_mode(model):
        expected = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
        found = output_head(model)(last_hidden_states(model, embeddings, mask, mask.cumsum(1) - 1))
    if not torch.allclose(found, expected.to(found.dtype), rtol=1e-3, atol=1e-3):
        kind = model.config.model_type
        raise ValueError(f"{name}: expected logits that are linear in the last hidden states, got {kind!r} with others")


def last_hidden_states(
    model: PreTrainedModel, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor
) -> Tensor:
    """What the output head reads (B, L, D).

    Args:
        inputs_embeds (B, L, D), attention_mask (B, L), position_ids (B, L): as `vlmfast.nn.prefix.assemble` gives them.
            Models without position_ids (ALiBi) count by the mask themselves.
    """
    base = model.base_model
    takes = {"position_ids": position_ids} if "position_ids" in signature(base.forward).parameters else {}
    states: Tensor = base(
        inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False, **takes
    ).last_hidden_state
    return states


def output_head(model: PreTrainedModel) -> nn.Module:
    """The linear layer from hidden states to logits."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"language_model: expected one with output embeddings, got {model.config.model_type!r}")
    return head


def position_limit(config: Any) -> int | None:
    """How many tokens a language model of a config reads at most, None where it does not say."""
    return getattr(config, "max_position_embeddings", None)


def check_length(config: Any, length: int, more: str = "") -> None:
    """ValueError where a language model of a config has fewer positions than `length`.

    Args:
        more: what is counted beside input_ids, for the message.
    """
    most = position_limit(config)
    if most is not None and length > most:
        raise ValueError(f"input_ids: expected at most the language model's {most} positions{more}, got {length}")


def end_tokens(model: PreTrainedModel, stop: int | None) -> list[int]:
    """The tokens that end what is generated: `stop` and the language model's own, each once."""
    own = model.config.get_text_config().eos_token_id
    ends = [stop, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in ends if token is not None))


def stop_token(tokenizer: Any, text: str) -> int:
    """The token that ends a caption: `text`, or the tokenizer's end token where that is empty.

    Raises:
        ValueError: `text` is not one token, or there is no end token.
    """
    if not text:
        if tokenizer.eos_token_id is None:
            raise ValueError("--stop: expected a text, as the tokenizer has no end token")
        return int(tokenizer.eos_token_id)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        # Where a word's first token differs from the same letters within one, as with sentencepiece.
        ids = [
            found for found in [tokenizer.convert_tokens_to_ids(text)] if found not in (None, tokenizer.unk_token_id)
        ]
    if len(ids) != 1:
        raise ValueError(f"--stop: expected a text that is one token of the tokenizer, got {text!r}")
    return int(ids[0])


def absolute(source: str) -> str:
    """A folder by its absolute path, so that a checkpoint finds it from anywhere; other names as they are."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source
