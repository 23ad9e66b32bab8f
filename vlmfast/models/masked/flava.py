"""FLAVA: Singh et al. 2022, "FLAVA: A Foundational Language And Vision Alignment Model" (2112.04482).

Three transformers, all pre-LN: one reads patches, one reads words, and a multimodal one reads [CLS], then the states of
both before their last layer norm, each through a linear layer. A batch is of images, of texts or of pairs. With h the
states after the last layer norm, M the hidden patches or words, CE the mean cross-entropy, the loss is the sum of::

    images     mim                 CE(mim_head(h_image[M]), codebook(image)[M])
    texts      mlm                 CE(mlm_head(h_text[M]), words[M])
    pairs      global_contrastive  (CE(s * X @ T.T) + CE(s * T @ X.T)) / 2, X and T projected from the [CLS] of image
                                   and text with nothing hidden, unit-norm, of all processes; s = exp(logit_scale)
               mmm_image           CE(mmm_image_head(h[M of patches]), codebook(image)[M])
               mmm_text            CE(mmm_text_head(h[M of words]), words[M])
               itm                 CE(itm_head(h[CLS]), is the text the image's own)

each times its weight in the config, 1. h of mmm and itm is the multimodal one of the masked image with the masked text.
Where some pairs have a text that is not their own, they count for itm alone; in the contrastive term their features
stay negatives of the others. If all are such pairs, all count.

The codebook is frozen; everything else is trained. Three poolers of transformers' classes are read by no term; they are
frozen and kept, so that its checkpoints load and save as they are.

Hidden patches are BEiT's blocks, 75 of 196; hidden words BERT's 15 %. A pair has another text with probability 0.1
(--mismatched). --image-data and --text-data add batches of images and of texts, in turn with those of pairs.

Departures from the paper and from transformers' FlavaForPreTraining, whose parameters this model has:

- Means over masked rows, pairs and matches are those of all processes together, not of each.
- Texts that do not match change places among pairs of the batch. TorchMultimodal draws them from the data set; drawn
  from the batch, a caption would be there twice, and the contrastive term would push it from its own image.
- The codebook reads the model's own crop, made smaller; the released code makes a second image of the file.
- Without a checkpoint of a codebook, `flava_codebook.fit_codebook` makes a small one of the images of --data.
- `logit_scale` is clamped to [0, ln 100] after each step, not before it is used.
- A model from a few numbers starts at weights of deviation width^-0.5, as CLIP's do. At 0.02, made for a width of 768,
  the [CLS] of narrow encoders hardly depends on the input: at width 64 the contrastive term stood still in 110 steps.
- Attention is scaled_dot_product_attention. transformers keeps the probabilities of every layer.
- Both passes of an encoder over pairs, with and without what is hidden, are one pass over twice the rows. In the last
  layer the pass with nothing hidden computes [CLS] alone, which is all that is read of it.
- Vocabulary heads give the loss without logits, on rows that have a label alone.
- `get_image_features` and `get_text_features` give one unit-norm vector. transformers' give one for each token.
"""

import math
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from vlmfast import data
from vlmfast.models.contract import JointFeatures, Pretrainable
from vlmfast.models.masked.flava_codebook import fit_codebook, load_codebook
from vlmfast.models.masked.flava_collator import FLAVACollator
from vlmfast.models.masked.flava_loss import FLAVAOutput, loss_terms, masked_loss
from vlmfast.models.masked.flava_options import FLAVAOptions, small_config
from vlmfast.models.masked.flava_towers import FLAVATowers, keys_of

CODEBOOK_IMAGES = 1024  # of --data, of which a new codebook is made


