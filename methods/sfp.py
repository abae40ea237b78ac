"""Soft filter pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from methods.api import (
    Budget,
    Cadence,
    Controls,
    Phase,
    Run,
    SparsityMethod,
    option,
)
from methods.filters import (
    companions,
    convolutions,
    filter_norms,
    write_filter_masks,
    zero_companions,
)
from methods.masking import fill_zeros
from methods.schedules import cubic_density, spaced


@dataclass(frozen=True)
class SFP(SparsityMethod):
    """Soft filter pruning (He et al., 2018, arXiv:1808.06866), Algorithm 1.

    Before training, after every epoch and at the end, zeroes the filters of each layer with the
    smallest L2 norm; in between all of them train, so a zeroed filter can grow back. The cell's
    sparsity is the fraction of filters, the same in every layer.

    Differs from the paper: counts are rounded so that the total is exact (the published code rounds
    down in each layer, and so misses the cell's sparsity: no option here). In the finished network
    the scale and shift of the BatchNorm behind a pruned filter, and its bias, are zero too; while
    it trains they stay, for a filter behind a scale of zero gets no gradient to grow back with.
    (Nor does one behind a shift of zero and a ReLU: what the first prune zeroes there stays so, as
    in the published code.) The 1x1 convolutions of shortcuts are pruned if the suite's preset has
    them (the paper leaves them out: preset `lth`).

    Attributes:
        every: epochs between prunes (paper: 1); at most a twentieth of the budget.
        ramp: fraction of the budget in which the sparsity rises along the cubic schedule (He et
            al.: 0, Lin et al., 2020: up to the second learning-rate decay).
        bn_leak: leave the normalisation in the finished network as it is (published code): a pruned
            filter then still sends a constant, and cannot be cut out.
    """

    paper: ClassVar[str] = "arXiv:1808.06866"
    controls: ClassVar[Controls] = "filters"
    every: int = option(1, "[1, inf)")
    ramp: float = option(0.0, "[0, 1]")
    bn_leak: bool = False

    @property
    def cuttable(self) -> bool:
        """Not with a leak."""
        return not self.bn_leak

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """One phase with a prune before it and after every epoch."""
        every = spaced(self.every * budget.steps_per_epoch, budget.steps)
        return (Phase("train", budget.steps, updates=Cadence(every)),)

    def prunable(self, model: nn.Module) -> tuple[str, ...]:
        """Convolutions only: a classifier's filters would be its classes."""
        return convolutions(model)

    def update(self, run: Run) -> None:
        """Zeroes the smallest filters; nothing holds them there."""
        assert run.density is not None
        end = round(self.ramp * run.budget.steps)
        density = cubic_density(run.step, 0, end, run.density)
        scores = {name: filter_norms(weight) for name, weight in run.state.weights.items()}
        write_filter_masks(run.state, scores, density, "uniform")
        for name, mask in run.state.masks.items():
            run.state.weights[name].mul_(mask)

    def forward_masks(self, run: Run) -> None:
        """None: between updates every filter takes part, zeroed ones from their first step on."""

    def gradient_masks(self, run: Run) -> None:
        """None, likewise."""

    def finish(self, run: Run) -> None:
        """Zeroes a last time, and silences what stands behind the pruned filters."""
        self.update(run)
        fill_zeros(run.state.weights, run.state.masks)
        if not self.bn_leak:
            found = companions(run.state.model, run.state.masks, run.input_shape)
            zero_companions(run.state, found)
