"""L0 regularisation: gates that can be exactly zero, and a price on those expected to be open."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from methods.api import OptimizerSettings, Run, Scores, Shape, TrainState, option
from methods.parametrizations import attach
from methods.penalised import PenaltyMethod, decay_others
from methods.schedules import spaced

GAMMA, ZETA = -0.1, 1.1
"""Ends of the stretched distribution."""

SPREAD = 0.01
"""Standard deviation of the first log_alpha."""


def drawn_gate(log_alpha: Tensor, u: Tensor, temperature: float) -> Tensor:
    """A hard-concrete gate in [0, 1], same shape, from a uniform draw (Eqs. 10 and 11)."""
    sharp = torch.sigmoid((torch.logit(u, eps=1e-6) + log_alpha) / temperature)
    return (sharp * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def final_gate(log_alpha: Tensor) -> Tensor:
    """The gate of the finished network (Eq. 13): the temperature plays no part."""
    return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def chance_open(log_alpha: Tensor, temperature: float) -> Tensor:
    """Probability that a drawn gate is not zero (Eq. 12)."""
    return torch.sigmoid(log_alpha - temperature * math.log(-GAMMA / ZETA))


class HardConcrete(nn.Module):
    """A weight times its gates, which are drawn anew in every training pass."""

    def __init__(self, log_alpha: Tensor, temperature: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(log_alpha)
        self.temperature = temperature

    def forward(self, weight: Tensor) -> Tensor:
        """Gated weight, same shape."""
        if not self.training:
            return weight * final_gate(self.log_alpha)
        return weight * drawn_gate(
            self.log_alpha, torch.rand_like(self.log_alpha), self.temperature
        )


@dataclass(frozen=True)
class L0(PenaltyMethod):
    """L0 regularisation (Louizos et al., 2018, arXiv:1712.01312), Sections 2.2 to 2.4.

    Weights are multiplied by gates z = clip(s (zeta - gamma) + gamma, 0, 1) with s from a binary
    concrete distribution. A group of weights costs its chance of being open times
    (lam / N * its size + weight decay / 2 * its squared norm), with N training images; the
    optimizer's weight decay stays for what has no gate. The finished network has the gates of
    Eq. 13 multiplied in, and a moving average of all parameters, log_alpha too.

    Differs from the paper: one coefficient and one initial dropout rate for all layers, where the
    paper's LeNets begin at 0.2 in a fully connected input layer and WRN at 0.3. Every prunable
    layer is gated; in WRN the paper gates the first convolution of each block. Biases
    have no gate. One draw serves a whole batch. The moving average is shorter in short budgets,
    its first term are the initial weights, and statistics of BatchNorm are not in it; looks at the
    validation loss during training see the present weights. `weight` gates appear in the paper's
    derivation, not in its experiments. Optimizer and learning rate are the recipe's; under SGD,
    gates of single weights hardly move unless `lam` is far above the paper's.

    Attributes:
        gates: one for each input unit of a linear layer and each filter of a convolution (paper:
            `group`), or one for each `weight`.
        lam: price of an open weight, times 1/N (paper: 0.1 on LeNet-300-100, 0.001 on WRN).
        droprate_init: a gate's dropout rate at first (paper: 0.5, and see above).
        temperature: of the concrete distribution (paper: 2/3).
        average: steps that the moving average spans, at most a twentieth of the budget; 1 turns it
            off (published code: 1000, a decay of 0.999; 100 for WRN).
    """

    paper: ClassVar[str] = "arXiv:1712.01312"
    gates: Literal["group", "weight"] = "group"
    lam: float = option(0.1, "[0, inf)")
    droprate_init: float = option(0.5, "(0, 1)")
    temperature: float = option(2 / 3, "(0, 1]")
    average: int = option(1000, "[1, inf)")

    def prepare(
        self, model: nn.Module, masks: Mapping[str, Tensor], input_shape: Shape
    ) -> dict[str, nn.Parameter]:
        """Puts gates before the weights."""
        weights = {}
        for name, mask in masks.items():
            log_alpha = torch.zeros_like(mask)
            if self.gates == "group":
                linear = mask.ndim == 2
                log_alpha = log_alpha.sum(0 if linear else tuple(range(1, mask.ndim)), keepdim=True)
            weights[name] = attach(model, name, HardConcrete(log_alpha, self.temperature))
        return weights

    def optimizer(
        self,
        weights: Mapping[str, nn.Parameter],
        others: Mapping[str, nn.Parameter],
        lr: Tensor,
        settings: OptimizerSettings,
    ) -> Optimizer:
        """Leaves the decay of gated weights to the penalty."""
        return decay_others(weights, others, "log_alpha", lr, settings)

    def start_phase(self, run: Run) -> None:
        """Draws log_alpha; makes the coefficients and the moving average."""
        state = run.state
        for _, gate in gates_of(state):
            noise = torch.randn(gate.log_alpha.shape, generator=run.generator)
            start = math.log(1 / self.droprate_init - 1) + SPREAD * noise
            gate.log_alpha.copy_(start)
        numbers = {
            "price": self.lam / run.budget.examples,
            "decay": state.optimizer.param_groups[-1]["weight_decay"],
            "rate": 1 / spaced(self.average, run.budget.steps),
            "filled": 0.0,
        }
        state.slots["number"] = {key: state.lr.new_tensor(x) for key, x in numbers.items()}
        parameters = state.model.named_parameters()
        state.slots["average"] = {name: p.detach().clone() for name, p in parameters}

    def penalty(self, state: TrainState) -> Tensor:
        """Expected L0 and L2 norms."""
        terms, number = [], state.slots["number"]
        for name, gate in gates_of(state):
            cost = number["price"] + number["decay"] / 2 * state.weights[name].square()
            terms.append((chance_open(gate.log_alpha, self.temperature) * cost).sum())
        return torch.stack(terms).sum()

    def project(self, state: TrainState) -> None:
        """Keeps log_alpha where gradients reach it; moves the average on."""
        for _, gate in gates_of(state):
            gate.log_alpha.clamp_(math.log(1e-2), math.log(1e2))
        rate, filled = state.slots["number"]["rate"], state.slots["number"]["filled"]
        filled.lerp_(torch.ones_like(filled), rate)
        for name, parameter in state.model.named_parameters():
            state.slots["average"][name].lerp_(parameter, rate / filled)

    def open_probability(self, state: TrainState) -> Scores:
        """Of the averaged gates."""
        average = state.slots["average"]
        known = {id(p): average[name] for name, p in state.model.named_parameters()}
        return {
            name: chance_open(known[id(gate.log_alpha)], self.temperature).expand_as(
                state.masks[name]
            )
            for name, gate in gates_of(state)
        }

    def importance(self, run: Run) -> Scores:
        """Magnitude behind the gate."""
        weights = run.state.weights
        return {
            name: final_gate(gate.log_alpha) * weights[name].abs()
            for name, gate in gates_of(run.state)
        }

    def finish(self, run: Run) -> None:
        """Takes the average, and multiplies the gates in."""
        for name, parameter in run.state.model.named_parameters():
            parameter.copy_(run.state.slots["average"][name])
        super().finish(run)


def gates_of(state: TrainState) -> Iterator[tuple[str, HardConcrete]]:
    """The gates of each prunable weight."""
    for name in state.weights:
        path, _, tensor = name.rpartition(".")
        module = state.model.get_submodule(path)
        gate = module.parametrizations[tensor][0]  # type: ignore[index]
        assert isinstance(gate, HardConcrete)
        yield name, gate