class FLAVAModel(Pretrainable, FLAVATowers):
    """transformers' FlavaForPreTraining with forward and loss of its own; see the top of this file."""

    Options = FLAVAOptions
    strategy = "masked"
    paper = "Singh et al. 2022 (2112.04482)"
    training_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": 5e-4,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        # A batch of texts gives the image transformer no gradient, and so on.
        "ddp_find_unused_parameters": True,
    }
    special_tokens: ClassVar[dict[str, str]] = {"mask_token": "<|mask|>"}
    tasks = ("retrieval", "zero_shot", "vqa", "hateful")
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.codebook_is_new = False
        self.last_terms: dict[str, Tensor] = {}
        self.freeze()

    @classmethod
    def build(cls, options: Any, tokenizer: Any) -> Self:
        model = super().build(options, tokenizer)
        model.codebook_is_new = not options.pretrained and not options.codebook
        return model

    @classmethod
    def create(cls, options: Any, tokenizer: Any, **overrides: Any) -> Self:
        codebook = load_codebook(options.codebook) if options.codebook else None
        config = small_config(options, tokenizer, None if codebook is None else codebook.config.to_dict())
        model = cls(cls.config_class.from_dict({**config.to_dict(), **overrides}))
        if codebook is not None:
            model.image_codebook.load_state_dict(codebook.state_dict())
        return model

    def training_data(self, options: Any, dataset: Any, tokenizer: Any = None) -> Any:
        """The pairs, with --image-data and --text-data in turn; a new codebook is made of the pairs' images first."""
        if self.codebook_is_new and self.image_codebook is not None:
            plain = data.ImagesAlone(dataset.source, transform=self.transform(options, train=False), seed=dataset.seed)
            chosen = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0)).tolist()
            samples = (plain[place] for place in chosen)
            found = (sample.image for sample in samples if sample is not None and sample.image is not None)
            fit_codebook(self.image_codebook, list(islice(found, CODEBOOK_IMAGES)), self.grid)
            self.codebook_is_new = False
        settings = {"seed": dataset.seed, "min_batch": dataset.min_batch}
        parts = [dataset]
        if options.image_data:
            parts.append(data.ImagesAlone(options.image_data, transform=dataset.transform, **settings))
        if options.text_data:
            parts.append(data.TextsAlone(options.text_data, **settings))
        return data.Mixture(parts) if len(parts) > 1 else dataset

    def collator(self, options: Any, tokenizer: Any, *, train: bool) -> Any:
        if not train:
            return super().collator(options, tokenizer, train=False)
        return FLAVACollator(tokenizer, max_length=options.max_length, grid=self.grid, mismatched=options.mismatched)

    def frozen_parts(self) -> tuple[nn.Module, ...]:
        """The codebook, and the poolers that no term reads."""
        towers = (self.flava.image_model, self.flava.text_model, self.flava.multimodal_model)
        return tuple(part for part in (self.image_codebook, *(tower.pooler for tower in towers)) if part is not None)

    @torch.no_grad()
    def resize_vocabulary(self, size: int) -> None:
        """Makes room for tokens at the end, in the embeddings and in both heads of words; what was there stays.

        The embedding of a new token is the mean of all.
        """
        table: Any = self.get_input_embeddings()
        old, heads = table.weight, (self.mlm_head, self.mmm_text_head)
        extra = size - len(old)
        where: dict[str, Any] = {"device": old.device, "dtype": old.dtype}
        words = nn.Embedding(size, old.shape[1], padding_idx=table.padding_idx, **where)
        words.weight.copy_(torch.cat([old, old.mean(0).expand(extra, -1)]))
        self.set_input_embeddings(words)
        head: Any
        for head in heads:
            before, head.decoder = head.decoder, nn.Linear(old.shape[1], size, **where)
            head.decoder.weight.copy_(torch.cat([before.weight, before.weight.mean(0).expand(extra, -1)]))
            head.decoder.bias.copy_(torch.cat([before.bias, before.bias.new_zeros(extra)]))
            head.bias = head.decoder.bias
        self.config.text_config.vocab_size = self.text_vocab_size = size

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Unit-norm image features (B, D), float32.

        Args:
            pixel_values: uint8 (B, H, W, 3), normalised here with CLIP's mean and standard deviation; or floating point
                (B, 3, H, W), already normalised.
        Raises:
            ValueError: the images are of another size than the image transformer's.
        """
        model = self.flava.image_model
        _, first = self.encode(model, self.patches(pixel_values), None, clean=len(pixel_values))
        return F.normalize(self.flava.image_projection(first).float(), dim=-1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Unit-norm text features (B, D), float32, of input_ids and attention_mask (B, L), padded on the right."""
        model = self.flava.text_model
        states = model.embeddings(input_ids=input_ids)
        _, first = self.encode(model, states, keys_of(attention_mask), clean=len(input_ids))
        return F.normalize(self.flava.text_projection(first).float(), dim=-1)

    def match_scores(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B,), the log-probability of the itm head that text and image belong together; nothing is hidden."""
        states = self.joint(input_ids, pixel_values, attention_mask)
        scores: Tensor = self.itm_head(states).float().log_softmax(-1)[:, 1]
        return scores

    def joint_features(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None
    ) -> JointFeatures:
        """States of the multimodal transformer after its last layer norm; [CLS] is what heads read."""
        states = self.joint(input_ids, pixel_values, attention_mask)
        image, text = self.parts(states, input_ids.shape[1])
        return JointFeatures(states[:, 0], text, image, attention_mask)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_ids_masked: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        mim_labels: Tensor | None = None,
        itm_labels: Tensor | None = None,
        codebook_pixel_values: Tensor | None = None,
        return_loss: bool = True,
    ) -> FLAVAOutput:
        """The terms of a batch of images, of texts or of pairs, and the loss when `return_loss`.

        Images have pixel_values and bool_masked_pos; texts input_ids_masked, mlm_labels and attention_mask; pairs all
        of these and input_ids. What pairs lack of the masked inputs leaves them the contrastive term alone.

        Args:
            input_ids (B, L): int64, with nothing hidden.
            pixel_values: as `get_image_features`.
            attention_mask (B, L): 1 for tokens, 0 for padding on the right; None when nothing is padding.
            input_ids_masked, mlm_labels (B, L): int64; the labels are -100 where nothing is to be predicted.
            bool_masked_pos (B, n) or (B, rows, columns): bool, True where a patch is hidden.
            mim_labels: int64, of bool_masked_pos's shape, words of the codebook; None asks the codebook.
            itm_labels (B,): int64, 1 where the text is the image's own; None where all are and itm is not learnt.
            codebook_pixel_values (B, 3, 8 rows, 8 columns): what the codebook reads; None makes it of pixel_values.
            return_loss: False leaves the loss to a call of `loss` on the features of the whole batch (GradCache).
        Raises:
            ValueError: inputs are missing, or of another shape.
        """
        hidden = {"bool_masked_pos": bool_masked_pos, "input_ids_masked": input_ids_masked, "mlm_labels": mlm_labels}
        if pixel_values is None:
            kind, needed = "texts", {"input_ids_masked": input_ids_masked, "mlm_labels": mlm_labels}
        elif input_ids is None and input_ids_masked is None:
            kind, needed = "images", {"bool_masked_pos": bool_masked_pos}
        else:
            masked = any(value is not None for value in hidden.values())
            kind, needed = "pairs", {"input_ids": input_ids, **(hidden if masked else {})}
        if missing := [name for name, value in needed.items() if value is None]:
            raise ValueError(f"{missing[0]}: missing, expected in a batch of {kind}")
        if bool_masked_pos is not None and pixel_values is not None:
            bool_masked_pos = bool_masked_pos.flatten(1).bool()
            mim_labels = self.words(pixel_values, bool_masked_pos, mim_labels, codebook_pixel_values)
        image, text = self.flava.image_model, self.flava.text_model
        features: dict[str, Tensor]
        if pixel_values is not None and kind == "images":
            states, _ = self.encode(image, self.patches(pixel_values, bool_masked_pos), None)
            features = masked_loss("image", self.mim_head, image.layernorm(states[:, 1:]), mim_labels)
        elif pixel_values is None or input_ids is None:
            states, _ = self.encode(text, text.embeddings(input_ids=input_ids_masked), keys_of(attention_mask))
            features = masked_loss("text", self.mlm_head, text.layernorm(states), mlm_labels)
        else:
            if len(input_ids) != len(pixel_values):
                raise ValueError(f"input_ids: expected {len(pixel_values)} texts, one per image, got {len(input_ids)}")
            features, image, text = self._clean(
                input_ids, pixel_values, attention_mask, input_ids_masked, bool_masked_pos
            )
            if input_ids_masked is not None:
                states = self.fuse(image, text, attention_mask)
                image, text = self.parts(states, input_ids.shape[1])
                features |= masked_loss("image", self.mmm_image_head, image, mim_labels)
                features |= masked_loss("text", self.mmm_text_head, text, mlm_labels)
                if itm_labels is not None:
                    each = F.cross_entropy(self.itm_head(states).float(), itm_labels, reduction="none")
                    features |= {"match_loss": each, "is_match": (itm_labels != 0).float()}
        return FLAVAOutput(loss=self.loss(**features) if return_loss else None, **features)

    def _clean(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None,
        input_ids_masked: Tensor | None,
        hidden: Tensor | None,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Features of pairs with nothing hidden; and the states of images and texts with what is hidden, if any is."""
        flava, rows, keys = self.flava, len(input_ids), keys_of(attention_mask)
        if input_ids_masked is not None:
            input_ids = torch.cat([input_ids, input_ids_masked])
            keys = None if keys is None else torch.cat([keys, keys])
        image, image_first = self.encode(
            flava.image_model, self.patches(pixel_values, hidden, clean=True), None, clean=rows
        )
        words = flava.text_model.embeddings(input_ids=input_ids)
        text, text_first = self.encode(flava.text_model, words, keys, clean=rows)
        features = {
            "image_features": F.normalize(flava.image_projection(image_first).float(), dim=-1),
            "text_features": F.normalize(flava.text_projection(text_first).float(), dim=-1),
            "logit_scale": flava.logit_scale.clone(),  # not the parameter: DDP would take it for unused
        }
        return features, image, text

    def loss(self, **features: Tensor) -> Tensor:
        """The weighted sum () of `flava_loss.loss_terms`; arguments are the features of one output."""
        terms = loss_terms(**features)
        self.last_terms = {**self.last_terms, **{name: term.detach() for name, term in terms.items()}}
        return torch.stack([getattr(self.config, f"{name}_weight") * term for name, term in terms.items()]).sum()

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Clamp `logit_scale` to [0, ln 100], in place."""
        self.flava.logit_scale.clamp_(0, math.log(100))

    def metrics(self) -> dict[str, float]:
        """The temperature, and each term as it was last: batches of images, texts and pairs take turns."""
        terms = {name: float(term) for name, term in self.last_terms.items()}
        return {"temperature": (-self.flava.logit_scale.detach().float()).exp().item(), **terms}
