"""What a finished network has left, and whether that is what was asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from bench.compact import compact_counts
from bench.counting import count_totals
from bench.evaluate import Evaluation
from bench.prunable import promised
from bench.record import Counts, Expected, LayerCount, Status
from methods.allocation import keep_count
from methods.api import Shape, SparsityMethod
from methods.masking import GROWN

CHANCE_FACTOR = 1.5
"""A final accuracy below this multiple of chance counts as diverged: the papers' `*`."""

CHANCE_MARGIN = 5.0
"""Points above chance that are enough with fewer than ten classes, where chance is high."""


def counts(
    model: nn.Module,
    layers: tuple[LayerCount, ...],
    names: Sequence[str],
    method: SparsityMethod,
    density: float | None,
    shape: Shape,
) -> Counts:
    """Weights and multiply-adds of a network.

    Args:
        model: the network, freshly made, with what was trained.
        layers: what `count_layers` says of it.
        names: of its prunable weights.
        method: that made it.
        density: fraction of the prunable weights that was asked for; None where none can be.
        shape: of an image.
    """
    totals = count_totals(model, layers)
    weights = {name: model.get_parameter(name).detach() for name in names}
    prunable = sum(weight.numel() for weight in weights.values())
    asked = promised(method, density)
    nonzero = {name: int(weight.count_nonzero()) for name, weight in weights.items()}
    grown = sum(int((weight.abs() <= GROWN).sum()) for weight in weights.values())
    zeros = prunable - sum(nonzero.values())
    live = [line.live for line in layers if line.prunable and line.live is not None]
    return Counts(
        parameters=totals.parameters,
        nonzero=totals.nonzero,
        prunable=prunable,
        target_nonzero=None if asked is None else keep_count(prunable, asked),
        prunable_nonzero=sum(nonzero.values()),
        idle=grown - zeros,
        dense_macs=totals.dense_macs,
        macs=totals.macs,
        dead=tuple(name for name, count in nonzero.items() if count == 0),
        filters=_filters(weights, density) if method.controls == "filters" else None,
        elementwise=totals.elementwise,
        live=sum(live) if live else None,
        live_macs=totals.live_macs,
        compact=compact_counts(model, shape) if method.cuttable else None,
    )


def _filters(weights: Mapping[str, Tensor], density: float | None) -> tuple[int, int, int]:
    """Filters of the prunable weights: all, asked to remain, with a weight that is not zero."""
    assert density is not None
    total = sum(len(weight) for weight in weights.values())
    left = sum(int(weight.flatten(1).any(dim=1).sum()) for weight in weights.values())
    return total, keep_count(total, density), left


def judge(found: Evaluation, left: Counts, classes: int) -> tuple[Status, str]:
    """Status of a network, and why.

    Args:
        found: on the test set.
        left: its weights.
        classes: of the data set.
    """
    if left.target_nonzero not in (None, left.prunable_nonzero):
        return "invalid", (
            f"{left.prunable_nonzero} prunable weights are not zero, but "
            f"{left.target_nonzero} were asked for"
        )
    if left.filters is not None and left.filters[1] != left.filters[2]:
        return "invalid", (
            f"{left.filters[2]} filters are not zero, but {left.filters[1]} were asked for"
        )
    if not math.isfinite(found.loss):
        return "diverged", "the network's outputs are not finite"
    chance = 100 / classes
    if found.top1 < min(CHANCE_FACTOR * chance, chance + CHANCE_MARGIN):
        least = f"{CHANCE_FACTOR} times chance"
        if classes < 10:
            least = f"{chance + CHANCE_MARGIN:.2f} %, {CHANCE_MARGIN:g} points above chance"
        return "diverged", f"accuracy {found.top1:.2f} % is under {least}"
    return "ok", ""


def expected(chances: Mapping[str, Tensor], layers: Sequence[LayerCount]) -> Expected:
    """Expected non-zeros and multiply-adds, each weight open with its chance.

    Args:
        chances: probability that a gate is open, for each element of a prunable weight by its name.
        layers: what `count_layers` says of the network.
    """
    l0 = {name: float(chance.double().sum()) for name, chance in chances.items()}
    macs = sum(
        layer.dense_macs * l0[layer.name] / layer.weights if layer.name in l0 else layer.macs
        for layer in layers
    )
    return Expected(sum(l0.values()), macs)


def structure(model: nn.Module) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Module types and tensor shapes by name; what a method may not change."""
    modules = {name: type(module).__qualname__ for name, module in model.named_modules()}
    return modules, {name: tuple(value.shape) for name, value in model.state_dict().items()}
