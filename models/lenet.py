"""The two LeNets that the pruning papers use (LeCun et al., 1998, Proc. IEEE 86)."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from models.options import check_size, scaled


def lenet_300_100(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    width: float = 1.0,
    batch_norm: bool = False,
) -> nn.Module:
    """Three linear layers with ReLU: 784-300-100-10 for MNIST; the first fits the input shape.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: size of the output.
        width: factor on the hidden units.
        batch_norm: normalisation in place of each layer's bias, the last one's too, as in the code
            of Mostafa & Wang (2019) for MNIST.

    Raises:
        ValueError: the width is not above 0.
    """
    return LeNet300100(math.prod(input_shape), classes, width, batch_norm)


def lenet5(input_shape: tuple[int, int, int], classes: int, *, width: float = 1.0) -> nn.Module:
    """LeNet-5 as in Caffe's example: 20 and 50 filters of 5x5, 500 hidden units.

    With a ReLU after each convolution, as the PyTorch ports have it; the code of SNIP and Caffe's
    example have none there.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: size of the output.
        width: factor on the filters and the hidden units.

    Raises:
        ValueError: the image is smaller than 16x16, so nothing would be left after the pooling; or
            the width is not above 0.
    """
    check_size("lenet5", input_shape, 16)
    return LeNet5(input_shape, classes, width)


class LeNet300100(nn.Module):
    """Multilayer perceptron; images are flattened."""

    def __init__(
        self, inputs: int, classes: int, width: float = 1.0, batch_norm: bool = False
    ) -> None:
        super().__init__()
        first, second = scaled(300, width), scaled(100, width)
        self.fc1 = _linear(inputs, first, batch_norm)
        self.fc2 = _linear(first, second, batch_norm)
        self.classifier = _linear(second, classes, batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        x = functional.relu(self.fc1(x.flatten(1)))
        x = functional.relu(self.fc2(x))
        return self.classifier(x)  # type: ignore[no-any-return]


class LeNet5(nn.Module):
    """Two convolutions without padding, each with 2x2 max-pooling, and two linear layers."""

    def __init__(self, input_shape: tuple[int, int, int], classes: int, width: float = 1.0) -> None:
        super().__init__()
        channels, rows, columns = input_shape
        first, second, hidden = scaled(20, width), scaled(50, width), scaled(500, width)
        self.conv1 = nn.Conv2d(channels, first, kernel_size=5)
        self.conv2 = nn.Conv2d(first, second, kernel_size=5)
        self.fc1 = nn.Linear(second * _pooled(rows) * _pooled(columns), hidden)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        # The maximum of ReLUs is the ReLU of the maximum, of a quarter as many numbers.
        x = functional.relu(functional.max_pool2d(self.conv1(x), 2))
        x = functional.relu(functional.max_pool2d(self.conv2(x), 2))
        x = functional.relu(self.fc1(x.flatten(1)))
        return self.classifier(x)  # type: ignore[no-any-return]


def _linear(inputs: int, outputs: int, batch_norm: bool) -> nn.Module:
    if not batch_norm:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs))


def _pooled(side: int) -> int:
    """Side of the last feature map: twice a 5x5 convolution and a pooling by 2."""
    return ((side - 4) // 2 - 4) // 2
