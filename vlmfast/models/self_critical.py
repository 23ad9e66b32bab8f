"""Self-critical training (SCST): a captioner is trained for the CIDEr of what it says, after maximum likelihood.

Of each image a beam search gives k captions w_1..w_k; r is a caption's CIDEr-D against the image's true captions, and
its baseline is the mean of the beams'. With log p(w) the sum over a caption's tokens, its end among them::

    loss = -mean over images and beams of (r(w_i) - mean_j r(w_j)) * log p(w_i | image) / T

T is the length that a caption may have, the same for all, so that long captions count no less than short ones. The
search has no gradient and is made without dropout; captions are scored by the sum of their log-probabilities.
k is 5, as in VisualGPT and M2.

CIDEr weighs n-grams by how rare they are in the captions of all training images, and words are `vlmfast.data.words`.

Source: Rennie et al. 2017 (1612.00563); the baseline is that of Cornia et al. 2020 (1912.08226), section 3.3.

Departures from M2's and VisualGPT's code: dropout is not active in the search; words come from a regular expression
instead of a Java program.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfast.data.records import text_of
from vlmfast.data.words import PUNCTUATION, words_of
from vlmfast.models.contract import eval_mode
from vlmfast.nn.prefix import IGNORED
from vlmfast.ops import linear_cross_entropy

BEAMS = 5


class CiderReward:
    """CIDEr-D of pycocoevalcap, of captions one at a time, with the weights of n-grams of a training set.

    Args:
        documents: for each training image its true captions.
    Raises:
        ModuleNotFoundError: pycocoevalcap is not installed.
        ValueError: there are fewer than two documents, by which no n-gram is rarer than another.
    """

    def __init__(self, documents: Iterable[Sequence[str]]) -> None:
        from pycocoevalcap.cider.cider_scorer import CiderScorer

        class Scorer(CiderScorer):
            """Its compute_cider sets ref_len by the captions that it scores; here it is that of all documents."""

            ref_len = property(lambda self: self.log_documents, lambda self, value: None)

        self._class = Scorer
        counted = Scorer()
        for captions in documents:
            counted.cook_append(None, [_joined(caption) for caption in captions])
        if len(counted.crefs) < 2:
            raise ValueError(f"documents: expected at least 2, got {len(counted.crefs)}")
        counted.compute_doc_freq()
        self._frequency = counted.document_frequency
        self._log_documents = math.log(len(counted.crefs))

    def __call__(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
        """(N,) float32, each from 0 to 10, of N captions with the true captions of each."""
        scorer = self._class()
        for caption, truth in zip(captions, references, strict=True):
            scorer.cook_append(_joined(caption), [_joined(text) for text in truth])
        scorer.document_frequency = self._frequency
        scorer.log_documents = self._log_documents
        return torch.tensor(scorer.compute_cider(), dtype=torch.float32)


class SelfCritical:
    """The objective: reward, tokenizer and length of the captions that are tried.

    Args:
        reward: captions and their true captions to (N,).
        tokenizer: makes captions of token ids.
        length: tokens of a caption at most, begin and end included.
        beams: captions of an image that are tried, at least 2.
    Raises:
        ValueError: length or beams is less than 2.
    """

    def __init__(self, reward: Any, tokenizer: Any, *, length: int, beams: int = BEAMS) -> None:
        for name, value in (("length", length), ("beams", beams)):
            if value < 2:
                raise ValueError(f"{name}: expected at least 2, got {value}")
        self._reward = reward
        self._tokenizer = tokenizer
        self._length = length
        self._beams = beams
        self.reward = 0.0
        """The mean reward of the last batch."""

    @classmethod
    def of_dataset(cls, dataset: Any, tokenizer: Any, *, length: int) -> SelfCritical:
        """With the n-grams of a dataset's captions.

        Args:
            dataset: a `vlmfast.data.ImageTextDataset`; its images are not read.
        """
        return cls(CiderReward(_documents(dataset)), tokenizer, length=length)

    def loss(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        references: Sequence[Sequence[str]],
        images: Tensor,
        **given: Tensor | None,
    ) -> Tensor:
        """The loss (), float32.

        Args:
            model: a `vlmfast.models.captioner.Captioner`.
            input_ids (B, L): what every caption begins with, without pads.
            attention_mask (B, L): of ones.
            references: of each of the B images its true captions.
            images: of `model.image_states`, with gradient.
            given: the images, as `model.generate` takes them.
        """
        start, beams = input_ids.shape[1], self._beams
        found = self._search(model, input_ids, attention_mask, given)
        stop = found == model.config.stop_token_id
        kept = stop.cumsum(1) - stop.long() == 0  # up to the first end
        texts = self._tokenizer.batch_decode(
            [row[mask].tolist() for row, mask in zip(found.cpu(), kept.cpu(), strict=True)], skip_special_tokens=True
        )
        rewards = self._reward(texts, [truth for truth in references for _ in range(beams)]).to(images.device)
        self.reward = float(rewards.mean())
        rewards = rewards.view(-1, beams)
        advantage = (rewards - rewards.mean(1, keepdim=True)).flatten()

        ids = torch.cat([input_ids.repeat_interleave(beams, 0), found], 1)
        mask = torch.cat([torch.ones_like(ids[:, :start]), kept.long()], 1)
        image_mask = given.get("image_mask")
        states = model.states(
            ids.masked_fill(mask == 0, 0),
            mask,
            images.repeat_interleave(beams, 0),
            None if image_mask is None else image_mask.repeat_interleave(beams, 0),
        )
        labels = found.masked_fill(~kept, IGNORED)
        losses = token_losses([state[:, start - 1 : -1] for state in states], model.decoder.heads(), labels)
        return (advantage * losses.sum(1)).mean() / (self._length - start)

    def _search(self, model: Any, input_ids: Tensor, attention_mask: Tensor | None, given: dict[str, Any]) -> Tensor:
        """Token ids (B * beams, L)."""
        with eval_mode(model):
            found: Tensor = model.generate(
                input_ids,
                attention_mask,
                **given,
                max_new_tokens=self._length - input_ids.shape[1],
                num_beams=self._beams,
                num_return_sequences=self._beams,
                length_penalty=0.0,
            )
        return found


def token_losses(states: Sequence[Tensor], heads: Sequence[Any], labels: Tensor) -> Tensor:
    """-log p of each label (B, L), 0 where it is -100, without the logits, which are the sum of the heads'.

    Args:
        states: (B, L, D) of each head, at the places that predict the labels.
        heads: with weight (V, D) and perhaps bias.
        labels (B, L).
    """
    biases = [head.bias for head in heads if getattr(head, "bias", None) is not None]
    losses = linear_cross_entropy(
        torch.cat(list(states), -1).flatten(0, 1),
        torch.cat([head.weight for head in heads], 1),
        labels.flatten(),
        bias=torch.stack(biases).sum(0) if biases else None,
        ignore_index=IGNORED,
        reduction="none",
    )
    return losses.view_as(labels)


def _joined(caption: str) -> str:
    return " ".join(word for word in words_of(caption) if word not in PUNCTUATION)


def _documents(dataset: Any) -> Iterable[list[str]]:
    for index in range(len(dataset)):
        captions = list(text_of(dataset.record(index)).captions)
        if not captions:
            _, caption, _ = dataset.metadata(index)
            captions = [] if caption is None else [caption]
        if captions:
            yield captions
