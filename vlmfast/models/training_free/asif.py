"""ASIF: Norelli et al. 2022, "ASIF: Coupled Data Turns Unimodal Models to Multimodal Without Training" (2210.01738).

Two frozen encoders that know nothing of each other, and N anchor pairs with a unit-norm feature of either: A (N, D) of
the images and A' (N, D') of the texts. An image with feature z is described by which anchors are most like it, a text
likewise, and the two descriptions are compared::

    r(z; A) = normalize(keep_top_k(z @ A.T).clamp(min=0) ** p)          # (N,), of which k are not 0
    score(image, text) = r(z_image; A) @ r(z_text; A')

The order is: the k largest by the raw similarity, then the power, then the norm. A class has the highest score of its
prompts. k = 800 and p = 8 as in the paper, for 1.6 million anchors. Nothing is trained: anchors that are added or
removed change what the rule says and no weight. A score is a sum over anchors, so it says which of them made it.

What a feature is read from: images as in LiT (the class token after the last norm where the pooler has a tanh, else
`pooler_output`); texts at the mean of their tokens, as sentence encoders are trained, or with text_pooling "first" at
their first; `pooler_output` of towers without a masked language model.

Departures from the public code (noranta4/ASIF, relreps.py):

- There the running top k starts with zeros, so that where a kept similarity is negative a pair of index 0 and value 0
  stands in its place; and an even power loses the sign of negative ones, a fractional one makes NaN of them. Here they
  are 0.
- There only texts are normalised, since that decides which text is best for an image. Here images are too, which
  decides which image is best for a text.
- There anchors lie in memory. Here they are mapped, and read in chunks: `vlmfast.models.training_free.anchors`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from vlmfast.models.contract import Options, vision_fingerprint
from vlmfast.models.training_free.anchors import Anchors, add_anchors, relative, sparse_products
from vlmfast.models.two_tower_config import TwoTowerConfig
from vlmfast.models.two_towers import TwoTowerModel, TwoTowerOutput, mean_of_tokens, read_class_token

FOLDER = "anchors"


class ASIFConfig(TwoTowerConfig):
    """TwoTowerConfig of two encoders and the rule that compares them.

    Args:
        k: anchors that describe a sample, at most.
        p: the power of their similarities.
        text_pooling: "mean" or "first", of text towers with bidirectional attention.
        anchors: their folder, absolute or within that of the checkpoint; "" where there are none yet.
        projection_dim, initializer_factor: not used.
        Others as TwoTowerConfig.
    Raises:
        ValueError: k or p is not positive, or text_pooling is another.
    """

    model_type = "asif"

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        k: int = 800,
        p: float = 8.0,
        text_pooling: str = "mean",
        anchors: str = "",
        projection_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.k = k
        self.p = p
        self.text_pooling = text_pooling
        self.anchors = anchors
        super().__init__(vision_config, text_config, projection_dim=projection_dim, **kwargs)
        self.check()

    def check(self) -> None:
        """ValueError where k or p is not positive, or text_pooling is another; `from_pretrained` sets fields behind
        `__init__`."""
        if self.text_pooling not in ("first", "mean"):
            raise ValueError(f"text_pooling: expected 'first' or 'mean', got {self.text_pooling!r}")
        if self.k < 1 or not 0 < self.p < float("inf"):
            name, value = ("k", self.k) if self.k < 1 else ("p", self.p)
            raise ValueError(f"{name}: expected a positive number, got {value}")


@dataclass
class ASIFOptions(Options):
    """Two pretrained encoders, and how they are compared."""

    vision_tower: str | None = field(default=None, metadata={"help": "Name or folder of a pretrained image model."})
    text_tower: str | None = field(
        default=None, metadata={"help": "Name or folder of a pretrained text model; its tokenizer is the default one."}
    )
    k: int = field(default=800, metadata={"help": "Anchors that describe a sample, at most."})
    p: float = field(default=8.0, metadata={"help": "Power of their similarities."})
    text_pooling: str = field(
        default="mean", metadata={"help": "What of a text is read: mean of its tokens, or first."}
    )
    image_size: int = field(
        default=224, metadata={"help": "Side of the images, pixels, where the image model has none of its own."}
    )
    max_length: int = field(default=64, metadata={"help": "Tokens of a text at most, special tokens included."})

    new_model: ClassVar[tuple[str, ...]] = ("vision_tower", "text_tower", "k", "p", "text_pooling")

    def tokenizer_source(self) -> str | None:
        return self.text_tower or self.pretrained


class ASIFModel(TwoTowerModel):
    """Two encoders and anchor pairs, and nothing that is trained; see the top of this file."""

    config: ASIFConfig
    config_class = ASIFConfig
    base_model_prefix = "asif"
    strategy = "no training"
    paper = "Norelli et al. 2022 (2210.01738)"
    made_by = "anchors"
    Options: ClassVar[type[Any]] = ASIFOptions
    scalars = ()
    training_defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: ASIFConfig) -> None:
        super().__init__(config)
        config.check()
        self.reads_class_token = read_class_token(self.vision_model)
        self._anchors: Anchors | None = None
        self.freeze()
        self.post_init()

    @classmethod
    def create(cls, options: Any, tokenizer: Any, **overrides: Any) -> Self:
        """A model of two pretrained encoders, without anchors.

        Raises:
            ValueError: one is not named.
        """
        if not (options.vision_tower and options.text_tower):
            raise ValueError("asif needs --vision-tower and --text-tower, two pretrained encoders, or --pretrained")
        settings = {"k": options.k, "p": options.p, "text_pooling": options.text_pooling, **overrides}
        made = cls.from_towers(options.vision_tower, options.text_tower, **settings)
        made.fix_image_size(options.image_size)
        return made

    def fix_image_size(self, side: int) -> None:
        """Keeps in the config the side of the images, for a tower that takes any: anchors and queries must agree."""
        vision = self.config.vision_config
        if getattr(vision, "image_size", None) is None:
            vision.image_size = side

    def frozen_parts(self) -> tuple[nn.Module, ...]:
        """All of it."""
        return (self.vision_model, self.text_model)

    # Anchors

    @property
    def anchors(self) -> Anchors:
        """The anchor pairs, opened when they are first asked for; may be assigned, such as `Anchors.of(image, text)`.

        Raises:
            ValueError: there are none, or they are of other encoders' widths.
        """
        if self._anchors is None:
            if not self.config.anchors:
                raise ValueError("anchors: expected some, this model has none yet; 'vlmfast anchors' makes them")
            self._anchors = Anchors.open(self.anchor_folder)
        return self._anchors

    @anchors.setter
    def anchors(self, anchors: Anchors) -> None:
        self._anchors = anchors

    @property
    def anchor_folder(self) -> Path:
        """Where the config says that they are."""
        return Path(self.config.name_or_path, self.config.anchors)

    def anchors_fingerprint(self) -> str:
        """A hash of what decides the features of anchors: both encoders, and what is read of them."""
        config, text = self.config, self.config.text_config.to_dict()
        unread = ("_name_or_path", "transformers_version", "dtype", "architectures")
        kept = {name: value for name, value in text.items() if name not in unread}
        return vision_fingerprint(config, self.vision_model, self.text_model, text=kept, pooling=config.text_pooling)

    def add_anchors(
        self,
        folder: str | os.PathLike[str],
        dataset: Any,
        collator: Callable[[Sequence[Any]], dict[str, Tensor]],
        **settings: Any,
    ) -> None:
        """Anchors of all samples of a dataset, added to those in a folder, which are this model's from now on.

        Args:
            folder: of the anchors, absolute or relative to the working folder.
            dataset: with this model's `transform(options, train=False)`.
            collator: this model's.
            settings: of `vlmfast.models.training_free.anchors.add_anchors`.
        """
        device = next(self.parameters()).device

        def encode(samples: list[Any]) -> tuple[Tensor, Tensor]:
            batch = {name: value.to(device) for name, value in collator(samples).items()}
            found = self(**batch)
            return found.image_features, found.text_features

        add_anchors(folder, dataset, encode, self.anchors_fingerprint(), **settings)
        self.config.anchors, self._anchors = str(Path(folder).resolve()), None

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As transformers'; the config names the folder of the anchors, and those in memory are written beside it."""
        before, own = self.config.anchors, Path(save_directory, FOLDER)
        if self._anchors is not None and self._anchors.folder is None:
            self._anchors.save(own)
            self.config.anchors = FOLDER
        elif before:
            place = self.anchor_folder.resolve()
            self.config.anchors = FOLDER if place == own.resolve() else str(place)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.anchors = before

    # What tasks call

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """The image encoder's unit-norm features (B, D), float32, which know nothing of texts; see `similarities`.

        Args:
            pixel_values: as TwoTowerModel's.
        """
        if not self.reads_class_token:
            return F.normalize(self._pool_image(pixel_values).float(), dim=-1)
        states: Tensor = self.vision_model(self._tower_input(pixel_values)).last_hidden_state
        return F.normalize(states[:, 0].float(), dim=-1)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """The text encoder's unit-norm features (B, D'), float32; arguments as TwoTowerModel's."""
        states, pooled = self._pool_text(input_ids, attention_mask, position_ids)
        if self.config.text_pooling == "mean" and self.text_pools_first:
            pooled = mean_of_tokens(states, input_ids, attention_mask, position_ids)
        return F.normalize(pooled.float(), dim=-1)

    @torch.no_grad()
    def similarities(self, image: Tensor, text: Tensor) -> Tensor:
        """Scores (B, C) in [0, 1], float32, of images and texts by the rule.

        Args:
            image (B, D), text (C, D'): features of `get_image_features` and `get_text_features`.
        Raises:
            ValueError: as `Anchors.nearest`.
        """
        return sparse_products(self._weights("image", image), self._weights("text", text), self.anchors.total)

    @torch.no_grad()
    def attribution(self, image: Tensor, text: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The anchors that contribute most to the scores of pairs.

        Args:
            image (B, D), text (B, D'): features of the pairs.
            count: of anchors of each pair.
        Returns:
            contributions (B, count): float32, best first; all contributions of a pair add up to its score.
            numbers (B, count): int64, of the anchors; where the contribution is 0, any.
        """
        (weights, numbers), (theirs, others) = self._weights("image", image), self._weights("text", text)
        found = torch.zeros_like(weights)
        for row in range(len(weights)):
            order = others[row].argsort()
            place = torch.searchsorted(others[row][order], numbers[row]).clamp(max=len(order) - 1)
            same = others[row][order][place] == numbers[row]
            found[row] = weights[row] * theirs[row][order][place] * same
        best, order = found.sort(dim=1, descending=True, stable=True)
        return best[:, :count].float(), numbers.gather(1, order)[:, :count]

    def _weights(self, side: Any, features: Tensor) -> tuple[Tensor, Tensor]:
        scores, numbers = self.anchors.nearest(side, features, self.config.k)
        return relative(scores, self.config.p), numbers

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool = False,
    ) -> TwoTowerOutput:
        """Features of both encoders, for pairs of anchors; there is no loss.

        Raises:
            ValueError: an input is missing, or a loss is asked for.
        """
        if return_loss:
            raise ValueError("return_loss: expected False, as nothing of ASIF is trained")
        output: TwoTowerOutput = super().forward(input_ids, pixel_values, attention_mask, position_ids, return_loss)
        return output

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}
