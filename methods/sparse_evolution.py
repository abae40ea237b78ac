"""Sparse evolutionary training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from methods.api import Run
from methods.drop_grow import DropGrow, smallest
from methods.schedules import portion


@dataclass(frozen=True)
class SET(DropGrow):
    """Sparse evolutionary training (Mocanu et al., 2018, arXiv:1707.04780), Algorithm 1.

    Every `every` steps, drops a fixed fraction of each layer's weights and grows as many at random.

    Differs from the paper: by default the variant that Evci et al. (2020) compare with: the
    smallest magnitudes are dropped whatever their sign, every 100 steps, until `stop`, on `erk`
    masks. `per_sign = true` is the paper's rule. The paper's `er` masks have a fixed epsilon and a
    dense output layer; here epsilon follows from the cell's sparsity. Grown weights start at zero
    (the paper's code: small random values).

    Attributes:
        per_sign: drop the fraction of the positive weights closest to zero and, apart from them, of
            the negative ones.
        every: steps between updates (paper: one epoch).
        drop_fraction: fraction dropped (paper: zeta = 0.3).
    """

    paper: ClassVar[str] = "arXiv:1707.04780"
    per_sign: bool = False

    def dropped(self, run: Run, name: str) -> Tensor:
        """The smallest weights, of each sign apart if asked."""
        if not self.per_sign:
            return super().dropped(run, name)
        weight = run.state.weights[name]
        positive, negative = weight > 0, weight < 0
        fraction = self.fraction(run)
        return smallest(weight, positive, portion(fraction, int(positive.sum()))) | smallest(
            weight, negative, portion(fraction, int(negative.sum()))
        )
