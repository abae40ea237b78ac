"""Gradual pruning with zero-cost neuroregeneration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.allocation import Scope
from methods.api import Budget, Cadence, Phase, Run, Scores, option
from methods.drop_grow import DropGrow
from methods.masking import random_scores, write_masks
from methods.schedules import cosine_fraction, cubic_density, spaced


@dataclass(frozen=True)
class GraNet(DropGrow):
    """GraNet (Liu et al., 2021, arXiv:2106.10404): gradual pruning that also rewires.

    Starts from random masks of density `initial`. Every `every` steps, prunes the smallest
    magnitudes to the cubic schedule's density (Zhu & Gupta's, from `initial` on), and then drops
    the smallest weights of each layer and grows as many where the gradient is largest. The dropped
    fraction falls along a cosine.

    Differs from the paper: the ramp reaches its target exactly (the published code keeps one weight
    fewer and stops one update short). The gradient is that of extra batches, which are metered,
    for the network before the update; the published code takes that of the step before. The
    cosine ends at 0 (published code: 0.005). Dropped counts are rounded down (published code: up).
    A cell denser than `initial` starts at its own density.

    Attributes:
        scope: how magnitudes are ranked: `global`, from `erk` masks (paper), or by a fixed count
            for each layer, from masks of that spread.
        every: steps between updates (published code: 1000 for CIFAR, 4000 for ImageNet); at most a
            twentieth of the ramp.
        initial: density at the start (published code: 0.5, or 1 to start dense).
        end: fraction of the budget at which pruning ends (published code: 110 of 160 epochs).
        stop: fraction of the budget after which the masks are fixed (published code: 1); not
            before the ramp's end.
        drop_fraction: fraction of active weights dropped at first (published code: 0.5).
        batches: extra batches that the gradient is averaged over (paper: 1).
    """

    paper: ClassVar[str] = "arXiv:2106.10404"
    scope: Scope = "global"
    every: int = option(1000, "[1, inf)")
    stop: float = option(1.0, "[0, 1]")
    drop_fraction: float = option(0.5, "[0, 1)")
    initial: float = option(0.5, "(0, 1]")
    end: float = option(0.6875, "(0, 1]")
    batches: int = option(1, "[1, 1000]")

    def ramp(self, budget: Budget) -> tuple[int, int]:
        """Steps between updates, and the step of the last prune: a multiple of them."""
        end = min(round(self.end * budget.steps), budget.steps - 1)
        every = spaced(self.every, end)
        return every, end // every * every

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """One phase that begins with random masks; the first update comes after `every` steps."""
        assert density is not None
        every, last = self.ramp(budget)
        updates = Cadence(every, min(every, last), max(round(self.stop * budget.steps), last + 1))
        return (Phase("train", budget.steps, density=max(density, self.initial), updates=updates),)

    def start_phase(self, run: Run) -> None:
        """Draws the masks."""
        assert run.phase.density is not None
        spread: Scope = "erk" if self.scope == "global" else self.scope
        write_masks(run.state, random_scores(run), run.phase.density, spread)

    def fraction(self, run: Run) -> float:
        """Cosine annealing."""
        return cosine_fraction(run.step, round(self.stop * run.budget.steps), self.drop_fraction)

    def grow_scores(self, run: Run) -> Scores:
        """Magnitude of the dense gradient."""
        return {name: g.abs() for name, g in run.gradients(self.batches).items()}

    def update(self, run: Run) -> None:
        """Prunes to the schedule, then rewires each layer."""
        start, target = run.phase.density, run.density
        assert start is not None
        assert target is not None
        left = cubic_density(run.step, 0, self.ramp(run.budget)[1], 0.0)
        self.prune(run, target + (start - target) * left)
        super().update(run)
