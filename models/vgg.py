"""VGG networks for small images, with batch normalisation.

The convolutions are those of Simonyan & Zisserman, 2015 (arXiv:1409.1556), configurations A, B, D
and E. Their heads of 4096 units are for ImageNet; small images have two others, below.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from models.options import check_size, scaled

_CONVOLUTIONS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Depth -> the number of convolutions in each block."""

_FILTERS = (64, 128, 256, 512, 512)


def _vgg(
    depth: int,
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    width: float = 1.0,
    bias: bool = True,
) -> nn.Module:
    """VGG-`depth` with one linear layer.

    Args:
        depth: 11, 13, 16 or 19.
        input_shape: (channels, height, width) of one image.
        classes: size of the output.
        width: factor on the filters.
        bias: whether convolutions have one, as in open_lth; the code of GraSP has none.

    Raises:
        ValueError: the image is smaller than 16x16, so nothing would be left after the pooling; or
            an option out of its range.
    """
    check_size(f"vgg{depth}", input_shape, 16)
    return VGG(depth, input_shape[0], classes, width, bias)


vgg11 = partial(_vgg, 11)
vgg13 = partial(_vgg, 13)
vgg16 = partial(_vgg, 16)
vgg19 = partial(_vgg, 19)


def vgg16_d(
    input_shape: tuple[int, int, int], classes: int, *, width: float = 1.0, bias: bool = True
) -> nn.Module:
    """VGG-16 with three linear layers: the VGG16-D of sparse momentum, SNIP and DPF.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: size of the output.
        width: factor on the filters and the hidden units.
        bias: whether convolutions have one.

    Raises:
        ValueError: the image is smaller than 32x32, so nothing would be left after the pooling; or
            an option out of its range.
    """
    check_size("vgg16_d", input_shape, 32)
    return VGG16D(input_shape, classes, width, bias)


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions, four max-poolings, a mean over pixels, a linear layer.

    The mean is the 2x2 average pooling of the lottery ticket paper and open_lth where the image is
    32x32; it takes larger and smaller images too. Initial weights are PyTorch's default.
    """

    def __init__(
        self, depth: int, channels: int, classes: int, width: float = 1.0, bias: bool = True
    ) -> None:
        super().__init__()
        self.features = _features(depth, channels, width, bias, pools=4)
        self.classifier = nn.Linear(scaled(_FILTERS[-1], width), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        return self.classifier(self.features(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class VGG16D(nn.Module):
    """Five blocks of 3x3 convolutions, five max-poolings, and linear layers of 512 units.

    The head is that of the code of sparse momentum: normalisation in the place of dropout, behind
    the ReLU. The code of SNIP normalises before the ReLU. The first linear layer fits the image,
    512 inputs for 32x32. Initial weights are PyTorch's default.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        width: float = 1.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        channels, rows, columns = input_shape
        units = scaled(512, width)
        self.features = _features(16, channels, width, bias, pools=5)
        self.fc1 = nn.Linear(units * (rows // 32) * (columns // 32), units)
        self.norm1 = nn.BatchNorm1d(units)
        self.fc2 = nn.Linear(units, units)
        self.norm2 = nn.BatchNorm1d(units)
        self.classifier = nn.Linear(units, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        x = self.features(x).flatten(1)
        x = self.norm1(functional.relu(self.fc1(x)))
        x = self.norm2(functional.relu(self.fc2(x)))
        return self.classifier(x)  # type: ignore[no-any-return]


def _features(depth: int, inputs: int, width: float, bias: bool, pools: int) -> nn.Sequential:
    """The blocks; layers are named as in `conv3_1`, the first convolution of the third block."""
    if not isinstance(bias, bool):
        raise ValueError(f"bias: found {bias!r}; allowed: true, false")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for block, (convolutions, filters) in enumerate(
        zip(_CONVOLUTIONS[depth], _FILTERS, strict=True), start=1
    ):
        outputs = scaled(filters, width)
        for number in range(1, convolutions + 1):
            place = f"{block}_{number}"
            layers["conv" + place] = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
            layers["norm" + place] = nn.BatchNorm2d(outputs)
            layers["relu" + place] = nn.ReLU()
            inputs = outputs
        if block <= pools:
            layers[f"pool{block}"] = nn.MaxPool2d(2)
    return nn.Sequential(layers)
