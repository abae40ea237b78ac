"""Random pruning at initialisation: the control of every method that chooses."""

from __future__ import annotations

from dataclasses import dataclass

from methods.allocation import Scope
from methods.api import Run, Scores
from methods.masking import PruneAtInit, random_scores


@dataclass(frozen=True)
class RandomPruning(PruneAtInit):
    """Random masks, fixed before the first step, on the same initial weights as the other methods.

    Attributes:
        scope: `uniform` gives every layer the same density; `er` (Mocanu et al., 2018) and `erk`
            (Evci et al., 2020) give small layers more; `global` draws over all layers together.
    """

    scope: Scope = "uniform"

    def scores(self, run: Run) -> Scores:
        """Uniform noise."""
        return random_scores(run)
