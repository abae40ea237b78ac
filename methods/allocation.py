"""How many weights each layer keeps: exact integers that sum to the target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

Scope = Literal["global", "uniform", "er", "erk"]
"""`global` ranks all layers together; the others fix each layer's count beforehand."""

Shape = tuple[int, ...]


def keep_count(total: int, density: float) -> int:
    """The integer that a density asks for: density * total, rounded half up.

    A density is often 1 - sparsity, and 1 - 0.9 is a little under 0.1: six decimals of the product
    keep 4.5 what it is.
    """
    return math.floor(round(density * total, 6) + 0.5)


def allocate(
    shapes: Mapping[str, Shape], density: float, scope: Literal["uniform", "er", "erk"]
) -> dict[str, int]:
    """Weights that each layer keeps.

    `uniform` gives every layer the same density. `er` (Mocanu et al., 2018) gives density
    proportional to (n_in + n_out) / (n_in n_out), and `erk` (Evci et al., 2020) to
    sum(shape) / prod(shape), kernel included; layers that would exceed density 1 are dense and the
    rest share what remains.

    Args:
        shapes: shape of each weight, output first.
        density: fraction of all the weights together that are kept, in (0, 1].
        scope: the rule.

    Returns:
        An integer per layer, at most its size; they sum to `keep_count(total, density)`.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    target = keep_count(sum(sizes.values()), density)
    raw = {name: _raw_density(shape, scope) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        free = sum(raw[name] * sizes[name] for name in sizes if name not in dense)
        room = target - sum(sizes[name] for name in dense)
        epsilon = room / free if free else 0.0
        largest = max((raw[name] for name in sizes if name not in dense), default=0.0)
        if epsilon * largest <= 1:
            break
        # All layers that share the largest value saturate together (Evci et al.'s published code).
        dense |= {name for name in sizes if name not in dense and raw[name] == largest}
    shares = {
        name: float(size) if name in dense else epsilon * raw[name] * size
        for name, size in sizes.items()
    }
    return apportion(shares, target, sizes)


def apportion(shares: Mapping[str, float], total: int, limits: Mapping[str, int]) -> dict[str, int]:
    """Rounds shares to integers that sum to `total`, by largest remainder.

    Args:
        shares: what each layer should have; they sum to about `total`.
        total: the sum to reach; at most the sum of `limits`.
        limits: the most that each layer can have.
    """
    counts = {name: min(math.floor(share), limits[name]) for name, share in shares.items()}
    # A stable sort: equal remainders go to the earlier layer.
    order = sorted(shares, key=lambda name: counts[name] - shares[name])
    while (missing := total - sum(counts.values())) > 0:
        open_layers = [name for name in order if counts[name] < limits[name]]
        for name in open_layers[:missing]:
            counts[name] += 1
    return counts


def _raw_density(shape: Shape, scope: Literal["uniform", "er", "erk"]) -> float:
    if scope == "uniform":
        return 1.0
    if scope == "er":
        return (shape[0] + shape[1]) / (shape[0] * shape[1])
    return sum(shape) / math.prod(shape)
