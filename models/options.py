"""What the options of several models share: the factor on the width, and checks."""

from __future__ import annotations

import math

MAX_UNITS = 100_000
"""Of a layer; more is a slip, which would end in an allocator's error."""


def scaled(units: int, width: float) -> int:
    """The size of a hidden layer under the option `width`: the product, rounded, at least 1.

    Raises:
        ValueError: the width is not a finite number above 0, or makes the layer too large.
    """
    if not _is_number(width) or not 0 < width < math.inf:
        raise ValueError(f"width: found {width!r}; allowed: a number above 0")
    if units * width > MAX_UNITS:
        raise ValueError(
            f"width: found {width!r}, of {units} units; allowed: up to {MAX_UNITS:,} units a layer"
        )
    return max(1, round(units * width))


def check_dropout(rate: float) -> None:
    """The part of the units that dropout sets to zero must be in [0, 1), else ValueError."""
    if not _is_number(rate) or not 0 <= rate < 1:
        raise ValueError(f"dropout: found {rate!r}; allowed: a number from 0 to below 1")


def check_size(name: str, input_shape: tuple[int, int, int], side: int) -> None:
    """Images must be `side` pixels high and wide or more, else ValueError.

    For models whose pooling would leave nothing of a smaller image.
    """
    channels, height, width = input_shape
    if min(height, width) < side:
        shape = f"{channels}x{height}x{width}"
        raise ValueError(f"{name} takes images of at least {side}x{side}, got {shape}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
