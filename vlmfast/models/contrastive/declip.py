"""DeCLIP: Li et al. 2021, "Supervision Exists Everywhere: A Data Efficient Contrastive Language-Image Pre-training
Paradigm" (2110.05208).

Each pair is seen as two images I1, I2 (two augmentations) and two texts T, T' (the caption with tokens masked; the
caption rewritten). The loss is the weighted sum of::

    clip                contrast(I1, T)
    multi_view          mean of contrast(I1, T'), contrast(I2, T), contrast(I2, T')
    image_ssl           SimSiam: -(cos(p1, sg z2) + cos(p2, sg z1)) / 2
    text_ssl            masked language modelling: mean cross-entropy at T's masked tokens
    nearest_neighbor    mean over I of I1, I2 and t of T, T' of cross_entropy(s * I @ nn(t).T, arange(N))

`contrast` is CLIP's symmetric InfoNCE over the global batch, s = exp(logit_scale). z is the projector's and p the
predictor's output on the image embedding before it is normalised; sg stops the gradient. nn(t) is the nearest neighbour
of t among the last 65,536 text features, a constant; only images are contrasted with it.

Weights: the released configurations (RELEASED_WEIGHTS, the default) have 0.4 times the mean of the four pairs, here 0.1
clip + 0.3 multi_view, and 0.2 times each other term; that of ViT-B/32 on 88M pairs (RELEASED_88M_VIT_WEIGHTS) has 0.6.
The paper writes 0.4 clip + 0.2 multi_view + 0.2 image_ssl + 0.2 text_ssl + 0.2 nearest_neighbor (PAPER_WEIGHTS), where
the first pair weighs six times what another does. A term of weight 0 is not computed, and has no parameters.

Everything is trained but the patch convolution of a CLIP vision tower, which keeps its initial values as in the
released code (`freeze_patch_embedding`).

Departures from the released code:

- Its bank loses keys when it wraps around, starts with random noise among which neighbours are found until 65,536
  texts have been seen, differs between processes and is not in checkpoints. Here it holds exactly the last features of
  all processes; what was never pushed is no neighbour, and in the first step the term has no gradient.
- Batch statistics and the mean over masked tokens are those of all processes together, not of each.
- It lets logit_scale go to 6 and computes with min(exp(logit_scale), 100), of which the gradient knows nothing. Here
  logit_scale itself is kept in [logit_scale_min, ln 100] after every step. Released configurations have a minimum of 3.
- A random token that stands for a masked one is never a special one: an end-of-text token moved where the text pools.
- Projections of the towers have no bias, as in CLIP; nor have linear layers before a batch norm, where it cancels.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from vlmfast import data, distributed
from vlmfast.models.contrastive.declip_parts import FeatureBank, predictor, projector, simsiam_loss
from vlmfast.models.gathered import Shards, mean_over_ranks
from vlmfast.models.towers import CLIPTextModel, CLIPVisionModel, tokens_first
from vlmfast.models.two_tower_config import ProjectionOptions, TwoTowerConfig
from vlmfast.models.two_towers import TwoTowerModel
from vlmfast.nn import ClipLoss

NOT_MASKED = -100


@dataclass
class DeCLIPOptions(ProjectionOptions):
    """ProjectionOptions, a preset of weights, and how captions are rewritten."""

    declip_weights: str | None = field(
        default=None,
        metadata={
            "help": "Weights of the terms; those of the released configurations by default.",
            "choices": ["released", "released-88m-vit", "paper"],
        },
    )
    synonyms: str | None = field(
        default=None, metadata={"help": "A JSON file of words and lists of their synonyms, for the rewritten caption."}
    )


class DeCLIPConfig(TwoTowerConfig):
    """TwoTowerConfig, and what DeCLIP adds; `DeCLIPConfig(**DeCLIPConfig.PAPER_WEIGHTS)` takes a preset.

    Args:
        clip_weight, multi_view_weight, image_ssl_weight, text_ssl_weight, nearest_neighbor_weight: of the terms at the
            top of this file.
        bank_size: text features among which neighbours are looked for.
        ssl_dim, ssl_hidden_dim: width of projector and predictor, and of the predictor's middle.
        freeze_patch_embedding: leave the patch convolution of a CLIP vision tower at its initial values.
        logit_scale_min: least value of the log-parameter after a step.
        logit_scale_init_value: initial value of the log-parameter.
        Others as TwoTowerConfig.
    """

    model_type = "declip"
    RELEASED_WEIGHTS: ClassVar[dict[str, float]] = {
        "clip_weight": 0.1,
        "multi_view_weight": 0.3,
        "image_ssl_weight": 0.2,
        "text_ssl_weight": 0.2,
        "nearest_neighbor_weight": 0.2,
    }
    RELEASED_88M_VIT_WEIGHTS: ClassVar[dict[str, float]] = {
        **RELEASED_WEIGHTS,
        "clip_weight": 0.15,
        "multi_view_weight": 0.45,
    }
    PAPER_WEIGHTS: ClassVar[dict[str, float]] = {**RELEASED_WEIGHTS, "clip_weight": 0.4, "multi_view_weight": 0.2}

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        clip_weight: float = 0.1,
        multi_view_weight: float = 0.3,
        image_ssl_weight: float = 0.2,
        text_ssl_weight: float = 0.2,
        nearest_neighbor_weight: float = 0.2,
        bank_size: int = 65536,
        ssl_dim: int = 1024,
        ssl_hidden_dim: int = 512,
        freeze_patch_embedding: bool = True,
        logit_scale_min: float = 0.0,
        logit_scale_init_value: float = math.log(1 / 0.07),
        **kwargs: Any,
    ) -> None:
        self.clip_weight = clip_weight
        self.multi_view_weight = multi_view_weight
        self.image_ssl_weight = image_ssl_weight
        self.text_ssl_weight = text_ssl_weight
        self.nearest_neighbor_weight = nearest_neighbor_weight
        self.bank_size = bank_size
        self.ssl_dim = ssl_dim
        self.ssl_hidden_dim = ssl_hidden_dim
        self.freeze_patch_embedding = freeze_patch_embedding
        self.logit_scale_min = logit_scale_min
        self.logit_scale_init_value = logit_scale_init_value
        super().__init__(vision_config, text_config, **kwargs)


WEIGHTS = {
    "released": DeCLIPConfig.RELEASED_WEIGHTS,
    "released-88m-vit": DeCLIPConfig.RELEASED_88M_VIT_WEIGHTS,
    "paper": DeCLIPConfig.PAPER_WEIGHTS,
}
"""Presets by the name that --declip-weights has for them."""


@dataclass
class DeCLIPOutput(ModelOutput):
    """What `DeCLIPModel` returns; what a term of weight 0 would need is None.

    Attributes:
        loss (): float32, when `return_loss`.
        image_features, text_features (B, 2, D): unit-norm, float32, of both views.
        logit_scale (): the log-parameter.
        image_embeddings (B, 2, D): of both views, not normalised: what the projector reads.
        head_parameters (P,): those of projector and predictor, in a row. The loss has them from here, so that they are
            trained in chunks (GradCache) too, over the whole batch.
        masked_token_loss, num_masked_tokens (B,): float32, summed cross-entropy and number of each row's masked tokens.
    """

    loss: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    logit_scale: Tensor | None = None
    image_embeddings: Tensor | None = None
    head_parameters: Tensor | None = None
    masked_token_loss: Tensor | None = None
    num_masked_tokens: Tensor | None = None


class DeCLIPModel(TwoTowerModel):
    """CLIP with four more supervisions; see the top of this file.

    Towers, projections and features for evaluation are CLIP's, and so are their parameters' names.
    """

    config: DeCLIPConfig
    base_model_prefix = "declip"
    paper = "Li et al. 2021 (2110.05208)"
    Options = DeCLIPOptions
    special_tokens: ClassVar[dict[str, str]] = {"mask_token": "<|mask|>"}
    new_parts = ("projector.", "predictor.", "text_predictor.", "bank.")
    shared_features = ("head_parameters",)
    """Features that do not depend on the batch, for GradCache."""

    def __init__(self, config: DeCLIPConfig) -> None:
        super().__init__(config)
        self.visual_projection, self.text_projection = self.linear_heads()
        self.logit_scale = self.scalar("logit_scale")
        dim = config.projection_dim
        self.projector = projector(dim, config.ssl_dim) if config.image_ssl_weight else None
        self.predictor = predictor(config.ssl_dim, config.ssl_hidden_dim) if config.image_ssl_weight else None
        self.text_predictor = None
        if config.text_ssl_weight:
            self.text_predictor = nn.Linear(self.text_projection.in_features, config.text_config.vocab_size)
        self.bank = FeatureBank(config.bank_size, dim) if config.nearest_neighbor_weight else None
        # Equal on every rank already; DDP would broadcast it in every step.
        self._ddp_params_and_buffers_to_ignore = ["bank.features", "bank.pushed"]
        self.freeze()
        self.post_init()

    @classmethod
    def overrides(cls, options: Any) -> dict[str, Any]:
        """The preset of weights, and the fields that have the last word."""
        preset = WEIGHTS[options.declip_weights] if options.declip_weights else {}
        return {**preset, **super().overrides(options)}

    def transform(self, options: Any, *, train: bool) -> data.Transform:
        """In training two views of each image, as MoCo v2 makes them."""
        if not train:
            return super().transform(options, train=False)
        if options.jitter:
            raise ValueError(f"--jitter: the two views have their own, expected 0; got {options.jitter}")
        scale = (options.crop_scale, 1.0)
        return data.two_views(data.moco_transform(self.image_size(options), scale=scale, flip=options.flip))

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Any:
        """In training two views of each text: the caption masked, and the caption rewritten."""
        if not train:
            return super().collator(options, tokenizer, train=False)
        synonyms = None if options.synonyms is None else data.read_synonyms(options.synonyms)
        rewrite = data.EDA(synonyms=synonyms)
        return data.TwoViewCollator(tokenizer, max_length=options.max_length, rewrite=rewrite)

    def frozen_parts(self) -> tuple[nn.Module, ...]:
        """The patch convolution of a CLIP vision tower, where `freeze_patch_embedding`."""
        if not (self.config.freeze_patch_embedding and isinstance(self.vision_model, CLIPVisionModel)):
            return ()
        return (self.vision_model.embeddings.patch_embedding,)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.BatchNorm1d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        elif isinstance(module, FeatureBank):
            init.zeros_(module.features)
            init.zeros_(module.pushed)

    @torch.no_grad()
    def resize_vocabulary(self, size: int) -> None:
        """Makes room for tokens at the end, such as the mask token that CLIP's tokenizers lack; what was there stays.

        Embeddings of new tokens are the mean of all. A CLIP tower that pools at the highest id, as OpenAI's do, pools
        at that id from now on.

        Args:
            size: of the new vocabulary.
        Raises:
            ValueError: it is smaller than what there is.
        """
        text_config, old = self.config.text_config, self.text_model.get_input_embeddings()
        rows = old.num_embeddings
        if size < rows:
            raise ValueError(f"size: expected at least the {rows} tokens that there are, got {size}")
        new = nn.Embedding(size, old.embedding_dim, old.padding_idx, device=old.weight.device, dtype=old.weight.dtype)
        new.weight.copy_(torch.cat([old.weight, old.weight.mean(0).expand(size - rows, -1)]))
        self.text_model.set_input_embeddings(new.requires_grad_(old.weight.requires_grad))
        if self.text_predictor is not None:
            head = self.text_predictor
            self.text_predictor = nn.Linear(head.in_features, size, device=head.weight.device, dtype=head.weight.dtype)
            self._init_weights(self.text_predictor)
            self.text_predictor.weight[:rows] = head.weight
            self.text_predictor.bias[:rows] = head.bias
        configs = (text_config, self.text_model.config)
        for config in configs:
            config.vocab_size = size
        if isinstance(self.text_model, CLIPTextModel) and text_config.eos_token_id == 2:
            for holder in (*configs, self.text_model):
                holder.eos_token_id = rows - 1

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        return_loss: bool = True,
    ) -> DeCLIPOutput:
        """Features of both views, and the loss when `return_loss`; `return_dict=False` gives a tuple.

        With the loss and in training mode the bank takes in the batch's texts.

        Args:
            input_ids (B, 2, L): int64; [:, 0] is the caption with tokens masked, [:, 1] the caption rewritten.
            pixel_values: uint8 (B, 2, H, W, 3) or floating point (B, 2, C, H, W).
            attention_mask (B, 2, L): 1 for tokens, 0 for padding; None when nothing is padding.
            mlm_labels (B, L): int64; the caption's ids where it is masked, -100 elsewhere. Needed with text_ssl_weight.
            return_loss: False leaves the loss to a later call of `loss` on the features of the whole batch (GradCache).

        Raises:
            ValueError: an input is missing or of another shape.
        """
        self._check_views(input_ids, pixel_values, attention_mask, mlm_labels)
        assert input_ids is not None
        assert pixel_values is not None
        rows = len(input_ids)
        images = self.visual_projection(self._pool_image(pixel_values.flatten(0, 1))).unflatten(0, (rows, 2))
        states, pooled = self._pool_text(
            input_ids.flatten(0, 1), None if attention_mask is None else attention_mask.flatten(0, 1)
        )
        features = {
            "image_features": F.normalize(images.float(), dim=-1),
            "text_features": F.normalize(self.text_projection(pooled).float(), dim=-1).unflatten(0, (rows, 2)),
            "logit_scale": self.logit_scale.clone(),  # not the parameter, as in TwoTowerModel
        }
        if self.projector is not None and self.predictor is not None:
            features["image_embeddings"] = images
            parameters = [*self.projector.parameters(), *self.predictor.parameters()]
            features["head_parameters"] = torch.cat([parameter.flatten() for parameter in parameters])
        if self.text_predictor is not None:
            assert mlm_labels is not None
            if attention_mask is not None:
                mlm_labels = tokens_first(attention_mask[:, 0], mlm_labels)  # as the states are
            masked = mlm_labels != NOT_MASKED
            logits = self.text_predictor(states.unflatten(0, (rows, 2))[:, 0][masked])
            each = F.cross_entropy(logits.float(), mlm_labels[masked], reduction="none")
            features["masked_token_loss"] = each.new_zeros(rows).index_add(0, masked.nonzero()[:, 0], each)
            features["num_masked_tokens"] = masked.sum(1).float()
        return DeCLIPOutput(loss=self.loss(**features) if return_loss else None, **features)

    def loss(  # type: ignore[override]
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **parts: Tensor
    ) -> Tensor:
        """The weighted sum of `loss_terms`; in training mode the bank then takes in the texts of all processes.

        Arguments as `loss_terms`: the features of one output.
        """
        terms = self.loss_terms(image_features, text_features, logit_scale, **parts)
        if self.training and self.bank is not None:
            flat = text_features.detach().flatten(1)
            texts = Shards("DeCLIPModel", flat).gather(flat).view(-1, *text_features.shape[1:])
            self.bank.push(texts[:, 1])
            self.bank.push(texts[:, 0])
        return torch.stack([getattr(self.config, f"{name}_weight") * term for name, term in terms.items()]).sum()

    def loss_terms(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        image_embeddings: Tensor | None = None,
        head_parameters: Tensor | None = None,
        masked_token_loss: Tensor | None = None,
        num_masked_tokens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The terms at the top of this file whose weight is not 0, by name, each () float32.

        Their means over processes are those of one process with the whole batch, and so are their gradients after
        DDP's mean. The bank is searched and not changed.

        Args:
            Fields of `DeCLIPOutput`, this process's part of the batch.
        """
        config, scale = self.config, logit_scale.float().exp()
        images, texts = image_features.unbind(1), text_features.unbind(1)
        rank, world_size = distributed.rank_and_world_size()
        contrast = ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)
        terms = {}
        if config.clip_weight:
            terms["clip"] = contrast(images[0], texts[0], scale)
        if config.multi_view_weight:
            pairs = [(images[0], texts[1]), (images[1], texts[0]), (images[1], texts[1])]
            terms["multi_view"] = torch.stack([contrast(*pair, scale) for pair in pairs]).mean()
        if image_embeddings is not None and head_parameters is not None:
            each = simsiam_loss(*self._predictions_and_projections(image_embeddings, head_parameters))
            terms["image_ssl"] = each.sum() / mean_over_ranks(each.new_tensor(len(each)))
        if masked_token_loss is not None and num_masked_tokens is not None:
            count = mean_over_ranks(num_masked_tokens.sum())
            terms["text_ssl"] = masked_token_loss.sum() / torch.where(count == 0, 1, count)
        if self.bank is not None:
            terms["nearest_neighbor"] = self._nearest_neighbor_loss(images, text_features.detach(), scale)
        return terms

    def _predictions_and_projections(self, image_embeddings: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """p and z (B, 2, P) of both views, each view a batch of its own for the batch norms."""
        assert self.projector is not None
        assert self.predictor is not None
        named: list[dict[str, Tensor]] = []
        for head in (self.projector, self.predictor):
            sizes = [parameter.numel() for parameter in head.parameters()]
            own, parameters = parameters[: sum(sizes)], parameters[sum(sizes) :]
            parts = zip(head.named_parameters(), own.split(sizes), strict=True)
            named.append({name: part.view_as(parameter) for (name, parameter), part in parts})
        views = image_embeddings.to(named[0]["0.weight"].dtype).unbind(1)
        projections = [functional_call(self.projector, named[0], (view,)) for view in views]
        predictions = [functional_call(self.predictor, named[1], (view,)) for view in projections]
        return torch.stack(predictions, 1), torch.stack(projections, 1)

    def _nearest_neighbor_loss(self, images: tuple[Tensor, ...], text_features: Tensor, scale: Tensor) -> Tensor:
        assert self.bank is not None
        own = self.bank.nearest(text_features.flatten(0, 1)).view(len(text_features), -1)
        shards = Shards("DeCLIPModel", own)
        neighbors = shards.gather(own).view(-1, *text_features.shape[1:])
        each = [shards.info_nce(image, neighbor, scale) for image in images for neighbor in neighbors.unbind(1)]
        return torch.stack(each).mean()

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Clamp `logit_scale` to [logit_scale_min, ln 100], in place."""
        self.logit_scale.clamp_(self.config.logit_scale_min, math.log(100))

    def _check_views(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        attention_mask: Tensor | None,
        mlm_labels: Tensor | None,
    ) -> None:
        needed = {"input_ids": input_ids, "pixel_values": pixel_values}
        if self.text_predictor is not None:
            needed["mlm_labels"] = mlm_labels
        if missing := [name for name, value in needed.items() if value is None]:
            raise ValueError(f"{missing[0]}: missing; for one tower call get_image_features or get_text_features")
        assert input_ids is not None
        assert pixel_values is not None
        if input_ids.ndim != 3 or input_ids.shape[1] != 2:
            raise ValueError(f"input_ids: expected (B, 2, L), two texts per pair, got shape {tuple(input_ids.shape)}")
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            shape = tuple(pixel_values.shape)
            raise ValueError(f"pixel_values: expected (B, 2, H, W, 3) or (B, 2, C, H, W), got shape {shape}")
        if len(pixel_values) != len(input_ids):
            raise ValueError(f"input_ids: expected {len(pixel_values)} pairs of texts, got {len(input_ids)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            shapes = f"{tuple(input_ids.shape)} of input_ids, got {tuple(attention_mask.shape)}"
            raise ValueError(f"attention_mask: expected the shape {shapes}")
        expected = (len(input_ids), input_ids.shape[2])
        if mlm_labels is not None and mlm_labels.shape != expected:
            raise ValueError(f"mlm_labels: expected the shape {expected}, got {tuple(mlm_labels.shape)}")
