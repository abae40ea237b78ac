"""A dense network as small as a sparse one: the control that tells what sparsity is worth."""

from __future__ import annotations

import functools

import torch
from torch import nn

from bench.counting import count_layers, count_totals
from bench.datasets import DatasetInfo
from bench.errors import SuiteError
from bench.networks import probe
from bench.prunable import prunable_names
from bench.spec import Options
from bench.store import Against
from methods.allocation import keep_count
from methods.dense import Dense
from models import create_model, is_known, model_options

GRID = 1000
"""Widths are multiples of 1/1000 of the suite's own."""


@functools.lru_cache(maxsize=256)
def nearest_width(
    name: str, info: DatasetInfo, options: Options, preset: str, sparsity: float
) -> float:
    """The `width` whose weights come nearest in number to those that the sparse network has left.

    All convolutions and linear layers count, those too that the preset leaves dense.

    Args:
        name: of the model.
        info: of the data set.
        options: the model's own; its `width`, if set, is what the sparsity counts from.
        preset: of prunable weights.
        sparsity: in [0, 1).

    Raises:
        SuiteError: the model has no option `width`, or refuses one that is tried.
    """
    if not is_known(name) or "width" not in model_options(name):
        raise SuiteError(f"{name} has no option `width`, so there is no smaller one of it")
    widest = float(dict(options).get("width", model_options(name)["width"]))  # type: ignore[arg-type]
    others = {key: value for key, value in options if key != "width"}

    def made(step: int) -> nn.Module:
        # No weight is made: a width is tried in milliseconds.
        width = round(widest * step / GRID, 6)
        try:
            with torch.device("meta"):
                return create_model(name, info.shape, info.classes, **others, width=width)
        except ValueError as error:
            raise SuiteError(f"{error}") from error

    def weights(step: int) -> int:
        return count_prunable(made(step), "all", sparsity)

    full = made(GRID)
    prunable = count_prunable(full, preset, sparsity)
    target = weights(GRID) - prunable + keep_count(prunable, 1 - sparsity)
    low, high = 1, GRID  # weights(low) <= target <= weights(high), if it can be
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if weights(middle) <= target else (low, middle)
    best = min((high, low), key=lambda step: abs(weights(step) - target))
    return round(widest * best / GRID, 6)


@functools.lru_cache(maxsize=64)
def compared(
    name: str, info: DatasetInfo, options: Options, width: float, preset: str, sparsity: float
) -> Against:
    """What the ratios of the narrower network count against."""
    model = probe(name, info, options)
    totals = count_totals(model, count_layers(model, info.shape))
    narrow = probe(name, info, (*((n, v) for n, v in options if n != "width"), ("width", width)))
    return Against(
        totals.parameters,
        count_prunable(model, preset, sparsity),
        totals.dense_macs,
        count_prunable(narrow, preset, sparsity),
    )


def count_prunable(model: nn.Module, preset: str, sparsity: float) -> int:
    """Weights that a preset counts."""
    names = prunable_names(model, Dense(), preset, sparsity)
    return sum(model.get_parameter(name).numel() for name in names)
