"""Soft deep rewiring: connections that come and go by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from methods.allocation import allocate
from methods.api import Run, Scores, Shape, TrainState, option
from methods.deepr import Langevin
from methods.masking import clear_buffers, random_scores, topk_mask
from methods.parametrizations import attach
from methods.penalised import PenaltyMethod


class SignedReLU(nn.Module):
    """w = sign * theta where theta > 0, else 0.

    Args:
        weight: gives the signs, which stay.
    """

    sign: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("sign", torch.ones_like(weight).copysign_(weight))

    def forward(self, theta: Tensor) -> Tensor:
        """The weight; theta gets no gradient while it is not above 0."""
        return self.sign * theta.relu()

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Theta of a weight with these signs."""
        return weight.abs()


@dataclass(frozen=True)
class SoftDeepR(Langevin, PenaltyMethod):
    """Soft deep rewiring (Bellec et al., 2018, arXiv:1711.05136), soft-DEEP R.

    As in `deepr`, but a dormant theta walks at random, by sqrt(2 eta T) nu and never below
    theta_min, until it comes above 0 and is active again: the number of connections is free.
    theta_min = -(1 - p) T / (p alpha), with which a fraction p of a layer would be active if there
    were no data (the published code's rule, with T at the recipe's base rate).

    Differs from the paper: as `deepr` does, in signs, optimizer and temperature. The noise is tied
    to L1, which keeps theta_min at the same number of steps whatever alpha is. The fractions p are
    spread by `scope`, as counts, where the published code draws with 0.5 %, 0.5 % and 10 % in the
    three layers of its network. `target`.

    Attributes:
        l1: alpha (published code: 1e-5); the coefficient to vary.
        noise_ratio: noise of `deepr` over alpha (published code: 1).
        active: p, and the fraction of all weights active at the start. The published code's 0.005
            is for 55,000 steps; a run of some hundred wants more.
        scope: its spread over the layers.
    """

    paper: ClassVar[str] = "arXiv:1711.05136"
    l1: float = option(1e-5, "(0, inf)")
    noise_ratio: float = option(1.0, "[0, inf)")
    active: float = option(0.005, "(0, 1]")
    scope: Literal["uniform", "er", "erk"] = "erk"

    def prepare(
        self, model: nn.Module, masks: Mapping[str, Tensor], input_shape: Shape
    ) -> dict[str, nn.Parameter]:
        """Parametrizes each weight by theta, all active."""
        return {
            name: attach(model, name, SignedReLU(model.get_parameter(name).detach()))
            for name in masks
        }

    def start_phase(self, run: Run) -> None:
        """Leaves some thetas as they are; the others lie dormant, uniform down to theta_min."""
        state, scores, walls = run.state, random_scores(run), {}
        # T / l1 with T = eta noise^2 / 2, at the recipe's base rate.
        warmth = state.optimizer.param_groups[0]["peak"] * self.l1 * self.noise_ratio**2 / 2
        shapes = {name: tuple(theta.shape) for name, theta in state.weights.items()}
        for name, count in allocate(shapes, self.active, self.scope).items():
            theta, chosen = state.weights[name], topk_mask(scores[name], count) != 0
            p = max(1, count) / theta.numel()
            walls[name] = torch.full_like(state.lr, -(1 - p) / p * warmth)
            depth = torch.rand(shapes[name], generator=run.generator).to(theta.device)
            theta.copy_(torch.where(chosen, theta, depth * walls[name]))
        state.slots["theta_min"] = walls

    def edit_gradients(self, state: TrainState) -> None:
        """Noise for all, L1 for active connections; dormant ones have no gradient."""
        for theta in state.weights.values():
            theta.add_(self.drift(state, theta, theta > 0, self.l1 * self.noise_ratio))

    def project(self, state: TrainState) -> None:
        """Holds theta at theta_min; Adam's memory of the dormant would move them."""
        for name, theta in state.weights.items():
            theta.clamp_(min=state.slots["theta_min"][name])
        clear_buffers(state, {name: theta > 0 for name, theta in state.weights.items()})

    def importance(self, run: Run) -> Scores:
        """Theta: active connections by magnitude, then the dormant ones nearest to 0."""
        return {name: theta.detach() for name, theta in run.state.weights.items()}
