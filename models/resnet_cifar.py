"""Residual networks for small images (He et al., 2016, arXiv:1512.03385, section 4.2)."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from models.options import scaled


def _resnet(
    depth: int,
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    shortcut: str = "A",
    width: float = 1.0,
) -> nn.Module:
    """ResNet-`depth`, 16-32-64 channels, for images of any size.

    Args:
        depth: number of layers, 6k + 2.
        input_shape: (channels, height, width) of one image.
        classes: size of the output.
        shortcut: where the shape changes, "A" takes every second pixel and pads channels with
            zeros (the paper's choice); "B" is a 1x1 convolution with normalisation.
        width: factor on all channels; GraSP's "ResNet-32" has twice the paper's.

    Raises:
        ValueError: another shortcut, or the width is not above 0.
    """
    return ResNet(depth, input_shape[0], classes, shortcut, width)


resnet20 = partial(_resnet, 20)
resnet32 = partial(_resnet, 32)
resnet44 = partial(_resnet, 44)
resnet56 = partial(_resnet, 56)
resnet110 = partial(_resnet, 110)


class ResNet(nn.Module):
    """CIFAR ResNet of `depth` = 6k + 2 layers: a stem and three stages of k blocks.

    Convolutions are drawn from a normal distribution with variance 2 / fan-out, as in the code of
    SFP and in torchvision's ResNets, so that gradients keep their size through ReLUs (He et al.,
    2015, arXiv:1502.01852, equation 14). The classifier keeps PyTorch's default.

    Raises:
        ValueError: the depth is not 6k + 2, the shortcut is neither "A" nor "B", or the width is
            not above 0.
    """

    def __init__(
        self, depth: int, channels: int, classes: int, shortcut: str = "A", width: float = 1.0
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth: found {depth}; allowed: 8, 14, 20 and so on (6k + 2)")
        if shortcut not in {"A", "B"}:
            raise ValueError(f"shortcut: found {shortcut!r}; allowed: 'A', 'B'")
        first, second, third = (scaled(units, width) for units in (16, 32, 64))
        self.stem = _conv3x3(channels, first, stride=1)
        self.norm = nn.BatchNorm2d(first)
        self.stages = nn.Sequential(
            _stage(first, first, blocks, stride=1, shortcut=shortcut),
            _stage(first, second, blocks, stride=2, shortcut=shortcut),
            _stage(second, third, blocks, stride=2, shortcut=shortcut),
        )
        self.classifier = nn.Linear(third, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        x = functional.relu(self.norm(self.stem(x)))
        x = self.stages(x)
        return self.classifier(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Two 3x3 convolutions, and the shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs, stride=1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps (batch, outputs, height / stride, width / stride)."""
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return functional.relu(y + self.shortcut(x))


class PadShortcut(nn.Module):
    """Option A: every second pixel, and new channels of zeros behind the old ones."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.new_channels = outputs - inputs
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """The input in the block's output shape; no parameters, no multiplications."""
        return functional.pad(
            x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels)
        )


def _shortcut(inputs: int, outputs: int, stride: int, kind: str) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if kind == "A":
        return PadShortcut(inputs, outputs, stride)
    conv = nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs)))


def _stage(inputs: int, outputs: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    first = Block(inputs, outputs, stride, shortcut)
    rest = [Block(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def _conv3x3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
