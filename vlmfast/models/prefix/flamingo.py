"""Flamingo: Alayrac et al. 2022, "Flamingo: a Visual Language Model for Few-Shot Learning" (2204.14198).

A Perceiver Resampler makes n tokens v of the states of a frozen image tower, for each image or video. Before every k-th
layer of a frozen language model stands a gated block, through which the states x of text read them::

    x = x + tanh(a) attention(LayerNorm(x), v_phi)      # no key of any other image; zero where there is no image
    x = x + tanh(b) FF(LayerNorm(x))                    # a = b = 0 at first: the language model is then as it was
    loss = -mean over l of log p(y_l | y_<l, v_<=l)

phi is the last image at or before a token. What comes before it reaches the token through the language model's own
attention. Documents have images among their text, each in the place of the token `<image>`; a chunk of text ends with
`<|endofchunk|>`, which is predicted and ends what is generated. Not predicted are `<image>`, text before the first
image, and text between the end of a chunk and the next image.

Trained are resampler, blocks and the embeddings of the two tokens. These stand beside the language model's embeddings,
which stay as they are; where its output embeddings are not its input embeddings, `<|endofchunk|>` has one of its own.
A language model or an image tower that is made new is trained; --language-model and --vision-tower make it the paper's.

In decoding, keys and values of the images are computed once for each sample, and its beams share them.

Departures from the paper:

- The feed-forward has GELU, as in open_flamingo and flamingo-pytorch; the paper's squared ReLU differs.
- Keys and values are not normalised before attention, as in all public code; the resampler ends in a LayerNorm.
- Videos are `pixel_values` of five dims; the embeddings of frames (`max_frames`) are not interpolated to more frames.
- The paper adds up gradients of several data sets, each with a weight. Here the `weight` of a record weighs its losses,
  so that a batch may mix data sets; the weights enter the sum of the mean, not its count.
- What the paper scores where a text reads the next image (`--p-next`) is not said. Here it is the text before the last
  image, and it is drawn for documents whose text begins before their first image.

From open_flamingo, whose checkpoints `load_open_flamingo` reads:

- Its `use_cached_media` is decided for a whole batch at once, which changes a sample by what others are; here each
  sample has its own place.
- It trains all rows of the embeddings and sets the gradient of all but two to zero, which weight decay does not know.
- Its output embedding of `<|endofchunk|>` is random and not trained where a language model's are not tied.
- `<image>` has no logit here, and is never generated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple
from typing_extensions import Self

from vlmfast.models.language_model import (
    check_length,
    end_tokens,
    last_hidden_states,
    output_head,
    position_limit,
)
from vlmfast.models.prefix.flamingo_batches import DocumentCollator
from vlmfast.models.prefix.flamingo_config import END_TOKEN, IMAGE_TOKEN, FlamingoConfig, FlamingoOptions
from vlmfast.models.prefix.flamingo_parts import (
    FlamingoParts,
    Reader,
    decoder_layers,
    from_open_flamingo,
    losses_with_end,
    rows_of_media,
)
from vlmfast.models.prefix_model import PrefixModel, PrefixOutput
from vlmfast.nn import GatedCrossAttentionBlock, PerceiverResampler
from vlmfast.nn.prefix import IGNORED, compact, positions
from vlmfast.ops import media_index


class FlamingoModel(PrefixModel):
    """Images and text in any order, read by a frozen language model; see the top of this file."""

    config: FlamingoConfig
    config_class = FlamingoConfig
    paper = "Alayrac et al. 2022 (2204.14198)"
    Options = FlamingoOptions
    tasks = ("captioning", "vqa")
    reads = "tokens"
    extra_tokens = (END_TOKEN, IMAGE_TOKEN)  # in open_flamingo's order
    example_end = END_TOKEN
    training_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 1e-4,
        "weight_decay": 0.1,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "lr_scheduler_type": "constant_with_warmup",
    }
    mapper: FlamingoParts

    def __init__(
        self,
        config: FlamingoConfig,
        language_model: PreTrainedModel | None = None,
        image_tower: tuple[PreTrainedModel, Tensor | None] | None = None,
    ) -> None:
        for name in ("media_token_id", "stop_token_id"):
            if not isinstance(getattr(config, name), int):
                raise ValueError(f"{name}: expected a token, got {getattr(config, name)!r}")
        self._reader = Reader()
        super().__init__(config, language_model, image_tower)
        if language_model is None and config.language_model is None:
            self._put_blocks()

    def new_mapper(self, width: int, embedding_size: int) -> nn.Module:
        config = self.config
        heads: dict[str, Any] = {"heads": config.cross_attention_heads, "dim_head": config.cross_attention_head_size}
        resampler = PerceiverResampler(
            dim=width,
            depth=config.resampler_layers,
            num_latents=config.prefix_length,
            max_num_frames=config.max_frames,
            **heads,
        )
        hidden = config.text_config.hidden_size
        blocks = {layer: GatedCrossAttentionBlock(dim=hidden, dim_visual=width, **heads) for layer in config.layers()}
        tied = bool(getattr(config.text_config, "tie_word_embeddings", True))
        return FlamingoParts(resampler, blocks, embedding_size, tied=tied)

    @classmethod
    def create(cls, options: Any, tokenizer: Any, **overrides: Any) -> Self:
        """A new model from the options. The new tokens' embeddings are drawn as if they were the language model's."""
        unknown = tokenizer.unk_token_id
        ids = [tokenizer.convert_tokens_to_ids(token) for token in cls.extra_tokens]
        if any(i is None or i == unknown for i in ids):
            raise ValueError(f"tokenizer: expected one with the tokens {', '.join(cls.extra_tokens)}, got ids {ids}")
        model = super().create(options, tokenizer, **{"media_token_id": ids[1], **overrides})
        with torch.no_grad():
            known: Tensor = model.get_input_embeddings().weight.float()  # type: ignore[assignment]
            drawn = known.mean(0) + known.std(0) * torch.randn(2, known.shape[1])
            model.mapper.tokens.copy_(drawn)
            if model.mapper.end is not None:
                model.mapper.end.copy_(output_head(model.language_model).weight.float().mean(0))  # type: ignore[operator]
        return model

    @classmethod
    def settings(cls, options: Any) -> dict[str, Any]:
        first = options.cross_attention_first
        return {
            "prefix_length": options.prefix_length,
            "resampler_layers": options.resampler_layers,
            "cross_attention_every": options.cross_attention_every,
            "cross_attention_offset": None if first is None else first - 1,
        }

    # Parts from elsewhere

    def _put_language_model(self, model: PreTrainedModel) -> None:
        super()._put_language_model(model)
        self._put_blocks()

    def _put_blocks(self) -> None:
        """Before the layers of the language model."""
        layers = decoder_layers(self.language_model)
        for name, block in self.mapper.blocks.items():
            layers[int(name)].register_forward_pre_hook(self._reader.hook(int(name), block), with_kwargs=True)

    def load_open_flamingo(self, checkpoint: str | PathLike[str] | Mapping[str, Tensor]) -> None:
        """Takes resampler, blocks and the embeddings of the new tokens of a checkpoint of open_flamingo.

        Args:
            checkpoint: a file that torch.save wrote, or its state dict; with or without "model_state_dict" around it.
        Raises:
            ValueError: weights are missing, are others than this model's, or of another shape; the message names them.
        """
        found: Any = checkpoint
        if not isinstance(checkpoint, Mapping):
            found = torch.load(fspath(checkpoint), map_location="cpu", weights_only=True)
        self.mapper.load_state_dict(
            from_open_flamingo(
                found.get("model_state_dict", found),
                self.mapper,
                media_id=self._new_ids()[0],
                end_id=self._new_ids()[1],
                names=[
                    [
                        f"lang_encoder.{name}.weight"
                        for name, module in self.language_model.named_modules()
                        if module is embedding
                    ]
                    for embedding in (self.get_input_embeddings(), output_head(self.language_model))
                ],
            )
        )

    # What trainer and tasks call

    @property
    def vocabulary(self) -> int:
        """Tokens of the language model, and the two new ones."""
        return 1 + max(self.config.text_config.vocab_size - 1, *self._new_ids())

    def _new_ids(self) -> tuple[int, int]:
        return self.config.media_token_id, self.config.stop_token_id  # type: ignore[return-value]

    @property
    def max_text_length(self) -> int:
        """Tokens of a text at most, beside one image."""
        return (position_limit(self.config.text_config) or 2**20) - 1

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """Documents, or pairs of image and caption; which image a text reads is random in training."""
        return DocumentCollator(
            tokenizer,
            media_id=self._new_ids()[0],
            train=train,
            next_probability=options.p_next,
            positions=position_limit(self.config.text_config),
            max_length=options.max_length,
            stop=self._new_ids()[1],
        )

    def prompt_collator(self, options: Any, tokenizer: Any) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """Images and prompt; several images where `<image>` stands in the caption. Prompts are not cut."""
        return DocumentCollator(
            tokenizer, media_id=self._new_ids()[0], positions=position_limit(self.config.text_config)
        )

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Weight decay of the blocks, gates and norms too, as in open_flamingo, and of matrices of new towers."""
        decayed: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                own = name.startswith("mapper.")
                decays = name.startswith("mapper.blocks.") if own else parameter.ndim > 1
                (decayed if decays else others).append(parameter)
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

    def metrics(self) -> dict[str, float]:
        """Mean size of the gates, of attention and of the feed-forward."""
        blocks = list(self.mapper.blocks.values())
        return {
            name: float(torch.stack([getattr(block, name).detach().tanh().abs() for block in blocks]).mean())
            for name in ("attn_gate", "ff_gate")
        }

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """States of the image tower (N, R, W), or of a video's frames (N, F, R, W); no gradient where it is frozen.

        Args:
            pixel_values: as `PrefixModel.image_features`, with a dim of frames after the first for videos.
        """
        if pixel_values.ndim == 5:
            return super().image_features(pixel_values.flatten(0, 1)).unflatten(0, pixel_values.shape[:2])
        return super().image_features(pixel_values)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        reads_next: Tensor | None = None,
        sample_weights: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> PrefixOutput:
        """The loss where there are labels, without the logits.

        Args:
            input_ids (B, L): int64, with the token `media_token_id` in the place of each image.
            attention_mask (B, L): 0 for pads, wherever they stand; None where there are none.
            labels (B, L): the token of each place that is predicted from those before it, or -100.
            pixel_values, image_features: the images of all rows in the order in which they are read; see
                `image_features`.
            reads_next (B,): bool, whether the text of a row reads the image after it; None: the one before it.
            sample_weights (B,): of each row's losses; None: 1.
            num_items_in_batch: what the sum over tokens is divided by; None: how many are predicted.
        Raises:
            TypeError: input_ids are no integers.
            ValueError: shapes disagree, images are given twice, L is more than the language model's positions, or, on
                a CPU, there are other images than places for them.
        """
        hidden, labels = self._hidden(input_ids, attention_mask, labels, pixel_values, image_features, reads_next)
        loss = None
        if labels is not None:
            losses = self._losses(hidden, labels)
            if sample_weights is not None:
                losses = losses * sample_weights[:, None]
            count = (labels[:, 1:] != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = losses.sum() / (count.to(losses.device) if isinstance(count, Tensor) else count)
        return PrefixOutput(loss=loss, hidden_states=hidden)

    @torch.no_grad()
    def match_scores(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """log p(text | image) (B,) float32, of the tokens that have labels; arguments as `forward`."""
        if labels is None:
            raise ValueError("labels: expected those of `collator`, got None")
        hidden, moved = self._hidden(input_ids, attention_mask, labels, pixel_values, image_features, None)
        assert moved is not None
        return -self._losses(hidden, moved).sum(1)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        *,
        max_new_tokens: int = 30,
        **settings: Any,
    ) -> Any:
        """Token ids (B, L) int64 of what follows, up to the token that ends a chunk; greedy unless told otherwise.

        Args:
            input_ids, attention_mask, pixel_values, image_features: as `forward`, of prompts of any lengths.
            max_new_tokens: at most.
            settings: of transformers' `generate`, such as num_beams.
        Raises:
            TypeError, ValueError: as `forward`; or prompt and new tokens are more than the language model's positions.
        """
        check_length(
            self.config.text_config,
            input_ids.shape[1] + max_new_tokens - 1,
            f" for the prompt and {max_new_tokens} new tokens",
        )
        ids, mask, _ = _padded(input_ids, attention_mask, None, left=True)
        media, counts = self._media(ids, pixel_values, image_features)
        lo, hi, _ = media_index(ids, self._new_ids()[0], num_media=counts)
        settings = {
            "do_sample": False,
            "eos_token_id": end_tokens(self.language_model, self._new_ids()[1]),
            "pad_token_id": self.config.filler_token_id,
            **settings,
        }
        embeddings = self._embed(ids)
        hooks = [
            output_head(self.language_model).register_forward_hook(self._with_end),
            # What stands behind the end of a row may be a token that the language model does not know.
            self.get_input_embeddings().register_forward_pre_hook(_known),
        ]
        try:
            with self._reader.reads(media, lo, hi, self.config.layers()):
                return self.language_model.generate(
                    inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=max_new_tokens, **settings
                )
        finally:
            for hook in hooks:
                hook.remove()

    def _with_end(self, head: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        """The logits, with that of the end of a chunk, and none of an image."""
        media_id, end_id = self._new_ids()
        logits = F.pad(logits, (0, self.vocabulary - logits.shape[-1]), value=-torch.inf)
        logits[..., end_id] = (args[0].float() @ self.mapper.output_embedding().float()).to(logits.dtype)
        logits[..., media_id] = -torch.inf
        return logits

    def _losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """(B, L) float32: place t has the loss of label t + 1."""
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        labels = labels.masked_fill(labels == self._new_ids()[0], IGNORED)
        end = self.mapper.output_embedding()
        head = output_head(self.language_model)
        losses = losses_with_end(hidden.flatten(0, 1), head, end, self._new_ids()[1], labels.flatten())
        return losses.view_as(labels)

    def _hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        pixel_values: Tensor | None,
        image_features: Tensor | None,
        reads_next: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The last hidden states (B, L, D), pads on the right, and the labels in their places."""
        check_length(self.config.text_config, input_ids.shape[-1])
        ids, mask, labels = _padded(input_ids, attention_mask, labels)
        media, counts = self._media(ids, pixel_values, image_features)
        lo, hi, _ = media_index(ids, self._new_ids()[0], num_media=counts)
        if reads_next is not None:
            following = media_index(ids, self._new_ids()[0], mode="next", num_media=counts)
            lo, hi = (torch.where(reads_next[:, None], n, t) for n, t in zip(following[:2], (lo, hi), strict=True))
        with self._reader.reads(media, lo, hi):
            return last_hidden_states(self.language_model, self._embed(ids), mask, positions(mask)), labels

    def _embed(self, ids: Tensor) -> Tensor:
        """Embeddings (B, L, E) of tokens, new ones too."""
        embedding = self.get_input_embeddings()
        size = int(embedding.num_embeddings)  # type: ignore[arg-type]
        found: Tensor = embedding(torch.where(ids < size, ids, 0))
        for token, own in zip(self._new_ids(), self.mapper.tokens.to(found.dtype), strict=True):
            found = torch.where((ids == token)[..., None], own, found)
        return found

    def _media(self, ids: Tensor, pixel_values: Tensor | None, image_features: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the resampler makes of the images (B, T, n, W), and how many each row has (B,)."""
        counts = (ids == self._new_ids()[0]).sum(1)
        if pixel_values is not None:
            if image_features is not None:
                raise ValueError("image_features: expected None beside pixel_values, got both")
            image_features = self.image_features(pixel_values)
        weight = self.mapper.resampler.latents
        if image_features is None:
            media = weight.new_zeros(0, *weight.shape)
        else:
            patches = self._patches()
            media = self.mapper(image_features[..., -patches:, :].to(weight.dtype))
        if ids.device.type == "cpu" and int(counts.sum()) != len(media):
            raise ValueError(
                f"input_ids: expected token {self._new_ids()[0]} once for each of {len(media)} images, got it "
                f"{int(counts.sum())} times"
            )
        return rows_of_media(media, counts), counts

    def _patches(self) -> int:
        """How many of an image tower's states are of patches: the last ones; 0 for all."""
        side, patch = (getattr(self.config.vision_config, name, None) for name in ("image_size", "patch_size"))
        return (side // patch) ** 2 if isinstance(side, int) and isinstance(patch, int) else 0

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PerceiverResampler):
            for parameter in (module.latents, module.frame_embs):
                if parameter is not None:
                    init.normal_(parameter)
        elif isinstance(module, GatedCrossAttentionBlock):
            init.zeros_(module.attn_gate)
            init.zeros_(module.ff_gate)
        elif isinstance(module, FlamingoParts):
            for parameter in (module.tokens, module.end):
                if parameter is not None:
                    init.normal_(parameter, std=0.02)


def _padded(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, *, left: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, mask and labels with pads on one side; a pad's id is 0, and it is not predicted."""
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids: expected integers, got {input_ids.dtype}")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: expected (B, L), got shape {tuple(input_ids.shape)}")
    for name, given in {"attention_mask": attention_mask, "labels": labels}.items():
        if given is not None and given.shape != input_ids.shape:
            expected = f"{tuple(input_ids.shape)} of input_ids"
            raise ValueError(f"{name}: expected the shape {expected}, got {tuple(given.shape)}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
    mask, ids, *more = compact(mask, input_ids, *([] if labels is None else [labels]), left=left)
    return ids.masked_fill(mask == 0, 0), mask, more[0].masked_fill(mask == 0, IGNORED) if more else None


def _known(embedding: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].clamp(max=embedding.num_embeddings - 1), *args[1:])
