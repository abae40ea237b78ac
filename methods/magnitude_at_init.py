"""Magnitude pruning before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.masking import PruneAtInit


@dataclass(frozen=True)
class MagnitudeAtInit(PruneAtInit):
    """Prune at iteration 0 (Frankle & Carbin, 2019, arXiv:1803.03635): a control for tickets.

    Before the first step, keeps the weights with the largest |theta_0|; the masks then stay.

    Differs from the paper: the sparsity is reached at once, not at that of one of its rounds, and
    output layers are pruned at the same rate as the others (paper: at half of it).

    Attributes:
        scope: ranks all layers together (paper: the convolutional networks), or each by its own
            count (`uniform`; paper: LeNet). Where layers start at different scales, `global`
            empties those of the smaller one first.
    """

    paper: ClassVar[str] = "arXiv:1803.03635"
