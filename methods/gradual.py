"""Gradual magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.api import Budget, Cadence, Phase, Run, option
from methods.finetuning import FineTuned
from methods.masking import MaskedMethod
from methods.schedules import cubic_density, ramp


@dataclass(frozen=True)
class GradualMagnitude(FineTuned, MaskedMethod):
    """To prune, or not to prune (Zhu & Gupta, 2017, arXiv:1710.01878), Eq. 1.

    Every `every` steps, prunes the smallest magnitudes to the cubic schedule's sparsity, which
    reaches the target at the second learning-rate decay (Lin et al., 2020, call this incremental
    pruning).

    Differs from the paper: a pruned weight is zero and stays so (the published code freezes it and
    lets it return); layers are ranked together as in Lin et al. (`scope = "uniform"` gives every
    layer the same sparsity, as in the paper; as its counts are rounded, a layer may then get back
    a single weight from one prune to the next).

    Attributes:
        every: steps between prunes (paper: 100 to 1000); at most a twentieth of the ramp.
        begin: fraction of the budget at which the ramp begins (Lin et al.: 0).
        end: fraction of the budget at which it ends; None: the recipe's second decay, else 0.75.
    """

    paper: ClassVar[str] = "arXiv:1710.01878"
    every: int = option(100, "[1, inf)")
    begin: float = option(0.0, "[0, 1)")
    end: float | None = option(None, "(0, 1]")

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """One phase, and fine-tuning if asked; the last prune lands on the target exactly.

        Raises:
            ValueError: the ramp would end before it begins, or with no step left to train.
        """
        begin = round(self.begin * budget.steps)
        end = budget.second_drop() if self.end is None else round(self.end * budget.steps)
        end = min(end, budget.steps - 1)
        if end <= begin and budget.steps > 1:
            raise ValueError(f"the ramp ends at step {end}, but begins at step {begin}")
        train = Phase("train", budget.steps, updates=ramp(begin, max(begin, end), self.every))
        return (train, self.finetuning(budget)) if self.finetune else (train,)

    def update(self, run: Run) -> None:
        """Prunes to the schedule."""
        cadence, target = run.phase.updates, run.density
        assert isinstance(cadence, Cadence)
        assert cadence.stop is not None
        assert target is not None
        self.prune(run, cubic_density(run.step, cadence.start, cadence.stop - 1, target))
