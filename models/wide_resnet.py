"""Wide residual networks for small images (Zagoruyko & Komodakis, 2016, arXiv:1605.07146)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from models.options import check_dropout, scaled


def _wrn(
    depth: int,
    k: int,
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    width: float = 1.0,
    dropout: float = 0.0,
) -> nn.Module:
    """WRN-`depth`-`k`, for images of any size.

    Args:
        depth: number of convolutions outside of shortcuts, and the classifier: 6n + 4.
        k: the paper's factor on the channels of the blocks, 16-32-64.
        input_shape: (channels, height, width) of one image.
        classes: size of the output.
        width: one more factor, on all channels, the stem's 16 too.
        dropout: part of the values dropped between the convolutions of a block. The paper has runs
            with 0 and with 0.3; the codes of sparse momentum and of L0 have 0.3, that of DSR 0.

    Raises:
        ValueError: an option out of its range.
    """
    return WideResNet(depth, k, input_shape[0], classes, width, dropout)


wrn_16_2 = partial(_wrn, 16, 2)
wrn_16_8 = partial(_wrn, 16, 8)
wrn_16_10 = partial(_wrn, 16, 10)
wrn_22_2 = partial(_wrn, 22, 2)
wrn_22_8 = partial(_wrn, 22, 8)
wrn_28_2 = partial(_wrn, 28, 2)
wrn_28_4 = partial(_wrn, 28, 4)
wrn_28_8 = partial(_wrn, 28, 8)
wrn_28_10 = partial(_wrn, 28, 10)


class WideResNet(nn.Module):
    """A stem of 16 channels, three stages of n blocks, normalisation, mean and classifier.

    Convolutions are drawn from a normal distribution with variance 2 / fan-out (He et al., 2015,
    arXiv:1502.01852, equation 14). The classifier keeps PyTorch's default.

    Raises:
        ValueError: the depth is not 6n + 4, or an option out of its range.
    """

    def __init__(
        self,
        depth: int,
        k: int,
        channels: int,
        classes: int,
        width: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth: found {depth}; allowed: 10, 16, 22 and so on (6n + 4)")
        check_dropout(dropout)
        stem, *stages = (scaled(units, width) for units in (16, 16 * k, 32 * k, 64 * k))
        self.stem = _conv3x3(channels, stem, stride=1)
        self.stages = nn.Sequential(
            _stage(stem, stages[0], blocks, 1, dropout),
            _stage(stages[0], stages[1], blocks, 2, dropout),
            _stage(stages[1], stages[2], blocks, 2, dropout),
        )
        self.norm = nn.BatchNorm2d(stages[2])
        self.classifier = nn.Linear(stages[2], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        x = functional.relu(self.norm(self.stages(self.stem(x))))
        return self.classifier(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Normalisation and ReLU before each of two 3x3 convolutions, and the shortcut around them.

    Where the shape changes, the shortcut is a 1x1 convolution of the first ReLU's output.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv3x3(outputs, outputs, stride=1)
        self.shortcut: nn.Conv2d | None = None
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps (batch, outputs, height / stride, width / stride)."""
        y = functional.relu(self.norm1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = self.dropout(functional.relu(self.norm2(self.conv1(y))))
        return x + self.conv2(y)  # type: ignore[no-any-return]


def _stage(inputs: int, outputs: int, blocks: int, stride: int, dropout: float) -> nn.Sequential:
    rest = [Block(outputs, outputs, 1, dropout) for _ in range(blocks - 1)]
    return nn.Sequential(Block(inputs, outputs, stride, dropout), *rest)


def _conv3x3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
