"""DyHead: Dai et al. 2021, "Dynamic Head: Unifying Object Detection Heads with Attentions" (2106.08322), a block of it.

Maps of several levels in, maps of the same shapes out. Of level l, with neighbours above and below::

    offsets, m = Conv(x_l)                            18 offsets, and 9 strengths behind a sigmoid, of each place
    y_k = GroupNorm(deformable convolution of x_k at these offsets and strengths)      k = l - 1, l, l + 1: spatial
    z = mean over k of hardsigmoid(relu(Linear(mean over places of y_k))) * y_k        scale
    out = max(a1 * z + b1, a2 * z + b2)               a, b of each channel from the mean of z over places: task

y_(l-1) has stride 2, and x_(l+1) is enlarged to the size of x_l first. Public code reads the offsets of level l, by the
places of level l, in the convolution of the smaller x_(l+1), where they belong to other places, and enlarges after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

GROUPS = 16
REDUCTION = 4


class DyReLU(nn.Module):
    """max(a1 x + b1, a2 x + b2) of maps (B, C, H, W), a1 in [0, 2], a2 in [-1, 1], b1 and b2 in [-1/2, 1/2].

    Source: Chen et al. 2020, "Dynamic ReLU" (2003.10027), variant B.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // REDUCTION)
        self.fc = nn.Sequential(nn.Linear(channels, inner), nn.ReLU(), nn.Linear(inner, 4 * channels))

    def forward(self, x: Tensor) -> Tensor:
        weights = F.hardsigmoid(self.fc(x.mean((2, 3))))[..., None, None]
        a1, b1, a2, b2 = weights.chunk(4, 1)
        return torch.maximum(x * (2 * a1) + (b1 - 0.5), x * (2 * a2 - 1) + (b2 - 0.5))


class DeformConvNorm(nn.Module):
    """A deformable convolution of 3 x 3 with strengths, and GroupNorm."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = DeformConv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(GROUPS if channels % GROUPS == 0 else 1, channels)

    def forward(self, x: Tensor, offsets: Tensor, strengths: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x, offsets, strengths))
        return out


class DyHeadBlock(nn.Module):
    """See the top of this file.

    Args:
        channels: C, of all levels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(channels, 27, 3, padding=1)
        self.coarser = DeformConvNorm(channels)
        self.own = DeformConvNorm(channels)
        self.finer = DeformConvNorm(channels, stride=2)
        self.scale = nn.Linear(channels, 1)
        self.task = DyReLU(channels)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C, H_l, W_l), each half the size of the one before, rounded up; and so are the results."""
        found = []
        for number, x in enumerate(levels):
            offsets, strengths = self.offset(x).split((18, 9), 1)
            read = [self.own(x, offsets, strengths.sigmoid())]
            if number:
                read.append(self.finer(levels[number - 1], offsets, strengths.sigmoid()))
            if number + 1 < len(levels):
                large = F.interpolate(levels[number + 1], x.shape[-2:], mode="bilinear", align_corners=True)
                read.append(self.coarser(large, offsets, strengths.sigmoid()))
            weighed = [F.hardsigmoid(F.relu(self.scale(y.mean((2, 3)))))[..., None, None] * y for y in read]
            found.append(self.task(torch.stack(weighed).mean(0)))
        return found
