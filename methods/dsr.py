"""Dynamic sparse reparameterization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.allocation import Scope, apportion
from methods.api import Run, option
from methods.drop_grow import DropGrow, drop_and_grow
from methods.masking import random_scores, topk_mask

DOUBLINGS = (0.125, 0.4, 0.7)
"""Fractions of the budget at which the period doubles: epochs 25, 80 and 140 of 200."""


def regrowth(left: Mapping[str, int], total: int, room: Mapping[str, int]) -> dict[str, int]:
    """Weights that each layer grows, in proportion to those it has left.

    What full layers cannot take goes round again among the others.

    Args:
        left: active weights after dropping.
        total: weights to grow; at most the sum of `room`.
        room: the most that each layer can grow.
    """
    grown = dict.fromkeys(left, 0)
    while missing := total - sum(grown.values()):
        waiting = {name: left[name] for name in left if grown[name] < room[name]}
        if not any(waiting.values()):
            waiting = dict.fromkeys(waiting, 1)
        shares = {name: missing * n / sum(waiting.values()) for name, n in waiting.items()}
        for name, count in apportion(shares, missing, dict.fromkeys(waiting, missing)).items():
            grown[name] = min(grown[name] + count, room[name])
    return grown


@dataclass(frozen=True)
class DSR(DropGrow):
    """Dynamic sparse reparameterization (Mostafa & Wang, 2019, arXiv:1902.05967), Algorithm 1.

    Drops every weight of magnitude below one threshold H, and grows as many at random, in each
    layer in proportion to the weights that it has left; never those just dropped. H is halved
    where more than 1.1 N_p weights lay below it, and doubled where fewer than 0.9 N_p did.

    Differs from the paper: N_p is a fraction of the active weights, so that it can be met at every
    sparsity. H grows no further than the largest weight. No more weights are dropped than there
    are places free, the smallest first. A layer below H keeps its largest weight (published code:
    its first). Rounding is by largest remainder, not by chance; a new weight has no momentum.

    Attributes:
        scope: spread of the random masks at the start (published code: `uniform`).
        every: steps between updates at first (published code: 100); at most a twentieth of `stop`.
            Doubled at 1/8, 2/5 and 7/10 of the budget if that leaves 20 updates.
        stop: fraction of the budget after which the masks are fixed (published code: 0.95).
        drop_fraction: N_p as a fraction of the active weights (published code: 20,000
            weights, which is 0.07 for WRN-28-2 at sparsity 0.8).
        dropped_weights: N_p as a number (published code: 20,000; for MNIST 600), instead of the
            fraction.
        threshold: H at first (published code: 0.001).
        tolerance: relative distance from N_p at which H changes (published code: 0.1).
    """

    paper: ClassVar[str] = "arXiv:1902.05967"
    scope: Scope = "uniform"
    stop: float = option(0.95, "[0, 1]")
    drop_fraction: float = option(0.07, "(0, 1]")
    dropped_weights: int | None = option(None, "[1, inf)")
    threshold: float = option(1e-3, "(0, inf)")
    tolerance: float = option(0.1, "[0, 1)")

    def start_phase(self, run: Run) -> None:
        """Draws the masks."""
        super().start_phase(run)
        threshold = torch.full_like(run.state.lr, self.threshold)
        run.state.slots["dsr"] = {"threshold": threshold}

    def skipped(self, run: Run) -> bool:
        """Whether the period, doubled so often by now, leaves this update out."""
        updates = run.phase.updates
        assert updates is not None
        doublings = sum(run.step >= fraction * run.budget.steps for fraction in DOUBLINGS)
        # With all doublings, 0.37 of the updates are left.
        enough = updates.count(run.phase.steps) >= 60
        return enough and (run.step // updates.every) % 2**doublings != 0

    def update(self, run: Run) -> None:
        """Drops below H, grows, and adapts H."""
        if self.skipped(run):
            return
        state, threshold = run.state, run.state.slots["dsr"]["threshold"]
        magnitudes = {
            name: state.weights[name].abs().masked_fill(mask == 0, -1)
            for name, mask in state.masks.items()
        }
        exempt = {name: (m < 0) | (topk_mask(m, 1) != 0) for name, m in magnitudes.items()}
        candidates = torch.cat(
            [m.masked_fill(exempt[name], torch.inf).reshape(-1) for name, m in magnitudes.items()]
        )
        room = {name: int((m < 0).sum()) for name, m in magnitudes.items()}
        below = int((candidates < threshold).sum())
        count = min(below, sum(room.values()))
        fallen = topk_mask(-candidates, count)
        parts = torch.split(fallen, [m.numel() for m in magnitudes.values()])
        dropped = {
            name: part.view(magnitudes[name].shape) != 0
            for name, part in zip(magnitudes, parts, strict=True)
        }
        left = {name: int(((m >= 0) & ~dropped[name]).sum()) for name, m in magnitudes.items()}
        grown, scores = regrowth(left, count, room), random_scores(run)
        for name, where in dropped.items():
            grow = scores[name].masked_fill(where, -torch.inf)
            drop_and_grow(state, name, where, grow, grown[name])
        target = self.dropped_weights or self.drop_fraction * (sum(left.values()) + count)
        if below > (1 + self.tolerance) * target:
            threshold.div_(2)
        elif below < (1 - self.tolerance) * target:
            largest = max(float(magnitude.max()) for magnitude in magnitudes.values())
            threshold.mul_(2).clamp_(max=largest)
