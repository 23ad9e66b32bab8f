"""MAGiC: Su et al. 2022, "Language Models Can See: Plugging Visual Controls in Text Generation" (2205.02655).

A language model that has read texts alone, and a model that compares images with texts, such as CLIP, neither of which
is trained on pairs for this. Each token x of a text is the best of the k likeliest, V::

    x = argmax over v in V of (1 - alpha) p(v | x_<t) - alpha max_{j<t} cos(h_v, h_j) + beta f(v)
    f = softmax over V of scale * cos(image, text of [x_<t, v])

with p the probability among all tokens, h the last hidden states, which the output head reads, and scale the
exp(logit_scale) of CLIP. The context j is all that was read, the begin token and the prompt included. CLIP reads what
was generated, its last `clip_tokens` tokens, without the prompt. beta = 0 is contrastive search, alpha = 0 as well
greedy search.

`vlmfast train magic` adapts the language model to captions, or to other texts, before. Images are not read. The loss is
SimCTG's (Su et al. 2022, 2202.06417), whose second term spreads the states that the search compares::

    -mean over l of log p(y_l | y_<l)  +  (1 / Z) sum over texts, i != j of max(0, margin - 1 + cos(h_i, h_j))

Z is the number of ordered pairs of tokens in the batch, of all processes. Texts have a begin and an end token. The
language model is trained, CLIP is frozen and not even run.

Departures from the public code (yxuansu/MAGIC):

- There keys and values of the prefix are copied k times. Here the candidates stand in one row behind one copy:
  `vlmfast.models.training_free.magic_search`.
- There images come one at a time. Here a batch goes on together; a text does not depend on the others.
- There a fixed number of tokens is generated, and cut at the end token. Here the search ends once every text of a batch
  has its end, which gives the same.
- There GPT-2 gets tokens of its own for begin and end. Here a tokenizer's own are used where it has them, which may be
  one and the same, as GPT-2's.
- Any model of MODELS with features of images and texts and a logit_scale stands for CLIP, with its own tokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple
from typing_extensions import Self

from vlmfast.data import Collator, Transform, load_tokenizer
from vlmfast.distributed import gather_scalars, rank_and_world_size
from vlmfast.models import model_class, model_type
from vlmfast.models.checkpoints import find, find_tokenizer, load
from vlmfast.models.contract import Pretrainable
from vlmfast.models.language_model import (
    check_language_model,
    last_hidden_states,
    load_language_model,
    new_language_model,
    output_head,
    small_gpt2,
)
from vlmfast.models.training_free.magic_batches import IGNORED, TextCollator
from vlmfast.models.training_free.magic_config import DECODING, MAGiCConfig, MAGiCOptions
from vlmfast.models.training_free.magic_search import Prefix, check_candidates, degeneration, simctg
from vlmfast.nn.linear_cross_entropy import language_model_loss

CLIP_FOLDER = "clip"
TEXTS = 1024  # that CLIP reads at a time


@dataclass
class MAGiCOutput(ModelOutput):
    """What MAGiC returns.

    Attributes:
        loss (): float32, where there are labels: both terms.
        hidden_states (B, L, D): what the output head reads.
    """

    loss: Tensor | None = None
    hidden_states: Tensor | None = None


class MAGiCModel(Pretrainable, PreTrainedModel):
    """A language model and CLIP, joined by a search; see the top of this file.

    Args:
        config: says what is made anew.
        language_model, clip: trained ones, in the place of new ones.

    Attributes:
        tokenizer, clip_tokenizer: of the two; `generate` needs both where there is a clip. Checkpoints hold them.
    """

    config: MAGiCConfig
    config_class = MAGiCConfig
    base_model_prefix = ""
    Options: ClassVar[type[MAGiCOptions]] = MAGiCOptions
    strategy = "no training"
    paper = "Su et al. 2022 (2205.02655)"
    tasks = ("captioning",)
    training_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 2e-5, "weight_decay": 0.0}
    special_tokens: ClassVar[dict[str, str]] = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
    }
    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # so that the Trainer says how many tokens are predicted
    _supports_sdpa = True
    _supports_attention_backend = True
    language_model: Any
    clip: Any

    def __init__(
        self, config: MAGiCConfig, language_model: PreTrainedModel | None = None, clip: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        config.check()
        real = torch.empty(0).device.type != "meta"
        # What is trained already is put in once transformers has dealt with the rest.
        self.language_model = nn.Module() if language_model is not None else new_language_model(config.text_config)
        self.clip = None
        if config.clip_config is not None:
            cls = model_class(config.clip_config.model_type)
            self._check_clip(cls)
            self.clip = nn.Module() if clip is not None else cls(config.clip_config)
        self.post_init()
        if language_model is not None:
            self.language_model = language_model
            tied = getattr(language_model, "all_tied_weights_keys", None) or {}
            self.all_tied_weights_keys.update({f"language_model.{k}": f"language_model.{v}" for k, v in tied.items()})
        if clip is not None:
            self.clip = clip
        if real:
            check_language_model("language_model", self.language_model)
            check_candidates("language_model", self.language_model)
        self.tokenizer: Any = None
        self.clip_tokenizer: Any = None
        self.freeze()

    @staticmethod
    def _check_clip(cls: Any) -> None:
        missing = [name for name in ("get_image_features", "get_text_features") if not hasattr(cls, name)]
        if missing or "logit_scale" not in getattr(cls, "scalars", ()):
            raise ValueError(
                f"clip_config: expected a model with features of images and texts and a logit_scale, got {cls.__name__}"
            )

    @classmethod
    def build(cls, options: Any, tokenizer: Any) -> Self:
        """As Pretrainable's; a model that a config file makes has the tokenizers that the options name."""
        model = super().build(options, tokenizer)
        model.tokenizer = tokenizer
        if model.clip is not None and model.clip_tokenizer is None:
            model.clip_tokenizer = find_tokenizer(options.clip_tokenizer or options.clip)
        return model

    @classmethod
    def create(cls, options: Any, tokenizer: Any, **overrides: Any) -> Self:
        """A new model from the options."""
        settings = {
            "start_token_id": tokenizer.bos_token_id,
            "end_token_id": tokenizer.eos_token_id,
            **DECODING[options.decoding],
        }
        language = clip = None
        if options.language_model:
            language = load_language_model(options.language_model)
            settings["text_config"] = language.config
        else:
            settings["text_config"] = small_gpt2(tokenizer, options.text_width, options.text_layers)
        if options.clip:
            clip = load(model_class(model_type(options.clip)), find(options.clip))
            if getattr(vision := getattr(clip.config, "vision_config", clip.config), "image_size", None) is None:
                vision.image_size = options.image_size  # of a tower that takes any
            settings["clip_config"] = clip.config
        else:
            settings |= {"beta": 0.0, "image_size": options.image_size}
        made = cls(cls.config_class(**{**settings, **overrides}), language, clip)
        made.image_size(options)  # refuses a size that is not clip's
        return made

    def frozen_parts(self) -> tuple[nn.Module, ...]:
        """CLIP."""
        return () if self.clip is None else (self.clip,)

    @property
    def max_text_length(self) -> int:
        """Tokens of a text at most."""
        return int(getattr(self.config.text_config, "max_position_embeddings", None) or 2**20)

    def get_input_embeddings(self) -> nn.Module:
        """Of the language model's tokens."""
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    def resize_vocabulary(self, size: int) -> None:
        """Makes room for tokens at the end of the language model's."""
        self.language_model.resize_token_embeddings(size)
        self.config.text_config.vocab_size = size

    # Checkpoints: with both tokenizers, as the search goes from the one's tokens to the other's

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As transformers', and both tokenizers, CLIP's in a folder `clip`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)
        if self.clip_tokenizer is not None:
            self.clip_tokenizer.save_pretrained(Path(save_directory, CLIP_FOLDER))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers', and the tokenizers of a folder."""
        found = super().from_pretrained(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        folder = Path(model.config.name_or_path)
        if (folder / "tokenizer_config.json").exists():
            model.tokenizer = load_tokenizer(str(folder))
        if (folder / CLIP_FOLDER / "tokenizer_config.json").exists():
            model.clip_tokenizer = load_tokenizer(str(folder / CLIP_FOLDER))
        model.eval()
        return found

    # Adaptation

    def transform(self, options: Any, *, train: bool) -> Transform | None:  # type: ignore[override]
        """Of images; None in training, which reads none."""
        return None if train else super().transform(options, train=False)

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """Texts with begin and end, and their labels."""
        return TextCollator(tokenizer, self._token("start_token_id"), self._token("end_token_id"), options.max_length)

    def prompt_collator(self, options: Any, tokenizer: Any) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """Images, and prompts behind the begin token."""
        return TextCollator(tokenizer, self._token("start_token_id"))

    def _token(self, name: str) -> int:
        value = getattr(self.config, name)
        if value is None:
            raise ValueError(f"{name}: expected a token, got None; set it in the config")
        return int(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MAGiCOutput:
        """The loss where there are labels, without the logits.

        Args:
            input_ids (B, L): int64.
            attention_mask (B, L): 0 for padding.
            labels (B, L): the token of each place that is predicted from those before it, or -100.
            num_items_in_batch: what the sum over tokens is divided by; None: how many are predicted here.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embeddings = self.get_input_embeddings()(input_ids)
        hidden = last_hidden_states(self.language_model, embeddings, mask, (mask.cumsum(1) - 1).clamp(min=0))
        loss = None
        if labels is not None:
            head = output_head(self.language_model)
            loss = language_model_loss(hidden, head, labels, num_items_in_batch=num_items_in_batch)
            loss = loss + self._contrast(hidden, mask, labels, num_items_in_batch)
        return MAGiCOutput(loss=loss, hidden_states=hidden)

    def _contrast(self, hidden: Tensor, mask: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """SimCTG's second term, in the unit of the first.

        Where the trainer sums over processes and accumulated batches, this batch's mean has the share of its tokens.
        """
        total, pairs = simctg(hidden, mask, self.config.margin)
        if num_items is None:
            return total / pairs.clamp(min=1)
        counts = torch.stack([pairs, (labels[:, 1:] != IGNORED).sum()])
        if rank_and_world_size()[1] > 1:
            counts = gather_scalars(counts).sum(dim=0)
        return total / counts[0].clamp(min=1) * counts[1] / num_items

    # The search

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        **settings: Any,
    ) -> Tensor:
        """Token ids (B, L) int64 of what follows, at most `config.length`; each row's end token stands behind its end.

        Args:
            input_ids, attention_mask (B, L): prompts with their begin token, and padding on the left.
            pixel_values: of the images, as the clip's get_image_features takes them; not read where beta is 0.
            max_new_tokens: at most; None is the config's length.
            settings: none; the search has its own.
        Raises:
            ValueError: a setting is given, images or tokenizers are missing, or the texts are longer than the language
                model's positions.
        """
        if settings:
            raise ValueError(f"{', '.join(settings)}: the search has its own settings: k, alpha, beta of the config")
        config = self.config
        length = config.length if max_new_tokens is None else min(config.length, max_new_tokens)
        if input_ids.shape[1] + length > self.max_text_length:
            raise ValueError(
                f"input_ids: expected at most the language model's {self.max_text_length} positions for the prompt and "
                f"{length} new tokens, got a prompt of {input_ids.shape[1]}"
            )
        image = self._image(pixel_values, len(input_ids)) if config.beta else None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        head, end = output_head(self.language_model), config.end_token_id
        prefix = Prefix(self.language_model, input_ids, mask)
        said = input_ids.new_zeros(len(input_ids), 0)
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for _ in range(length):
            likely = head(prefix.states[:, -1]).float().softmax(dim=-1).topk(min(config.k, self.vocabulary), dim=1)
            tokens = likely.indices
            states = prefix.candidates(tokens)
            scores = (1 - config.alpha) * likely.values
            scores = scores - config.alpha * degeneration(states, prefix.states, prefix.mask)
            if image is not None:
                scores = scores + config.beta * self.image_scores(image, said, tokens)
            choice = scores.argmax(dim=1)
            prefix.take(states, choice)
            said = torch.cat([said, tokens.gather(1, choice[:, None])], dim=1)
            if end is not None:
                ended |= said[:, -1] == end
                if ended.all():
                    break
        if end is None:
            return said
        behind = (said == end).cumsum(dim=1) > 0
        return said.masked_fill(behind, end)

    def image_scores(self, image: Tensor, said: Tensor, tokens: Tensor) -> Tensor:
        """f (B, k): how much more an image is like what was said with one token than with the others; sums to 1.

        Args:
            image (B, D): of the clip's get_image_features.
            said (B, t): what was generated so far.
            tokens (B, k): candidates.
        """
        k = tokens.shape[1]
        whole = torch.cat([said.repeat_interleave(k, dim=0), tokens.reshape(-1, 1)], dim=1)[
            :, -self.config.clip_tokens :
        ]
        texts = self.tokenizer.batch_decode(whole.tolist(), skip_special_tokens=True)
        features = []
        collator = Collator(self.clip_tokenizer, max_length=self.clip.max_text_length)
        for start in range(0, len(texts), TEXTS):
            read = {
                name: value.to(image.device) for name, value in collator.tokens(texts[start : start + TEXTS]).items()
            }
            features.append(self.clip.get_text_features(**read))
        cosines = torch.einsum("bd,bkd->bk", image.float(), torch.cat(features).float().unflatten(0, (-1, k)))
        return (self.clip.logit_scale.float().exp() * cosines).softmax(dim=1)

    def _image(self, pixel_values: Tensor | None, count: int) -> Tensor:
        if pixel_values is None or len(pixel_values) != count:
            got = "none" if pixel_values is None else len(pixel_values)
            raise ValueError(f"pixel_values: expected an image for each of {count} prompts, got {got}")
        if self.tokenizer is None or self.clip_tokenizer is None:
            name = "tokenizer" if self.tokenizer is None else "clip_tokenizer"
            raise ValueError(f"{name}: expected the model to have one, got None; assign it")
        features: Tensor = self.clip.get_image_features(pixel_values)
        return F.normalize(features.float(), dim=-1)

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # else transformers passes over modules without parameters of their own
