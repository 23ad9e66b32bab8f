"""VisualGPT's self-resurrecting activation unit: how much of a token is language, how much is the image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmfast.nn._sizes import check_integers, check_real
from vlmfast.nn._stem import reason_to_call


class SelfResurrectingGate(nn.Module):
    """Mixes text with what cross-attention found at each of the encoder's levels; VisualGPT's gate.

    Equals, with a the text and e_i what it found at level i::

        s_i = sigmoid(fc_alpha_i([a, e_i]))
        mixed = sum_i(s_i * (s_i > tau) * a + (1 - s_i) * (s_i < 1 - tau) * e_i) / sqrt(levels)

    A gate that is shut has no gradient; the other one, open as tau < 1/2, moves s_i until it opens again. There is no
    residual around it. Parameters are `fc_alpha1`, `fc_alpha2`, ... as in VisualGPT's Block.

    Args:
        dim: of text and levels.
        levels: of the encoder.
        tau: below it a gate is shut, in [0, 1/2). The paper's value is 0.2, VisualGPT's command line defaults to 0.
    Raises:
        TypeError: dim or levels is no integer, or tau no number.
        ValueError: dim or levels is less than 1, or tau outside.
    Source: Chen et al. 2022 (VisualGPT), section 3.2; its gpt_decoder_visualGPT.py for the names and levels.
    """

    def __init__(self, dim: int, levels: int = 3, tau: float = 0.2) -> None:
        super().__init__()
        check_integers("SelfResurrectingGate", dim=dim, levels=levels)
        check_real("SelfResurrectingGate", "tau", tau, "in [0, 0.5)", lambda x: 0 <= x < 0.5)
        self.levels = levels
        self.tau = tau
        for level in range(1, levels + 1):
            self.add_module(f"fc_alpha{level}", nn.Linear(2 * dim, dim))

    def forward(self, text: Tensor, visual: Tensor, row_mask: Tensor | None = None) -> Tensor:
        """The mixture, (B, L, dim).

        Args:
            text (B, L, dim).
            visual (B, levels, L, dim): what the text found at each level.
            row_mask (B, L): bool, False at padding, whose rows are 0; None: there is none.
        Raises:
            ValueError: visual is not text's shape for each level.
        """
        if visual.shape != (text.shape[0], self.levels, *text.shape[1:]):
            raise ValueError(
                f"SelfResurrectingGate: visual must be {(text.shape[0], self.levels, *text.shape[1:])}; "
                f"got {tuple(visual.shape)}"
            )
        mixed = torch.zeros_like(text)
        for level, found in enumerate(visual.unbind(1), 1):
            fc = self.get_submodule(f"fc_alpha{level}")
            if isinstance(fc, nn.Linear) and not reason_to_call(fc, nn.Linear):
                weight_text, weight_visual = fc.weight.chunk(2, 1)
                logits = F.linear(text, weight_text) + F.linear(found, weight_visual, fc.bias)
            else:
                logits = fc(torch.cat([text, found], -1))
            mixed = mixed + srau(text, found, logits, self.tau)
        mixed = mixed / math.sqrt(self.levels)
        return mixed if row_mask is None else mixed.masked_fill(~row_mask[..., None], 0)


def srau(text: Tensor, visual: Tensor, logits: Tensor, tau: float) -> Tensor:
    """`s * (s > tau) * text + (1 - s) * (s < 1 - tau) * visual` with s = sigmoid(logits); tensors of one shape."""
    alpha = logits.sigmoid()
    language = torch.where(alpha > tau, alpha, 0)
    vision = torch.where(alpha < 1 - tau, 1 - alpha, 0)
    return language * text + vision * visual
