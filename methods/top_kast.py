"""Top-K always sparse training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from methods.allocation import Scope
from methods.api import Budget, Cadence, Phase, Run, Shape, SparsityMethod, TrainState, option
from methods.masking import clear_buffers, fill_zeros, magnitudes, write_masks
from methods.parametrizations import MaskSTE, attach, bake
from methods.schedules import spaced


@dataclass(frozen=True)
class TopKAST(SparsityMethod):
    """Top-KAST (Jayakumar et al., 2020, arXiv:2106.03517), Section 2.

    The forward pass uses the set A of each layer's largest weights; the gradient found there
    updates a larger set B, by the same ranking. An L2 penalty of weight 1 on A and 1 / D on the
    rest of B, with D the density of A, makes newcomers earn their place. Weights outside B keep
    their values, neither penalised nor updated. The masks of the run are A.

    Differs from the paper: the penalty is w^2 / 2, where the equation has |w|; its coefficient is
    the recipe's weight decay, which it replaces, and `l2` beside it. A weight that enters B starts
    without momentum. The finished network has the A that was trained last, not ranked again. As
    the penalty is in the gradient, AdamW and its like are refused.

    Attributes:
        scope: each layer by its own count (paper: `uniform`), or all together.
        every: steps between rankings (paper's equations: 1); at most a twentieth of the budget.
        backward: density of B in multiples of A's, at most dense (paper: D + M, M set with D).
        l2: coefficient of the penalty beside the recipe's weight decay, for recipes without one.
    """

    paper: ClassVar[str] = "arXiv:2106.03517"
    scope: Scope = "uniform"
    every: int = option(1, "[1, inf)")
    backward: float = option(2.0, "[1, inf)")
    l2: float = option(0.0, "[0, inf)")

    def plan(self, budget: Budget, density: float | None) -> tuple[Phase, ...]:
        """One phase, ranked anew every `every` steps.

        Raises:
            ValueError: the optimizer's decay is not in the gradient, where the penalty is.
        """
        budget.require_coupled_decay("the penalty")
        every = spaced(self.every, budget.steps)
        return (Phase("train", budget.steps, updates=Cadence(every, every)),)

    def prepare(
        self, model: nn.Module, masks: Mapping[str, Tensor], input_shape: Shape
    ) -> dict[str, nn.Parameter]:
        """Masks the weights in the forward pass; the gradient reaches all of them."""
        return {name: attach(model, name, MaskSTE(mask)) for name, mask in masks.items()}

    def start_phase(self, run: Run) -> None:
        """Makes B, the penalty beyond weight decay, and the values held outside B; ranks."""
        for slot in ("backward", "penalty", "held"):
            zeros = {name: torch.zeros_like(mask) for name, mask in run.state.masks.items()}
            run.state.slots[slot] = zeros
        self.update(run)

    def update(self, run: Run) -> None:
        """Ranks the weights."""
        state, density = run.state, run.density
        assert density is not None
        backward, penalty, held = (state.slots[s] for s in ("backward", "penalty", "held"))
        clear_buffers(state, backward)  # outside B the optimizer has gathered weight decay
        sizes = magnitudes(state)
        write_masks(state, sizes, density, self.scope)
        wide = dataclasses.replace(state, masks=backward)
        write_masks(wide, sizes, min(1.0, self.backward * density), self.scope)
        decay = state.optimizer.param_groups[0]["weight_decay"]
        outside = (decay + self.l2) / density - decay  # the optimizer adds the weight decay itself
        for name, mask in state.masks.items():
            # Rounded to counts, a layer's B could be smaller than its A.
            backward[name].copy_(torch.maximum(backward[name], mask))
            penalty[name].copy_(self.l2 * mask + outside * (backward[name] - mask))
            torch.mul(state.weights[name], 1 - backward[name], out=held[name])

    def gradient_masks(self, run: Run) -> Mapping[str, Tensor]:
        """B."""
        return run.state.slots["backward"]

    def edit_gradients(self, state: TrainState) -> None:
        """Leaves the gradient on B alone, and adds the penalty's."""
        for name, weight in state.weights.items():
            assert weight.grad is not None
            weight.grad.mul_(state.slots["backward"][name])
            weight.grad.addcmul_(weight, state.slots["penalty"][name])

    def project(self, state: TrainState) -> None:
        """Holds the weights outside B, whatever the optimizer does."""
        for name, weight in state.weights.items():
            weight.mul_(state.slots["backward"][name]).add_(state.slots["held"][name])

    def finish(self, run: Run) -> None:
        """Leaves A."""
        fill_zeros(run.state.weights, run.state.masks)
        bake(run.state.model)
