"""Random pruning at initialisation: the control of every method that chooses."""

from __future__ import annotations

from dataclasses import dataclass

from methods.allocation import Scope
from methods.api import Run, Scores
from methods.masking import PruneAtInit, random_scores

OWN_STREAM = 3 * 2**30
"""Added to the seed, of which torch reads 32 bits: what begins with random masks has others."""


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
        run.generator.manual_seed(run.generator.initial_seed() + OWN_STREAM)
        return random_scores(run)
