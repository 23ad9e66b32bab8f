"""A ResNet cut in two, as Faster R-CNN's C4 has it: up to res4 for the whole image, res5 for each region."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

SMALL = "small"
SMALL_DEPTHS = (1, 2, 3, 1)
"""Blocks of the four stages of a small ResNet."""
STAGES = 5
"""The stem, and four stages."""


class Backbone(nn.Module):
    """The layers of a torchvision ResNet, under their names, without its classifier.

    Args:
        name: of a ResNet of torchvision, such as "resnet101"; or "small", a ResNet of bottlenecks with `SMALL_DEPTHS`
            blocks, whose stages are 4, 8, 16 and 32 times `width` wide.
        width: of a small one.
        stride: pixels between two places of the map, 16 or 8; at 8 res4 is dilated instead.
        frozen_norm: whether batch norm is a fixed affine map, as for pretrained weights.
    Raises:
        ValueError: torchvision has no ResNet of that name, or another stride.
    """

    def __init__(self, name: str, width: int, stride: int, frozen_norm: bool) -> None:
        super().__init__()
        if stride not in (8, 16):
            raise ValueError(f"stride: expected 8 or 16, got {stride}")
        norm: Callable[[int], nn.Module] = FrozenBatchNorm2d if frozen_norm else nn.BatchNorm2d
        net = _small(width, norm) if name == SMALL else _named(name, norm)
        self.stride = stride
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.map_width, self.width = _width(self.layer3), _width(self.layer4)
        _dilate(self.layer4)
        if stride == 8:
            _dilate(self.layer3)

    def forward(self, images: Tensor) -> Tensor:
        """The map of res4, (B, C, H / stride, W / stride), of images (B, 3, H, W) of multiples of the stride."""
        states = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        found: Tensor = self.layer3(self.layer2(self.layer1(states)))
        return found

    def res5(self, pooled: Tensor) -> Tensor:
        """The features (R, D) of regions, from their parts of the map (R, C, P, P): res5 without stride, and a mean."""
        found: Tensor = self.layer4(pooled).mean(dim=(2, 3))
        return found

    def first(self, stages: int) -> tuple[nn.Module, ...]:
        """The modules of the stem, for 1, and of as many stages as the number is larger."""
        parts = ((self.conv1, self.bn1), (self.layer1,), (self.layer2,), (self.layer3,), (self.layer4,))
        return tuple(module for part in parts[:stages] for module in part)


def load_weights(backbone: Backbone, file: str) -> None:
    """Weights of a torchvision ResNet of the same name, such as its ImageNet classifier's, from a .pth or .safetensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or weights are missing, not finite or of another shape.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"--backbone-weights: no file {file}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name: value for name, value in found.items() if not name.startswith("fc.")}
    except Exception as error:  # what it is depends on how the file is damaged
        reason = " ".join(str(error).split())
        raise ValueError(f"--backbone-weights: {file} holds no weights of a ResNet: {reason}") from error
    own = backbone.state_dict()
    wrong = [
        name
        for name, value in own.items()
        if not name.endswith("num_batches_tracked")
        and (name not in weights or weights[name].shape != value.shape or not weights[name].isfinite().all())
    ]
    if wrong:
        raise ValueError(
            f"--backbone-weights: {file} lacks {len(wrong)} of the backbone's {len(own)} weights, or has them of"
            f" another shape or not finite: {', '.join(wrong[:3])}"
        )
    backbone.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)


def _named(name: str, norm: Callable[[int], nn.Module]) -> Any:
    known = [model for model in models.list_models(models) if model.startswith(("resnet", "resnext", "wide_resnet"))]
    if name not in known:
        raise ValueError(f"backbone: expected {SMALL} or one of {', '.join(known)}; got {name!r}")
    return models.get_model(name, weights=None, norm_layer=norm)


def _small(width: int, norm: Callable[[int], nn.Module]) -> Any:
    net = nn.Module()
    net.conv1 = nn.Conv2d(3, 4 * width, 3, stride=2, padding=1, bias=False)
    net.bn1, net.relu, net.maxpool = norm(4 * width), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)
    channels = 4 * width
    for stage, depth in enumerate(SMALL_DEPTHS):
        planes, blocks = width << stage, []
        for number in range(depth):
            stride = 2 if stage and not number else 1
            down = None
            if not number:
                down = nn.Sequential(nn.Conv2d(channels, 4 * planes, 1, stride, bias=False), norm(4 * planes))
            blocks.append(Bottleneck(channels, planes, stride, down, norm_layer=norm))
            channels = 4 * planes
        setattr(net, f"layer{stage + 1}", nn.Sequential(*blocks))
    return net


def _dilate(layer: nn.Module) -> None:
    """A stage without stride, its 3 x 3 convolutions with dilation 2."""
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (2, 2)


def _width(layer: Any) -> int:
    last = layer[-1]
    return int((last.conv3 if hasattr(last, "conv3") else last.conv2).out_channels)
