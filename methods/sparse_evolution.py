"""Sparse evolutionary training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from methods.api import Budget, Cadence, Run
from methods.drop_grow import DropGrow, part_of, smallest


@dataclass(frozen=True)
class SET(DropGrow):
    """Sparse evolutionary training (Mocanu et al., 2018, arXiv:1707.04780), Algorithm 1.

    Every `every` steps, drops a fixed fraction of each layer's weights and grows as many at random.

    Differs from the paper: by default the variant that Evci et al. (2020) compare with: the
    smallest magnitudes are dropped whatever their sign, every 100 steps, until `stop`, on `erk`
    masks. The paper's rule is `per_sign = true, epochs = true, stop = 1, scope = "er"`. The paper's
    `er` masks have a fixed epsilon and a dense output layer; here epsilon follows from the cell's
    sparsity.

    Attributes:
        per_sign: drop the fraction of the positive weights closest to zero and, apart from them, of
            the negative ones.
        every: steps between updates; at most a twentieth of `stop`.
        epochs: once an epoch (paper), in place of `every`, however few there are.
        drop_fraction: fraction dropped (paper: zeta = 0.3).
        grown: new weights start at zero, or at 0.1 times a standard normal number (one of the
            published codes).
    """

    paper: ClassVar[str] = "arXiv:1707.04780"
    per_sign: bool = False
    epochs: bool = False
    grown: Literal["zero", "normal"] = "zero"

    def cadence(self, budget: Budget) -> Cadence:
        """Every `every` steps, or after each epoch."""
        if not self.epochs:
            return super().cadence(budget)
        every = budget.steps_per_epoch
        return Cadence(every, every, round(self.stop * budget.steps))

    def dropped(self, run: Run, name: str) -> Tensor:
        """The smallest weights, of each sign apart if asked."""
        if not self.per_sign:
            return super().dropped(run, name)
        weight = run.state.weights[name]
        signs = (weight > 0).to(weight.dtype), (weight < 0).to(weight.dtype)
        fraction = self.fraction(run)
        closest = [smallest(weight, sign, part_of(fraction, sign)) for sign in signs]
        return closest[0] + closest[1]

    def update(self, run: Run) -> None:
        """Rewires each layer, and draws the new weights if asked."""
        old = {name: mask.clone() for name, mask in run.state.masks.items()}
        super().update(run)
        if self.grown == "normal":
            for name, mask in run.state.masks.items():
                weight = run.state.weights[name]
                noise = 0.1 * torch.randn(mask.shape, generator=run.generator)
                weight.copy_(torch.where(mask > old[name], noise.to(weight.device), weight))
