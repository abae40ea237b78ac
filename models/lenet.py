"""The two LeNets that the pruning papers use (LeCun et al., 1998, Proc. IEEE 86)."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional


def lenet_300_100(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Three linear layers with ReLU: 784-300-100-10 for MNIST; the first fits the input shape."""
    return LeNet300100(math.prod(input_shape), classes)


def lenet5(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """LeNet-5 as in Caffe's example: 20 and 50 filters of 5x5, 500 hidden units.

    With a ReLU after each convolution, as the PyTorch ports have it; the code of SNIP and Caffe's
    example have none there.

    Raises:
        ValueError: the image is smaller than 16x16, so nothing would be left after the pooling.
    """
    channels, height, width = input_shape
    if min(height, width) < 16:
        shape = f"{channels}x{height}x{width}"
        raise ValueError(f"lenet5 takes images of at least 16x16, got {shape}")
    return LeNet5(input_shape, classes)


class LeNet300100(nn.Module):
    """Multilayer perceptron; images are flattened."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, 300)
        self.fc2 = nn.Linear(300, 100)
        self.classifier = nn.Linear(100, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        x = functional.relu(self.fc1(x.flatten(1)))
        x = functional.relu(self.fc2(x))
        return self.classifier(x)  # type: ignore[no-any-return]


class LeNet5(nn.Module):
    """Two convolutions without padding, each with 2x2 max-pooling, and two linear layers."""

    def __init__(self, input_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.conv1 = nn.Conv2d(channels, 20, kernel_size=5)
        self.conv2 = nn.Conv2d(20, 50, kernel_size=5)
        self.fc1 = nn.Linear(50 * _pooled(height) * _pooled(width), 500)
        self.classifier = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = functional.relu(self.fc1(x.flatten(1)))
        return self.classifier(x)  # type: ignore[no-any-return]


def _pooled(side: int) -> int:
    """Side of the last feature map: twice a 5x5 convolution and a pooling by 2."""
    return ((side - 4) // 2 - 4) // 2
