"""VisualBERT and LXMERT in two processes: the mean of their losses and gradients is that of one with both batches."""

from __future__ import annotations

from typing import Any

import torch
from processes import run_processes
from regions import DIM, REGIONS, batch, sizes, word_labels
from torch import Tensor
from torch import distributed as dist

from vlmfast.models.masked.lxmert import LXMERTConfig, LXMERTModel
from vlmfast.models.masked.visual_bert import VisualBERTConfig, VisualBERTModel


def models() -> list[Any]:
    torch.manual_seed(0)
    counts = {"num_object_labels": 7, "num_attr_labels": 4, "num_qa_labels": 3}
    layers = {"l_layers": 1, "r_layers": 1, "x_layers": 1, "visual_feat_dim": DIM}
    return [
        VisualBERTModel(VisualBERTConfig(**sizes(num_hidden_layers=1, visual_embedding_dim=DIM))).eval(),
        LXMERTModel(LXMERTConfig(**sizes(**counts, **layers))).eval(),
    ]


def batch_of(model: Any) -> dict[str, Tensor]:
    """Four rows: the first two have more words to predict, more regions and more answers than the others."""
    given = batch(dtype=torch.float32)
    labels = word_labels(given)
    labels[2:, 2:] = -100
    given |= {"labels": labels, "matched": torch.tensor([1, 0, 1, 1])}
    if isinstance(model, LXMERTModel):
        masked = torch.zeros(4, REGIONS, dtype=torch.bool)
        masked[0, :3] = masked[3, 0] = True
        given |= {
            "masked_regions": masked,
            "object_labels": torch.arange(REGIONS).repeat(4, 1),
            "object_weights": torch.linspace(0.1, 0.9, 4 * REGIONS).view(4, REGIONS),
            "attribute_labels": torch.arange(REGIONS).repeat(4, 1) % 4,
            "attribute_weights": torch.linspace(0.9, 0.1, 4 * REGIONS).view(4, REGIONS),
            "answer": torch.tensor([2, 0, 1, -100]),
        }
    return given


def share(rank: int, world_size: int, expected: list[tuple[Tensor, dict[str, Tensor]]]) -> None:
    for model, (loss, gradients) in zip(models(), expected, strict=True):
        own = model(**{name: value.chunk(world_size)[rank] for name, value in batch_of(model).items()}).loss
        own.backward()
        mean = own.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / world_size, loss)
        for name, parameter in model.named_parameters():
            if name in gradients:
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                dist.all_reduce(gradient)
                torch.testing.assert_close(gradient / world_size, gradients[name], rtol=1e-4, atol=1e-6)


def test_two_processes_are_one() -> None:
    expected = []
    for model in models():
        loss = model(**batch_of(model)).loss
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        expected.append((loss.detach(), found))
    run_processes(share, 2, expected)
