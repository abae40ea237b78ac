"""AlexNet for small images, as SNIP has it (Lee et al., 2019, arXiv:1810.02340).

The kernels and filters of Krizhevsky et al., 2012, with a stride of 2 in every convolution in the
place of pooling, and narrower linear layers.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from models.options import check_size, scaled

_CONVOLUTIONS = ((96, 11, 2), (256, 5, 2), (384, 3, 1), (384, 3, 1), (256, 3, 1))
"""(filters, kernel, padding on each side) of each layer."""

_STRIDE = 2


def _alexnet(
    k: int,
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    width: float = 1.0,
    padding: str = "fixed",
) -> nn.Module:
    """AlexNet with 1024 `k` hidden units.

    Args:
        k: the paper's factor on the hidden units, 1 for AlexNet-s and 2 for AlexNet-b.
        input_shape: (channels, height, width) of one image.
        classes: size of the output.
        width: factor on the filters and the hidden units.
        padding: "fixed" puts 2, 2, 1, 1, 1 pixels of zeros on each side, as in the code of sparse
            momentum and other PyTorch ports: 32x32 becomes 13, 7, 4, 2, 1. "same" is TensorFlow's
            rule, as in the code of SNIP: half the size, rounded up, so 16, 8, 4, 2, 1. The weights
            are as many, the multiply-adds are not.

    Raises:
        ValueError: with fixed padding, the image is smaller than 7x7, so the first kernel does not
            fit; or an option out of its range.
    """
    if padding not in {"fixed", "same"}:
        raise ValueError(f"padding: found {padding!r}; allowed: 'fixed', 'same'")
    if padding == "fixed":
        check_size("alexnet with fixed padding", input_shape, 7)
    return AlexNet(k, input_shape, classes, width, padding)


alexnet_s = partial(_alexnet, 1)
alexnet_b = partial(_alexnet, 2)


class AlexNet(nn.Module):
    """Five convolutions and three linear layers, normalised and with a ReLU, all but the last.

    The first linear layer fits the image, 256 inputs for 32x32. Initial weights are PyTorch's
    default; SNIP draws from a truncated normal distribution with variance 1 / fan-in. For images of
    64x64 SNIP's first stride is 4, here it stays 2.
    """

    def __init__(
        self,
        k: int,
        input_shape: tuple[int, int, int],
        classes: int,
        width: float = 1.0,
        padding: str = "fixed",
    ) -> None:
        super().__init__()
        inputs, *size = input_shape
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (filters, kernel, pad) in enumerate(_CONVOLUTIONS, start=1):
            outputs = scaled(filters, width)
            if padding == "same":
                # More on the right and below, which no padding of a convolution can say.
                (top, bottom), (left, right) = (_same(length, kernel) for length in size)
                layers[f"pad{number}"] = nn.ZeroPad2d((left, right, top, bottom))
                size, pad = [-(-length // _STRIDE) for length in size], 0
            else:
                size = [(length + 2 * pad - kernel) // _STRIDE + 1 for length in size]
            layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, kernel, _STRIDE, pad)
            layers[f"norm{number}"] = nn.BatchNorm2d(outputs)
            layers[f"relu{number}"] = nn.ReLU()
            inputs = outputs
        hidden = scaled(1024 * k, width)
        self.features = nn.Sequential(layers)
        self.hidden = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(inputs * size[0] * size[1], hidden),
                norm1=nn.BatchNorm1d(hidden),
                relu1=nn.ReLU(),
                fc2=nn.Linear(hidden, hidden),
                norm2=nn.BatchNorm1d(hidden),
                relu2=nn.ReLU(),
            )
        )
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        return self.classifier(self.hidden(self.features(x).flatten(1)))  # type: ignore[no-any-return]


def _same(length: int, kernel: int) -> tuple[int, int]:
    """Pixels of zeros before and behind, so that the output has half the length, rounded up."""
    outputs = -(-length // _STRIDE)
    both = max(0, (outputs - 1) * _STRIDE + kernel - length)
    return both // 2, both - both // 2
