"""Dynamic sparse training: drop the smallest weights, grow as many others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.allocation import Scope
from methods.api import Budget, Cadence, Phase, Run, Scores, TrainState, option
from methods.masking import (
    GROWN,
    MaskedMethod,
    clear_buffers,
    inside,
    random_scores,
    write_masks,
)
from methods.ranking import ones, write_top
from methods.schedules import spaced


def drop_and_grow(
    state: TrainState,
    name: str,
    dropped: Tensor,
    grow_scores: Tensor,
    count: int | Tensor | None = None,
    *,
    clear: bool = True,
) -> None:
    """Rewires one layer.

    A grown weight starts at zero (see `GROWN`) without momentum. A weight that is dropped and
    chosen again in the same update was never gone: it keeps its value and its momentum.

    Args:
        state: the layer's weight, mask and optimizer memory are written in place.
        name: the layer's weight.
        dropped: 1, or true, at active weights that are dropped; the weight's shape.
        grow_scores: the highest are grown, among all weights that are not kept.
        count: weights that are grown; None: as many as are dropped.
        clear: clears the optimizer's memory of all but the weights that stay.
    """
    weight, mask = state.weights[name], state.masks[name]
    kept = mask - dropped.to(mask.dtype)
    grown, count = torch.empty_like(mask), ones(dropped) if count is None else count
    write_top([grown], [inside(grow_scores, 1 - kept)], count)
    new, stays = (1 - mask) * grown, torch.maximum(kept, grown)
    if clear:
        clear_buffers(state, {name: mask * stays})
    mask.copy_(stays)
    weight.mul_(mask).masked_fill_(new != 0, GROWN)


def smallest(weight: Tensor, mask: Tensor, count: int | Tensor) -> Tensor:
    """Mask of the `count` active weights of smallest magnitude.

    Args:
        weight: any shape.
        mask: 1 where a weight is active.
        count: at most as many as are active.
    """
    kept = torch.empty_like(mask)
    write_top([kept], [inside(weight.detach().abs(), mask)], ones(mask) - count)
    return mask - kept


def part_of(fraction: float, mask: Tensor) -> Tensor:
    """() what `portion` gives of the number of ones, without a wait for the device."""
    return (fraction * ones(mask).double() + 1e-9).floor()


@dataclass(frozen=True)
class DropGrow(MaskedMethod):
    """Base of methods that rewire a random sparse network while it trains.

    Attributes:
        scope: how the random masks at the start are spread over the layers; each layer then keeps
            its number of non-zeros.
        every: steps between updates; at most a twentieth of the time in which there are any.
        stop: fraction of the budget after which the masks are fixed.
        drop_fraction: fraction of a layer's active weights dropped in an update.
    """

    scope: Scope = "erk"
    every: int = option(100, "[1, inf)")
    stop: float = option(0.75, "[0, 1]")
    drop_fraction: float = option(0.3, "[0, 1)")

    def cadence(self, budget: Budget) -> Cadence:
        """When it rewires; the first update comes after `every` steps."""
        end = round(self.stop * budget.steps)
        every = spaced(self.every, end)
        return Cadence(every, every, end)

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """One phase that begins with random masks."""
        return (Phase("train", budget.steps, density=density, updates=self.cadence(budget)),)

    def start_phase(self, run: Run) -> None:
        """Draws the masks."""
        assert run.phase.density is not None
        write_masks(run.state, random_scores(run), run.phase.density, self.scope)

    def fraction(self, run: Run) -> float:
        """Fraction to drop in this update."""
        return self.drop_fraction

    def dropped(self, run: Run, name: str) -> Tensor:
        """Mask of the weights of one layer that this update drops."""
        mask = run.state.masks[name]
        return smallest(run.state.weights[name], mask, part_of(self.fraction(run), mask))

    def grow_scores(self, run: Run) -> Scores:
        """What decides where weights grow: the highest are grown. Default: chance."""
        return random_scores(run)

    def update(self, run: Run) -> None:
        """Rewires each layer."""
        for name, scores in self.grow_scores(run).items():
            drop_and_grow(run.state, name, self.dropped(run, name), scores)
