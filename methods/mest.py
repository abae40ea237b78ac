"""Memory-economic sparse training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.allocation import Scope
from methods.api import Budget, Cadence, Phase, Run, Scores, option
from methods.drop_grow import DropGrow, drop_and_grow, smallest
from methods.masking import magnitudes
from methods.schedules import portion, spaced


@dataclass(frozen=True)
class MEST(DropGrow):
    """MEST with elastic mutation (Yuan et al., 2021, arXiv:2110.14032), EM and EM&S.

    Every `every` steps, drops the weights of each layer with the smallest |w| + lambda |g| and
    grows as many at random. Only gradients of active weights count, so no dense gradient is ever
    needed. The mutated fraction falls to a half and then to nothing. With the soft memory bound
    (EM&S) a layer first grows beyond its share, trains so, and loses the surplus at the next
    update; the last update leaves the target.

    Differs from the paper: the gradient is that of extra batches, which are metered. A weight that
    is dropped and drawn again at once keeps its value (published code: zero). The paper's lambda
    was not to be found in its code, whose scripts run with 0. There is no mutation at step 0, and
    examples are not left out of training.

    Attributes:
        scope: spread over the layers (published scripts: `uniform`).
        every: steps between updates (published scripts: 5 epochs of 782); at most a twentieth of
            `stop`.
        stop: fraction of the budget after which the masks are fixed (published scripts: epoch 120
            of 160). The fraction halves at three quarters of it (epoch 90).
        drop_fraction: mutated fraction of a layer's target at first (published scripts: 0.2; with
            the soft bound 0.2 to 1).
        gradient_weight: lambda, per unit of |w| / |g|; 0 ranks by magnitude, without extra batches.
        soft_bound: EM&S.
        batches: extra batches that the gradient is averaged over.
    """

    paper: ClassVar[str] = "arXiv:2110.14032"
    scope: Scope = "uniform"
    every: int = option(3910, "[1, inf)")
    drop_fraction: float = option(0.2, "[0, 1)")
    gradient_weight: float = option(1.0, "[0, inf)")
    soft_bound: bool = False
    batches: int = option(1, "[1, 1000]")

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """One phase that begins with random masks; the last update mutates nothing."""
        end = min(round(self.stop * budget.steps), budget.steps - 1)
        every = spaced(self.every, end)
        updates = Cadence(every, every, end // every * every + 1)
        return (Phase("train", budget.steps, density=density, updates=updates),)

    def start_phase(self, run: Run) -> None:
        """Draws the masks, and notes how many weights each layer is to have."""
        super().start_phase(run)
        counts = torch.stack([mask.count_nonzero() for mask in run.state.masks.values()])
        run.state.slots["mest"] = {"counts": counts}

    def fraction(self, run: Run) -> float:
        """Fraction to mutate in this update."""
        assert run.phase.updates is not None
        assert run.phase.updates.stop is not None
        last = run.phase.updates.stop - 1
        if run.step >= last:
            return 0.0
        return self.drop_fraction if run.step < 0.75 * last else self.drop_fraction / 2

    def scores(self, run: Run) -> Scores:
        """|w| + lambda |g|."""
        scores = magnitudes(run.state)
        if self.gradient_weight:
            for name, gradient in run.gradients(self.batches).items():
                scores[name] += self.gradient_weight * gradient.abs()
        return scores

    def update(self, run: Run) -> None:
        """Mutates each layer."""
        state, fraction = run.state, self.fraction(run)
        if fraction == 0 and not self.soft_bound:
            return
        scores, grow = self.scores(run), self.grow_scores(run)
        targets = state.slots["mest"]["counts"].tolist()
        for (name, mask), target in zip(state.masks.items(), targets, strict=True):
            grown = portion(fraction, target)
            kept = target if self.soft_bound else target - grown
            dropped = smallest(scores[name], mask, int(mask.count_nonzero()) - kept)
            drop_and_grow(state, name, dropped, grow[name], grown)  # or as many as have room
