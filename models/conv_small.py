"""Conv-2, Conv-4 and Conv-6 of the lottery ticket paper (Frankle & Carbin, 2019, arXiv:1803.03635).

VGGs made small: pairs of convolutions, and three linear layers.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from models.options import check_dropout, check_size, scaled


def _conv(
    depth: int,
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    width: float = 1.0,
    dropout: float = 0.0,
) -> nn.Module:
    """Conv-`depth`; its first linear layer fits the input shape.

    Args:
        depth: number of convolutions: 2, 4 or 6.
        input_shape: (channels, height, width) of one image.
        classes: size of the output.
        width: factor on the filters and the hidden units.
        dropout: part of the units that each hidden linear layer drops; the paper's is 0.5, in the
            experiments that have it.

    Raises:
        ValueError: the image is smaller than 2x2, 4x4 or 8x8, so nothing would be left after the
            pooling; or an option out of its range.
    """
    check_size(f"conv{depth}", input_shape, 2 ** (depth // 2))
    return ConvSmall(depth, input_shape, classes, width, dropout)


conv2 = partial(_conv, 2)
conv4 = partial(_conv, 4)
conv6 = partial(_conv, 6)


class ConvSmall(nn.Module):
    """Pairs of 3x3 convolutions of 64, 128 and 256 filters, then 256, 256 and `classes` units.

    A ReLU follows every layer but the last, and a 2x2 max-pooling every pair.

    Differs from the paper: the initial weights are PyTorch's default, the paper's are Glorot
    normal; dropout stands behind the ReLU of the two hidden linear layers, where it is our choice.
    The paper's table gives Conv-6 1.7 million weights; the layers of that table have 2.3 million.
    """

    def __init__(
        self,
        depth: int,
        input_shape: tuple[int, int, int],
        classes: int,
        width: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_dropout(dropout)
        inputs, rows, columns = input_shape
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(1, depth + 1):
            pair = (number + 1) // 2
            outputs = scaled(32 * 2**pair, width)
            layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
            layers[f"relu{number}"] = nn.ReLU()
            if number % 2 == 0:
                layers[f"pool{pair}"] = nn.MaxPool2d(2)
                rows, columns = rows // 2, columns // 2
            inputs = outputs
        hidden = scaled(256, width)
        self.features = nn.Sequential(layers)
        self.fc1 = nn.Linear(inputs * rows * columns, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        x = self.features(x).flatten(1)
        x = self.dropout(functional.relu(self.fc1(x)))
        x = self.dropout(functional.relu(self.fc2(x)))
        return self.classifier(x)  # type: ignore[no-any-return]
