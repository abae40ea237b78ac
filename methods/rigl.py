"""Rigging the lottery: growth where the gradient is largest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from methods.api import Budget, Cadence, Run, Scores, option
from methods.drop_grow import DropGrow
from methods.schedules import cosine_fraction


@dataclass(frozen=True)
class RigL(DropGrow):
    """Rigging the Lottery (Evci et al., 2020, arXiv:1911.11134), Algorithm 1.

    Every `every` steps, drops the smallest weights of each layer and grows those with the largest
    gradient. The dropped fraction falls along a cosine to 0 at `stop` (Eq. 1).

    Differs from the paper: the gradient is that of extra batches, which are counted in
    `Record.extra_batches`; the paper gives up the step in which the masks change. There is no
    update at step 0 unless `from_start`. `uniform` gives the first layer the same density as the
    others, where the paper keeps it dense; here that is a matter of the suite's prunable weights.

    Attributes:
        every: steps between mask updates (paper: 100); at most a twentieth of `stop`.
        stop: fraction of the budget after which the masks are fixed (paper: 0.75).
        drop_fraction: fraction of active weights dropped at first (paper: 0.3).
        scope: spread over the layers (paper: `erk` and `uniform`).
        batches: extra batches that the gradient is averaged over (paper: 1).
        from_start: the first update comes before step 0 (published code), not after `every` steps.
    """

    paper: ClassVar[str] = "arXiv:1911.11134"
    batches: int = option(1, "[1, 1000]")
    from_start: bool = False

    def cadence(self, budget: Budget) -> Cadence:
        """Every `every` steps, from step 0 on if asked."""
        found = super().cadence(budget)
        return dataclasses.replace(found, start=0) if self.from_start else found

    def fraction(self, run: Run) -> float:
        """Cosine annealing."""
        end = round(self.stop * run.budget.steps)
        return cosine_fraction(run.step, end, self.drop_fraction)

    def grow_scores(self, run: Run) -> Scores:
        """Magnitude of the dense gradient."""
        return {name: g.abs() for name, g in run.gradients(self.batches).items()}
