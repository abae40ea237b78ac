"""Alternating compressed and decompressed training."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from methods.api import Budget, Phase, Run, option
from methods.masking import MaskedMethod, reset_optimizer


@dataclass(frozen=True)
class ACDC(MaskedMethod):
    """AC/DC (Peste et al., 2021, arXiv:2106.12379), Algorithm 1.

    After a dense warm-up, compressed and decompressed phases alternate. A compressed phase begins
    by keeping the largest magnitudes, and trains them alone; in a decompressed one all weights
    train, the pruned ones from zero on. The last phase is compressed. The defaults are the
    published schedule for CIFAR: of 200 epochs, compression at 10, 50, 90, 130 and 170, and
    decompression at 30, 70, 110 and 150.

    Momentum: as in all published runs, the optimizer's whole memory is zeroed at each
    decompression; at a compression, that of the pruned weights.

    Differs from the paper: the phases are fractions of the budget, in steps; a phase without a step
    in a short budget is left out. Counts are exact (the published code keeps one weight fewer).

    Attributes:
        scope: ranks all layers together (paper), or each by its own count (paper: `uniform`).
        warmup: fraction of the budget before the first compression (paper: 10 of 200 epochs).
        final: fraction of the budget in the last compressed phase (paper: 30 of 200 epochs).
        cycles: compressed and decompressed phases between them, equally long (paper: 4 of each).
    """

    paper: ClassVar[str] = "arXiv:2106.12379"
    warmup: float = option(0.05, "[0, 0.5]")
    final: float = option(0.15, "(0, 0.5]")
    cycles: int = option(4, "[1, 1000]")

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """Warm-up, the cycles, and the last compressed phase."""
        parts = 2 * self.cycles
        length = (1 - self.warmup - self.final) / parts
        switches = [round(budget.steps * (self.warmup + length * i)) for i in range(parts + 1)]
        phases = []
        for i, (begin, end) in enumerate(pairwise([0, *switches, budget.steps])):
            name = f"compressed-{i // 2 + 1}" if i % 2 else f"decompressed-{i // 2}"
            window = (begin / budget.steps, end / budget.steps)
            target = density if i % 2 else 1.0
            if end > begin or i == parts + 1:
                phases.append(Phase(name, end - begin, window, density=target))
        return tuple(phases)

    def start_phase(self, run: Run) -> None:
        """Compresses, or decompresses: a density of 1 keeps every weight, pruned before or not."""
        pruned = any(not mask.all() for mask in run.state.masks.values())
        super().start_phase(run)
        if pruned and run.phase.density == 1:
            reset_optimizer(run.state)
