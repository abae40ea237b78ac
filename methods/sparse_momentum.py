"""Sparse momentum: growth, within layers and across them, where the momentum is largest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from methods.allocation import Scope, apportion
from methods.api import Budget, Cadence, Phase, Run, Scores, option
from methods.drop_grow import drop_and_grow, smallest
from methods.masking import MaskedMethod, NoOrderError, random_scores, write_masks
from methods.schedules import cosine_fraction, spaced


def momenta(run: Run) -> Scores:
    """|M| of every weight, masked or not; of Adam, the mean over the root of the square's mean.

    Optimizers that only some recipes borrow are read likewise: their mean of gradients, over that
    root where they have it.
    """
    found: Scores = {}
    for name, weight in run.state.weights.items():
        memory = run.state.optimizer.state.get(weight, {})
        if "exp_avg" in memory:
            found[name] = memory["exp_avg"]
            if "exp_avg_sq" in memory:
                found[name] = found[name] / (memory["exp_avg_sq"].sqrt() + 1e-8)
        elif memory.get("momentum_buffer") is not None:
            found[name] = memory["momentum_buffer"]
    if len(found) < len(run.state.weights):
        found = run.gradients()
    return {name: momentum.abs() for name, momentum in found.items()}


@dataclass(frozen=True)
class SparseMomentum(MaskedMethod):
    """Sparse Networks from Scratch (Dettmers & Zettlemoyer, 2019, arXiv:1907.04840).

    After each epoch but the last, drops the smallest weights of each layer; all that were dropped
    are shared among the layers by the mean |momentum| of their active weights, and grow where the
    momentum is largest. A layer that is nearly dense drops at most its sparsity, p_l = min(p, s_l),
    and what a layer has no room for is spread evenly over the others. The optimizer's momentum of
    pruned weights is never cleared: it is what they are chosen by.

    Differs from the paper: an epoch longer than a twentieth of the budget is cut.
    Counts are integers by largest remainder; the published code rounds, and corrects the drift in
    later updates. The rate falls to 0 (published code: 0.005). M is the optimizer's own buffer; a
    recipe without momentum has M = the gradient of one extra batch, which is metered. `none` gives
    each layer back what it lost.

    Attributes:
        scope: spread of the random masks at the start (paper: `uniform`).
        prune_rate: fraction p of active weights dropped at first (published code: 0.5).
        decay: how p falls to 0 over the run (paper: `cosine` and `linear`).
        growth: where weights grow within a layer; `random` is an ablation.
        redistribution: how they are shared among layers; `none` is an ablation, and `size` what the
            published code does there: shares proportional to the layers' dense sizes.
        guard: whose p_l is capped: every layer's (paper), or only that of one below sparsity 0.2
            with more than an equal share (published code).
    """

    paper: ClassVar[str] = "arXiv:1907.04840"
    scope: Scope = "uniform"
    prune_rate: float = option(0.5, "[0, 1]")
    decay: Literal["cosine", "linear"] = "cosine"
    growth: Literal["momentum", "random"] = "momentum"
    redistribution: Literal["momentum", "none", "size"] = "momentum"
    guard: Literal["always", "published"] = "always"

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """One phase that begins with random masks."""
        every = spaced(budget.steps_per_epoch, budget.steps)
        return (Phase("train", budget.steps, density=density, updates=Cadence(every, every)),)

    def start_phase(self, run: Run) -> None:
        """Draws the masks."""
        assert run.phase.density is not None
        write_masks(run.state, random_scores(run), run.phase.density, self.scope)

    def gradient_masks(self, run: Run) -> None:
        """None: the momentum of pruned weights is what grows them."""

    def rate(self, run: Run) -> float:
        """The prune rate p of this update."""
        if self.decay == "linear":
            return self.prune_rate * (1 - run.step / run.budget.steps)
        return cosine_fraction(run.step, run.budget.steps, self.prune_rate)

    def update(self, run: Run) -> None:
        """Drops in each layer, shares among layers, grows."""
        state, momentum = run.state, momenta(run)
        actives = {name: int(mask.count_nonzero()) for name, mask in state.masks.items()}
        removed, room, parts = {}, {}, {}
        for name, mask in state.masks.items():
            mean = float((momentum[name] * mask).sum()) / max(1, actives[name])
            parts[name] = float(mask.numel()) if self.redistribution == "size" else mean
        whole = sum(parts.values())
        if not math.isfinite(whole):
            raise NoOrderError("a momentum is not finite, so the layers have no shares")
        for name, active in actives.items():
            size, rate = state.masks[name].numel(), self.rate(run)
            important = 5 * (size - active) < size and len(parts) * parts[name] > whole
            if important or self.guard == "always":
                rate = min(rate, 1 - active / size)
            removed[name] = math.ceil(rate * active - 1e-9)
            room[name] = size - active + removed[name]
        total = sum(removed.values())
        shares: dict[str, float] = {**removed}
        if self.redistribution != "none" and whole > 0:
            shares = {name: total * part / whole for name, part in parts.items()}
        scores = momentum if self.growth == "momentum" else random_scores(run)
        for name, count in apportion(shares, total, room).items():
            dropped = smallest(state.weights[name], state.masks[name], removed[name])
            drop_and_grow(state, name, dropped, scores[name], count, clear=False)
