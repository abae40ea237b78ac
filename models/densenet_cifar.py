"""Densely connected networks for small images (Huang et al., 2017, arXiv:1608.06993)."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.options import check_dropout, check_size, scaled

_BLOCKS = 3


def _densenet(
    depth: int,
    k: int,
    bc: bool,
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    width: float = 1.0,
    dropout: float = 0.0,
) -> nn.Module:
    """DenseNet of `depth` layers with growth rate `k`.

    Args:
        depth: number of convolutions and the classifier: 3n + 4, with `bc` 6n + 4.
        k: channels that each layer adds.
        bc: whether a 1x1 convolution to 4k channels stands before each 3x3, and transitions halve
            the channels: the paper's DenseNet-BC.
        input_shape: (channels, height, width) of one image.
        classes: size of the output.
        width: factor on k, on 4k and on the channels of the stem; transitions follow.
        dropout: part of the values dropped behind each convolution but the stem; the paper's is
            0.2 for data without augmentation, 0 with it.

    Raises:
        ValueError: the image is smaller than 4x4, so nothing would be left after the pooling; or
            an option out of its range.
    """
    check_size("densenet", input_shape, 4)
    return DenseNet(depth, k, bc, input_shape[0], classes, width, dropout)


densenet_40_12 = partial(_densenet, 40, 12, False)
densenet_bc_100_12 = partial(_densenet, 100, 12, True)


class DenseNet(nn.Module):
    """A stem, three blocks with transitions between them, normalisation, mean and classifier.

    The stem has 16 channels, or 2k with `bc`, as the paper says; the authors' code has 2k in both.
    Convolutions are drawn from a normal distribution with variance 2 / fan-out (He et al., 2015,
    arXiv:1502.01852, equation 14), as in the authors' code. The classifier keeps PyTorch's default;
    the authors' starts with biases of 0.

    Raises:
        ValueError: the depth is not 3n + 4, or 6n + 4 with `bc`, or an option out of its range.
    """

    def __init__(
        self,
        depth: int,
        k: int,
        bc: bool,
        channels: int,
        classes: int,
        width: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        convolutions = 2 if bc else 1
        layers, rest = divmod(depth - 4, _BLOCKS * convolutions)
        if layers < 1 or rest:
            step = _BLOCKS * convolutions
            raise ValueError(f"depth: found {depth}; allowed: {4 + step}, {4 + 2 * step} and so on")
        check_dropout(dropout)
        growth, units = scaled(k, width), scaled(2 * k if bc else 16, width)
        narrow = scaled(4 * k, width) if bc else None
        self.stem = nn.Conv2d(channels, units, kernel_size=3, padding=1, bias=False)
        self.blocks = nn.Sequential()
        for number in range(1, _BLOCKS + 1):
            block = [DenseLayer(units + i * growth, growth, narrow, dropout) for i in range(layers)]
            self.blocks.add_module(f"block{number}", nn.Sequential(*block))
            units += layers * growth
            if number < _BLOCKS:
                outputs = max(1, units // 2) if bc else units
                transition = _unit(units, outputs, kernel=1, dropout=dropout)
                transition.add_module("pool", nn.AvgPool2d(2))
                self.blocks.add_module(f"transition{number}", transition)
                units = outputs
        self.norm = nn.BatchNorm2d(units)
        self.classifier = nn.Linear(units, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        x = functional.relu(self.norm(self.blocks(self.stem(x))))
        return self.classifier(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class DenseLayer(nn.Module):
    """Appends `growth` channels, computed from all that are there or from `narrow` sums of them."""

    def __init__(self, inputs: int, growth: int, narrow: int | None, dropout: float) -> None:
        super().__init__()
        self.bottleneck: nn.Module = nn.Identity()
        if narrow is not None:
            self.bottleneck = _unit(inputs, narrow, kernel=1, dropout=dropout)
            inputs = narrow
        self.new = _unit(inputs, growth, kernel=3, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps (batch, inputs + growth, height, width)."""
        return torch.cat([x, self.new(self.bottleneck(x))], dim=1)


def _unit(inputs: int, outputs: int, kernel: int, dropout: float) -> nn.Sequential:
    """Normalisation, ReLU and a convolution that keeps the size."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    norm, drop = nn.BatchNorm2d(inputs), nn.Dropout(dropout)
    return nn.Sequential(OrderedDict(norm=norm, relu=nn.ReLU(), conv=conv, dropout=drop))
