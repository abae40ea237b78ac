"""The methods: one paper, one file. The table below names them without importing torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from methods.api import Controls, SparsityMethod


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A method as `list` shows it.

    Attributes:
        target: module in this package and class in it.
        paper: who and when.
        controls: what a cell's sparsity means; the class says the same, and a test compares them.
        summary: one line.
    """

    target: str
    paper: str
    controls: Controls
    summary: str


METHODS: dict[str, MethodInfo] = {
    "dense": MethodInfo("dense:Dense", "", "none", "no sparsity: the baseline"),
    "one_shot": MethodInfo(
        "one_shot:OneShotMagnitude",
        "Han 2015",
        "density",
        "train, prune the smallest magnitudes once, fine-tune",
    ),
    "gradual": MethodInfo(
        "gradual:GradualMagnitude",
        "Zhu & Gupta 2017",
        "density",
        "prune the smallest magnitudes along a cubic ramp while training",
    ),
    "random": MethodInfo(
        "random_pruning:RandomPruning", "", "density", "random masks at initialisation: the control"
    ),
    "snip": MethodInfo(
        "snip:SNIP", "Lee 2019", "density", "prune at initialisation by connection sensitivity"
    ),
    "set": MethodInfo(
        "sparse_evolution:SET",
        "Mocanu 2018",
        "density",
        "drop the smallest weights, grow at random, while training",
    ),
    "rigl": MethodInfo(
        "rigl:RigL",
        "Evci 2020",
        "density",
        "drop the smallest weights, grow where the gradient is largest",
    ),
    "dpf": MethodInfo(
        "dpf:DPF",
        "Lin 2020",
        "density",
        "mask the forward pass, update all the weights, re-rank every 16 steps",
    ),
}


def get_method(name: str) -> type[SparsityMethod]:
    """The class of a method.

    Raises:
        KeyError: the table has no such name.
    """
    module, _, attribute = METHODS[name].target.partition(":")
    found: type[SparsityMethod] = getattr(importlib.import_module(f"methods.{module}"), attribute)
    return found
